//! The kernel's datagram sockets: UDP with its error queue, and ICMP echo ("ping") sockets.
//!
//! Owns nothing but the socket. What the network reports about a datagram (ip(7), `IP_RECVERR`)
//! comes out as a [`QueuedError`], ready to be passed on to the guest.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::num::NonZeroU16;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrLike,
    SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt,
};
use socket2::Socket;

use super::{EchoSocket, QueuedError, UdpSocket, datagrams};
use crate::net::emit::IcmpError;

/// Receive buffer asked for: a burst of a thousand sockets' answers must not be lost while the
/// loop is busy. The kernel caps it at `net.core.rmem_max`.
const RECEIVE_BUFFER: usize = 1 << 20;

/// Bytes of an ICMP echo header.
const ECHO_HEADER: usize = 8;

/// A UDP socket of the kernel.
#[derive(Debug)]
pub struct KernelUdp {
    socket: Socket,
    ipv6: bool,
}

impl KernelUdp {
    pub(super) fn new(socket: Socket, ipv6: bool) -> io::Result<Self> {
        if ipv6 {
            setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
        } else {
            setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
        }
        let _ = socket.set_recv_buffer_size(RECEIVE_BUFFER);
        // A guest may speak to a broadcast address only by name of an ordinary one; the stack
        // never asks for it, so SO_BROADCAST stays off.
        Ok(Self { socket, ipv6 })
    }

    /// Address and port that the socket is bound to.
    ///
    /// # Errors
    /// What `getsockname(2)` reports.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket
            .local_addr()?
            .as_socket()
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Has datagrams say which of the host's addresses they came to (ip(7), `IP_PKTINFO`), so that the
    /// answer leaves from the same; a client takes no other's.
    pub(super) fn note_addresses(&self) -> io::Result<()> {
        if self.ipv6 {
            setsockopt(&self.socket, sockopt::Ipv6RecvPacketInfo, &true)?;
        } else {
            setsockopt(&self.socket, sockopt::Ipv4PacketInfo, &true)?;
        }
        Ok(())
    }
}

/// The address that a datagram came to, as it is to be named in the answer.
fn asked_address(message: &ControlMessageOwned) -> Option<IpAddr> {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "the kernel may say anything else"
    )]
    match message {
        ControlMessageOwned::Ipv4PacketInfo(info) => Some(IpAddr::V4(Ipv4Addr::from(
            info.ipi_spec_dst.s_addr.to_ne_bytes(),
        ))),
        ControlMessageOwned::Ipv6PacketInfo(info) => {
            Some(IpAddr::V6(Ipv6Addr::from(info.ipi6_addr.s6_addr)))
        }
        _ => None,
    }
}

/// Sends. An error that an earlier datagram earned is reported by the next call once; the error queue
/// still has it, and this datagram deserves its own attempt.
fn past_old_errors<T>(mut send: impl FnMut() -> io::Result<T>) -> io::Result<()> {
    match send() {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(error),
        Err(_) => send().map(drop),
    }
}

/// Sends one datagram from one of the host's addresses.
fn send_one(socket: &Socket, from: IpAddr, to: &SockaddrStorage, payload: &[u8]) -> io::Result<()> {
    let vector = [IoSlice::new(payload)];
    let (fd, flags) = (socket.as_raw_fd(), MsgFlags::MSG_NOSIGNAL);
    match from {
        IpAddr::V4(from) => {
            let info = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr {
                    s_addr: u32::from_ne_bytes(from.octets()),
                },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            sendmsg(
                fd,
                &vector,
                &[ControlMessage::Ipv4PacketInfo(&info)],
                flags,
                Some(to),
            )?;
        }
        IpAddr::V6(from) => {
            let info = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr {
                    s6_addr: from.octets(),
                },
                ipi6_ifindex: 0,
            };
            sendmsg(
                fd,
                &vector,
                &[ControlMessage::Ipv6PacketInfo(&info)],
                flags,
                Some(to),
            )?;
        }
    }
    Ok(())
}

impl AsFd for KernelUdp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl UdpSocket for KernelUdp {
    fn send_to(
        &mut self,
        to: SocketAddr,
        payload: &[u8],
        segment: Option<NonZeroU16>,
    ) -> io::Result<()> {
        let to = to.into();
        datagrams(payload, segment)
            .try_for_each(|datagram| past_old_errors(|| self.socket.send_to(datagram, &to)))
    }

    fn recv_from(&mut self, bytes: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        receive(&self.socket, &mut [IoSliceMut::new(bytes)])
    }

    fn recv_asked(&mut self, bytes: &mut [u8]) -> io::Result<(usize, SocketAddr, Option<IpAddr>)> {
        let mut control = nix::cmsg_space!(libc::in6_pktinfo);
        let mut vector = [IoSliceMut::new(bytes)];
        let (fd, flags) = (self.socket.as_raw_fd(), MsgFlags::empty());
        let message = recvmsg::<SockaddrStorage>(fd, &mut vector, Some(&mut control), flags)?;
        let asked = message.cmsgs()?.find_map(|it| asked_address(&it));
        let sender = sender(message.address).ok_or(io::ErrorKind::InvalidData)?;
        Ok((message.bytes, sender, asked))
    }

