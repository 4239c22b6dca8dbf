//! What sockets can do and no crate offers: options (ip(7), ipv6(7)), and accept4(2) with the peer's
//! address; and what their errors mean.
//!
//! Comes in: a socket and a value. Goes out: nothing, a socket, or the kernel's error.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use socket2::SockAddr;

/// The system has no descriptor or no memory at this moment, which says nothing of what was asked for.
#[must_use]
pub fn lacks_means(error: &io::Error) -> bool {
    const NUMBERS: [i32; 4] = [libc::EMFILE, libc::ENFILE, libc::ENOBUFS, libc::ENOMEM];
    let number = error.raw_os_error();
    number.is_some_and(|number| NUMBERS.contains(&number))
}

/// Takes one connection from a listener, non-blocking and closed on exec, by one call.
///
/// # Errors
/// `WouldBlock` when there is none, else what accept4(2) reports.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, SockAddr)> {
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let take = |storage: *mut socket2::SockAddrStorage, length| {
        // SAFETY: both pointers are to live memory, the second to the first one's size.
        let number = unsafe { libc::accept4(listener.as_raw_fd(), storage.cast(), length, flags) };
        match number {
            -1 => Err(io::Error::last_os_error()),
            number => Ok(number),
        }
    };
    // SAFETY: where it succeeds, the call has written an address and its length.
    let (number, peer) = unsafe { SockAddr::try_init(take) }?;
    // SAFETY: a fresh descriptor that only we know.
    Ok((unsafe { OwnedFd::from_raw_fd(number) }, peer))
}

/// Lets peeking at a stream begin at the next byte to be received; each look then goes on where the last one ended
/// (socket(7), `SO_PEEK_OFF`; for TCP since Linux 6.9).
///
/// # Errors
/// `EOPNOTSUPP` where the kernel is older.
pub fn peek_from_next(socket: BorrowedFd<'_>) -> io::Result<()> {
    let zero: libc::c_int = 0;
    // SAFETY: the pointer is to a live integer, of the size that is given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const zero).cast(),
            4,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Receives so many bytes of a stream to nowhere (tcp(7), `MSG_TRUNC`); gives how many there were.
///
/// # Errors
/// `WouldBlock` when there are none, else what recv(2) reports.
pub fn discard(socket: BorrowedFd<'_>, len: usize) -> io::Result<usize> {
    let flags = libc::MSG_TRUNC | libc::MSG_DONTWAIT;
    // SAFETY: with this flag TCP writes nothing to the buffer.
    let discarded = unsafe { libc::recv(socket.as_raw_fd(), std::ptr::null_mut(), len, flags) };
    usize::try_from(discarded).map_err(|_| io::Error::last_os_error())
}

/// Has a socket that gets its port from the kernel get one from the first to the last of these, where they are in the
/// namespace's range (ip(7), `IP_LOCAL_PORT_RANGE`; since Linux 6.3, for both families).
///
/// # Errors
/// `ENOPROTOOPT` where the kernel is older.
pub fn limit_ports(socket: BorrowedFd<'_>, [first, last]: [u16; 2]) -> io::Result<()> {
    /// Of linux/in.h.
    const IP_LOCAL_PORT_RANGE: libc::c_int = 51;
    let both = u32::from(last) << 16 | u32::from(first);
    set_integer(
        socket,
        libc::IPPROTO_IP,
        IP_LOCAL_PORT_RANGE,
        both.cast_signed(),
    )
}

/// The window of a TCP connection becomes no larger than this, bytes; what it was limited to before is forgotten (tcp(7),
/// `TCP_WINDOW_CLAMP`).
///
/// # Errors
/// When the descriptor is no TCP socket.
pub fn clamp_window(socket: BorrowedFd<'_>, most: usize) -> io::Result<()> {
    let most = libc::c_int::try_from(most).map_err(io::Error::other)?;
    set_integer(socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, most)
}

/// The least time that a TCP peer's acknowledgement has taken, microseconds; `u32::MAX` where that is not known
/// (`TCP_INFO`, `tcpi_min_rtt` of linux/tcp.h; since Linux 4.6).
///
/// # Errors
/// When the descriptor is no TCP socket; `Unsupported` where the kernel is older.
pub fn least_round_trip(socket: BorrowedFd<'_>) -> io::Result<u32> {
    /// Of `tcpi_min_rtt`.
    const PLACE: usize = 148;
    tcp_info(socket, [PLACE]).map(|[time]| time)
}

/// The peer's system has acknowledged all that was sent (`TCP_INFO`, `tcpi_unacked` and `tcpi_notsent_bytes` of
/// linux/tcp.h; since Linux 4.6).
///
/// # Errors
/// When the descriptor is no TCP socket; `Unsupported` where the kernel is older.
pub fn is_all_acknowledged(socket: BorrowedFd<'_>) -> io::Result<bool> {
    /// Of `tcpi_unacked` and `tcpi_notsent_bytes`.
    const PLACES: [usize; 2] = [24, 144];
    tcp_info(socket, PLACES).map(|numbers| numbers == [0, 0])
}

/// Numbers of 32 bits out of `struct tcp_info`, which only grows at its end.
fn tcp_info<const COUNT: usize>(
    socket: BorrowedFd<'_>,
    places: [usize; COUNT],
) -> io::Result<[u32; COUNT]> {
    /// Its size in Linux 4.6.
    const LEN: usize = 160;
    let mut info = [0; LEN];
    let length = get(socket, (libc::IPPROTO_TCP, libc::TCP_INFO), &mut info)?;
    if places.iter().any(|place| place + 4 > length) {
        return Err(io::ErrorKind::Unsupported.into());
    }
    // Each lies within the array, as has been seen.
    Ok(places.map(|place| {
        info[place..]
            .first_chunk()
            .map_or(0, |four| u32::from_ne_bytes(*four))
    }))
}

/// What a socket does about datagrams above a path's MTU (`IP_MTU_DISCOVER`, `IPV6_MTU_DISCOVER`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathMtu {
    /// They are fragmented, here or on the way. IPv6 is fragmented here alone, so the path's MTU is
    /// learnt: without that, whatever fits the first link and no later one would never arrive.
    Fragment,
    /// They are sent whole and never to be fragmented, whatever is known of the path; above the
    /// interface's MTU they fail with `EMSGSIZE`.
    Probe,
}

