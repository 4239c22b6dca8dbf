//! Which published ports have something to take, and who of them is served when.
//!
//! Comes in: what was left at a port when it was served. Goes out: whose turn it is. Who comes first is served first; one whose
//! socket fails waits alone, and those who found no descriptors wait together, in the order in which they get them.

use std::collections::VecDeque;

use crate::net::{Duration, Instant};

/// How long clients wait once there was no descriptor for one, or their port's socket failed.
const PAUSE: Duration = Duration::from_millis(100);

/// What is left at a published port that was served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    Nothing,
    More,
    /// Something, which can't be had now.
    Failing,
    /// Something, for which there are no descriptors, as others have found.
    Starving,
    /// The same, as was found here.
    Exhausted,
}

/// Ports by their numbers, each in one place at most.
#[derive(Debug, Default)]
pub(super) struct Line {
    /// Who has something to take.
    ready: VecDeque<usize>,
    /// Who failed, each of itself, and when to look again: the first in front.
    failing: VecDeque<(Instant, usize)>,
    /// Listeners that wait for descriptors.
    starving: VecDeque<usize>,
    /// No sooner than this is a connection taken: descriptors had run out.
    paused_until: Option<Instant>,
}

impl Line {
    /// Puts a port, which is in no place, where it belongs.
    pub(super) fn note(&mut self, now: Instant, id: usize, left: Left) {
        match left {
            Left::Nothing => {}
            Left::More => self.ready.push_back(id),
            Left::Failing => self.failing.push_back((now + PAUSE, id)),
            Left::Starving | Left::Exhausted => self.starving.push_back(id),
        }
    }

    /// Takes a port out.
    pub(super) fn remove(&mut self, id: usize) {
        self.ready.retain(|waiting| *waiting != id);
        self.failing.retain(|(_, waiting)| *waiting != id);
        self.starving.retain(|waiting| *waiting != id);
    }

    /// Takes out all whose turn it is; each has to be noted again.
    pub(super) fn take(&mut self, now: Instant) -> VecDeque<usize> {
        if self.paused_until.is_some_and(|until| until <= now) {
            self.paused_until = None;
            self.ready.append(&mut self.starving);
        }
        while let Some(&(until, id)) = self.failing.front()
            && until <= now
        {
            self.failing.pop_front();
            self.ready.push_back(id);
        }
        std::mem::take(&mut self.ready)
    }

    /// Puts those in front whose turn it was and who had none.
    pub(super) fn lead(&mut self, mut kept: VecDeque<usize>) {
        if !kept.is_empty() {
            kept.append(&mut self.ready);
            self.ready = kept;
        }
    }

    /// Descriptors have run out.
    pub(super) fn pause(&mut self, now: Instant) {
        self.paused_until = Some(now + PAUSE);
    }

    /// They had, a moment ago.
    pub(super) const fn is_paused(&self) -> bool {
        self.paused_until.is_some()
    }

    /// It is nobody's turn.
    pub(super) fn is_empty(&self) -> bool {
        self.ready.is_empty()
    }

    /// When it is the turn of those who have to pause.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let failing = self.failing.front().map(|(until, _)| *until);
        let paused = self.paused_until.filter(|_| !self.starving.is_empty());
        failing.into_iter().chain(paused).min()
    }

    /// Those who are in some place, each once, are `expected`, in rising order; all have an end to their wait.
    pub(super) fn check(&self, expected: impl Iterator<Item = usize>) -> Result<(), String> {
        let failing = self.failing.iter().map(|(_, id)| id);
        let places = self.ready.iter().chain(&self.starving).chain(failing);
        let mut waiting: Vec<usize> = places.copied().collect();
        waiting.sort_unstable();
        if !expected.eq(waiting.iter().copied()) {
            return Err(format!("{waiting:?} wait to be served, others say so"));
        }
        let sorted = self.failing.iter().is_sorted_by_key(|(until, _)| *until);
        if !sorted || (self.paused_until.is_none() && !self.starving.is_empty()) {
            return Err("published ports wait without an end".into());
        }
        Ok(())
    }
}
