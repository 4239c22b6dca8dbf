//! The host edge: ordinary sockets of the host, behind a small trait.
//!
//! [`Host`] is all that the stack knows of the outside. [`kernel`] implements it with the kernel's
//! sockets and an epoll set, [`simulated`] in memory for tests and fuzzing. Sockets are owned
//! values: dropping one closes it, so a flow that goes can't leak its descriptor. What a
//! [`Token`] stands for only the stack knows; a host hands it back with each event.

mod inbox;
pub mod kernel;
pub mod resolv_conf;
pub mod resolv_text;
mod sending;
pub mod simulated;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;

use crate::net::Marks;
use crate::net::emit::IcmpError;

pub use inbox::Inbox;
pub use sending::SendFailure;
use sending::Sending;

/// Names the owner of a socket in events. Opaque to the host; the stack puts a generation in, so
/// that a late event never finds a stranger. All ones is the host's own.
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
    /// The socket failed, or the network has reported an error.
    pub error: bool,
    /// The peer has sent urgent data, which are part of the stream all the same.
    pub urgent: bool,
}

/// What a datagram socket is for; decides how it is bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DatagramRole {
    /// Sends to anybody and hears anybody (RFC 4787 endpoint-independent), in one address family.
    Outbound(PortWish),
    /// Speaks with the host's own loopback, past the outbound interface.
    Loopback(PortWish),
    /// Speaks with one peer only: other senders are not heard.
    Connected(SocketAddr),
    /// Listens at a published address.
    Published(SocketAddr),
}

/// Which port a socket should have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortWish {
    /// The family of the addresses it will send to.
    pub ipv6: bool,
    /// The guest's own port (RFC 4787 4.2.1); 0 where any will do.
    pub port: u16,
    /// Where the search begins for another of the same parity, should that one be taken; unpredictable
    /// (RFC 6056).
    pub spare: u16,
}

impl PortWish {
    /// Ports that are tried before any will do.
    const ATTEMPTS: u16 = 16;

    /// The ports to try, best first; 0 is any.
    pub(crate) fn candidates(self) -> impl Iterator<Item = u16> {
        let Self { port, spare, .. } = self;
        let others = (0..Self::ATTEMPTS).map(move |number| {
            // The upper half of all ports, in steps that keep the parity.
            let place = spare.wrapping_add(number.wrapping_mul(2)) & !1;
            0x8000 | place | (port & 1)
        });
        let wanted = (port != 0).then_some(port);
        let others = others.filter(move |_| port != 0);
        wanted.into_iter().chain(others).chain(Some(0))
    }
}

/// A datagram on its way to the host's network.
#[derive(Debug, Clone, Copy)]
pub struct Outgoing<'a> {
    /// Its destination.
    pub to: SocketAddr,
    /// The address that it must leave from, where the socket has several.
    pub from: Option<IpAddr>,
    /// Its payload, or that of several.
    pub payload: &'a [u8],
    /// Bytes of each, where there are several.
    pub segment: Option<NonZeroU16>,
    /// How it is to look; as the host's datagrams do where nothing is said.
    pub marks: Option<Marks>,
}

impl<'a> Outgoing<'a> {
    /// One datagram that looks as the host's do.
    #[must_use]
    pub const fn plain(to: SocketAddr, payload: &'a [u8]) -> Self {
        Self {
            to,
            from: None,
            payload,
            segment: None,
            marks: None,
        }
    }

    /// The payloads of the datagrams: pieces of `segment` bytes, or the whole; an empty payload is one
    /// empty datagram.
    fn datagrams(self) -> impl Iterator<Item = &'a [u8]> {
        let whole = self.payload;
        let step = self.segment.map_or(whole.len(), |it| it.get().into());
        let empty = whole.is_empty().then_some(whole);
        empty.into_iter().chain(whole.chunks(step.max(1)))
    }

    /// How many datagrams there are.
    pub(crate) fn count(self) -> usize {
        self.datagrams().count()
    }
}

