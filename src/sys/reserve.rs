//! Descriptors that a guest can't use up: for clients of published ports, sockets inside, and the API.
//!
//! The kernel gives a new descriptor the lowest number that is free (open(2)), so a socket's number tells that all
//! below are in use. A socket that a guest has asked for is given up again where its number is among the last ones below
//! the limit. That counts whatever the process has open, in every thread, and costs no call. What clients of published
//! ports use up is bounded in turn: the limit itself (getrlimit(2), `RLIMIT_NOFILE`) stays a little below what it may be,
//! and is raised for the moment in which an API client is let in.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use super::process::limit_descriptors;

/// Descriptors that are kept from guests, where there may be at least four times as many; else a quarter of
/// them all.
const KEPT: u64 = 16;
/// As many of them, a quarter, are kept from everybody but clients of the API.
const SHARE_OF_API: u64 = 4;

/// Which descriptors are for whom.
#[derive(Debug, Clone, Copy)]
pub struct Reserve {
    /// The first number that no guest gets.
    first: RawFd,
    limit: u64,
    /// As far as the limit can be raised.
    most: u64,
}

impl Reserve {
    /// The reserve of a process that may have `most` descriptors, whose limit is set to what it is to
    /// be.
    ///
    /// # Errors
    /// When the limit can't be set.
    pub fn begin(most: u64) -> io::Result<Self> {
        let reserve = Self::of(most);
        limit_descriptors(reserve.limit, most)?;
        Ok(reserve)
    }

    pub(crate) fn of(most: u64) -> Self {
        let kept = KEPT.min(most / 4);
        Self {
            first: RawFd::try_from(most - kept).unwrap_or(RawFd::MAX),
            limit: most - kept / SHARE_OF_API,
            most,
        }
    }

    /// Opens a descriptor where none of the others is left.
    ///
    /// # Errors
    /// What `open` reports; when the limit can't be set.
    pub fn open_last<T>(self, open: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        limit_descriptors(self.most, self.most)?;
        let opened = open();
        limit_descriptors(self.limit, self.most)?;
        opened
    }

    /// A descriptor is of the reserve: only who needs it at this moment may have it.
    #[must_use]
    pub fn holds(self, descriptor: &impl AsRawFd) -> bool {
        descriptor.as_raw_fd() >= self.first
    }

    /// Lets a guest have a new socket.
    ///
    /// # Errors
    /// `EMFILE` where it is of the reserve.
    pub fn for_guest<T: AsRawFd>(self, socket: T) -> io::Result<T> {
        if self.holds(&socket) {
            Err(io::Error::from_raw_os_error(libc::EMFILE))
        } else {
            Ok(socket)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Number(RawFd);

    impl AsRawFd for Number {
        fn as_raw_fd(&self) -> RawFd {
            self.0
        }
    }

    #[test]
    fn the_last_numbers_are_kept() {
        for (most, first, limit) in [
            (1024, 1008, 1020),
            (64, 48, 60),
            (32, 24, 30),
            (0, 0, 0),
            (u64::MAX, RawFd::MAX, u64::MAX - 4),
        ] {
            let reserve = Reserve::of(most);
            assert_eq!((reserve.first, reserve.limit), (first, limit), "{most}");
        }
        let reserve = Reserve::of(64);
        assert!(reserve.for_guest(Number(47)).is_ok());
        let refused = reserve.for_guest(Number(48)).err();
        assert_eq!(refused.and_then(|it| it.raw_os_error()), Some(libc::EMFILE));
    }
}
