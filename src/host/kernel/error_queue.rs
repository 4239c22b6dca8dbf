//! What the network reports about packets that were sent: the kernel's error queues (ip(7),
//! `IP_RECVERR`; ipv6(7), `IPV6_RECVERR`).
//!
//! Comes in: a socket. Goes out: a [`QueuedError`], ready to be passed on to the guest.

use std::io::IoSliceMut;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrLike, recvmsg, setsockopt,
    sockopt,
};

use crate::host::QueuedError;
use crate::net::emit::IcmpError;

/// Has a socket keep what the network reports, or not.
pub(super) fn keep_errors<F: AsFd>(socket: &F, ipv6: bool, keep: bool) -> nix::Result<()> {
    if ipv6 {
        setsockopt(socket, sockopt::Ipv6RecvErr, &keep)
    } else {
        setsockopt(socket, sockopt::Ipv4RecvErr, &keep)
    }
}

/// Takes the next entry off a socket's error queue; the original payload is written to `bytes`.
/// Entries that say nothing about the network are passed over.
pub(super) fn next_error<F: AsRawFd>(
    socket: &F,
    ipv6: bool,
    bytes: &mut [u8],
) -> Option<QueuedError> {
    if ipv6 {
        next_of_family::<SockaddrIn6>(socket, bytes)
    } else {
        next_of_family::<SockaddrIn>(socket, bytes)
    }
}

fn next_of_family<A: SockaddrLike + Into<Destination>>(
    socket: &impl AsRawFd,
    bytes: &mut [u8],
) -> Option<QueuedError> {
    loop {
        // Beside the error: the marks and the address that a socket may have asked for.
        let mut control = nix::cmsg_space!(
            libc::sock_extended_err,
            libc::sockaddr_in6,
            libc::in6_pktinfo,
            libc::c_int,
            libc::c_int
        );
        let mut vector = [IoSliceMut::new(bytes)];
        let message = recvmsg::<A>(
            socket.as_raw_fd(),
            &mut vector,
            Some(&mut control),
            MsgFlags::MSG_ERRQUEUE,
        )
        .ok()?;
        let quoted = message.bytes;
        let reported = message
            .cmsgs()
            .ok()
            .and_then(|mut all| all.find_map(|m| reported(&m)));
        let destination: Option<Destination> = message.address.map(Into::into);
        let (Some((error, reporter)), Some(Destination(destination))) = (reported, destination)
        else {
            continue;
        };
        return Some(QueuedError {
            error,
            reporter,
            destination,
            quoted,
        });
    }
}

/// Where a packet was sent to, out of the address of an entry.
struct Destination(SocketAddr);

impl From<SockaddrIn> for Destination {
    fn from(addr: SockaddrIn) -> Self {
        Self(SocketAddr::from((addr.ip(), addr.port())))
    }
}

impl From<SockaddrIn6> for Destination {
    fn from(addr: SockaddrIn6) -> Self {
        Self(SocketAddrV6::new(addr.ip(), addr.port(), 0, addr.scope_id()).into())
    }
}

/// The ICMP error in a control message, and who reported it.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "of nix's forty kinds of message two are asked for"
)]
fn reported(message: &ControlMessageOwned) -> Option<(IcmpError, Option<IpAddr>)> {
    match message {
        ControlMessageOwned::Ipv4RecvErr(err, offender) => {
            let reporter =
                offender.map(|addr| Ipv4Addr::from(u32::from_be(addr.sin_addr.s_addr)).into());
            extended_error(err).map(|error| (error, reporter.filter(|_| !is_local(err))))
        }
        ControlMessageOwned::Ipv6RecvErr(err, offender) => {
            let reporter = offender.map(|addr| Ipv6Addr::from(addr.sin6_addr.s6_addr).into());
            extended_error(err).map(|error| (error, reporter.filter(|_| !is_local(err))))
        }
        // Nothing else is about errors.
        _ => None,
    }
}

const fn is_local(err: &libc::sock_extended_err) -> bool {
    err.ee_origin == libc::SO_EE_ORIGIN_LOCAL
}

/// Translates `struct sock_extended_err` (linux/errqueue.h).
fn extended_error(err: &libc::sock_extended_err) -> Option<IcmpError> {
    match err.ee_origin {
        // The second word of the ICMP header is the MTU for "fragmentation needed", else unused.
        libc::SO_EE_ORIGIN_ICMP => Some(IcmpError::Raw(
            err.ee_type,
            err.ee_code,
            err.ee_info & 0xffff,
        )),
        libc::SO_EE_ORIGIN_ICMP6 => Some(IcmpError::Raw(err.ee_type, err.ee_code, err.ee_info)),
        libc::SO_EE_ORIGIN_LOCAL => match i32::try_from(err.ee_errno).unwrap_or(0) {
            libc::EMSGSIZE => Some(IcmpError::TooBig(err.ee_info)),
            libc::EHOSTUNREACH => Some(IcmpError::HostUnreachable),
            libc::ENETUNREACH => Some(IcmpError::NetUnreachable),
            libc::EACCES | libc::EPERM => Some(IcmpError::AdministrativelyProhibited),
            _ => None,
        },
        _ => None,
    }
}
