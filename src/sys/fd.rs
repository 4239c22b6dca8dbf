//! Descriptors that come from elsewhere: by number from a caller, or over a socket from a child.
//!
//! Comes in: a number, or a Unix socket (unix(7), `SCM_RIGHTS`). Goes out: owned descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// Takes over a descriptor that the caller of this program opened and named on the command line.
/// It is closed on exec from now on.
///
/// # Errors
/// When the number is no open descriptor, or is one of the standard streams.
pub fn adopt(number: RawFd) -> io::Result<OwnedFd> {
    if number <= 2 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: borrowed for the one call below, which fails with EBADF if it is not open.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    // SAFETY: the descriptor is open, and whoever passed its number handed it over to us: nothing
    // in this program opened it, so nothing else here owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Sends a message of at most a few kilobytes, with a descriptor where there is one.
///
/// # Errors
/// What `sendmsg(2)` reports.
pub fn send(socket: &UnixStream, bytes: &[u8], descriptor: Option<&OwnedFd>) -> io::Result<()> {
    let raw = descriptor.map(AsRawFd::as_raw_fd);
    let rights = raw.as_slice();
    let control = [ControlMessage::ScmRights(rights)];
    let control = if rights.is_empty() {
        &[][..]
    } else {
        &control[..]
    };
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

/// Receives what [`send`] sent; an empty message means that the other end is gone.
///
/// # Errors
/// What `recvmsg(2)` reports.
pub fn receive(socket: &UnixStream, bytes: &mut Vec<u8>) -> io::Result<Option<OwnedFd>> {
    bytes.resize(4096, 0);
    let mut control = nix::cmsg_space!(RawFd);
    let mut vector = [IoSliceMut::new(bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut vector, Some(&mut control), flags)?;
    let mut received = None;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = control {
            for descriptor in descriptors {
                // SAFETY: the kernel installed this descriptor for this message and nobody else
                // has been told its number.
                received = Some(unsafe { OwnedFd::from_raw_fd(descriptor) });
            }
        }
    }
    let len = message.bytes;
    bytes.truncate(len);
    Ok(received)
}