/// What is known of a received datagram beside its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Its sender.
    pub from: SocketAddr,
    /// The address that it came to, where the socket has several and the answer must name it.
    pub asked: Option<IpAddr>,
    /// How it looked when it arrived.
    pub marks: Marks,
}

/// An error that the network reported for something sent earlier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueuedError {
    /// The ICMP error, as it is to be passed on.
    pub error: IcmpError,
    /// The router or host that reported it, where it is known.
    pub reporter: Option<IpAddr>,
    /// Where the packet was sent to.
    pub destination: SocketAddr,
    /// Bytes of the original payload that were given back; for an echo request, of the ICMP message.
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
    /// Memory of the host's between two TCP connections.
    type Pipe: Pipe<Self::Tcp>;

    /// The host's resolvers at this moment, best first.
    fn resolvers(&mut self) -> &[SocketAddr];

    /// Whether some route leads from the host to global IPv6 addresses; none where that can't be told at this moment.
    fn reaches_ipv6(&mut self) -> Option<bool>;

    /// Begins a connection, whose packets are to have these marks. The outcome comes as an event, see
    /// [`TcpSocket::connect_outcome`].
    ///
    /// # Errors
    /// What `connect(2)` reports at once: no route, no descriptor, forbidden; `WouldBlock` where hardly a port is left, and
    /// there is no time to look for one.
    fn tcp_connect(
        &mut self,
        token: Token,
        remote: SocketAddr,
        marks: Marks,
    ) -> io::Result<Self::Tcp>;

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

    /// Begins a connection within the guest's own namespace, past the link, from the address `to` itself:
    /// the guest's own address, or its loopback. The outcome comes as an event.
    ///
    /// # Errors
    /// `WouldBlock` when an event with this token will tell the time to ask again, or by
    /// [`Event::error`] that there is no way; `Unsupported` when there is none; `AddrNotAvailable`
    /// when the guest has not got that address, or no port was found; what `connect(2)` reports at once.
    fn tcp_connect_inside(&mut self, token: Token, to: SocketAddr) -> io::Result<Self::Tcp>;

    /// Nobody has answered in time who could open sockets inside: until somebody does there is no way there.
    fn pass_over_inside(&mut self);

    /// Takes a pipe, which is empty.
    ///
    /// # Errors
    /// When no descriptors are left.
    fn pipe(&mut self) -> io::Result<Self::Pipe>;

    /// Gives back an empty pipe for the next to need one.
    fn return_pipe(&mut self, pipe: Self::Pipe);

    /// Opens a datagram socket. No events come from it before [`Host::udp_watch`].
    ///
    /// # Errors
    /// What `socket(2)`, `bind(2)` and `connect(2)` report.
    fn udp_open(&mut self, role: DatagramRole) -> io::Result<Self::Udp>;

    /// Starts events for a datagram socket, of another host of the same network, too.
    ///
    /// # Errors
    /// When the poller has no room.
    fn udp_watch(&mut self, token: Token, socket: &Self::Udp) -> io::Result<()>;

    /// Opens an ICMP echo socket.
    ///
    /// # Errors
    /// `PermissionDenied` where `net.ipv4.ping_group_range` leaves our group out.
    fn echo_open(&mut self, token: Token, ipv6: bool) -> io::Result<Self::Echo>;
}

/// A TCP connection of the host.
pub trait TcpSocket {
    /// The connection was there when the call that began it returned: no event need be waited for.
    fn is_connected_already(&self) -> bool {
        false
    }

    /// How the connect ended; call it once the socket became writable.
    ///
    /// # Errors
    /// Why there is no connection.
    fn connect_outcome(&mut self) -> io::Result<()>;

    /// What the network said about a connect that failed, where it was the network.
    fn connect_error(&mut self) -> Option<QueuedError>;

    /// Gives what is sent another type of service than before; the bits of ECN are the kernel's.
    fn set_tos(&mut self, tos: u8);

