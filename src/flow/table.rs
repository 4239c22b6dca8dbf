//! The flow table: a slab, an index by key, and deadlines.
//!
//! Owns every flow. A [`Token`] names a slot and the slot's generation, so an event that comes
//! after its flow is gone finds nothing, never a stranger. Every flow has a deadline; deadlines may
//! move later for free (the heap's entry stays and is looked at again when it comes up). Where there is
//! no room, `giving_way` says who goes.

mod giving_way;

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap};

use super::key::{FlowKey, KeyedState, Kind};
use crate::host::Token;
use crate::net::Instant;

use giving_way::Waiting;

/// Generations wrap below this; the bit above marks tokens that are not flows.
const GENERATION_MASK: u64 = 0x3fff_ffff;

/// Room for this many flows is kept when most have gone.
const KEPT: usize = 1024;

/// The table holds as many flows as it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the limit on flows is reached")]
pub struct Full;

struct Entry<F> {
    key: FlowKey,
    flow: F,
    deadline: Instant,
    /// The earliest heap entry for this flow: it is looked at then at the latest.
    scheduled: Instant,
    /// In the queue of flows with something to do.
    queued: bool,
}

struct Slot<F> {
    generation: u64,
    entry: Option<Entry<F>>,
}

/// Each kind of flow may have all places but this part of them, which is kept for the other.
const KEPT_FOR_OTHERS: usize = 8;

/// All flows of a stack.
pub struct Table<F> {
    slots: Vec<Slot<F>>,
    free: Vec<u32>,
    index: HashMap<FlowKey, Token, KeyedState>,
    deadlines: BinaryHeap<Reverse<(Instant, Token)>>,
    waiting: Waiting,
    /// How many are datagrams'.
    datagrams: usize,
    limit: usize,
    /// The generation of slots that are new: above those of slots that were given up.
    first_generation: u64,
    /// When no more flows than this are left, room is given up.
    shrink_at: usize,
}

fn token(index: u32, generation: u64) -> Token {
    Token(generation << 32 | u64::from(index))
}

fn slot_of(token: Token) -> usize {
    // The lower half of a token is the slot.
    usize::try_from(token.0 & 0xffff_ffff).unwrap_or(usize::MAX)
}

fn generation_of(token: Token) -> u64 {
    token.0 >> 32
}

