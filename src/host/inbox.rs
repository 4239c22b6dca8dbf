//! Datagrams received from one socket and not yet handed on.
//!
//! Comes in: what a host's socket receives, several at once. Goes out: each datagram with what is known
//! of it, in order. The memory is used again and again, so receiving allocates nothing.

use std::collections::VecDeque;

use super::Received;
use crate::sys::datagrams::{ReceiveBatch, ReceivedDatagram};

/// Datagrams that are received at once, at most.
const CAPACITY: usize = 32;

/// Received datagrams, oldest first.
pub struct Inbox {
    batch: ReceiveBatch,
    /// What is known of each, and its place.
    received: VecDeque<(usize, Received)>,
    /// There was room for no more when it was filled.
    full: bool,
}

impl Default for Inbox {
    fn default() -> Self {
        Self {
            batch: ReceiveBatch::new(CAPACITY),
            received: VecDeque::with_capacity(CAPACITY),
            full: false,
        }
    }
}

impl Inbox {
    /// Nothing is left in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.received.is_empty()
    }

    /// There was room for no more when it was filled: the socket may hold more.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        self.full
    }

    /// What is known of the first.
    #[must_use]
    pub fn first(&self) -> Option<Received> {
        self.received.front().map(|(_, received)| *received)
    }

    /// The datagrams in order, each with what is known of it.
    pub fn datagrams(&self) -> impl Iterator<Item = (Received, &[u8])> + Clone {
        self.received.iter().map(|(place, received)| {
            let payload = self.batch.get(*place).map(|it| it.payload);
            (*received, payload.unwrap_or_default())
        })
    }

    /// Forgets the first so many datagrams.
    pub fn pass(&mut self, count: usize) {
        self.received.drain(..count.min(self.received.len()));
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.received.clear();
        self.full = false;
    }

    /// Fills it anew: `receive` gives the number of datagrams, `describe` what is known of one. Those of
    /// which nothing is known are passed over.
    pub(super) fn fill(
        &mut self,
        receive: impl FnOnce(&mut ReceiveBatch) -> std::io::Result<usize>,
        describe: impl Fn(ReceivedDatagram<'_>) -> Option<Received>,
    ) -> std::io::Result<()> {
        self.clear();
        let count = receive(&mut self.batch)?;
        self.full = count >= CAPACITY;
        for place in 0..count {
            if let Some(received) = self.batch.get(place).and_then(&describe) {
                self.received.push_back((place, received));
            }
        }
        Ok(())
    }

    /// Adds a datagram, while there is room. For hosts that are not the kernel's.
    pub fn add(&mut self, received: Received, payload: &[u8]) {
        let place = self.received.len();
        if place < CAPACITY {
            self.batch.put(place, payload);
            self.received.push_back((place, received));
        }
        self.full = self.received.len() >= CAPACITY;
    }
}