    fn send_from(
        &mut self,
        asked: Option<IpAddr>,
        to: SocketAddr,
        payload: &[u8],
        segment: Option<NonZeroU16>,
    ) -> io::Result<()> {
        let Some(asked) = asked else {
            return self.send_to(to, payload, segment);
        };
        let to = SockaddrStorage::from(to);
        datagrams(payload, segment).try_for_each(|datagram| {
            past_old_errors(|| send_one(&self.socket, asked, &to, datagram))
        })
    }

    fn queued_error(&mut self, bytes: &mut [u8]) -> Option<QueuedError> {
        if self.ipv6 {
            queued_error::<SockaddrIn6>(&self.socket, bytes)
        } else {
            queued_error::<SockaddrIn>(&self.socket, bytes)
        }
    }
}

/// Receives one datagram and its sender.
fn receive(socket: &Socket, parts: &mut [IoSliceMut<'_>]) -> io::Result<(usize, SocketAddr)> {
    let fd = socket.as_raw_fd();
    let message = recvmsg::<SockaddrStorage>(fd, parts, None, MsgFlags::empty())?;
    let sender = sender(message.address).ok_or(io::ErrorKind::InvalidData)?;
    Ok((message.bytes, sender))
}

fn sender(address: Option<SockaddrStorage>) -> Option<SocketAddr> {
    let address = address?;
    let v4 = address
        .as_sockaddr_in()
        .map(|a| SocketAddr::from((a.ip(), a.port())));
    v4.or_else(|| {
        address
            .as_sockaddr_in6()
            .map(|a| SocketAddrV6::new(a.ip(), a.port(), 0, a.scope_id()).into())
    })
}

/// Takes the next entry off a socket's error queue; entries that say nothing about the network
/// are passed over.
fn queued_error<A: SockaddrLike + Into<Destination>>(
    socket: &Socket,
    bytes: &mut [u8],
) -> Option<QueuedError> {
    loop {
        let mut control = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
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

/// Where a datagram was sent to, out of the address of an error queue entry.
struct Destination(SocketAddr);

impl From<SockaddrIn> for Destination {
    fn from(addr: SockaddrIn) -> Self {
        Self(SocketAddr::from((addr.ip(), addr.port())))
    }
}

impl From<SockaddrIn6> for Destination {
    fn from(addr: SockaddrIn6) -> Self {
        Self(SocketAddr::from((addr.ip(), addr.port())))
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
            extended_error(err).map(|error| (error, reporter))
        }
        ControlMessageOwned::Ipv6RecvErr(err, offender) => {
            let reporter = offender.map(|addr| Ipv6Addr::from(addr.sin6_addr.s6_addr).into());
            extended_error(err).map(|error| (error, reporter))
        }
        // Nothing else was asked for.
        _ => None,
    }
}

/// Translates `struct sock_extended_err` (linux/errqueue.h).
fn extended_error(err: &libc::sock_extended_err) -> Option<IcmpError> {
    match err.ee_origin {
        libc::SO_EE_ORIGIN_ICMP => {
            // The second word of the ICMP header is the MTU for "fragmentation needed", else unused.
            Some(IcmpError::Raw(
                err.ee_type,
                err.ee_code,
                err.ee_info & 0xffff,
            ))
        }
        libc::SO_EE_ORIGIN_LOCAL => match i32::try_from(err.ee_errno).unwrap_or(0) {
            libc::EMSGSIZE => Some(IcmpError::FragmentationNeeded(
                u16::try_from(err.ee_info).unwrap_or(u16::MAX),
            )),
            libc::EHOSTUNREACH => Some(IcmpError::HostUnreachable),
            libc::ENETUNREACH => Some(IcmpError::NetUnreachable),
            libc::EACCES | libc::EPERM => Some(IcmpError::AdministrativelyProhibited),
            _ => None,
        },
        _ => None,
    }
}

/// An ICMP echo socket of the kernel (icmp(7), `ping_group_range`).
#[derive(Debug)]
pub struct KernelEcho {
    socket: Socket,
    ipv6: bool,
}

impl KernelEcho {
    pub(super) const fn new(socket: Socket, ipv6: bool) -> Self {
        Self { socket, ipv6 }
    }
}

impl AsFd for KernelEcho {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl EchoSocket for KernelEcho {
    fn send_to(&mut self, to: IpAddr, seq: u16, data: &[u8]) -> io::Result<()> {
        let kind = if self.ipv6 { 128 } else { 8 };
        let [high, low] = seq.to_be_bytes();
        // The kernel fills in identifier and checksum.
        let header = [kind, 0, 0, 0, 0, 0, high, low];
        let parts = [IoSlice::new(&header), IoSlice::new(data)];
        let to = SocketAddr::new(to, 0).into();
        self.socket.send_to_vectored(&parts, &to).map(drop)
    }

    fn recv_from(&mut self, data: &mut [u8]) -> io::Result<(IpAddr, u16, usize)> {
        let mut header = [0; ECHO_HEADER];
        let mut parts = [IoSliceMut::new(&mut header), IoSliceMut::new(data)];
        let (len, from) = receive(&self.socket, &mut parts)?;
        let len = len
            .checked_sub(ECHO_HEADER)
            .ok_or(io::ErrorKind::InvalidData)?;
        Ok((from.ip(), u16::from_be_bytes([header[6], header[7]]), len))
    }
}
