//! What a panic says, as a line of the log: at most as often as any other kind, and waiting for nobody.
//!
//! Comes in: panics of any thread. Goes out: a line for each. Where it is the log that panics the runtime's own words go to
//! standard error.

use std::panic::{self, PanicHookInfo};

use super::SPEAKS;

/// From now on panics are told in the log.
pub(super) fn tell() {
    let runtimes = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        if SPEAKS.get() {
            runtimes(panic);
        } else {
            say(panic);
        }
    }));
}

fn say(panic: &PanicHookInfo<'_>) {
    let payload = panic.payload();
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    let what = text.unwrap_or("?");
    match panic.location() {
        Some(at) => tracing::error!(%at, what, "panicked"),
        None => tracing::error!(what, "panicked"),
    }
}
