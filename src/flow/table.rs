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
use crate::buf;
use crate::host::Token;
use crate::net::Instant;

use giving_way::Waiting;

pub use giving_way::{BegunBy, Wait};

/// How many flows there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Most {
    /// Of all kinds.
    pub flows: usize,
    /// That wait for their other end, of those that either side began.
    pub half_open: usize,
    /// Guests' UDP ports and ping identifiers, each of which is one of the host's.
    pub ports: usize,
    /// Clients of published UDP ports.
    pub peers: usize,
    /// Queries that wait for the resolver.
    pub queries: usize,
}

/// Generations wrap below this; the bit above marks tokens that are not flows.
const GENERATION_MASK: u64 = 0x3fff_ffff;

/// Room for this many flows is kept when most have gone.
const KEPT: usize = 256;

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
    /// How many are datagrams', and how many of these are guests' ports, and clients of published ones.
    datagrams: usize,
    ports: usize,
    peers: usize,
    most: Most,
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
    /// An empty table for at most so many flows.
    #[must_use]
    pub fn new(most: Most, hash: KeyedState) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            index: HashMap::with_hasher(hash),
            deadlines: BinaryHeap::new(),
            waiting: Waiting::new(most),
            datagrams: 0,
            ports: 0,
            peers: 0,
            most,
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
        count >= self.most.flows - self.most.flows / KEPT_FOR_OTHERS
    }

    /// There are as many guests' UDP ports and ping identifiers as there may be.
    #[must_use]
    pub const fn are_ports_used(&self) -> bool {
        self.ports >= self.most.ports
    }

    /// There are as many clients of published UDP ports as there may be.
    #[must_use]
    pub const fn are_peers_used(&self) -> bool {
        self.peers >= self.most.peers
    }

    /// The token that the next [`Table::insert`] will give, for opening the socket of a flow of this kind with.
    /// Makes room by forgetting the oldest flow that is over, if it must.
    ///
    /// # Errors
    /// [`Full`] when every flow is live.
    pub fn next_token(&mut self, kind: Kind) -> Result<Token, Full> {
        while self.index.len() >= self.most.flows || self.is_share_used(kind) {
            self.forget_one()?;
        }
        self.promise()
    }

    fn promise(&self) -> Result<Token, Full> {
        if self.index.len() >= self.most.flows {
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
        while self.index.len() >= self.most.flows {
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
        self.ports += usize::from(key.is_port());
        self.peers += usize::from(key.is_peer());
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
        self.ports -= usize::from(entry.key.is_port());
        self.peers -= usize::from(entry.key.is_peer());
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
        buf::give_back();
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
        let ports = self.index.keys().filter(|key| key.is_port()).count();
        if ports != self.ports || ports > self.most.ports {
            return Err(format!("{ports} ports, {} are counted", self.ports));
        }
        let peers = self.index.keys().filter(|key| key.is_peer()).count();
        if peers != self.peers || peers > self.most.peers {
            return Err(format!("{peers} peers, {} are counted", self.peers));
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
mod tests;
