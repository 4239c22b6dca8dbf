//! Readiness of descriptors: a private epoll set (epoll(7)), and tokio's watch over one descriptor, which may go from
//! one thread's runtime to another's.
//!
//! tokio asks for a promise that a watched value keeps its descriptor for as long as it lives. The
//! values that keep it are listed here, by [`Steady`].

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::task::{Context, Poll};

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

/// A value whose descriptor is watched for input by the runtime of the thread that uses it. It may go from thread to
/// thread: [`Watched::leave`] before, [`Watched::settle`] after that.
#[derive(Debug)]
pub struct Watched<T: Steady> {
    /// None where no runtime watches. Before the value: the watch has to end while the descriptor is open.
    watch: Option<AsyncFd<Number>>,
    value: T,
}

/// The number of a descriptor that somebody else keeps open.
#[derive(Debug)]
struct Number(RawFd);

impl AsRawFd for Number {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

impl<T: Steady> Watched<T> {
    /// Watches a value in the runtime of this thread, which there must be.
    ///
    /// # Errors
    /// What `epoll_ctl(2)` reports.
    pub fn new(value: T) -> io::Result<Self> {
        let mut watched = Self { watch: None, value };
        watched.settle()?;
        Ok(watched)
    }

    /// No runtime watches it any more; it can be read from all the same.
    pub fn leave(&mut self) {
        self.watch = None;
    }

    /// Is watched in the runtime of this thread from now on, if it is not by any.
    ///
    /// # Errors
    /// What `epoll_ctl(2)` reports; then nothing has changed.
    pub fn settle(&mut self) -> io::Result<()> {
        if self.watch.is_none() {
            let number = Number(self.value.as_raw_fd());
            // SAFETY: a `Steady` value owns its descriptor, never exchanges it, and keeps it open until it is
            // dropped, which for the one here is after the watch; it is never moved out or replaced.
            let watch = unsafe { AsyncFd::register_with_interest(number, Interest::READABLE) };
            self.watch = Some(watch?);
        }
        Ok(())
    }

    /// The value.
    #[must_use]
    pub const fn get(&self) -> &T {
        &self.value
    }

    /// Has the task woken when there may be input, and says whether there may be some now. Nobody wakes it while no
    /// runtime watches.
    ///
    /// # Errors
    /// When the runtime goes away.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &self.watch {
            Some(watch) => watch
                .poll_read_ready(cx)
                .map_ok(|mut guard| guard.retain_ready()),
            None => Poll::Pending,
        }
    }

    /// Tries to read from it.
    ///
    /// # Errors
    /// `WouldBlock` where nothing is there or was told; else what `read` reports.
    pub fn try_read<R>(
        &mut self,
        look: Look,
        mut read: impl FnMut(&T) -> io::Result<R>,
    ) -> io::Result<R> {
        let value = &self.value;
        match (&mut self.watch, look) {
            (Some(watch), Look::WhenTold) => watch.try_io_mut(Interest::READABLE, |_| read(value)),
            (Some(_), Look::Anyway) | (None, _) => read(value),
        }
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
