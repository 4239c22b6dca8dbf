//! What a panic says, as a line of the log: at most as often as any other kind, and waiting for nobody.
//!
//! Comes in: panics of any thread. Goes out: a line for each. Where the log itself may be what panicked the runtime's own
//! words go to standard error.

use std::panic::{self, PanicHookInfo};
use std::sync::{Mutex, TryLockError};

use super::{LIMITS, SINK};

/// From now on panics are told in the log.
pub(super) fn tell() {
    let runtimes = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        if is_free(&SINK) && is_free(&LIMITS) {
            say(panic);
        } else {
            runtimes(panic);
        }
    }));
}

/// Whoever holds it may be who panics.
fn is_free<T>(shared: &Mutex<T>) -> bool {
    !matches!(shared.try_lock(), Err(TryLockError::WouldBlock))
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
