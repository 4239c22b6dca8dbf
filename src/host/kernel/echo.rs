//! The kernel's ICMP echo ("ping") sockets (icmp(7), `ping_group_range`).
//!
//! Owns nothing but the socket. The kernel fills in identifier and checksum of requests, and hands
//! over replies to them alone.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

use socket2::Socket;

use super::datagram::receive;
use super::error_queue::{keep_errors, next_error};
use super::marks::{Told, note_marks};
use crate::host::{EchoSocket, QueuedError, ReceivedEcho};
use crate::net::Marks;

/// Bytes of an ICMP echo header.
const HEADER: usize = 8;

/// An ICMP echo socket of the kernel.
#[derive(Debug)]
pub struct KernelEcho {
    socket: Socket,
    ipv6: bool,
    told: Told,
}

impl KernelEcho {
    pub(super) fn new(socket: Socket, ipv6: bool) -> io::Result<Self> {
        keep_errors(&socket, ipv6, true)?;
        note_marks(&socket, ipv6)?;
        Ok(Self {
            socket,
            ipv6,
            told: Told::default(),
        })
    }
}

impl AsFd for KernelEcho {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl EchoSocket for KernelEcho {
    fn send(&mut self, to: IpAddr, seq: u16, data: &[u8], marks: Marks) -> io::Result<()> {
        self.told.tell(&self.socket, self.ipv6, marks)?;
        let kind = if self.ipv6 { 128 } else { 8 };
        let [high, low] = seq.to_be_bytes();
        let header = [kind, 0, 0, 0, 0, 0, high, low];
        let parts = [IoSlice::new(&header), IoSlice::new(data)];
        let to = SocketAddr::new(to, 0).into();
        super::datagram::past_old_errors(|| self.socket.send_to_vectored(&parts, &to))
    }

    fn recv(&mut self, data: &mut [u8]) -> io::Result<ReceivedEcho> {
        let mut header = [0; HEADER];
        let mut parts = [IoSliceMut::new(&mut header), IoSliceMut::new(data)];
        let received = receive(&self.socket, &mut parts)?;
        let len = received.len.checked_sub(HEADER);
        Ok(ReceivedEcho {
            len: len.ok_or(io::ErrorKind::InvalidData)?,
            from: received.from.ip(),
            seq: u16::from_be_bytes([header[6], header[7]]),
            marks: received.marks,
        })
    }

    fn queued_error(&mut self, bytes: &mut [u8]) -> Option<QueuedError> {
        next_error(&self.socket, self.ipv6, bytes)
    }
}
