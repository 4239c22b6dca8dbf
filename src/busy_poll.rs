//! How long the loop looks for more before it sleeps.
//!
//! Comes in: how long the loop slept. Goes out: how long to look before it does so again. An answer that
//! takes 20 us costs far more when a processor has to be woken for it: where pauses are short, looking
//! is cheaper than sleeping. The window grows while that holds and shrinks where it does not, so a loop
//! with little to do sleeps at once; the loop asks only where little was carried (the way of KVM's `halt_poll_ns`, Documentation/virt/kvm/halt-polling.rst).

use std::time::Duration;

/// The first window.
const START: Duration = Duration::from_micros(10);

/// The window before a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BusyPoll {
    longest: Duration,
    window: Duration,
}

impl BusyPoll {
    /// No window is longer than `longest`; zero switches it off.
    #[must_use]
    pub const fn new(longest: Duration) -> Self {
        Self {
            longest,
            window: Duration::ZERO,
        }
    }

    /// How long to look before sleeping.
    #[must_use]
    pub const fn window(&self) -> Duration {
        self.window
    }

    /// Something came after the window was over and so much more.
    pub fn slept(&mut self, time: Duration) {
        let pause = self.window + time;
        let start = START.min(self.longest);
        self.window = if pause <= self.longest {
            (self.window * 2).clamp(start, self.longest)
        } else if self.window > start {
            self.window / 2
        } else {
            Duration::ZERO
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_micros(50);

    #[test]
    fn short_pauses_open_the_window_and_long_ones_close_it() {
        let mut poll = BusyPoll::new(LONGEST);
        assert_eq!(poll.window(), Duration::ZERO, "at rest it sleeps at once");
        let mut after = |asleep| {
            poll.slept(Duration::from_micros(asleep));
            poll.window().as_micros()
        };
        assert_eq!([45, 35, 25, 5].map(&mut after), [10, 20, 40, 50]);
        // Looking for 50 us and sleeping for 1 more is too long.
        assert_eq!([1, 1_000, 1_000, 1_000].map(after), [25, 12, 6, 0]);
    }

    #[test]
    fn zero_switches_it_off() {
        let mut poll = BusyPoll::new(Duration::ZERO);
        for pause in [0, 1, 100] {
            poll.slept(Duration::from_micros(pause));
            assert_eq!(poll.window(), Duration::ZERO);
        }
    }
}
