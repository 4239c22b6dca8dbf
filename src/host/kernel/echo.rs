//! The kernel's ICMP echo ("ping") sockets (icmp(7), `ping_group_range`).
//!
//! Owns nothing but the socket. The kernel fills in identifier and checksum of requests, and hands
//! over replies to them alone.

use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

use socket2::Socket;

use super::datagram::describe;
use super::error_queue::{keep_errors, next_error};
use super::marks::{Told, note_marks};
use crate::host::{EchoSocket, Inbox, QueuedError};
use crate::net::Marks;

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

    fn recv(&mut self, inbox: &mut Inbox) -> io::Result<()> {
        inbox.fill(|batch| batch.receive(self.socket.as_fd()), describe)
    }

    fn queued_error(&mut self, bytes: &mut [u8]) -> Option<QueuedError> {
        next_error(&self.socket, self.ipv6, bytes)
    }
}
