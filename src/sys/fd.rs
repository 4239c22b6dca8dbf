//! Descriptors that come from elsewhere: by number from a caller, or over a socket from a child.
//!
//! Comes in: a number, or a Unix socket (unix(7), `SCM_RIGHTS`). Goes out: owned descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, accept4,
    recvmsg, sendmsg, socketpair,
};

/// Longest message that [`receive`] takes whole, bytes.
pub const MAX_MESSAGE: usize = 8 * 1024;

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

/// The descriptors beside the standard streams that were open before this program opened any. To be
/// asked first of all.
#[must_use]
pub fn inherited() -> Vec<RawFd> {
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else {
        return Vec::new();
    };
    let numbers = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut numbers: Vec<RawFd> = numbers.filter(|number| *number > 2).collect();
    // The one that reads the directory is among them, and closed by now.
    numbers.retain(|number| is_open(*number));
    numbers
}

fn is_open(number: RawFd) -> bool {
    // SAFETY: borrowed for the one call below, which fails with EBADF if it is not open.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_GETFD).is_ok()
}

/// Closes what [`inherited`] told of, but for what the command line names.
pub fn close_inherited(inherited: &[RawFd], named: &[RawFd]) {
    for number in inherited.iter().filter(|number| !named.contains(number)) {
        drop(adopt(*number));
    }
}

/// Takes the next client of a listening Unix socket, non-blocking.
///
/// # Errors
/// What `accept4(2)` reports.
pub fn accept(listener: &impl AsRawFd) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let number = accept4(listener.as_raw_fd(), flags)?;
    // SAFETY: a fresh descriptor that only we know.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Two connected sockets that keep messages apart (unix(7), `SOCK_SEQPACKET`). Each end hears when the
/// other is closed, as an empty message.
///
/// # Errors
/// When no descriptors are left.
pub fn message_pair() -> io::Result<(UnixStream, UnixStream)> {
    let (one, other) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    Ok((one.into(), other.into()))
}

/// Sends a message of at most [`MAX_MESSAGE`] bytes, with a descriptor where there is one.
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
    receive_with(socket, bytes, MsgFlags::empty())
}

/// [`receive`] without waiting.
///
/// # Errors
/// `WouldBlock` when there is nothing yet.
pub fn try_receive(socket: &UnixStream, bytes: &mut Vec<u8>) -> io::Result<Option<OwnedFd>> {
    receive_with(socket, bytes, MsgFlags::MSG_DONTWAIT)
}

fn receive_with(
    socket: &UnixStream,
    bytes: &mut Vec<u8>,
    flags: MsgFlags,
) -> io::Result<Option<OwnedFd>> {
    bytes.resize(MAX_MESSAGE, 0);
    let mut control = nix::cmsg_space!(RawFd);
    let mut vector = [IoSliceMut::new(bytes)];
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
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
