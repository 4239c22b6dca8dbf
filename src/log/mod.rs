//! What the program says about itself: lines on standard error, of which no kind may flood and none may be
//! waited for.
//!
//! Comes in: events of `tracing`. Goes out: lines, at most ten a second of a kind (`src/log/limits.rs`), to a
//! descriptor that whoever reads it can't make the loop wait for (`src/log/sink.rs`). What was left out or lost is told by
//! a field of the next line: `left_out`, lines of the same kind, and `lost`, lines of any kind.

mod limits;
mod panics;
mod sink;

use std::cell::Cell;
use std::fmt;
use std::io::{self, IsTerminal, Stderr, Write};
use std::sync::{LazyLock, Mutex, PoisonError};

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use limits::{Limits, Verdict};
use sink::Sink;

/// How lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl LogFormat {
    /// Adds a field to a line that ends with its newline.
    fn add_field(self, line: &mut String, name: &str, value: u64) {
        let end = match self {
            Self::Text => "\n",
            Self::Json => "}\n",
        };
        line.truncate(line.strip_suffix(end).map_or(line.len(), str::len));
        line.push_str(&match self {
            Self::Text => format!(" {name}={value}"),
            Self::Json => format!(r#","{name}":{value}"#),
        });
        line.push_str(end);
    }
}

/// There is one standard error and one log, whatever thread speaks.
static SINK: LazyLock<Mutex<Sink<Stderr>>> = LazyLock::new(|| Mutex::new(Sink::new(io::stderr())));
static LIMITS: LazyLock<Mutex<Limits>> = LazyLock::new(Mutex::default);

thread_local! {
    /// This thread is within the log.
    static SPEAKS: Cell<bool> = const { Cell::new(false) };
}

/// Has something of the log's for a moment. A thread that panicked left nothing behind that the next could not use.
fn with<T, R>(shared: &Mutex<T>, act: impl FnOnce(&mut T) -> R) -> R {
    let spoke = SPEAKS.replace(true);
    let outcome = act(&mut shared.lock().unwrap_or_else(PoisonError::into_inner));
    SPEAKS.set(spoke);
    outcome
}

/// Starts the log: `verbose` is how much more than warnings is said.
pub fn start(verbose: u8, format: LogFormat) {
    let level = match verbose {
        0 => Level::WARN,
        1 => Level::INFO,
        2 => Level::DEBUG,
        _ => Level::TRACE,
    };
    LazyLock::force(&SINK);
    panics::tell();
    let lines = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(io::stderr().is_terminal())
        // What is said about a log that can't be written would go to the same place.
        .log_internal_errors(false)
        .with_writer(Lines(format));
    match format {
        LogFormat::Text => lines
            .map_event_format(|inner| Limited { inner, format })
            .init(),
        LogFormat::Json => {
            let lines = lines.json();
            lines
                .map_event_format(|inner| Limited { inner, format })
                .init();
        }
    }
}

/// Takes a description of standard error that is this process's alone, where there can be one. For the process
/// that carries packets, while files can still be opened.
pub fn detach() {
    with(&SINK, Sink::detach);
}

/// The last word of this process: what was left out and lost and not yet told.
pub fn end() {
    let untold = with(&LIMITS, Limits::end);
    for (kind, left_out) in untold {
        tracing::warn!(kind, left_out, "more of these lines were left out");
    }
    if with(&SINK, |sink| sink.lost()) > 0 {
        tracing::warn!("lines were lost: nobody read them");
    }
}

/// Formats what its kind may still say.
struct Limited<F> {
    inner: F,
    format: LogFormat,
}

impl<S, N, F> FormatEvent<S, N> for Limited<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    #[expect(
        clippy::disallowed_methods,
        reason = "ten lines a second are counted by the clock, the same for all threads"
    )]
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let now = std::time::Instant::now();
        let verdict = with(&LIMITS, |limits| limits.ask(event.metadata(), now));
        match verdict {
            // A line without a byte is not written.
            Verdict::LeaveOut => Ok(()),
            Verdict::Say { left_out: 0 } => self.inner.format_event(ctx, writer, event),
            Verdict::Say { left_out } => {
                let mut line = String::new();
                self.inner
                    .format_event(ctx, Writer::new(&mut line), event)?;
                self.format.add_field(&mut line, "left_out", left_out);
                writer.write_str(&line)
            }
        }
    }
}

/// Where `tracing_subscriber` writes lines to, one a call.
struct Lines(LogFormat);

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        Self(self.0)
    }
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        with(&SINK, |sink| sink.write(line, self.0));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_added_in_the_formats_own_way() {
        let mut line = "WARN tapgate: what=1\n".to_owned();
        LogFormat::Text.add_field(&mut line, "left_out", 3);
        assert_eq!(line, "WARN tapgate: what=1 left_out=3\n");
        let mut line = "{\"fields\":{\"a\":{}}}\n".to_owned();
        LogFormat::Json.add_field(&mut line, "lost", 4);
        LogFormat::Json.add_field(&mut line, "left_out", 3);
        let read: serde_json::Value = serde_json::from_str(&line).unwrap();
        let expected = serde_json::json!({"fields": {"a": {}}, "lost": 4, "left_out": 3});
        assert_eq!(read, expected);
        assert!(line.ends_with("}\n"));
    }
}
