//! Signals for async code.
//!
//! Comes in: a [`SignalSource`]. Goes out: one signal at a time, as it arrives.

use std::io;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys::readiness::watch;
use crate::sys::signals::{Arrived, SignalSource};

/// Signals for async code.
#[derive(Debug)]
pub struct Signals(AsyncFd<SignalSource>);

impl Signals {
    /// Hands a source to the runtime.
    ///
    /// # Errors
    /// When the runtime has no room.
    pub fn new(source: SignalSource) -> io::Result<Self> {
        watch(source).map(Self)
    }

    /// Waits for the next signal.
    ///
    /// # Errors
    /// When the runtime goes away.
    pub async fn next(&self) -> io::Result<Arrived> {
        self.0
            .async_io(Interest::READABLE, SignalSource::try_next)
            .await
    }
}
