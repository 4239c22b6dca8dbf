//! Engines: made, lent to connections that move, and taken back.
//!
//! Owns those that wait to be used, a few at most, and the count of all. An engine that wrote little is
//! kept for the next connection, so that a short one costs no system call; what is not needed for a
//! while is freed. Comes in: the time. Goes out: engines, or none where there is no memory.

use std::net::IpAddr;
use std::sync::Arc;

use super::tcp_engine::{Engine, Path, RING};
use super::tcp_memory::{Budget, Extent};
use super::tcp_rest::{Rest, Streams};
use crate::buf;
use crate::net::emit::Ends;
use crate::net::{Duration, Instant};

/// Engines kept ready, so that a short connection costs no allocation.
const WARM: usize = 64;

/// An engine whose rings hold more than this is not kept.
const WARM_BYTES: usize = 64 * 1024;

/// Engines that were not needed for this long are freed.
const WARM_TIME: Duration = Duration::from_secs(2);

/// Why no engine goes on where another had stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoEngine {
    /// There is no memory for one now.
    Memory,
    /// None would stand there: it never will.
    Elsewhere,
}

#[expect(
    clippy::vec_box,
    reason = "an engine stays where it is while it goes from one connection to the next"
)]
/// All engines that no connection has at the moment.
pub struct EnginePool {
    budget: Arc<Budget>,
    /// There may be as many, in use or warm.
    most: usize,
    warm: Vec<Box<Engine>>,
    /// The fewest that were warm at a time since the last look.
    least: usize,
    look_at: Option<Instant>,
}

impl EnginePool {
    /// A pool whose rings hold no more than `limit` bytes, but for a segment in each, and take no more than
    /// `space` bytes of addresses, but for one engine's.
    #[must_use]
    pub fn new(limit: usize, space: usize) -> Self {
        Self {
            budget: Arc::new(Budget::new(limit)),
            most: (space / (2 * RING)).max(1),
            warm: Vec::new(),
            least: 0,
            look_at: None,
        }
    }

    /// An engine for the endpoint `local` (an outside address), not yet open. `seed` decides its
    /// initial sequence number and must be unpredictable (RFC 6528). None where there is no memory.
    pub fn engine(
        &mut self,
        now: Instant,
        path: Path,
        local: IpAddr,
        seed: u64,
    ) -> Option<Box<Engine>> {
        if let Some(mut engine) = self.warm.pop() {
            self.least = self.least.min(self.warm.len());
            engine.renew((now, seed), path, local);
            return Some(engine);
        }
        if !self.has_one() {
            return None;
        }
        self.least = 0;
        let rings = [buf::zeroed(RING)?, buf::zeroed(RING)?];
        let extent = Extent::new(&self.budget);
        let engine = Engine::new((now, seed), path, local, rings, extent);
        Some(Box::new(engine))
    }

    /// An engine that goes on where another had stopped.
    ///
    /// # Errors
    /// Why there is none.
    pub(super) fn resume(
        &mut self,
        now: Instant,
        (path, ends): (Path, Ends),
        rest: &Rest,
        streams: Streams,
    ) -> Result<Box<Engine>, NoEngine> {
        let seed = rest.seed();
        let engine = self.engine(now, path, ends.dst.ip(), seed);
        let mut engine = engine.ok_or(NoEngine::Memory)?;
        if engine.resume(now, ends, rest, streams) {
            Ok(engine)
        } else {
            self.put(engine);
            Err(NoEngine::Elsewhere)
        }
    }

    /// Takes an engine back whose connection is over or rests.
    pub fn put(&mut self, engine: Box<Engine>) {
        if engine.is_broken() {
            return;
        }
        let small = engine.extent.held() <= WARM_BYTES && engine.extent.is_from_start();
        if small && !self.budget.is_scarce() && self.warm.len() < WARM {
            self.warm.push(engine);
        }
    }

    /// One is ready, or another may be made.
    #[must_use]
    pub fn has_one(&self) -> bool {
        !self.warm.is_empty() || self.budget.engines() < self.most
    }

    /// Engines that connections have.
    #[must_use]
    pub fn in_use(&self) -> usize {
        self.budget.engines() - self.warm.len()
    }

    /// Bytes of memory that all rings hold.
    #[must_use]
    pub fn held(&self) -> usize {
        self.budget.held()
    }

    /// When [`EnginePool::free_unused`] wants to be called.
    pub fn next_look(&mut self, now: Instant) -> Option<Instant> {
        if self.warm.is_empty() {
            self.look_at = None;
        } else if self.look_at.is_none() {
            self.look_at = Some(now + WARM_TIME);
            self.least = self.warm.len();
        }
        self.look_at
    }

    /// Frees what was not needed for a while.
    pub fn free_unused(&mut self, now: Instant) {
        if self.look_at.is_none_or(|at| now < at) {
            return;
        }
        self.look_at = None;
        self.warm.truncate(self.warm.len() - self.least);
        if self.warm.is_empty() {
            self.warm.shrink_to_fit();
        }
    }
}
