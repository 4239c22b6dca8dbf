//! The host edge: ordinary sockets of the host, behind a small trait.
//!
//! [`Host`] is all that the stack knows of the outside. [`kernel`] implements it with the kernel's
//! sockets and an epoll set, [`simulated`] in memory for tests and fuzzing. Sockets are owned
//! values: dropping one closes it, so a flow that goes can't leak its descriptor. What a
//! [`Token`] stands for only the stack knows; a host hands it back with each event.

mod datagram;
pub mod kernel;
pub mod resolv_conf;
pub mod resolv_text;
pub mod simulated;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;

use crate::net::emit::IcmpError;

/// Names the owner of a socket in events. Opaque to the host; the stack puts a generation in, so
/// that a late event never finds a stranger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// What became possible at a socket. Edge-triggered: told once, true until a call would block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// The socket's owner.
    pub token: Token,
    /// Data, an end of stream, a connection or an error can be read.
    pub readable: bool,
    /// Data can be written, or a connect has ended either way.
    pub writable: bool,
    /// The peer has ended its stream, or the socket failed: reading goes on to the end, however
    /// little a single call returns.
    pub hangup: bool,
}

/// What a datagram socket is for; decides how it is bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DatagramRole {
    /// Sends to anybody and hears anybody (RFC 4787 endpoint-independent), in one address family.
    Outbound {
        /// The family of the addresses it will send to.
        ipv6: bool,
    },
    /// Speaks with the host's own loopback, past the outbound interface.
    Loopback,
    /// Speaks with one peer only: other senders are not heard.
    Connected(SocketAddr),
    /// Listens at a published address.
    Published(SocketAddr),
}

/// An error that the network reported for a datagram sent earlier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueuedError {
    /// The ICMP error, as it is to be passed on.
    pub error: IcmpError,
    /// The router or host that reported it, where it is known.
    pub reporter: Option<IpAddr>,
    /// Where the datagram was sent to.
    pub destination: SocketAddr,
    /// Bytes of the original datagram's payload that were given back.
    pub quoted: usize,
}

/// The host's network, as far as the stack uses it. No call blocks.
pub trait Host {
    /// A TCP connection.
    type Tcp: TcpSocket;
    /// A listening TCP socket.
    type Listener;
    /// A UDP socket.
    type Udp: UdpSocket;
    /// An ICMP echo ("ping") socket.
    type Echo: EchoSocket;

    /// The host's resolvers at this moment, best first.
    fn resolvers(&mut self) -> &[SocketAddr];

    /// Begins a connection. The outcome comes as an event, see [`TcpSocket::connect_outcome`].
    ///
    /// # Errors
    /// What `connect(2)` reports at once: no route, no descriptor, forbidden.
    fn tcp_connect(&mut self, token: Token, remote: SocketAddr) -> io::Result<Self::Tcp>;

    /// Listens at a published address.
    ///
    /// # Errors
    /// What `bind(2)` and `listen(2)` report: in use, privileged, not ours.
    fn tcp_listen(&mut self, token: Token, local: SocketAddr) -> io::Result<Self::Listener>;

    /// Takes one connection from a listener. No events come from it before [`Host::tcp_watch`].
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    fn tcp_accept(&mut self, listener: &Self::Listener) -> io::Result<(Self::Tcp, SocketAddr)>;

    /// Starts events for an accepted connection.
    ///
    /// # Errors
    /// When the poller has no room.
    fn tcp_watch(&mut self, token: Token, socket: &Self::Tcp) -> io::Result<()>;

    /// Opens a datagram socket.
    ///
    /// # Errors
    /// What `socket(2)`, `bind(2)` and `connect(2)` report.
    fn udp_open(&mut self, token: Token, role: DatagramRole) -> io::Result<Self::Udp>;

    /// Opens an ICMP echo socket.
    ///
    /// # Errors
    /// `PermissionDenied` where `net.ipv4.ping_group_range` leaves our group out.
    fn echo_open(&mut self, token: Token, ipv6: bool) -> io::Result<Self::Echo>;
}

/// A TCP connection of the host.
pub trait TcpSocket {
    /// How the connect ended; call it once the socket became writable.
    ///
    /// # Errors
    /// Why there is no connection.
    fn connect_outcome(&mut self) -> io::Result<()>;

    /// Sends what fits, at least one byte.
    ///
    /// # Errors
    /// `WouldBlock` when nothing fits; anything else ends the connection.
    fn send(&mut self, bytes: &[u8]) -> io::Result<usize>;

    /// Receives what is there; 0 at the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there; anything else ends the connection.
    fn recv(&mut self, bytes: &mut [u8]) -> io::Result<usize>;

    /// Tells the peer that no more data comes.
    ///
    /// # Errors
    /// When the connection is gone.
    fn shutdown_write(&mut self) -> io::Result<()>;

    /// Closes with a RST instead of a FIN.
    fn reset(self);
}

/// A UDP socket of the host.
pub trait UdpSocket {
    /// Sends one datagram, or, with `segment`, as many as `payload` holds pieces of that size.
    ///
    /// # Errors
    /// What `sendto(2)` reports; each concerns these datagrams only.
    fn send_to(
        &mut self,
        to: SocketAddr,
        payload: &[u8],
        segment: Option<NonZeroU16>,
    ) -> io::Result<()>;

    /// Receives one datagram: its length and sender.
    ///
    /// # Errors
    /// `WouldBlock` when there is none; another error means that [`UdpSocket::queued_error`] has
    /// something to tell.
    fn recv_from(&mut self, bytes: &mut [u8]) -> io::Result<(usize, SocketAddr)>;

    /// Receives one datagram of a published port: its length and sender, and the address that it came
    /// to, where the socket has several and the answer must name it.
    ///
    /// # Errors
    /// As [`UdpSocket::recv_from`].
    fn recv_asked(&mut self, bytes: &mut [u8]) -> io::Result<(usize, SocketAddr, Option<IpAddr>)> {
        self.recv_from(bytes)
            .map(|(len, sender)| (len, sender, None))
    }

    /// [`UdpSocket::send_to`] from an address that a client had asked.
    ///
    /// # Errors
    /// As [`UdpSocket::send_to`].
    fn send_from(
        &mut self,
        asked: Option<IpAddr>,
        to: SocketAddr,
        payload: &[u8],
        segment: Option<NonZeroU16>,
    ) -> io::Result<()> {
        let _ = asked;
        self.send_to(to, payload, segment)
    }

    /// The next error that the network reported; the original payload is written to `bytes`.
    fn queued_error(&mut self, bytes: &mut [u8]) -> Option<QueuedError>;
}

/// The datagrams that a payload holds: pieces of `segment` bytes, or the whole; an empty payload is
/// one empty datagram.
fn datagrams(payload: &[u8], segment: Option<NonZeroU16>) -> impl Iterator<Item = &[u8]> {
    let step = segment.map_or(payload.len(), |segment| usize::from(segment.get()));
    let empty = payload.is_empty().then_some(payload);
    empty.into_iter().chain(payload.chunks(step.max(1)))
}

/// An ICMP echo socket of the host. The kernel chooses the identifier.
pub trait EchoSocket {
    /// Sends an echo request.
    ///
    /// # Errors
    /// What `sendto(2)` reports.
    fn send_to(&mut self, to: IpAddr, seq: u16, data: &[u8]) -> io::Result<()>;

    /// Receives an echo reply: who answered, the sequence number, the length of its data.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    fn recv_from(&mut self, data: &mut [u8]) -> io::Result<(IpAddr, u16, usize)>;
}
