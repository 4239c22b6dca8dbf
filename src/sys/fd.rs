//! Descriptors that come from elsewhere: by number from a caller, or over a socket from a child.
//!
//! Comes in: a number, or a Unix socket (unix(7), `SCM_RIGHTS`). Goes out: owned descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, accept4, recvmsg, sendmsg,
    socketpair,
};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::datagrams::control_messages;

/// Longest message that [`receive`] takes whole, bytes.
pub const MAX_MESSAGE: usize = 8 * 1024;

/// Most descriptors that [`send_all`] puts into a message.
pub const MAX_DESCRIPTORS: usize = 16;

/// Takes over a descriptor that the caller of this program opened and named on the command line.
/// It is closed on exec from now on. A standard stream is handed over as a copy; in its place is
/// `/dev/null`, so that its other end sees when the copy is closed.
///
/// # Errors
/// When the number is no open descriptor.
pub fn adopt(number: RawFd) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: borrowed for the calls below, which fail with EBADF if it is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    if number <= 2 {
        let copy = borrowed.try_clone_to_owned()?;
        let null = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/null")?;
        match number {
            0 => dup2_stdin(null)?,
            1 => dup2_stdout(null)?,
            _ => dup2_stderr(null)?,
        }
        return Ok(copy);
    }
    fcntl(borrowed, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    // SAFETY: the descriptor is open, and whoever passed its number handed it over to us: nothing
    // in this program opened it, so nothing else here owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Closes every descriptor that the caller of this program left open, but for the standard streams and
/// those that the command line names. To be called before this program opens any.
///
/// # Errors
/// On kernels before 5.9 that have no `/proc` mounted.
pub fn close_all_but(named: &[RawFd]) -> io::Result<()> {
    for (first, last) in ranges_without(3, named) {
        close_range(first, last)?;
    }
    Ok(())
}

/// The ranges of descriptors from `first` on that leave these out.
fn ranges_without(first: u32, kept: &[RawFd]) -> Vec<(u32, u32)> {
    let numbers = kept.iter().filter_map(|number| u32::try_from(*number).ok());
    let mut kept: Vec<u32> = numbers.filter(|number| *number >= first).collect();
    kept.sort_unstable();
    let mut ranges = Vec::new();
    let mut next = first;
    for number in kept {
        if number > next {
            ranges.push((next, number - 1));
        }
        next = number + 1;
    }
    ranges.push((next, u32::MAX));
    ranges
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    if close_numbers(first, last).is_ok() {
        return Ok(());
    }
    let within = |number: &RawFd| {
        u32::try_from(*number).is_ok_and(|number| (first..=last).contains(&number))
    };
    let open: Vec<RawFd> = inherited()?.into_iter().filter(within).collect();
    close_inherited(&open);
    Ok(())
}

fn close_numbers(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: three integers. By the contract of the callers nothing in this program owns a descriptor of
    // theirs yet, or whatever does is never looked at again, so none is closed under somebody's hands.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The descriptors beside the standard streams that were open before this program opened any. To be
/// asked first of all.
///
/// # Errors
/// When no `/proc` is mounted.
pub fn inherited() -> io::Result<Vec<RawFd>> {
    let entries = std::fs::read_dir("/proc/self/fd")?;
    let numbers = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut numbers: Vec<RawFd> = numbers.filter(|number| *number > 2).collect();
    // The one that reads the directory is among them, and closed by now.
    numbers.retain(|number| is_open(*number));
    Ok(numbers)
}

fn is_open(number: RawFd) -> bool {
    // SAFETY: borrowed for the one call below, which fails with EBADF if it is not open.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(borrowed, FcntlArg::F_GETFD).is_ok()
}

/// Closes every descriptor but these, the standard streams included.
///
/// # Errors
/// On kernels before 5.9.
pub fn keep_only(sockets: Vec<UnixStream>) -> io::Result<Vec<UnixStream>> {
    let kept: Vec<RawFd> = sockets.iter().map(AsRawFd::as_raw_fd).collect();
    for (first, last) in ranges_without(0, &kept) {
        close_numbers(first, last)?;
    }
    Ok(sockets)
}

/// Whether something can be written to a descriptor.
#[must_use]
pub fn is_writable(descriptor: BorrowedFd<'_>) -> bool {
    fcntl(descriptor, FcntlArg::F_GETFL)
        .map(OFlag::from_bits_retain)
        .is_ok_and(|flags| flags & OFlag::O_ACCMODE != OFlag::O_RDONLY)
}

/// Closes what [`inherited`] told of.
pub fn close_inherited(numbers: &[RawFd]) {
    for number in numbers {
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
    send_all(socket, bytes, descriptor.map_or(&[], std::slice::from_ref))
}

/// [`send`] with several descriptors, at most [`MAX_DESCRIPTORS`].
///
/// # Errors
/// What `sendmsg(2)` reports; `InvalidInput` for too many.
pub fn send_all(socket: &UnixStream, bytes: &[u8], descriptors: &[OwnedFd]) -> io::Result<()> {
    let mut raw = [-1; MAX_DESCRIPTORS];
    let rights = raw
        .get_mut(..descriptors.len())
        .ok_or(io::ErrorKind::InvalidInput)?;
    for (number, descriptor) in rights.iter_mut().zip(descriptors) {
        *number = descriptor.as_raw_fd();
    }
    let control = [ControlMessage::ScmRights(rights)];
    let control = if descriptors.is_empty() {
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
    receive_all(socket, bytes).map(|mut received| received.pop())
}

/// Receives what [`send_all`] sent.
///
/// # Errors
/// What `recvmsg(2)` reports.
pub fn receive_all(socket: &UnixStream, bytes: &mut Vec<u8>) -> io::Result<Vec<OwnedFd>> {
    receive_with(socket, bytes, MsgFlags::empty())
}

/// [`receive`] without waiting.
///
/// # Errors
/// `WouldBlock` when there is nothing yet.
pub fn try_receive(socket: &UnixStream, bytes: &mut Vec<u8>) -> io::Result<Option<OwnedFd>> {
    try_receive_all(socket, bytes).map(|mut received| received.pop())
}

/// [`receive_all`] without waiting.
///
/// # Errors
/// `WouldBlock` when there is nothing yet.
pub fn try_receive_all(socket: &UnixStream, bytes: &mut Vec<u8>) -> io::Result<Vec<OwnedFd>> {
    receive_with(socket, bytes, MsgFlags::MSG_DONTWAIT)
}

fn receive_with(
    socket: &UnixStream,
    bytes: &mut Vec<u8>,
    flags: MsgFlags,
) -> io::Result<Vec<OwnedFd>> {
    bytes.resize(MAX_MESSAGE, 0);
    let mut control = nix::cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let mut vector = [IoSliceMut::new(bytes)];
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut vector, Some(&mut control), flags)?;
    let len = message.bytes;
    bytes.truncate(len);
    // Where our own descriptors run out the kernel gives some and says that the message was cut short
    // (unix(7), MSG_CTRUNC). Those are open and must have an owner, so nix's reader, which gives none, won't do.
    let rights = control_messages(&control)
        .filter(|it| (it.level, it.kind) == (libc::SOL_SOCKET, libc::SCM_RIGHTS));
    let numbers = rights.flat_map(|it| it.data.as_chunks().0);
    let owned = numbers.map(|number| {
        // SAFETY: the kernel installed this descriptor for this message and nobody else has been told its
        // number; the buffer was zeroes before, so nothing else looks like one.
        unsafe { OwnedFd::from_raw_fd(RawFd::from_ne_bytes(*number)) }
    });
    Ok(owned.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_in_no_range() {
        assert_eq!(ranges_without(3, &[]), [(3, u32::MAX)]);
        let ranges = ranges_without(3, &[1, 9, 3, -1, 5, 6]);
        assert_eq!(ranges, [(4, 4), (7, 8), (10, u32::MAX)]);
        assert_eq!(ranges_without(0, &[2]), [(0, 1), (3, u32::MAX)]);
    }
}
