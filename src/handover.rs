//! What workers hand to one another, on its way from loop to loop.
//!
//! Each loop owns a [`Handover`]: its inbox, and the way to the others. Comes in: what a stack has for
//! another. Goes out: the same, at the other. Frames wait in bounded number: a worker that does not keep up
//! loses them, as a link would; what was promised to somebody always gets there.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use tokio::sync::mpsc;

use crate::host::Host;
use crate::stack::share::Handed;

/// Bytes that may wait for one worker: a few turns' worth.
const LIMIT: usize = 4 << 20;
/// What anything costs beside its bytes.
const OVERHEAD: usize = 256;
/// Neighbours that it may have to hear of: as many as it remembers.
const MOST_NEIGHBOURS: usize = 1024;
/// Things that may wait: as many as the limits let, and every port twice that was published and taken back.
const PLACES: usize = LIMIT / OVERHEAD + MOST_NEIGHBOURS + 2 * 65_536;

/// One worker's end.
pub struct Handover<H: Host> {
    index: usize,
    inbox: mpsc::Receiver<Handed<H>>,
    /// To every worker, this one included, which keeps its inbox open.
    to: Vec<mpsc::Sender<Handed<H>>>,
    /// What waits for each.
    waiting: Arc<[Waiting]>,
    /// Taken out of the inbox already.
    next: Option<Handed<H>>,
}

/// What waits for one worker.
#[derive(Debug, Default)]
struct Waiting {
    bytes: AtomicUsize,
    neighbours: AtomicUsize,
}

impl Waiting {
    /// Where something counts and how much, and the most that may wait there; none for what is promised to somebody.
    /// The rest can be done without, or by whoever has it.
    fn account<H: Host>(&self, handed: &Handed<H>) -> (&AtomicUsize, usize, Option<usize>) {
        match handed {
            Handed::Frame { bytes, .. } | Handed::Whole { bytes, .. } => {
                (&self.bytes, OVERHEAD + bytes.len(), Some(LIMIT))
            }
            Handed::Client { .. } => (&self.bytes, OVERHEAD, Some(LIMIT)),
            // A guest with ever new addresses leaves the others their room.
            Handed::Neighbour(..) => (&self.neighbours, 1, Some(MOST_NEIGHBOURS)),
            Handed::Port { .. } | Handed::PortLost { .. } | Handed::Unpublish { .. } => {
                (&self.bytes, OVERHEAD, None)
            }
        }
    }
}

impl<H: Host> Handover<H> {
    /// The ends of so many workers.
    #[must_use]
    pub fn between(count: usize) -> Vec<Self> {
        let waiting: Arc<[Waiting]> = (0..count).map(|_| Waiting::default()).collect();
        let (to, inboxes): (Vec<_>, Vec<_>) = (0..count).map(|_| mpsc::channel(PLACES)).unzip();
        let ends = inboxes.into_iter().enumerate();
        ends.map(|(index, inbox)| Self {
            index,
            inbox,
            to: to.clone(),
            waiting: Arc::clone(&waiting),
            next: None,
        })
        .collect()
    }

    /// Brings something on its way.
    ///
    /// # Errors
    /// Gives it back when the other has no room for it, or is gone.
    pub fn send(&self, to: usize, handed: Handed<H>) -> Result<(), Handed<H>> {
        let (Some(sender), Some(waiting)) = (self.to.get(to), self.waiting.get(to)) else {
            return Err(handed);
        };
        let (sum, cost, most) = waiting.account(&handed);
        if most.is_some_and(|most| sum.load(Ordering::Relaxed) + cost > most) {
            return Err(handed);
        }
        // Before it can be taken, which takes it off again.
        sum.fetch_add(cost, Ordering::Relaxed);
        sender.try_send(handed).map_err(|refused| {
            sum.fetch_sub(cost, Ordering::Relaxed);
            refused.into_inner()
        })
    }

    /// The next thing that came, if there is one.
    pub fn take(&mut self) -> Option<Handed<H>> {
        let handed = self.next.take().or_else(|| self.inbox.try_recv().ok())?;
        let (sum, cost, _) = self.waiting[self.index].account(&handed);
        sum.fetch_sub(cost, Ordering::Relaxed);
        Some(handed)
    }

    /// Has the task woken when there is something to take.
    pub fn poll_arrived(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.next.is_none() {
            self.next = ready!(self.inbox.poll_recv(cx));
        }
        Poll::Ready(())
    }

    /// The number of the worker that it is of.
    #[must_use]
    pub const fn index(&self) -> usize {
        self.index
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::buf::{LinkId, RxMeta};
    use crate::host::simulated::SimulatedHost;
    use crate::net::Mac;

    fn frame(len: usize) -> Handed<SimulatedHost> {
        Handed::Frame {
            bytes: vec![0; len],
            meta: RxMeta::plain(LinkId(0)),
            seen: 1,
        }
    }

    #[test]
    fn frames_wait_in_bounded_number_and_promises_are_kept() {
        let mut ends = Handover::between(2);
        let mut other = ends.pop().unwrap();
        let one = ends.pop().unwrap();
        let mut sent = 0;
        while one.send(1, frame(65_536)).is_ok() {
            sent += 1;
        }
        assert_eq!(sent, LIMIT / (65_536 + OVERHEAD));
        assert!(one.send(0, frame(65_536)).is_ok(), "each has its own limit");
        let (addr, mac) = (IpAddr::from([10, 0, 2, 100]), Mac([2; 6]));
        let mut neighbours = 0;
        while one.send(1, Handed::Neighbour(addr, mac)).is_ok() {
            neighbours += 1;
        }
        assert_eq!(neighbours, MOST_NEIGHBOURS, "these as well");
        assert!(
            one.send(1, Handed::Unpublish { id: 1, freed: None })
                .is_ok()
        );
        assert!(matches!(other.take(), Some(Handed::Frame { .. })));
        assert!(one.send(1, frame(1)).is_ok(), "there is room again");
        let mut taken = 1;
        while other.take().is_some() {
            taken += 1;
        }
        assert_eq!(taken, sent + neighbours + 2);
        assert!(one.send(1, Handed::Neighbour(addr, mac)).is_ok());
        assert!(one.send(2, frame(1)).is_err(), "nobody has that number");
    }
}
