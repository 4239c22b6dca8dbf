//! How often the gateway lets something be: token buckets.
//!
//! Comes in: the time. Goes out: whether one more is granted now. There is one for errors that are told (RFC 4443 2.4 f,
//! RFC 1812 4.3.2.8): who floods hears of a part; who makes a mistake, or looks for a path, hears of every one. Another
//! is for connections that the guest remembers after their end.

use crate::net::Instant;

/// Errors that may be told at once.
const ERRORS: i64 = 500;
/// Time after which another may be told: a thousand a second in the long run.
const ERROR_MICROS: i64 = 1000;

/// Connections that a guest's kernel may come to hold in TIME-WAIT at once, and twice as many in the end: few beside the
/// 28,232 ports that it may use towards one server (ip(7), `ip_local_port_range`), of which it takes every other one first.
const WAITS: i64 = 1024;
/// Time after which there may be another: as many a minute, which is how long Linux keeps one (`TCP_TIMEWAIT_LEN`).
const WAIT_MICROS: i64 = 60_000_000 / WAITS;

/// A limit on how often.
#[derive(Debug)]
pub struct Rate {
    /// Time after which another is granted, in microseconds.
    interval: i64,
    /// Time in which an empty bucket fills, in microseconds.
    span: i64,
    /// When the bucket will be, or was, full again, in microseconds.
    full_at: i64,
}

impl Rate {
    /// That of errors, for one of so many that are to tell no more together than one would.
    #[must_use]
    pub fn of_errors(count: usize) -> Self {
        Self::shared(ERRORS, ERROR_MICROS, count)
    }

    /// That of connections which the guest may remember, for one of so many.
    #[must_use]
    pub fn of_waits(count: usize) -> Self {
        Self::shared(WAITS, WAIT_MICROS, count)
    }

    fn shared(burst: i64, micros: i64, count: usize) -> Self {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        Self {
            interval: micros.saturating_mul(count),
            span: burst * micros,
            full_at: 0,
        }
    }

    /// Takes one, if there is one to take.
    pub fn take(&mut self, now: Instant) -> bool {
        let now = now.total_micros();
        let next = self.full_at.max(now).saturating_add(self.interval);
        let granted = next - now <= self.span;
        if granted {
            self.full_at = next;
        }
        granted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn granted(rate: &mut Rate, millis: i64) -> usize {
        let now = Instant::from_millis(millis);
        (0..5000).filter(|_| rate.take(now)).count()
    }

    #[test]
    fn bursts_pass_and_floods_are_thinned() {
        let mut rate = Rate::of_errors(1);
        let told = [0, 0, 10, 100_000].map(|at| granted(&mut rate, at));
        assert_eq!(told, [500, 0, 10, 500]);
        assert_eq!(granted(&mut Rate::of_errors(2), 0), 250);
    }

    #[test]
    fn a_crowd_is_remembered_in_part() {
        let mut rate = Rate::of_waits(1);
        let remembered = [0, 0, 1_000, 100_000].map(|at| granted(&mut rate, at));
        assert_eq!(remembered, [1024, 0, 17, 1024]);
    }
}
