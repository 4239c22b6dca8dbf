//! How often each kind of line may be said: ten times in any second. A kind is a place in the code.
//!
//! Comes in: who wants to speak, and when. Goes out: whether it may, and how often it could not since it last did.
//! There are as many kinds as places that log, so nothing here grows by what a guest does.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tracing::Metadata;
use tracing::callsite::Identifier;

/// Lines of a kind in any [`SECOND`].
const MOST: usize = 10;
const SECOND: Duration = Duration::from_secs(1);

/// Whether a line may be said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It may; so many of its kind were left out since the last.
    Say { left_out: u64 },
    /// It may not, and is counted.
    LeaveOut,
}

/// What a kind has said.
#[derive(Debug)]
struct Kind {
    name: &'static str,
    /// When the last lines were said, in a ring; the next to be overwritten is the oldest.
    said: [Option<Instant>; MOST],
    next: usize,
    left_out: u64,
}

/// All kinds that have spoken.
#[derive(Debug, Default)]
pub(super) struct Limits {
    kinds: HashMap<Identifier, Kind>,
    /// What is said now is the end of it.
    ended: bool,
}

impl Limits {
    /// Asks for a line at a place in the code.
    pub(super) fn ask(&mut self, place: &'static Metadata<'static>, now: Instant) -> Verdict {
        if self.ended {
            return Verdict::Say { left_out: 0 };
        }
        let kind = self.kinds.entry(place.callsite()).or_insert(Kind {
            name: place.name(),
            said: [None; MOST],
            next: 0,
            left_out: 0,
        });
        let oldest = kind.said[kind.next];
        if oldest.is_some_and(|oldest| now.duration_since(oldest) < SECOND) {
            kind.left_out += 1;
            return Verdict::LeaveOut;
        }
        kind.said[kind.next] = Some(now);
        kind.next = (kind.next + 1) % MOST;
        Verdict::Say {
            left_out: std::mem::take(&mut kind.left_out),
        }
    }

    /// Limits nothing any more; gives the kinds that had lines left out and not told.
    pub(super) fn end(&mut self) -> Vec<(&'static str, u64)> {
        self.ended = true;
        let kinds = self.kinds.drain().map(|(_, kind)| kind);
        let untold = kinds.filter(|kind| kind.left_out > 0);
        let mut untold: Vec<_> = untold.map(|kind| (kind.name, kind.left_out)).collect();
        untold.sort_unstable();
        untold
    }
}

#[cfg(test)]
#[allow(
    clippy::disallowed_methods,
    reason = "any moment will do to count from"
)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use tracing::subscriber::with_default;
    use tracing::{Event, Subscriber, span};

    /// Notes the place of each event.
    #[derive(Default)]
    struct Places(Mutex<Vec<&'static Metadata<'static>>>);

    impl Subscriber for &'static Places {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }
        fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
            span::Id::from_u64(1)
        }
        fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
        fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
        fn event(&self, event: &Event<'_>) {
            self.0.lock().unwrap().push(event.metadata());
        }
        fn enter(&self, _: &span::Id) {}
        fn exit(&self, _: &span::Id) {}
    }

    /// Two places in the code.
    fn places() -> [&'static Metadata<'static>; 2] {
        let places: &'static Places = Box::leak(Box::default());
        with_default(places, || {
            tracing::warn!("one");
            tracing::warn!("other");
        });
        let seen = places.0.lock().unwrap();
        [seen[0], seen[1]]
    }

    #[test]
    fn in_any_second_a_kind_says_ten_lines() {
        let [one, _] = places();
        let start = Instant::now();
        let mut limits = Limits::default();
        let mut said = Vec::new();
        let mut told = 0;
        for milli in 0..10_000 {
            let now = start + Duration::from_millis(milli);
            if let Verdict::Say { left_out } = limits.ask(one, now) {
                said.push(milli);
                told += left_out;
            }
        }
        assert_eq!(said.len(), 100);
        assert!(said.windows(11).all(|lines| lines[10] - lines[0] >= 1000));
        // The last may follow: nothing else is lost of the count.
        let untold = limits.end().pop().map_or(0, |(_, left_out)| left_out);
        assert_eq!(told + untold + 100, 10_000);
    }

    #[test]
    fn one_kind_does_not_silence_another() {
        let [one, other] = places();
        let now = Instant::now();
        let mut limits = Limits::default();
        for _ in 0..MOST {
            assert_eq!(limits.ask(one, now), Verdict::Say { left_out: 0 });
        }
        assert_eq!(limits.ask(one, now), Verdict::LeaveOut);
        assert_eq!(limits.ask(other, now), Verdict::Say { left_out: 0 });
        let later = now + SECOND;
        assert_eq!(limits.ask(one, later), Verdict::Say { left_out: 1 });
    }

    #[test]
    fn at_the_end_all_is_told() {
        let [one, _] = places();
        let now = Instant::now();
        let mut limits = Limits::default();
        for _ in 0..MOST + 5 {
            limits.ask(one, now);
        }
        let untold = limits.end();
        assert_eq!(untold, [(one.name(), 5)]);
        assert!(untold[0].0.contains("limits.rs"), "it names the place");
        assert_eq!(limits.ask(one, now), Verdict::Say { left_out: 0 });
        assert_eq!(limits.end(), []);
    }
}
