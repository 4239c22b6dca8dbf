//! The kernel's pipes between two TCP sockets (splice(2)): bytes move by reference, not by copy.
//!
//! Owns the pipes that nobody needs at the moment. A pipe is needed only while something is in it, so
//! thousands of connections at rest share a few. All pipes of a user count against one soft limit of pages
//! (pipe(7), `pipe-user-pages-soft`), hence only a few are made larger than they come.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;

use super::stream::KernelTcp;
use crate::host::{Pipe, TcpSocket};
use crate::sys::reserve::Reserve;

/// Bytes of a large pipe. Measured on Linux 6.18, processor seconds for a gigabyte over those at this size: at 256 KiB 1.1
/// times, at 1 MiB the same; at the default of 64 KiB far more.
const LARGE: i32 = 512 * 1024;
/// Large pipes of all workers at once: at most a quarter of what a user's pipes may have together by default.
const MOST_LARGE: usize = 32;
/// Pipes that are kept for the next to need one.
const MOST_IDLE: usize = 16;
/// Bytes that are asked for at once: more than any pipe holds.
const ALL: usize = 1 << 30;
/// Bytes that are copied at once where the kernel can't pass them by reference; any pipe holds these.
const COPIED: usize = 4096;

/// A pipe.
#[derive(Debug)]
pub struct KernelPipe {
    read: OwnedFd,
    write: OwnedFd,
    held: usize,
    /// Counts it among the large ones for as long as it lives.
    _large: Option<Arc<()>>,
}

impl KernelPipe {
    /// Urgent data stop every way of taking data by reference (tcp_read_sock in net/ipv4/tcp.c).
    fn copy(&mut self, from: &mut KernelTcp) -> io::Result<usize> {
        let mut bytes = [0; COPIED];
        let len = from.recv(&mut bytes)?;
        if len > 0 {
            nix::unistd::write(&self.write, &bytes[..len])?;
        }
        Ok(len)
    }
}

impl Pipe<KernelTcp> for KernelPipe {
    fn fill(&mut self, from: &mut KernelTcp, urgent: bool) -> io::Result<usize> {
        let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
        let taken = splice(&*from, None, &self.write, None, ALL, flags).map_err(io::Error::from);
        let len = match taken {
            Err(error) if urgent && error.kind() == io::ErrorKind::WouldBlock => self.copy(from)?,
            // The kernel says so as well where urgent data wait before the end of the stream.
            Ok(0) => self.copy(from)?,
            taken => taken?,
        };
        self.held += len;
        Ok(len)
    }

    fn drain(&mut self, to: &mut KernelTcp) -> io::Result<usize> {
        let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
        match splice(&self.read, None, &*to, None, self.held, flags)? {
            // It would be asked for ever.
            0 => Err(io::ErrorKind::WriteZero.into()),
            len => {
                self.held -= len;
                Ok(len)
            }
        }
    }

    fn held(&self) -> usize {
        self.held
    }
}

/// Pipes for all connections.
#[derive(Debug)]
pub(super) struct Pipes {
    idle: Vec<KernelPipe>,
    large: Arc<()>,
    most_large: usize,
}

impl Pipes {
    /// The pipes of one of so many workers.
    pub(super) fn new(workers: usize) -> Self {
        Self {
            idle: Vec::new(),
            large: Arc::default(),
            most_large: MOST_LARGE / workers.max(1),
        }
    }

    /// A pipe that was given back, or a new one.
    pub(super) fn take(&mut self) -> io::Result<KernelPipe> {
        if let Some(pipe) = self.idle.pop() {
            return Ok(pipe);
        }
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        // One more than there are.
        let room = Arc::strong_count(&self.large) <= self.most_large;
        // A refusal costs speed alone.
        let large = room && fcntl(&write, FcntlArg::F_SETPIPE_SZ(LARGE)).is_ok();
        Ok(KernelPipe {
            read,
            write,
            held: 0,
            _large: large.then(|| Arc::clone(&self.large)),
        })
    }

    /// Keeps an empty pipe, unless its descriptors are of the reserve.
    pub(super) fn put(&mut self, pipe: KernelPipe, reserve: Reserve) {
        let scarce = reserve.holds(&pipe.read) || reserve.holds(&pipe.write);
        if pipe.held == 0 && self.idle.len() < MOST_IDLE && !scarce {
            self.idle.push(pipe);
        }
    }
}
