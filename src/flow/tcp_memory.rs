//! The memory that rings hold: how much of each has been written to, the sum of it all, and what that
//! leaves for each.
//!
//! Owns numbers only. A ring is a range of zeroed pages that the kernel commits when they are first
//! written to, so what counts is how far a ring has been written since it was made, or its pages given back; an [`Extent`] keeps
//! that for the two rings of an engine and gives it back to the [`Budget`] when they are freed.
//!
//! The share of a ring is a part of what is free, the same for all at a time (dynamic thresholds, Choudhury
//! and Hahne 1998): who holds more gets no more until it has drained, who holds less does, and a part is
//! always left for newcomers. Below its share a ring is written freely; beyond, one segment at a time.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::tcp_engine::{RING, length};

/// Into how many shares the free memory is divided.
const SHARES: usize = 4;

/// Bytes of the guest's that are taken from the first: what a SYN can announce (RFC 9293 3.1).
const FIRST_WINDOW: u32 = 64 * 1024;

/// What the rings of all connections hold together.
#[derive(Debug)]
pub(super) struct Budget {
    limit: usize,
    held: AtomicUsize,
    engines: AtomicUsize,
}

impl Budget {
    /// At most `limit` bytes, but for a segment in each ring.
    pub(super) const fn new(limit: usize) -> Self {
        Self {
            limit,
            held: AtomicUsize::new(0),
            engines: AtomicUsize::new(0),
        }
    }

    fn free(&self) -> usize {
        self.limit.saturating_sub(self.held())
    }

    /// Bytes that one ring may hold, as things are.
    pub(super) fn share(&self) -> usize {
        (self.free() / SHARES).min(RING)
    }

    /// No ring may be as full as it could be.
    pub(super) fn is_scarce(&self) -> bool {
        self.share() < RING
    }

    /// Bytes that rings hold, those of engines that wait to be used included.
    pub(super) fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Engines that exist.
    pub(super) fn engines(&self) -> usize {
        self.engines.load(Ordering::Relaxed)
    }
}

/// How far a sequence number is ahead of another; 0 where it is behind.
fn ahead(seq: u32, of: u32) -> usize {
    usize::try_from(seq.wrapping_sub(of).cast_signed()).unwrap_or(0)
}

/// How far the two rings of an engine have been written to.
#[derive(Debug)]
pub(super) struct Extent {
    budget: Arc<Budget>,
    /// The sequence number that stands at the start of the receive ring, but for whole rounds of it.
    start: u32,
    /// The sequence number from which on is counted what was written to the receive ring.
    begin: u32,
    /// Bytes that came past the receive ring, as far as they matter: at most [`RING`].
    skipped: u32,
    /// Bytes of the receive ring, at most [`RING`].
    rx: usize,
    /// Bytes of the send ring, at most [`RING`].
    tx: usize,
    /// Where the send ring is written next.
    tx_at: usize,
}

