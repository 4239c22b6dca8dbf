//! The kernel's UDP sockets.
//!
//! Owns nothing but the socket. Each datagram says how it is to look, and each received one how it
//! looked; what the network reports comes from `error_queue.rs`. A train of datagrams leaves by one call
//! (udp(7), `UDP_SEGMENT`), and as many as are there are received by one.

use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg, setsockopt, sockopt};
use socket2::Socket;

use super::error_queue::{keep_errors, next_error};
use super::marks::{Told, note_marks, take_mark};
use crate::host::{Inbox, Outgoing, QueuedError, Received, SendFailure, Sending, UdpSocket};
use crate::net::Marks;
use crate::net::emit::{MAX_TRAIN, MAX_TRAIN_DATAGRAMS};
use crate::sys::datagrams::{self as batch, ReceivedDatagram};

/// Receive buffer asked for: a burst of a thousand sockets' answers must not be lost while the
/// loop is busy. The kernel caps it at `net.core.rmem_max`.
const RECEIVE_BUFFER: usize = 1 << 20;

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

/// The address that a datagram came to, as it is to be named in the answer: of `struct in_pktinfo` the
/// second field, of `struct in6_pktinfo` the first.
fn asked_address(message: batch::ControlMessage<'_>) -> Option<IpAddr> {
    match (message.level, message.kind) {
        (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
            let addr: [u8; 4] = *message.data.get(4..)?.first_chunk()?;
            Some(Ipv4Addr::from(addr).into())
        }
        // Nobody can answer from a group's address.
        (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
            let addr: [u8; 16] = *message.data.first_chunk()?;
            Some(Ipv6Addr::from(addr))
                .filter(|addr| !addr.is_multicast())
                .map(IpAddr::V6)
        }
        _ => None,
    }
}

/// What the kernel says of a datagram.
pub(super) fn describe(datagram: ReceivedDatagram<'_>) -> Option<Received> {
    let mut received = Received {
        from: datagram.sender()?,
        asked: None,
        marks: Marks::default(),
    };
    for message in datagram.control_messages() {
        received.asked = asked_address(message).or(received.asked);
        take_mark(&mut received.marks, message);
    }
    Some(received)
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

/// The kernel, the path's MTU or the device is against trains; anything else would be said of each datagram, too (udp(7),
/// `UDP_SEGMENT`).
fn is_about_trains(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    [libc::EINVAL, libc::EIO, libc::EMSGSIZE, libc::EOPNOTSUPP]
        .map(Some)
        .contains(&errno)
}

/// Sends one payload, from one of the host's addresses where that is given; as a train of datagrams
/// where a segment's size is.
fn send_message(
    socket: &Socket,
    (from, to): (Option<IpAddr>, &SockaddrStorage),
    payload: &[u8],
    segment: Option<u16>,
) -> io::Result<()> {
    let vector = [IoSlice::new(payload)];
    let send = |control: &[ControlMessage<'_>]| {
        let flags = MsgFlags::MSG_NOSIGNAL;
        let sent = sendmsg(socket.as_raw_fd(), &vector, control, flags, Some(to));
        sent.map(drop).map_err(io::Error::from)
    };
    let segment = segment.as_ref().map(ControlMessage::UdpGsoSegments);
    let with = |info| match segment {
        Some(segment) => send(&[info, segment]),
        None => send(&[info]),
    };
    match from {
        None => match segment {
            Some(segment) => send(&[segment]),
            None => send(&[]),
        },
        Some(IpAddr::V4(from)) => with(ControlMessage::Ipv4PacketInfo(&libc::in_pktinfo {
            ipi_ifindex: 0,
            ipi_spec_dst: libc::in_addr {
                s_addr: u32::from_ne_bytes(from.octets()),
            },
            ipi_addr: libc::in_addr { s_addr: 0 },
        })),
        Some(IpAddr::V6(from)) => with(ControlMessage::Ipv6PacketInfo(&libc::in6_pktinfo {
            ipi6_addr: libc::in6_addr {
                s6_addr: from.octets(),
            },
            ipi6_ifindex: 0,
        })),
    }
}

impl AsFd for KernelUdp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl UdpSocket for KernelUdp {
    fn send(&mut self, datagram: &Outgoing<'_>) -> Result<(), SendFailure> {
        let mut sending = Sending::default();
        let marks = datagram.marks;
        let told = marks.map_or(Ok(()), |it| self.told.tell(&self.socket, self.ipv6, it));
        if let Err(error) = told {
            return Err(SendFailure {
                error,
                lost: datagram.count(),
            });
        }
        let to = SockaddrStorage::from(datagram.to);
        let ends = (datagram.from, &to);
        let socket = &self.socket;
        for train in trains(datagram.payload, datagram.segment) {
            let pieces = Outgoing {
                payload: train,
                ..*datagram
            };
            if let Some(segment) = datagram.segment.filter(|it| train.len() > it.get().into()) {
                let send = || send_message(socket, ends, train, Some(segment.get()));
                match past_old_errors(send) {
                    Ok(()) => continue,
                    Err(error) if !is_about_trains(&error) => {
                        sending.give_up(pieces.count(), error);
                        continue;
                    }
                    // Each by itself learns what is to be told of it.
                    Err(_) => {}
                }
            }
            for piece in pieces.datagrams() {
                let send = || send_message(socket, ends, piece, None);
                sending.attempt(piece.len(), || past_old_errors(send));
            }
        }
        sending.end()
    }

    fn recv(&mut self, inbox: &mut Inbox) -> io::Result<()> {
        inbox.fill(|batch| batch.receive(self.socket.as_fd()), describe)
    }

    fn queued_error(&mut self, bytes: &mut [u8]) -> Option<QueuedError> {
        next_error(&self.socket, self.ipv6, bytes)
    }
}

/// The parts of a payload that one call may send: of several datagrams as many as the kernel takes.
fn trains(payload: &[u8], segment: Option<NonZeroU16>) -> impl Iterator<Item = &[u8]> {
    let step = segment.map_or(payload.len(), |segment| {
        let segment = usize::from(segment.get());
        (MAX_TRAIN / segment).clamp(1, MAX_TRAIN_DATAGRAMS) * segment
    });
    let empty = payload.is_empty().then_some(payload);
    empty.into_iter().chain(payload.chunks(step.max(1)))
}