impl<F> Table<F> {
    /// An empty table for at most `limit` flows.
    #[must_use]
    pub fn new(limit: usize, hash: KeyedState) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            index: HashMap::with_hasher(hash),
            deadlines: BinaryHeap::new(),
            waiting: Waiting::default(),
            datagrams: 0,
            limit,
            first_generation: 0,
            shrink_at: 0,
        }
    }

    /// Number of flows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// There is no flow.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Flows of this kind have all the places that they may have: a flood of one kind leaves room for the
    /// other.
    #[must_use]
    pub fn is_share_used(&self, kind: Kind) -> bool {
        let count = match kind {
            Kind::Datagrams => self.datagrams,
            Kind::Stream => self.index.len() - self.datagrams,
        };
        count >= self.limit - self.limit / KEPT_FOR_OTHERS
    }

    /// The token that the next [`Table::insert`] will give, for opening the socket of a flow of this kind with.
    /// Makes room by forgetting the oldest flow that is over, if it must.
    ///
    /// # Errors
    /// [`Full`] when every flow is live.
    pub fn next_token(&mut self, kind: Kind) -> Result<Token, Full> {
        while self.index.len() >= self.limit || self.is_share_used(kind) {
            self.forget_one()?;
        }
        self.promise()
    }

    fn promise(&self) -> Result<Token, Full> {
        if self.index.len() >= self.limit {
            return Err(Full);
        }
        match self.free.last() {
            Some(&index) => Ok(token(
                index,
                self.slots[usize::try_from(index).unwrap_or(usize::MAX)].generation,
            )),
            None => {
                let index = u32::try_from(self.slots.len()).map_err(|_| Full)?;
                Ok(token(index, self.first_generation))
            }
        }
    }

    /// Adds a flow under a key that no other flow has.
    ///
    /// # Errors
    /// [`Full`] when every flow is live.
    pub fn insert(&mut self, key: FlowKey, flow: F, deadline: Instant) -> Result<Token, Full> {
        while self.index.len() >= self.limit {
            self.forget_one()?;
        }
        let token = self.promise()?;
        debug_assert!(!self.index.contains_key(&key), "a key names one flow");
        if self.free.pop().is_none() {
            self.slots.push(Slot {
                generation: self.first_generation,
                entry: None,
            });
            self.shrink_at = self.shrink_at.max(self.slots.len() / 8);
        }
        let entry = Entry {
            key,
            flow,
            deadline,
            scheduled: deadline,
            queued: false,
        };
        self.slots[slot_of(token)].entry = Some(entry);
        self.datagrams += usize::from(key.kind() == Kind::Datagrams);
        self.index.insert(key, token);
        self.deadlines.push(Reverse((deadline, token)));
        Ok(token)
    }

    /// The flow of a key.
    #[must_use]
    pub fn find(&self, key: &FlowKey) -> Option<Token> {
        self.index.get(key).copied()
    }

    fn entry(&self, token: Token) -> Option<&Entry<F>> {
        let slot = self.slots.get(slot_of(token))?;
        slot.entry
            .as_ref()
            .filter(|_| slot.generation == generation_of(token))
    }

    fn entry_mut(&mut self, token: Token) -> Option<&mut Entry<F>> {
        let slot = self.slots.get_mut(slot_of(token))?;
        let current = slot.generation == generation_of(token);
        slot.entry.as_mut().filter(|_| current)
    }

    /// The flow of a token, unless it is gone.
    #[must_use]
    pub fn get(&self, token: Token) -> Option<&F> {
        self.entry(token).map(|entry| &entry.flow)
    }

    /// The flow of a token, unless it is gone.
    pub fn get_mut(&mut self, token: Token) -> Option<&mut F> {
        self.entry_mut(token).map(|entry| &mut entry.flow)
    }

    /// The key of a token's flow.
    #[must_use]
    pub fn key(&self, token: Token) -> Option<FlowKey> {
        self.entry(token).map(|entry| entry.key)
    }

    /// The deadline of a token's flow.
    #[must_use]
    pub fn deadline(&self, token: Token) -> Option<Instant> {
        self.entry(token).map(|entry| entry.deadline)
    }

    /// Notes that a flow is in the queue of those with something to do; false when it is gone or
    /// was there already.
    pub fn queue(&mut self, token: Token) -> bool {
        self.entry_mut(token)
            .is_some_and(|entry| !std::mem::replace(&mut entry.queued, true))
    }

    /// Notes that a flow has left that queue.
    pub fn unqueue(&mut self, token: Token) {
        if let Some(entry) = self.entry_mut(token) {
            entry.queued = false;
        }
    }

    /// Takes a flow out. Its token is worth nothing from now on.
    pub fn remove(&mut self, token: Token) -> Option<F> {
        let slot = self.slots.get_mut(slot_of(token))?;
        if slot.generation != generation_of(token) {
            return None;
        }
        let entry = slot.entry.take()?;
        slot.generation = (slot.generation + 1) & GENERATION_MASK;
        self.index.remove(&entry.key);
        self.datagrams -= usize::from(entry.key.kind() == Kind::Datagrams);
        self.trim_deadlines();
        self.free
            .push(u32::try_from(slot_of(token)).unwrap_or(u32::MAX));
        if self.index.len() <= self.shrink_at && self.slots.len() > KEPT {
            self.shrink();
        }
        Some(entry.flow)
    }

    /// Gives up room that a crowd has left behind. Slots of flows stay where they are; what is behind the
    /// last one goes.
    fn shrink(&mut self) {
        let last = self.slots.iter().rposition(|slot| slot.entry.is_some());
        let kept = last.map_or(0, |last| last + 1).max(KEPT);
        for slot in self.slots.drain(kept.min(self.slots.len())..) {
            // A late event must not find a stranger in a slot that is made anew.
            let above = (slot.generation + 1) & GENERATION_MASK;
            self.first_generation = self.first_generation.max(above);
        }
        self.slots.shrink_to(KEPT);
        self.free
            .retain(|&index| usize::try_from(index).is_ok_and(|index| index < kept));
        self.free.shrink_to(KEPT);
        self.index.shrink_to(KEPT);
        self.deadlines.shrink_to(KEPT);
        self.waiting.shrink();
        // Where the last one is in the way, this waits until there are half as many.
        self.shrink_at = self.index.len() / 2;
    }

    /// Moves a flow's deadline.
    pub fn set_deadline(&mut self, token: Token, deadline: Instant) {
        let Some(entry) = self.entry_mut(token) else {
            return;
        };
        entry.deadline = deadline;
        if deadline < entry.scheduled {
            entry.scheduled = deadline;
            self.deadlines.push(Reverse((deadline, token)));
            self.trim_deadlines();
        }
    }

    /// A deadline that moves near and far again leaves an entry behind each time: when most entries
    /// are such, they are thrown out.
    fn trim_deadlines(&mut self) {
        if self.deadlines.len() <= self.most_entries() {
            return;
        }
        let mut kept = std::mem::take(&mut self.deadlines);
        kept.retain(|&Reverse((at, token))| {
            self.entry(token).is_some_and(|entry| entry.scheduled == at)
        });
        self.deadlines = kept;
    }

    fn most_entries(&self) -> usize {
        2 * self.index.len() + 64
    }

    /// When [`Table::expired`] may have something to give. May be early, never late.
    pub fn next_deadline(&mut self) -> Option<Instant> {
        while let Some(&Reverse((at, token))) = self.deadlines.peek() {
            let live = self.entry(token).is_some_and(|entry| entry.scheduled == at);
            if live {
                return Some(at);
            }
            self.deadlines.pop();
        }
        None
    }

    /// The next flow whose deadline has passed. The caller moves its deadline or removes it.
    pub fn expired(&mut self, now: Instant) -> Option<Token> {
        while let Some(&Reverse((at, token))) = self.deadlines.peek() {
            if at > now {
                return None;
            }
            self.deadlines.pop();
            let Some(entry) = self.entry_mut(token).filter(|entry| entry.scheduled == at) else {
                continue;
            };
            let deadline = entry.deadline;
            if deadline <= now {
                // Out of the heap: whatever deadline is set next is scheduled anew.
                entry.scheduled = Instant::from_micros(i64::MAX);
                return Some(token);
            }
            entry.scheduled = deadline;
            self.deadlines.push(Reverse((deadline, token)));
        }
        self.trim_deadlines();
        None
    }

    /// Every flow's token, in no particular order.
    pub fn tokens(&self) -> impl Iterator<Item = Token> {
        self.index.values().copied()
    }

    /// Number of flows that are in the queue of those with something to do.
    #[must_use]
    pub fn queued(&self) -> usize {
        let entries = self.slots.iter().filter_map(|slot| slot.entry.as_ref());
        entries.filter(|entry| entry.queued).count()
    }

    /// Index and slab agree, and every flow is scheduled: what tests hold after every step.
    ///
    /// # Errors
    /// What does not agree.
    pub fn check(&self) -> Result<(), String> {
        let live = self
            .slots
            .iter()
            .filter(|slot| slot.entry.is_some())
            .count();
        if live != self.index.len() || live + self.free.len() != self.slots.len() {
            return Err(format!(
                "{live} live, {} indexed, {} free",
                self.index.len(),
                self.free.len()
            ));
        }
        self.waiting.check()?;
        let of_datagrams = |key: &&FlowKey| key.kind() == Kind::Datagrams;
        if self.index.keys().filter(of_datagrams).count() != self.datagrams {
            return Err(format!("{} flows of datagrams are counted", self.datagrams));
        }
        if self.deadlines.len() > self.most_entries() {
            return Err(format!(
                "{} deadlines for {live} flows",
                self.deadlines.len()
            ));
        }
        // In order, so that a crowd costs little more than its number.
        let scheduled: BTreeSet<_> = self.deadlines.iter().map(|Reverse(entry)| *entry).collect();
        for (key, &token) in &self.index {
            let entry = self
                .entry(token)
                .ok_or_else(|| format!("{key:?} leads nowhere"))?;
            if entry.key != *key {
                return Err(format!("{key:?} leads to {:?}", entry.key));
            }
            if !scheduled.contains(&(entry.scheduled, token)) {
                return Err(format!("{key:?} has no deadline"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buf::LinkId;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn key(n: u16) -> FlowKey {
        FlowKey::Echo {
            link: LinkId(0),
            guest: [10, 0, 2, 100].into(),
            ident: n,
        }
    }

    fn at(seconds: i64) -> Instant {
        Instant::from_secs(seconds)
    }

    fn table(limit: usize) -> Table<u16> {
        Table::new(limit, KeyedState::new((1, 2)))
    }

    #[test]
    fn a_late_event_finds_no_stranger() {
        let mut table = table(4);
        let old = table.insert(key(1), 1, at(1)).unwrap();
        assert_eq!(table.remove(old), Some(1));
        let new = table.insert(key(2), 2, at(1)).unwrap();
        assert_eq!(slot_of(old), slot_of(new), "the slot is used again");
        assert_eq!(table.get(old), None);
        assert_eq!(table.get(new), Some(&2));
    }

    #[test]
    fn a_crowd_leaves_no_room_behind() {
        let mut table = table(usize::MAX);
        let crowd: Vec<_> = (0..10_000)
            .map(|n| table.insert(key(n), n, at(1)).unwrap())
            .collect();
        for token in &crowd[1..] {
            table.remove(*token);
        }
        assert_eq!(table.check(), Ok(()));
        assert!(
            table.slots.capacity() <= 2 * KEPT,
            "{}",
            table.slots.capacity()
        );
        assert!(table.index.capacity() <= 4 * KEPT);
        assert_eq!(table.get(crowd[0]), Some(&0));
        for n in 1..10_000 {
            table.insert(key(n), n, at(1)).unwrap();
        }
        let strangers = crowd[1..].iter().filter(|old| table.get(**old).is_some());
        assert_eq!(strangers.count(), 0, "late events find nobody");
    }

    #[test]
    fn a_full_table_forgets_what_is_over_first() {
        let mut table = table(2);
        let first = table.insert(key(1), 1, at(1)).unwrap();
        table.insert(key(2), 2, at(1)).unwrap();
        assert_eq!(table.insert(key(3), 3, at(1)), Err(Full));
        table.set_evictable(first);
        assert!(table.insert(key(3), 3, at(1)).is_ok());
        assert_eq!(table.find(&key(1)), None);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Insert(u16, i64),
        Remove(u16),
        Move(u16, i64),
        Expire(i64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..20_u16, 0..100_i64).prop_map(|(k, t)| Step::Insert(k, t)),
            (0..20_u16).prop_map(Step::Remove),
            (0..20_u16, 0..100_i64).prop_map(|(k, t)| Step::Move(k, t)),
            (0..100_i64).prop_map(Step::Expire),
        ]
    }

    proptest! {
        /// The table agrees with an ordered map, whatever is done to it.
        #[test]
        fn behaves_like_a_map(steps in proptest::collection::vec(step(), 0..200)) {
            let mut table = table(16);
            let mut model: BTreeMap<u16, i64> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Insert(k, t) if !model.contains_key(&k) => {
                        let inserted = table.insert(key(k), k, at(t));
                        prop_assert_eq!(inserted.is_ok(), model.len() < 16);
                        if inserted.is_ok() {
                            model.insert(k, t);
                        }
                    }
                    Step::Insert(..) => {}
                    Step::Remove(k) => {
                        let removed = table.find(&key(k)).and_then(|token| table.remove(token));
                        prop_assert_eq!(removed.is_some(), model.remove(&k).is_some());
                    }
                    Step::Move(k, t) => {
                        if let Some(token) = table.find(&key(k)) {
                            table.set_deadline(token, at(t));
                            model.insert(k, t);
                        }
                    }
                    Step::Expire(t) => {
                        while let Some(token) = table.expired(at(t)) {
                            let k = *table.get(token).unwrap();
                            prop_assert!(model[&k] <= t);
                            table.remove(token);
                            model.remove(&k);
                        }
                        prop_assert!(model.values().all(|&deadline| deadline > t));
                    }
                }
                prop_assert_eq!(table.check(), Ok(()));
                prop_assert_eq!(table.len(), model.len());
                let earliest = model.values().min().copied();
                prop_assert!(table.next_deadline().is_none_or(|at| Some(at.secs()) <= earliest));
            }
        }
    }
}
