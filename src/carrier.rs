//! A thread that carries loops: the only place on the data path that awaits.
//!
//! Owns the loops that it carries, of those that serve one network, and the batches that they take their turns with, and
//! knows when to take the next turn: at once, after having looked for a while, or when something comes. Comes in: loops
//! that other threads lend ([`Lending`]), and what the loops are told. Goes out: loops that are another thread's to
//! carry, and why it ended.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

use crate::busy_poll::BusyPoll;
use crate::control::Command;
use crate::event_loop::{Batches, Ended, EventLoop, Failed, Next, Turned, Woken};
use crate::lending::{Due, Lending};
use crate::link::{Link, Look};
use crate::preemption::Preemption;

/// Busy turns in a row before signals and commands get a hearing.
const BUSY_TURNS: u32 = 16;
/// So do the host's sockets, and a link that was empty once: no later than this, however long a turn is.
const BUSY_TIME: Duration = Duration::from_millis(1);
/// How long to sleep when there is no deadline at all.
const NO_DEADLINE: Duration = Duration::from_secs(3600);
/// How long at most while nobody would wake a loop.
const UNTOLD: Duration = Duration::from_millis(1);
/// How long at most while the thread gives way: what comes once the bulk is over is not to wait for others.
const GIVING_WAY: Duration = Duration::from_millis(2);

/// A loop in which looking found nothing so many times is quiet.
const IN_VAIN: u32 = 32;
/// Who looks for more looks at a quiet loop that seldom: every so many times.
const SELDOM: u32 = 4;

/// A loop, and what came of its last turn.
struct Carried<L> {
    event_loop: Box<EventLoop<L>>,
    last: Turned,
    /// How often looking found nothing since it did.
    in_vain: u32,
}

impl<L: Link> Carried<L> {
    const fn new(event_loop: Box<EventLoop<L>>) -> Self {
        Self {
            event_loop,
            last: Turned::NOTHING,
            in_vain: IN_VAIN,
        }
    }

    fn turn(&mut self, batches: &mut Batches, look: Look) -> Result<Turned, Failed> {
        self.last = self.event_loop.turn(batches, look)?;
        if self.last.moved {
            self.in_vain = 0;
        }
        Ok(self.last)
    }

    const fn is_quiet(&self) -> bool {
        self.in_vain >= IN_VAIN
    }

    /// A turn to look for more.
    fn look(&mut self, batches: &mut Batches) -> Result<Turned, Failed> {
        self.in_vain = self.in_vain.saturating_add(1);
        self.turn(batches, Look::Anyway)
    }

    /// As if it had been looked at, in vain.
    const fn pass_over(&self) -> Turned {
        Turned {
            moved: false,
            ..self.last
        }
    }
}

/// Why the thread was woken.
enum Event<L> {
    /// The loop at that place is told something.
    Told(usize, Option<Command>),
    /// It has one loop more to carry.
    Lent(Box<EventLoop<L>>),
    /// There may be something to do.
    Ready,
}

/// A thread, and the loops that it carries.
pub struct Carrier<L> {
    loops: Vec<Carried<L>>,
    batches: Batches,
    lending: Lending<Box<EventLoop<L>>>,
    busy_poll: BusyPoll,
    preemption: Preemption,
}

impl<L: Link> Carrier<L> {
    /// Carries these for now. For no longer than `busy_poll` it looks for more before it sleeps; `preemption` is of the
    /// thread that it runs in.
    #[must_use]
    pub fn new(
        loops: Vec<EventLoop<L>>,
        lending: Lending<Box<EventLoop<L>>>,
        busy_poll: Duration,
        preemption: Preemption,
    ) -> Self {
        Self {
            loops: loops
                .into_iter()
                .map(|each| Carried::new(Box::new(each)))
                .collect(),
            batches: Batches::default(),
            lending,
            busy_poll: BusyPoll::new(busy_poll),
            preemption,
        }
    }

    /// Takes the first turn, so that the guest has heard of the network before anybody says that it
    /// works.
    ///
    /// # Errors
    /// When the poller fails.
    pub fn begin(&mut self) -> io::Result<()> {
        match self.turn() {
            // A link that is gone already `run` will find so.
            Ok(_) | Err(Failed::Link(_)) => Ok(()),
            Err(Failed::Poller(error)) => Err(error),
        }
    }

    /// Runs until told to stop or the link is gone.
    ///
    /// # Errors
    /// When the poller fails.
    pub async fn run(mut self) -> io::Result<Ended> {
        match self.carry().await {
            Ok(ended) => Ok(ended),
            Err(Failed::Link(error)) => {
                tracing::debug!(%error, "link gone");
                Ok(Ended::LinkGone)
            }
            Err(Failed::Poller(error)) => Err(error),
        }
    }

