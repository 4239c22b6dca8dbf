//! What the stack says to its log: counted, and by the second of virtual time.
//!
//! In: events of `tracing` in this thread, the time. Out: whether the busiest second stays within bounds.
//! Only what is shown by default counts: warnings and errors.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use tapgate::net::Instant;
use tracing::subscriber::DefaultGuard;
use tracing_subscriber::fmt::MakeWriter;

/// Lines in a second of the same kind or of all: the bound of the issue.
const MOST: usize = 10;

#[derive(Debug, Default)]
struct Lines {
    second: i64,
    count: usize,
    busiest: usize,
    last: String,
}

/// Listens to the log of this thread for as long as it lives.
pub(crate) struct Log {
    lines: Writer,
    _guard: DefaultGuard,
}

impl Log {
    pub(crate) fn listen() -> Self {
        let lines = Writer::default();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::WARN)
            .with_writer(lines.clone())
            .finish();
        Self {
            lines,
            _guard: tracing::subscriber::set_default(subscriber),
        }
    }

    /// The time is now this.
    pub(crate) fn pass(&self, now: Instant) {
        let mut lines = self.lines.0.lock().unwrap();
        let second = now.total_millis() / 1000;
        if second != lines.second {
            (lines.second, lines.count) = (second, 0);
        }
    }

    /// In no second was more said than is allowed.
    pub(crate) fn is_quiet(&self) {
        let lines = self.lines.0.lock().unwrap();
        assert!(
            lines.busiest <= MOST,
            "{} lines in a second, such as {}",
            lines.busiest,
            lines.last
        );
    }
}

#[derive(Debug, Clone, Default)]
struct Writer(Arc<Mutex<Lines>>);

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut lines = self.0.lock().unwrap();
        lines.count += 1;
        lines.busiest = lines.busiest.max(lines.count);
        lines.last = String::from_utf8_lossy(bytes).into_owned();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Writer {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}
