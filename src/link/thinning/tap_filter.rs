//! Where the queues of a tap meet: it has one filter for all of them.
//!
//! Owns what each queue lets through of each kind, and when connections carried data last, by whatever queue. Comes in:
//! what one queue changes. Goes out: the filter, which lets through as little of a kind as the strictest of them. It is
//! locked when a queue's part changes alone; whether another queue wants to know of connections is read once in a batch.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{ALL, Instruction, KINDS, filter};

/// The filter of a tap; each of its queues has this.
#[derive(Debug, Clone)]
pub struct TapFilter(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    queues: u64,
    filter: Mutex<Filter>,
    epoch: Instant,
    /// When connections carried data last, microseconds after the epoch and one; 0 is never.
    carried: AtomicU64,
    /// A queue that may have to thin wants to know.
    asked: AtomicBool,
}

#[derive(Debug)]
struct Filter {
    /// The part of each kind that each queue lets through.
    kept: Vec<[u32; KINDS]>,
    /// What the tap does.
    set: [u32; KINDS],
    ended: bool,
}

impl TapFilter {
    /// Of a tap with so many queues, which let everything through.
    #[must_use]
    #[expect(
        clippy::disallowed_methods,
        reason = "any moment will do to count from"
    )]
    pub fn of(queues: usize) -> Self {
        Self(Arc::new(Shared {
            queues: u64::try_from(queues).unwrap_or(u64::MAX),
            filter: Mutex::new(Filter {
                kept: vec![[ALL; KINDS]; queues],
                set: [ALL; KINDS],
                ended: false,
            }),
            epoch: Instant::now(),
            carried: AtomicU64::new(0),
            asked: AtomicBool::new(false),
        }))
    }

    pub(super) fn queues(&self) -> u64 {
        self.0.queues
    }

    fn filter(&self) -> MutexGuard<'_, Filter> {
        // Who panicked has left whole numbers behind.
        self.0.filter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn micros(&self, at: Instant) -> u64 {
        let micros = at.saturating_duration_since(self.0.epoch).as_micros();
        u64::try_from(micros).unwrap_or(u64::MAX - 1) + 1
    }

    /// Who has connections that carry data is to say so.
    pub(super) fn ask(&self) {
        self.0.asked.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_asked(&self) -> bool {
        self.0.asked.load(Ordering::Relaxed)
    }

    /// Connections carry data.
    pub(super) fn note_carried(&self, now: Instant) {
        let now = self.micros(now);
        self.0.carried.fetch_max(now, Ordering::Relaxed);
        self.0.asked.store(false, Ordering::Relaxed);
    }

    /// They did so lately, by any queue.
    pub(super) fn carried_within(&self, time: Duration, now: Instant) -> bool {
        let carried = self.0.carried.load(Ordering::Relaxed);
        let since = self.micros(now).saturating_sub(carried);
        carried > 0 && u128::from(since) < time.as_micros()
    }

    /// A queue lets so much through from now on. Has the filter set, if that is another for all of them, before another
    /// queue changes it.
    ///
    /// # Errors
    /// What `set` reports. The filter is then taken away, and this queue's part left out of account; those of others count
    /// again when one changes.
    pub(super) fn change(
        &self,
        queue: usize,
        kept: [u32; KINDS],
        set: impl Fn(Option<Vec<Instruction>>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut state = self.filter();
        let Some(part) = state.kept.get_mut(queue) else {
            return Ok(());
        };
        *part = kept;
        let least = |kind: usize| state.kept.iter().map(|part| part[kind]).min();
        let least = std::array::from_fn(|kind| least(kind).unwrap_or(ALL));
        if state.ended || least == state.set {
            return Ok(());
        }
        let done = set((least != [ALL; KINDS]).then(|| filter(least)));
        if done.is_ok() {
            match (state.set == [ALL; KINDS], least == [ALL; KINDS]) {
                (true, _) => tracing::info!("the guest floods its network: a part is dropped"),
                (_, true) => tracing::info!("the flood is over: nothing is dropped"),
                (false, false) => {}
            }
            state.set = least;
        } else {
            state.kept[queue] = [ALL; KINDS];
            state.set = [ALL; KINDS];
            // Who can't set one may still take one away; else it stays for as long as we do.
            let _ = set(None);
        }
        done
    }

    /// Has the filter taken away, if there is one; there will be no other.
    pub(super) fn end(&self, clear: impl FnOnce()) {
        let mut state = self.filter();
        let is_set = state.set != [ALL; KINDS];
        if is_set && !state.ended {
            clear();
        }
        state.ended = true;
    }
}
