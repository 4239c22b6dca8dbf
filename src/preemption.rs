//! Whether this thread takes the processor, when something wakes it, from whoever has it.
//!
//! Comes in: what the last turn carried. Goes out: the thread's scheduling policy. A thread of `SCHED_OTHER` that wakes
//! may interrupt the one that runs; one of `SCHED_BATCH` waits until that one sleeps or a tick ends its time (sched(7),
//! `wakeup_preempt_fair` of kernel/sched/fair.c). Where the kernel itself carries bulk, each interruption finds a few
//! bytes that the running client has just written, and waiting finds many. A policy that somebody chose before the start
//! is left alone.

use crate::sys::process;

/// How soon a thread wants the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// Nothing tells.
    Unknown,
    /// What it does next can wait for who runs now.
    Later,
    /// Somebody waits for an answer.
    AtOnce,
}

/// What is known of a thread's policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preemption {
    gives_way: bool,
    /// Nobody else chose a policy, and none was refused.
    ours: bool,
}

impl Preemption {
    /// Of the calling thread, and of those that it starts.
    #[must_use]
    pub fn of_this_thread() -> Self {
        Self {
            gives_way: false,
            ours: process::is_scheduled_as_any(),
        }
    }

    /// It takes the processor from nobody at present.
    #[must_use]
    pub const fn gives_way(&self) -> bool {
        self.gives_way && self.ours
    }

    /// What this thread does next is so urgent.
    pub fn set(&mut self, urgency: Urgency) {
        let gives_way = urgency == Urgency::Later;
        if gives_way == self.gives_way || !self.ours {
            return;
        }
        self.gives_way = gives_way;
        if let Err(error) = process::schedule_as_batch(gives_way) {
            tracing::debug!(%error, gives_way, "scheduling policy stays");
            self.ours = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_can_wait_gives_way() {
        let mut preemption = Preemption::of_this_thread();
        assert!(process::is_scheduled_as_any());
        for (urgency, as_any) in [
            (Urgency::Later, false),
            (Urgency::Later, false),
            (Urgency::AtOnce, true),
            (Urgency::Later, false),
            (Urgency::Unknown, true),
        ] {
            preemption.set(urgency);
            assert_eq!(process::is_scheduled_as_any(), as_any, "{urgency:?}");
        }
    }

    #[test]
    fn a_policy_that_somebody_chose_stays() {
        process::schedule_as_batch(true).expect("everybody may");
        let mut preemption = Preemption::of_this_thread();
        for urgency in [Urgency::AtOnce, Urgency::Later, Urgency::AtOnce] {
            preemption.set(urgency);
            assert!(!process::is_scheduled_as_any(), "{urgency:?}");
        }
    }
}