    /// Has the other end's system asked whether it is still there, once it has been silent for `after`
    /// seconds. Where it does not answer within `answer` seconds the connection fails.
    ///
    /// # Errors
    /// When this can't be had; the host's own times hold then.
    fn ask_after(&mut self, _after: u32, _answer: u32) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

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

    /// Lets [`TcpSocket::peek`] begin at the next byte to be received.
    ///
    /// # Errors
    /// When this stream can't be peeked at.
    fn begin_peeking(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Copies what follows the bytes that were peeked at last; they stay to be received. 0 at the end of the
    /// stream.
    ///
    /// # Errors
    /// As [`TcpSocket::recv`].
    fn peek(&mut self, _bytes: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Receives so many of the bytes that were peeked at, to nowhere.
    ///
    /// # Errors
    /// When they are not there any more: the connection is gone.
    fn discard(&mut self, _len: usize) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Tells the peer that no more data comes.
    ///
    /// # Errors
    /// When the connection is gone.
    fn shutdown_write(&mut self) -> io::Result<()>;

    /// The other end's system has acknowledged all that was sent: nothing would be lost by a reset.
    fn has_delivered(&self) -> bool {
        true
    }

    /// Closes with a RST instead of a FIN. What the other end's system has not acknowledged is lost.
    fn reset(self);

    /// What became possible by the last calls though no event will say so.
    fn woken(&self) -> Woken {
        Woken::default()
    }
}

/// Memory of the host's between two TCP connections, by which bytes go from one to the other without a
/// copy (splice(2)). Dropping it loses what it holds.
pub trait Pipe<S> {
    /// Takes some of what there is from a connection, 0 at the end of its stream; only while nothing is
    /// held. `urgent` says that the stream may have urgent data in it.
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there; anything else ends the connection.
    fn fill(&mut self, from: &mut S, urgent: bool) -> io::Result<usize>;

    /// Gives a connection some of what is held.
    ///
    /// # Errors
    /// `WouldBlock` when it takes no more; anything else ends the connection.
    fn drain(&mut self, to: &mut S) -> io::Result<usize>;

    /// Bytes that are held.
    fn held(&self) -> usize;
}

/// What can be done with a stream though no event of its socket says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Woken {
    /// There may be something to receive.
    pub readable: bool,
    /// Something may be sent.
    pub writable: bool,
}

/// A UDP socket of the host.
pub trait UdpSocket {
    /// Sends a datagram, or several: one that is too long does not keep a shorter one behind it.
    ///
    /// # Errors
    /// What `sendto(2)` reports; it concerns only as many of these datagrams as it says.
    fn send(&mut self, datagram: &Outgoing<'_>) -> Result<(), SendFailure>;

    /// Receives what is there, as far as the inbox has room; what was in it is forgotten.
    ///
    /// # Errors
    /// `WouldBlock` when there is none; another error means that [`UdpSocket::queued_error`] has
    /// something to tell.
    fn recv(&mut self, inbox: &mut Inbox) -> io::Result<()>;

    /// The next error that the network reported; the original payload is written to `bytes`.
    fn queued_error(&mut self, bytes: &mut [u8]) -> Option<QueuedError>;
}

/// An ICMP echo socket of the host. The kernel chooses the identifier.
pub trait EchoSocket {
    /// Sends an echo request.
    ///
    /// # Errors
    /// What `sendto(2)` reports.
    fn send(&mut self, to: IpAddr, seq: u16, data: &[u8], marks: Marks) -> io::Result<()>;

    /// Receives the echo replies that are there, as far as the inbox has room: ICMP messages from their
    /// type on. What was in it is forgotten.
    ///
    /// # Errors
    /// `WouldBlock` when there is none; another error means that [`EchoSocket::queued_error`] has
    /// something to tell.
    fn recv(&mut self, inbox: &mut Inbox) -> io::Result<()>;

    /// The next error that the network reported; the original ICMP message is written to `bytes`.
    fn queued_error(&mut self, bytes: &mut [u8]) -> Option<QueuedError>;
}
