//! The kernel's TCP sockets.
//!
//! Owns nothing but the socket. While a connect is under way the socket keeps what the network says
//! about it, so that the guest can be told who refused; afterwards it does not, since the kernel would
//! then end a living connection at the first router's complaint (ip(7), `IP_RECVERR`).

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};
use socket2::{Socket, TcpKeepalive};

use super::depth::Depth;
use super::error_queue::{keep_errors, next_error};
use super::marks::Told;
use super::ports::{Ports, is_there};
use crate::host::{QueuedError, TcpSocket};
use crate::net::Marks;
use crate::sys::socket::{discard, is_all_acknowledged, peek_from_next};

/// A TCP socket of the kernel.
#[derive(Debug)]
pub struct KernelTcp {
    socket: Socket,
    ipv6: bool,
    /// It keeps what the network says.
    keeps_errors: bool,
    /// What the network said about the connect.
    said: Option<QueuedError>,
    connected: bool,
    told: Told,
    depth: Depth,
}

/// How often a silent peer is asked whether it is still there.
const QUESTIONS: u32 = 9;
/// Seconds that the kernel takes at most (`MAX_TCP_KEEPIDLE` of linux/net/tcp.h). Who is there answers sooner, too.
const LONGEST_KEEPALIVE: u32 = 32_767;

/// What every connection has. Accepted ones inherit it from their listener.
pub(super) fn prepare(socket: &Socket) -> io::Result<()> {
    // The guest decides when small segments are sent; its choice is not to be delayed again.
    socket.set_tcp_nodelay(true)?;
    // RFC 9293 3.8.4: not below two hours by default, which is what the kernel has.
    socket.set_keepalive(true)?;
    // Urgent data are ordinary data with a mark; left out of the stream, their byte would be lost
    // (RFC 6093 section 3).
    socket.set_out_of_band_inline(true)
}

/// Asks after so many seconds, and again until those to answer are over (tcp(7), `TCP_KEEPIDLE` and what follows).
fn keepalive(after: u32, answer: u32) -> TcpKeepalive {
    let interval = answer.div_ceil(QUESTIONS).max(1);
    let seconds = |count: u32| Duration::from_secs(count.clamp(1, LONGEST_KEEPALIVE).into());
    TcpKeepalive::new()
        .with_time(seconds(after))
        .with_interval(seconds(interval))
        .with_retries((answer / interval).max(1))
}