impl Extent {
    pub(super) fn new(budget: &Arc<Budget>) -> Self {
        budget.engines.fetch_add(1, Ordering::Relaxed);
        Self {
            budget: Arc::clone(budget),
            start: 0,
            begin: 0,
            skipped: 0,
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
        self.begin_at(0);
        self.skipped = 0;
        self.tx_at = 0;
    }

    /// What counts as written to the receive ring was written from its start on.
    pub(super) const fn is_from_start(&self) -> bool {
        self.begin == self.start
    }

    /// The guest's stream begins at this sequence number.
    pub(super) const fn begin_at(&mut self, seq: u32) {
        self.start = seq;
        self.begin = seq;
    }

    /// Payload went past the receive ring, whose start stands for a later number now.
    pub(super) fn skip(&mut self, bytes: usize) {
        let bytes = length(bytes);
        self.start = self.start.wrapping_add(bytes);
        self.begin = self.begin.wrapping_add(bytes);
        self.skip_in_sum(bytes);
    }

    fn skip_in_sum(&mut self, bytes: u32) {
        self.skipped = self.skipped.saturating_add(bytes).min(length(RING));
    }

    /// Bytes of the receive ring that hold nothing any more: all before `taken` having been taken, and nothing having
    /// come beyond `end`.
    pub(super) fn behind(&self, taken: u32, end: u32) -> usize {
        self.rx.saturating_sub(ahead(end, taken))
    }

    /// These bytes are not held any more. Gives the parts of the ring in which nothing is.
    pub(super) fn forget_behind(&mut self, taken: u32, end: u32) -> [Range<usize>; 2] {
        let behind = self.behind(taken, end);
        self.budget.held.fetch_sub(behind, Ordering::Relaxed);
        self.rx -= behind;
        self.skip_in_sum(length(ahead(taken, self.begin)));
        self.begin = taken;
        let kept = ahead(end, taken).min(RING);
        let at = |seq: u32| usize::try_from(seq.wrapping_sub(self.start)).unwrap_or(0) % RING;
        let from = (at(taken) + kept) % RING;
        let to = from + RING - kept;
        [from..to.min(RING), 0..to.saturating_sub(RING)]
    }

    /// The share of each of the rings.
    pub(super) fn share(&self) -> usize {
        self.budget.share()
    }

    /// No ring may be as full as it could be.
    pub(super) fn is_scarce(&self) -> bool {
        self.budget.is_scarce()
    }

    /// Bytes that may be written to the send ring now. Within its share it is written from its start until
    /// it is empty again; `segment` bytes always may be.
    pub(super) fn room(&self, was_empty: bool, segment: usize) -> usize {
        let share = self.share();
        if share >= RING {
            return RING;
        }
        let from = if was_empty { 0 } else { self.tx_at };
        share.max(segment).saturating_sub(from)
    }

    /// The sequence number up to which the guest may send, all before `taken` having been taken: twice
    /// what it has sent so far, within the share of its ring; `segment` bytes always.
    pub(super) fn edge(&self, taken: u32, segment: u32) -> u32 {
        let shown = taken.wrapping_sub(self.begin).min(length(RING));
        let wanted = (2 * (shown + self.skipped)).clamp(FIRST_WINDOW, length(RING));
        let share = self.share();
        if share >= RING {
            return taken.wrapping_add(wanted.max(segment));
        }
        let left = length(share).saturating_sub(shown);
        taken.wrapping_add(wanted.min(left).max(segment))
    }

    /// Bytes for which there is no memory, of what comes from the guest up to `end`, all before `taken`
    /// having been taken: none, unless memory has run out. Then the ring is written no further than it was
    /// before, but for `segment` bytes: also by what comes out of order. What is left when so much is cut off has no
    /// excess any more, however far beyond the ring's end it began.
    pub(super) fn excess(&self, end: u32, taken: u32, segment: u32) -> usize {
        let place = |seq: u32| ahead(seq, self.begin);
        let reach = place(end);
        if reach.min(RING).saturating_sub(self.rx) <= self.budget.free() {
            return 0;
        }
        let least = place(taken.wrapping_add(segment));
        reach.saturating_sub(self.rx.max(least))
    }

    /// Payload up to a sequence number came from the guest: smoltcp writes the receive ring from its
    /// start to its end and over again.
    pub(super) fn received(&mut self, end: u32) {
        // What ends before the ring begins is not written there: it came a second time.
        let reach = ahead(end, self.begin);
        if reach > self.rx && self.rx < RING {
            let more = reach.min(RING) - self.rx;
            self.rx += more;
            self.budget.held.fetch_add(more, Ordering::Relaxed);
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
            self.budget.held.fetch_add(more, Ordering::Relaxed);
        }
    }
}

impl Drop for Extent {
    fn drop(&mut self) {
        self.budget.held.fetch_sub(self.held(), Ordering::Relaxed);
        self.budget.engines.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What was cut once need not be cut again: a segment is cut once, whatever its numbers.
        #[test]
        fn what_is_in_excess_is_so_once(
            begin in any::<u32>(),
            held in 0..=RING + 2,
            limit in prop_oneof![Just(0), 0..=2 * RING],
            beyond in prop_oneof![0..70_000_u32, 0..3 * length(RING)],
            taken in 0..2 * length(RING),
            segment in 0..70_000_u32,
        ) {
            let budget = Arc::new(Budget::new(limit));
            let mut extent = Extent::new(&budget);
            extent.begin_at(begin);
            extent.received(begin.wrapping_add(length(held)));
            let end = begin.wrapping_add(length(extent.rx)).wrapping_add(beyond);
            let taken = begin.wrapping_add(taken);
            let excess = extent.excess(end, taken, segment);
            let kept = end.wrapping_sub(length(excess));
            prop_assert_eq!(extent.excess(kept, taken, segment), 0);
            prop_assert!(excess <= usize::try_from(beyond).unwrap());
        }
    }

