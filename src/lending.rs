//! Which thread carries which loop.
//!
//! Every worker has a loop, and a thread that it may have to itself. As long as there is time for it the first thread
//! carries them all: a packet then finds a thread that is awake, instead of waking one of its own. A thread that hardly
//! rests any more lends a loop to the thread that it belongs to; one that has little to do gives its loop back.
//! Comes in: when a thread rests. Goes out: what is due, and the loops, from thread to thread. What a loop is, is
//! not known here.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

/// The first thread.
const FIRST: usize = 0;

/// How long the first thread must have been busy.
const LEND_AFTER: Duration = Duration::from_millis(50);
/// Part of that time, in thousandths, from which on it hardly rests.
const FULL: u64 = 950;
/// Of the turns that had something to do, one in so many must have had it in several loops: a thread of its own is of no
/// use to a loop that waits for nobody.
const TOGETHER: u32 = 4;
/// How long two threads must have been at rest together before one does for both.
const GIVE_BACK_AFTER: Duration = Duration::from_millis(100);
/// Part of that time, in thousandths, that both were busy for at most.
const LIGHT: u64 = 800;

/// What a thread is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// Lend one of its loops to the thread that it belongs to.
    Lend,
    /// Give its loop back to the first.
    GiveBack,
}

/// How long a thread has rested.
#[derive(Debug, Default)]
struct Rest {
    /// Nanoseconds of all rests that are over.
    total: AtomicU64,
    /// When it began to rest, nanoseconds after the epoch of all; 0 while it does not.
    since: AtomicU64,
}

impl Rest {
    fn begin(&self, now: u64) {
        self.since.store(now.max(1), Ordering::Relaxed);
    }

    fn end(&self, now: u64) {
        let since = self.since.swap(0, Ordering::Relaxed);
        if since > 0 {
            self.total
                .fetch_add(now.saturating_sub(since), Ordering::Relaxed);
        }
    }

    /// All of it until now, the present one included.
    fn until(&self, now: u64) -> u64 {
        let under_way = match self.since.load(Ordering::Relaxed) {
            0 => 0,
            since => now.saturating_sub(since),
        };
        self.total.load(Ordering::Relaxed) + under_way
    }
}

/// One thread's end.
#[derive(Debug)]
pub struct Lending<T> {
    index: usize,
    inbox: mpsc::Receiver<T>,
    /// To every thread, this one included, which keeps its inbox open.
    to: Vec<mpsc::Sender<T>>,
    rests: Arc<[Rest]>,
    epoch: Instant,
    /// When it was looked at how busy they are, and how long this thread and the first had rested by then.
    looked: (u64, [u64; 2]),
    /// Turns since then that had something to do, and those that had it in several loops.
    turns: [u32; 2],
}

impl<T> Lending<T> {
    /// The ends of so many threads.
    #[must_use]
    pub fn between(count: usize) -> Vec<Self> {
        let rests: Arc<[Rest]> = (0..count).map(|_| Rest::default()).collect();
        let (to, inboxes): (Vec<_>, Vec<_>) = (0..count).map(|_| mpsc::channel(count)).unzip();
        let epoch = Instant::now();
        let ends = inboxes.into_iter().enumerate();
        ends.map(|(index, inbox)| Self {
            index,
            inbox,
            to: to.clone(),
            rests: Arc::clone(&rests),
            epoch,
            looked: (0, [0; 2]),
            turns: [0; 2],
        })
        .collect()
    }

    fn nanos(&self, at: Instant) -> u64 {
        u64::try_from(at.duration_since(self.epoch).as_nanos()).unwrap_or(u64::MAX)
    }

    /// This thread has nothing to do from now on.
    pub fn begin_rest(&self, now: Instant) {
        self.rests[self.index].begin(self.nanos(now));
    }

    /// This thread has something to do again.
    pub fn end_rest(&self, now: Instant) {
        self.rests[self.index].end(self.nanos(now));
    }

    /// How busy the threads are is looked at from now on.
    pub fn look_from(&mut self, now: Instant) {
        let now = self.nanos(now);
        self.looked = (now, self.rested(now));
        self.turns = [0; 2];
    }

    /// This thread has taken a turn, and so many of its loops had something to do.
    pub const fn note_turn(&mut self, busy: usize) {
        let [some, several] = &mut self.turns;
        *some = some.saturating_add((busy > 0) as u32);
        *several = several.saturating_add((busy > 1) as u32);
    }

    /// How long a thread that has a loop may sleep at most, so that it gives it back; the first may for ever.
    #[must_use]
    pub const fn look_within(&self) -> Option<Duration> {
        if self.index == FIRST {
            None
        } else {
            Some(self.window())
        }
    }