/// Decides about datagrams above a path's MTU.
///
/// # Errors
/// When the descriptor is no socket of that family.
pub fn set_path_mtu(socket: BorrowedFd<'_>, ipv6: bool, way: PathMtu) -> io::Result<()> {
    let (level, option, value) = match (ipv6, way) {
        (false, PathMtu::Fragment) => (
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            libc::IP_PMTUDISC_DONT,
        ),
        (false, PathMtu::Probe) => (
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            libc::IP_PMTUDISC_PROBE,
        ),
        (true, PathMtu::Fragment) => (
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_WANT,
        ),
        (true, PathMtu::Probe) => (
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_PROBE,
        ),
    };
    set_integer(socket, level, option, value)
}

/// Reads an option, as far as it fits; gives its length.
fn get(
    socket: BorrowedFd<'_>,
    (level, option): (libc::c_int, libc::c_int),
    value: &mut [u8],
) -> io::Result<usize> {
    let mut length = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the pointers are to live memory, the first of the length that the second gives.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            option,
            value.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    usize::try_from(length).map_err(io::Error::other)
}

fn set_integer(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<libc::c_int>()).map_err(io::Error::other)?;
    // SAFETY: the pointer is to a live integer of the length given, which the call reads.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            length,
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    #[test]
    fn both_ways_are_taken() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        for way in [PathMtu::Probe, PathMtu::Fragment] {
            set_path_mtu(socket.as_fd(), false, way).unwrap();
        }
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(set_path_mtu(null.as_fd(), false, PathMtu::Probe).is_err());
    }
}
