//! The kernel's UDP sockets.
//!
//! Owns nothing but the socket. Each datagram says how it is to look, and each received one how it
//! looked; what the network reports comes from `error_queue.rs`.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt,
    sockopt,
};
use socket2::Socket;

use super::error_queue::{keep_errors, next_error};
use super::marks::{Told, note_marks, take_mark};
use crate::host::{Outgoing, QueuedError, Received, UdpSocket, datagrams};
use crate::net::Marks;

/// Receive buffer asked for: a burst of a thousand sockets' answers must not be lost while the
/// loop is busy. The kernel caps it at `net.core.rmem_max`.
const RECEIVE_BUFFER: usize = 1 << 20;

/// Room for the control messages of one datagram: both marks, and the address it came to.
const CONTROL: usize = 128;

/// A UDP socket of the kernel.
#[derive(Debug)]
pub struct KernelUdp {
    socket: Socket,
    ipv6: bool,
    told: Told,
}

impl KernelUdp {
    /// Takes over a socket that is bound as it is to be.
    pub(super) fn new(socket: Socket, ipv6: bool) -> io::Result<Self> {
        keep_errors(&socket, ipv6, true)?;
        let _ = socket.set_recv_buffer_size(RECEIVE_BUFFER);
        // A guest may speak to a broadcast address only by name of an ordinary one; the stack
        // never asks for it, so SO_BROADCAST stays off.
        Ok(Self {
            socket,
            ipv6,
            told: Told::default(),
        })
    }

    /// Has datagrams say how they looked.
    pub(super) fn note_marks(&self) -> io::Result<()> {
        note_marks(&self.socket, self.ipv6)
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
        // Nobody can answer from a group's address.
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(Ipv6Addr::from(info.ipi6_addr.s6_addr))
            .filter(|addr| !addr.is_multicast())
            .map(IpAddr::V6),
        _ => None,
    }
}

/// Sends. An error that an earlier datagram earned is reported by the next call once; the error queue
/// still has it, and this datagram deserves its own attempt.
pub(super) fn past_old_errors<T>(mut send: impl FnMut() -> io::Result<T>) -> io::Result<()> {
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
            let info = [ControlMessage::Ipv4PacketInfo(&info)];
            sendmsg(fd, &vector, &info, flags, Some(to))?;
        }
        IpAddr::V6(from) => {
            let info = libc::in6_pktinfo {
                ipi6_addr: libc::in6_addr {
                    s6_addr: from.octets(),
                },
                ipi6_ifindex: 0,
            };
            let info = [ControlMessage::Ipv6PacketInfo(&info)];
            sendmsg(fd, &vector, &info, flags, Some(to))?;
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
    fn send(&mut self, datagram: &Outgoing<'_>) -> io::Result<()> {
        if let Some(marks) = datagram.marks {
            self.told.tell(&self.socket, self.ipv6, marks)?;
        }
        let socket = &self.socket;
        let mut pieces = datagrams(datagram.payload, datagram.segment);
        if let Some(from) = datagram.from {
            let to = SockaddrStorage::from(datagram.to);
            return pieces
                .try_for_each(|piece| past_old_errors(|| send_one(socket, from, &to, piece)));
        }
        let to = datagram.to.into();
        pieces.try_for_each(|piece| past_old_errors(|| socket.send_to(piece, &to)))
    }

    fn recv(&mut self, bytes: &mut [u8]) -> io::Result<Received> {
        receive(&self.socket, &mut [IoSliceMut::new(bytes)])
    }

    fn queued_error(&mut self, bytes: &mut [u8]) -> Option<QueuedError> {
        next_error(&self.socket, self.ipv6, bytes)
    }
}

/// Receives one datagram, with what is known of it.
pub(super) fn receive(socket: &Socket, parts: &mut [IoSliceMut<'_>]) -> io::Result<Received> {
    let mut control = [0; CONTROL];
    let (fd, flags) = (socket.as_raw_fd(), MsgFlags::empty());
    let message = recvmsg::<SockaddrStorage>(fd, parts, Some(&mut control), flags)?;
    let mut received = Received {
        len: message.bytes,
        from: sender(message.address).ok_or(io::ErrorKind::InvalidData)?,
        asked: None,
        marks: Marks::default(),
    };
    for message in message.cmsgs()? {
        received.asked = asked_address(&message).or(received.asked);
        take_mark(&mut received.marks, &message);
    }
    Ok(received)
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