    /// How long this thread looks before it judges.
    const fn window(&self) -> Duration {
        if self.index == FIRST {
            LEND_AFTER
        } else {
            GIVE_BACK_AFTER
        }
    }

    /// What this thread is to do; ask again and again.
    pub fn due(&mut self, now: Instant) -> Option<Due> {
        let (at, before) = self.looked;
        let now = self.nanos(now);
        let elapsed = now.saturating_sub(at);
        if u128::from(elapsed) < self.window().as_nanos() {
            return None;
        }
        let rested = self.rested(now);
        self.looked = (now, rested);
        let [some, several] = std::mem::take(&mut self.turns);
        let busy = |place: usize| {
            let rested = rested[place].saturating_sub(before[place]);
            elapsed.saturating_sub(rested).saturating_mul(1000) / elapsed
        };
        let [own, first] = [busy(0), busy(1)];
        if self.index == FIRST {
            let together = several > 0 && several >= some / TOGETHER;
            (own >= FULL && together).then_some(Due::Lend)
        } else {
            (own + first <= LIGHT).then_some(Due::GiveBack)
        }
    }

    fn rested(&self, now: u64) -> [u64; 2] {
        [self.index, FIRST].map(|index| self.rests[index].until(now))
    }

    /// Brings a loop, which belongs to the thread `home`, where it is due.
    ///
    /// # Errors
    /// Gives it back when there is no such thread, or it is gone.
    pub fn send(&self, due: Due, home: usize, lent: T) -> Result<(), T> {
        let to = match due {
            Due::Lend => home,
            Due::GiveBack => FIRST,
        };
        match self.to.get(to) {
            Some(sender) => sender.try_send(lent).map_err(|error| error.into_inner()),
            None => Err(lent),
        }
    }

    /// A loop that another thread has brought; how busy this one is, is looked at from then on.
    pub fn poll_lent(&mut self, cx: &mut Context<'_>) -> Poll<T> {
        match self.inbox.poll_recv(cx) {
            Poll::Ready(Some(lent)) => {
                self.look_from(Instant::now());
                Poll::Ready(lent)
            }
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLI: Duration = Duration::from_millis(1);

    /// Both threads of two, and a clock.
    fn two() -> (Lending<u8>, Lending<u8>, Instant) {
        let mut ends = Lending::between(2);
        let (other, first) = (ends.pop().unwrap(), ends.pop().unwrap());
        let epoch = first.epoch;
        (first, other, epoch)
    }

    #[test]
    fn first_lends_when_it_hardly_rests_and_not_before() {
        let (mut first, _other, start) = two();
        first.note_turn(2);
        assert_eq!(first.due(start + 49 * MILLI), None, "too early to tell");
        assert_eq!(first.due(start + 50 * MILLI), Some(Due::Lend));
        first.note_turn(2);
        first.begin_rest(start + 60 * MILLI);
        first.end_rest(start + 65 * MILLI);
        assert_eq!(first.due(start + 100 * MILLI), None, "a tenth was rest");
        for busy in [0, 1, 1, 1, 1, 1, 1, 1, 2] {
            first.note_turn(busy);
        }
        assert_eq!(first.due(start + 150 * MILLI), None, "one in eight");
        for busy in [0, 1, 1, 1, 2] {
            first.note_turn(busy);
        }
        assert_eq!(first.due(start + 200 * MILLI), Some(Due::Lend));
        assert_eq!(first.due(start + 250 * MILLI), None, "nothing to do");
    }

    #[test]
    fn other_gives_back_when_both_have_time() {
        let (first, mut other, start) = two();
        assert_eq!(other.due(start + 100 * MILLI), None, "both were busy");
        // The first rests, and has not come to the end of that.
        first.begin_rest(start + 110 * MILLI);
        other.begin_rest(start + 100 * MILLI);
        other.end_rest(start + 120 * MILLI);
        assert_eq!(other.due(start + 200 * MILLI), None, "80 + 10 of 100");
        other.begin_rest(start + 200 * MILLI);
        other.end_rest(start + 220 * MILLI);
        assert_eq!(other.due(start + 300 * MILLI), Some(Due::GiveBack));
    }

    #[test]
    fn loops_get_where_they_are_sent() {
        let (mut first, mut other, _) = two();
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(other.poll_lent(&mut cx).is_pending());
        assert_eq!(first.send(Due::Lend, 1, 7), Ok(()));
        assert_eq!(other.poll_lent(&mut cx), Poll::Ready(7));
        assert_eq!(other.send(Due::GiveBack, 1, 7), Ok(()));
        assert_eq!(first.poll_lent(&mut cx), Poll::Ready(7));
        assert_eq!(first.send(Due::Lend, 2, 7), Err(7), "there are two");
    }
}