impl KernelTcp {
    /// Begins a connection from a socket that is bound as it is to be.
    pub(super) fn connect(
        socket: Socket,
        remote: SocketAddr,
        marks: Marks,
        ports: &mut Ports,
        probe: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<Self> {
        prepare(&socket)?;
        let ipv6 = remote.is_ipv6();
        // No router is on the way to the host itself.
        let keeps_errors = !remote.ip().is_loopback();
        if keeps_errors {
            keep_errors(&socket, ipv6, true)?;
        }
        let mut told = Told::default();
        // One hop more or less is noticed by those alone who chose the limit.
        let usual = [Marks::DEFAULT_HOP_LIMIT, Marks::DEFAULT_HOP_LIMIT - 1];
        if !usual.contains(&marks.hop_limit) {
            told.hop_limit(&socket, ipv6, marks.hop_limit)?;
        }
        told.tos(&socket, ipv6, marks.tos & !ECN)?;
        let mut connected = ports.connect(&socket, remote, probe)?;
        if !connected && remote.ip().is_loopback() {
            // There both ends have spoken by now, which the first call does not look at.
            connected = is_there(socket.connect(&remote.into()))?;
        }
        Ok(Self {
            socket,
            ipv6,
            keeps_errors,
            said: None,
            connected,
            told,
            depth: Depth::default(),
        })
    }

    /// Begins a connection within another namespace, whose own address it comes from, so that whoever
    /// trusts the loopback there alone does not take it for a neighbour's.
    pub(super) fn connect_inside(
        socket: Socket,
        to: SocketAddr,
        ports: &mut Ports,
    ) -> io::Result<Self> {
        prepare(&socket)?;
        if !to.ip().is_loopback() {
            setsockopt(&socket, sockopt::IpBindAddressNoPort, &true)?;
            socket.bind(&SocketAddr::new(to.ip(), 0).into())?;
        }
        ports.connect(&socket, to, || Ok(())).map_err(|error| {
            // That no socket can be had yet is told so; it is another matter.
            if error.kind() == io::ErrorKind::WouldBlock {
                io::ErrorKind::AddrNotAvailable.into()
            } else {
                error
            }
        })?;
        Ok(Self::accepted(socket, to))
    }

    fn next_error(&self) -> Option<QueuedError> {
        let mut quoted = [0; 8];
        self.keeps_errors
            .then(|| next_error(&self.socket, self.ipv6, &mut quoted))
            .flatten()
    }

    /// Takes over a connection with nothing but hosts in between.
    pub(super) fn accepted(socket: Socket, peer: SocketAddr) -> Self {
        Self {
            socket,
            ipv6: peer.is_ipv6(),
            keeps_errors: false,
            said: None,
            connected: true,
            told: Told::default(),
            depth: Depth::default(),
        }
    }
}

/// The bits of the type of service that TCP uses itself (RFC 3168).
const ECN: u8 = 3;

impl AsFd for KernelTcp {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl TcpSocket for KernelTcp {
    fn is_connected_already(&self) -> bool {
        self.connected
    }

    fn connect_outcome(&mut self) -> io::Result<()> {
        if let Some(error) = self.socket.take_error()? {
            return Err(error);
        }
        // The kernel queues what a router said, and wakes us, before it ends the socket for it: that there
        // is no error yet does not mean that there is a connection.
        self.said = self.next_error();
        if self.said.is_some() {
            return Err(io::ErrorKind::HostUnreachable.into());
        }
        if std::mem::take(&mut self.keeps_errors) {
            keep_errors(&self.socket, self.ipv6, false)?;
        }
        Ok(())
    }

    fn connect_error(&mut self) -> Option<QueuedError> {
        self.said.take().or_else(|| self.next_error())
    }

    fn set_tos(&mut self, tos: u8) {
        // A mark that can't be set is no reason to end a connection.
        let _ = self.told.tos(&self.socket, self.ipv6, tos & !ECN);
    }

    fn ask_after(&mut self, after: u32, answer: u32) -> io::Result<()> {
        self.socket.set_tcp_keepalive(&keepalive(after, answer))
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.send_with_flags(bytes, libc::MSG_NOSIGNAL)
    }

    fn recv(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        io::Read::read(&mut &self.socket, bytes)
    }

    fn begin_peeking(&mut self) -> io::Result<()> {
        peek_from_next(self.socket.as_fd())
    }

    fn peek(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        Ok(recv(self.socket.as_raw_fd(), bytes, MsgFlags::MSG_PEEK)?)
    }

    fn discard(&mut self, len: usize) -> io::Result<()> {
        self.depth.taken(&self.socket, len);
        let mut left = len;
        while left > 0 {
            match discard(self.socket.as_fd(), left) {
                // Nobody else takes from the socket: it was emptied by the end of the connection.
                Ok(0) => return Err(io::ErrorKind::ConnectionReset.into()),
                // It stops before urgent data.
                Ok(discarded) => left -= discarded,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        self.socket.shutdown(std::net::Shutdown::Write)
    }

    fn has_delivered(&self) -> bool {
        // A kernel that can't tell has nobody wait.
        is_all_acknowledged(self.socket.as_fd()).unwrap_or(true)
    }

    fn reset(self) {
        // RFC 9293 3.10.5 ABORT: closing with a zero linger time sends a RST.
        let _ = self.socket.set_linger(Some(Duration::ZERO));
    }
}
