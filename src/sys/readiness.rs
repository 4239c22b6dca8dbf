//! Readiness of descriptors: a private epoll set (epoll(7)), and tokio's watch over one descriptor.
//!
//! tokio asks for a promise that a watched value keeps its descriptor for as long as it lives. The
//! values that keep it are listed here, by [`Steady`].

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::signals::SignalSource;

mod sealed {
    /// Only this file names the values that are steady.
    pub trait Sealed {}
}

/// A value that owns one descriptor and gives the same number as long as it lives.
pub trait Steady: AsRawFd + sealed::Sealed {}

macro_rules! steady {
    ($($name:ty),+) => {
        $(impl sealed::Sealed for $name {}
        impl Steady for $name {})+
    };
}

steady!(OwnedFd, File, SignalSource, EventSet);

/// Lets tokio watch a descriptor for input. Needs a runtime.
///
/// # Errors
/// What `epoll_ctl(2)` reports.
pub fn watch<T: Steady>(value: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: a `Steady` value owns its descriptor, never exchanges it, and keeps it open until it
    // is dropped; it is moved into the `AsyncFd`.
    unsafe { AsyncFd::register_with_interest(value, Interest::READABLE) }.map_err(io::Error::from)
}

/// Whether to believe that nothing is there as long as nothing was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Only where the runtime has told of something: no call is made for nothing.
    WhenTold,
    /// Anyway: the runtime was not asked lately.
    Anyway,
}

/// Tries to read from a watched value.
///
/// # Errors
/// `WouldBlock` where nothing is there or was told; else what `read` reports.
pub fn try_read<T: AsRawFd, R>(
    watched: &mut AsyncFd<T>,
    look: Look,
    mut read: impl FnMut(&mut T) -> io::Result<R>,
) -> io::Result<R> {
    match look {
        Look::WhenTold => watched.try_io_mut(Interest::READABLE, read),
        Look::Anyway => read(watched.get_mut()),
    }
}

/// A private set of descriptors that are watched edge-triggered for input and output.
#[derive(Debug)]
pub struct EventSet(Epoll);

impl EventSet {
    /// An empty set.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?))
    }

    /// Adds a descriptor, which leaves the set by being closed. Urgent data are told of, too.
    ///
    /// # Errors
    /// `ENOSPC` at the limit on watches, `ENOMEM`.
    pub fn add(&self, descriptor: impl AsFd, data: u64) -> io::Result<()> {
        let interest = EpollFlags::EPOLLIN
            | EpollFlags::EPOLLPRI
            | EpollFlags::EPOLLOUT
            | EpollFlags::EPOLLRDHUP
            | EpollFlags::EPOLLET;
        Ok(self.0.add(descriptor, EpollEvent::new(interest, data))?)
    }

    /// Takes what is ready, without waiting.
    ///
    /// # Errors
    /// `EINTR`.
    pub fn take(&self, events: &mut [EpollEvent]) -> io::Result<usize> {
        Ok(self.0.wait(events, EpollTimeout::ZERO)?)
    }
}

impl AsRawFd for EventSet {
    fn as_raw_fd(&self) -> RawFd {
        self.0.0.as_raw_fd()
    }
}
