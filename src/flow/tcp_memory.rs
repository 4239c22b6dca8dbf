//! The memory that rings hold: how much of each has been written to, and the sum of it all.
//!
//! Owns numbers only. A ring is a range of zeroed pages that the kernel commits when they are first
//! written to, so what counts is how far a ring has been written since it was made; an [`Extent`] keeps
//! that for the two rings of an engine and gives it back to the [`Budget`] when they are freed.

use std::cell::Cell;
use std::rc::Rc;

use super::tcp_engine::RING;

/// What the rings of all connections hold together.
#[derive(Debug, Default)]
pub(super) struct Budget {
    held: Cell<usize>,
    engines: Cell<usize>,
}

impl Budget {
    /// Bytes that rings hold, those of engines that wait to be used included.
    pub(super) const fn held(&self) -> usize {
        self.held.get()
    }

    /// Engines that exist.
    pub(super) const fn engines(&self) -> usize {
        self.engines.get()
    }
}

/// How far the two rings of an engine have been written to.
#[derive(Debug)]
pub(super) struct Extent {
    budget: Rc<Budget>,
    /// The sequence number that stands at the start of the receive ring, until it wraps.
    begin: u32,
    /// Bytes of the receive ring, at most [`RING`].
    rx: usize,
    /// Bytes of the send ring, at most [`RING`].
    tx: usize,
    /// Where the send ring is written next.
    tx_at: usize,
}

impl Extent {
    pub(super) fn new(budget: &Rc<Budget>) -> Self {
        budget.engines.set(budget.engines() + 1);
        Self {
            budget: Rc::clone(budget),
            begin: 0,
            rx: 0,
            tx: 0,
            tx_at: 0,
        }
    }

    /// Bytes of both rings.
    pub(super) const fn held(&self) -> usize {
        self.rx + self.tx
    }

    /// Another connection begins with the same rings, at their start.
    pub(super) const fn restart(&mut self) {
        self.begin = 0;
        self.tx_at = 0;
    }

    /// The guest's stream begins at this sequence number.
    pub(super) const fn begin_at(&mut self, seq: u32) {
        self.begin = seq;
    }

    /// Payload up to a sequence number came from the guest: smoltcp writes the receive ring from its
    /// start to its end and over again.
    pub(super) fn received(&mut self, end: u32) {
        let reach = usize::try_from(end.wrapping_sub(self.begin)).unwrap_or(RING);
        if reach > self.rx && self.rx < RING {
            let more = reach.min(RING) - self.rx;
            self.rx += more;
            self.budget.held.set(self.budget.held() + more);
        }
    }

    /// Payload for the guest was written to the send ring, which begins at its start whenever it was
    /// empty.
    pub(super) fn sent(&mut self, was_empty: bool, bytes: usize) {
        let from = if was_empty { 0 } else { self.tx_at };
        let reach = from + bytes;
        self.tx_at = reach % RING;
        if reach > self.tx {
            let more = reach.min(RING) - self.tx;
            self.tx += more;
            self.budget.held.set(self.budget.held() + more);
        }
    }
}

impl Drop for Extent {
    fn drop(&mut self) {
        self.budget.held.set(self.budget.held() - self.held());
        self.budget.engines.set(self.budget.engines() - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_counted_once() {
        let budget = Rc::new(Budget::default());
        let mut extent = Extent::new(&budget);
        extent.begin_at(u32::MAX);
        extent.received(99);
        extent.received(50);
        assert_eq!(budget.held(), 100, "sequence numbers wrap");
        extent.sent(true, 10);
        extent.sent(false, 10);
        extent.sent(true, 15);
        assert_eq!(
            budget.held(),
            120,
            "an empty ring is written from its start"
        );
        extent.restart();
        extent.begin_at(7);
        extent.received(57);
        assert_eq!(
            (budget.held(), budget.engines()),
            (120, 1),
            "pages stay dirty"
        );
        drop(extent);
        assert_eq!((budget.held(), budget.engines()), (0, 0));
    }

    #[test]
    fn a_ring_holds_no_more_than_its_size() {
        let budget = Rc::new(Budget::default());
        let mut extent = Extent::new(&budget);
        for round in 0..5_u32 {
            extent.received(round * 500_000);
            extent.sent(false, 500_000);
        }
        assert_eq!(budget.held(), 2 * RING);
    }
}
