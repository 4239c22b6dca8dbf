//! How often the gateway speaks up: a token bucket (RFC 4443 2.4 f, RFC 1812 4.3.2.8).
//!
//! Comes in: the time. Goes out: whether an error may be told now. Who floods hears of a part; who
//! makes a mistake, or looks for a path, hears of every one.

use crate::net::Instant;

/// Errors that may be told at once.
const BURST: i64 = 500;
/// Time after which another may be told: a thousand a second in the long run.
const INTERVAL_MICROS: i64 = 1000;

/// A limit on errors.
#[derive(Debug)]
pub struct ErrorRate {
    /// Time after which another may be told, in microseconds.
    interval: i64,
    /// When the bucket will be, or was, full again, in microseconds.
    full_at: i64,
}

impl ErrorRate {
    /// One of so many that are to tell no more together than one would.
    #[must_use]
    pub fn shared(count: usize) -> Self {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        Self {
            interval: INTERVAL_MICROS.saturating_mul(count),
            full_at: 0,
        }
    }

    /// Takes one, if there is one to take.
    pub fn take(&mut self, now: Instant) -> bool {
        let now = now.total_micros();
        let next = self.full_at.max(now).saturating_add(self.interval);
        let granted = next - now <= BURST * INTERVAL_MICROS;
        if granted {
            self.full_at = next;
        }
        granted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bursts_pass_and_floods_are_thinned() {
        let mut rate = ErrorRate::shared(1);
        let mut told = |millis: i64| {
            (0..1000)
                .filter(|_| rate.take(Instant::from_millis(millis)))
                .count()
        };
        assert_eq!(told(0), 500);
        assert_eq!(told(0), 0);
        assert_eq!(told(10), 10);
        assert_eq!(told(100_000), 500);
        let mut half = ErrorRate::shared(2);
        let told = (0..1000).filter(|_| half.take(Instant::ZERO)).count();
        assert_eq!(told, 250);
    }
}