    async fn carry(&mut self) -> Result<Ended, Failed> {
        let began = Instant::now();
        self.lending.look_from(began);
        let sleep = tokio::time::sleep(NO_DEADLINE);
        tokio::pin!(sleep);
        let (mut busy, mut heard) = (0, began);
        loop {
            let turned = self.turn()?;
            self.preemption.set(turned.urgency);
            let rests = turned.next != Next::Again;
            if rests {
                self.lending.begin_rest(Instant::now());
            }
            let looks = !turned.bulk;
            let next = if looks {
                self.look(turned.next)?
            } else {
                turned.next
            };
            match next {
                Next::Again if busy < BUSY_TURNS && heard.elapsed() < BUSY_TIME => {
                    busy += 1;
                    if rests {
                        self.lending.end_rest(Instant::now());
                    }
                    continue;
                }
                // Signals and timers of others are served in between, then it goes on.
                Next::Again => {
                    tokio::task::yield_now().await;
                    sleep.as_mut().reset(began);
                }
                Next::Wait(at) => sleep.as_mut().reset(self.wake_at(at)),
            }
            busy = 0;
            let asleep = Instant::now();
            let event = std::future::poll_fn(|cx| self.poll_event(cx, sleep.as_mut())).await;
            let awake = Instant::now();
            heard = awake;
            self.lending.end_rest(awake);
            if looks && next != Next::Again {
                self.busy_poll.slept(awake - asleep);
            }
            if self.handle(event.map_err(Failed::Poller)?) {
                return Ok(Ended::Stopped);
            }
            self.balance(awake);
        }
    }

    /// Does what does not wait for a turn; true when that is to stop.
    fn handle(&mut self, event: Event<L>) -> bool {
        match event {
            Event::Told(place, command) => self.loops[place].event_loop.obey(command),
            Event::Lent(lent) => {
                tracing::debug!(worker = lent.index(), "loop came");
                self.loops.push(Carried::new(lent));
                false
            }
            Event::Ready => false,
        }
    }

    /// A turn of every loop, as `take` takes it.
    fn turn_each(
        &mut self,
        mut take: impl FnMut(&mut Carried<L>, &mut Batches) -> Result<Turned, Failed>,
    ) -> Result<Turned, Failed> {
        let (mut all, mut busy) = (Turned::NOTHING, 0);
        for each in &mut self.loops {
            let turned = take(each, &mut self.batches)?;
            busy += usize::from(turned.moved);
            all = all.and(turned);
        }
        self.lending.note_turn(busy);
        Ok(all)
    }

    /// One turn of every loop.
    fn turn(&mut self) -> Result<Turned, Failed> {
        self.turn_each(|each, batches| each.turn(batches, Look::WhenTold))
    }

    /// Looks for more for a while, if there is nothing to do; what comes is done at once.
    fn look(&mut self, mut next: Next) -> Result<Next, Failed> {
        let (since, mut time) = (Instant::now(), 0_u32);
        let mut now = since;
        while let Next::Wait(_) = next
            && now - since < self.busy_poll.window()
        {
            // Who waits for this processor may be the one that is waited for.
            std::thread::yield_now();
            let turned = self.look_once(time)?;
            time = time.wrapping_add(1);
            if turned.moved {
                // Looking was a rest, what was found is none.
                self.lending.end_rest(now);
                return Ok(Next::Again);
            }
            next = turned.next;
            now = Instant::now();
        }
        Ok(next)
    }

    /// Looks at every loop, but seldom at quiet ones beside others.
    fn look_once(&mut self, time: u32) -> Result<Turned, Failed> {
        let all = time.is_multiple_of(SELDOM) || self.loops.iter().all(Carried::is_quiet);
        self.turn_each(|each, batches| {
            if all || !each.is_quiet() {
                each.look(batches)
            } else {
                Ok(each.pass_over())
            }
        })
    }

    /// When to wake at the latest.
    fn wake_at(&mut self, at: Option<Instant>) -> Instant {
        let now = Instant::now();
        let mut settled = true;
        for each in &mut self.loops {
            settled &= each.event_loop.settle();
        }
        let rest = match self.lending.look_within() {
            _ if !settled => UNTOLD,
            Some(time) if !self.loops.is_empty() => time,
            Some(_) | None => NO_DEADLINE,
        };
        let rest = if self.preemption.gives_way() {
            rest.min(GIVING_WAY)
        } else {
            rest
        };
        let latest = now + rest;
        at.map_or(latest, |at| at.min(latest))
    }

    fn poll_event(
        &mut self,
        cx: &mut Context<'_>,
        sleep: Pin<&mut Sleep>,
    ) -> Poll<io::Result<Event<L>>> {
        // Before the others, which may be ready time after time: nobody else carries it.
        if let Poll::Ready(lent) = self.lending.poll_lent(cx) {
            return Poll::Ready(Ok(Event::Lent(lent)));
        }
        for (place, each) in self.loops.iter_mut().enumerate() {
            if let Poll::Ready(woken) = each.event_loop.poll_woken(cx) {
                return Poll::Ready(woken.map(|woken| match woken {
                    Woken::Told(command) => Event::Told(place, command),
                    Woken::Ready => Event::Ready,
                }));
            }
        }
        sleep.poll(cx).map(|()| Ok(Event::Ready))
    }

    /// Gives the last loop to who has more time for it.
    fn balance(&mut self, now: Instant) {
        let Some(due) = self.lending.due(now) else {
            return;
        };
        // What is told to a loop is told to the first one, which stays.
        if due == Due::Lend && self.loops.len() == 1 {
            return;
        }
        let Some(Carried { mut event_loop, .. }) = self.loops.pop() else {
            return;
        };
        let home = event_loop.index();
        tracing::debug!(worker = home, ?due, "loop goes to another thread");
        event_loop.leave();
        if let Err(refused) = self.lending.send(due, home, event_loop) {
            // Its thread is gone, and all of them will be.
            self.loops.push(Carried::new(refused));
        }
    }
}