    proptest! {
        /// What is forgotten is all but what is still held, once, and is not counted; the rest of the stream is where it was.
        #[test]
        fn what_was_passed_on_is_forgotten_and_nothing_else(
            begin in any::<u32>(),
            skipped in 0..3 * RING,
            steps in proptest::collection::vec((0..RING / 2, 0..70_000_usize, 0..RING), 1..8),
        ) {
            let budget = Arc::new(Budget::new(64 * RING));
            let mut extent = Extent::new(&budget);
            extent.begin_at(begin);
            extent.skip(skipped);
            let mut first = begin.wrapping_add(length(skipped));
            let (mut taken, mut end) = (0, 0);
            for (passed, kept, past) in steps {
                (taken, end) = (end.max(taken + passed), end.max(taken + passed) + kept);
                let seq = |at: usize| first.wrapping_add(length(at));
                extent.received(seq(end));
                let parts = extent.forget_behind(seq(taken), seq(end));
                prop_assert_eq!(budget.held(), kept);
                prop_assert_eq!(extent.behind(seq(taken), seq(end)), 0);
                prop_assert_eq!(parts.iter().map(ExactSizeIterator::len).sum::<usize>(), RING - kept);
                let held = [taken % RING, (end.max(taken + 1) - 1) % RING];
                prop_assert!(kept == 0 || held.iter().all(|at| !parts.iter().any(|part| part.contains(at))));
                // All of it is taken, and then comes what goes past the ring.
                taken = end;
                extent.skip(past);
                first = first.wrapping_add(length(past));
            }
        }
    }

    #[test]
    fn what_was_written_is_counted_once() {
        let budget = Arc::new(Budget::new(64 * RING));
        let mut extent = Extent::new(&budget);
        extent.begin_at(u32::MAX);
        extent.received(99);
        extent.received(50);
        assert_eq!(budget.held(), 100, "sequence numbers wrap");
        extent.received(u32::MAX - 1);
        extent.received(u32::MAX - 500_000);
        assert_eq!(budget.held(), 100, "what came before is not written");
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
    fn shares_shrink_alike_and_never_end() {
        let budget = Arc::new(Budget::new(8 * RING));
        let mut extents: Vec<_> = (0..200).map(|_| Extent::new(&budget)).collect();
        for _ in 0..1000 {
            for extent in &mut extents {
                let room = extent.room(false, 0).min(1000);
                extent.sent(false, room);
            }
        }
        let held = |extent: &Extent| extent.held();
        let (least, most) = (
            extents.iter().map(held).min(),
            extents.iter().map(held).max(),
        );
        assert!(most.unwrap() - least.unwrap() <= 1000, "{least:?} {most:?}");
        assert!(budget.held() <= 8 * RING && budget.held() > 7 * RING);
        let newcomer = Extent::new(&budget);
        assert_eq!(newcomer.room(true, 60_000), 60_000, "a segment at least");
        assert_eq!(newcomer.edge(0, 1460), 1460.max(length(budget.share())));
        extents.truncate(1);
        assert_eq!(
            newcomer.room(true, 1460),
            RING,
            "what drains is free at once"
        );
    }

    #[test]
    fn a_ring_holds_no_more_than_its_size() {
        let budget = Arc::new(Budget::new(64 * RING));
        let mut extent = Extent::new(&budget);
        for round in 0..5_u32 {
            extent.received(round * 500_000);
            extent.sent(false, 500_000);
        }
        assert_eq!(budget.held(), 2 * RING);
    }
}
