//! [`Host`] by the kernel's sockets, with a private edge-triggered epoll set.
//!
//! Owns the epoll descriptor and the source of resolvers; sockets are owned by the flows. One
//! descriptor (the epoll set) is watched by tokio, so a thousand sockets cost the runtime one
//! registration (design.md 1.7). No policy: whether a destination may be reached is decided
//! before a call comes here.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Socket, TcpKeepalive, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::resolv_conf::Source;
use super::{DatagramRole, Event, Host, TcpSocket, Token};
use crate::config::{Config, Dns, Outbound};
use crate::sys::readiness::{EventSet, watch};

pub use super::datagram::{KernelEcho, KernelUdp};

/// Events taken from the kernel in one turn: the budget of a turn.
const EVENTS_PER_TURN: usize = 256;

/// Connections that may wait for us at a published port; the kernel caps it at `somaxconn`.
const LISTEN_BACKLOG: i32 = 1024;

/// Idle time before a host connection is probed (RFC 9293 3.8.4: not below two hours by default).
const KEEPALIVE_IDLE: Duration = Duration::from_secs(7200);

/// Which resolvers there are.
#[derive(Debug)]
enum Resolvers {
    Fixed(Vec<SocketAddr>),
    File {
        source: Source,
        /// Looked at in this turn already.
        fresh: bool,
    },
}

/// The host's network by ordinary sockets.
#[derive(Debug)]
pub struct KernelHost {
    poller: AsyncFd<EventSet>,
    events: Vec<EpollEvent>,
    outbound: Option<Outbound>,
    outbound6: Option<Outbound>,
    resolvers: Resolvers,
}

impl KernelHost {
    /// Opens the epoll set. Needs a tokio runtime.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn new(config: &Config, resolv_conf: Source) -> io::Result<Self> {
        Ok(Self {
            poller: watch(EventSet::new()?)?,
            events: vec![EpollEvent::empty(); EVENTS_PER_TURN],
            outbound: config.outbound.clone(),
            outbound6: config.outbound6.clone(),
            resolvers: match &config.dns {
                Dns::Fixed(addrs) => Resolvers::Fixed(addrs.clone()),
                Dns::Off => Resolvers::Fixed(Vec::new()),
                Dns::Host => Resolvers::File {
                    source: resolv_conf,
                    fresh: false,
                },
            },
        })
    }

    /// Waits until [`KernelHost::poll_events`] has something to tell.
    ///
    /// # Errors
    /// When the runtime goes away.
    pub async fn readable(&self) -> io::Result<()> {
        self.poller
            .readable()
            .await
            .map(|mut guard| guard.retain_ready())
    }

    /// Fills `events` with what became ready, up to a turn's budget; true when there may be more.
    ///
    /// # Errors
    /// What `epoll_wait(2)` reports.
    pub fn poll_events(&mut self, events: &mut Vec<Event>) -> io::Result<bool> {
        events.clear();
        if let Resolvers::File { fresh, .. } = &mut self.resolvers {
            *fresh = false;
        }
        let buffer = &mut self.events;
        let mut taken = 0;
        let polled = self.poller.try_io(Interest::READABLE, |poller| {
            taken = poller.take(buffer)?;
            // Fewer than fit means that the ready list is empty now: tell tokio to wait for the
            // next edge, which saves the call that would find nothing.
            if taken < buffer.len() {
                Err(io::ErrorKind::WouldBlock.into())
            } else {
                Ok(())
            }
        });
        let more = match polled {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => true,
            Err(error) => return Err(error),
        };
        let failed = EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP;
        events.extend(buffer[..taken].iter().map(|event| {
            let flags = event.events();
            Event {
                token: Token(event.data()),
                readable: flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | failed),
                writable: flags.intersects(EpollFlags::EPOLLOUT | failed),
                hangup: flags.intersects(EpollFlags::EPOLLRDHUP | failed),
            }
        }));
        Ok(more)
    }

    /// Binds an outgoing socket to the address or interface asked for.
    fn bind_outbound(&self, socket: &Socket, remote: IpAddr) -> io::Result<()> {
        // What leads to the host's own loopback does not leave by an interface.
        if remote.is_loopback() {
            return Ok(());
        }
        match self.outbound(remote.is_ipv6()) {
            None => Ok(()),
            Some(Outbound::Interface(name)) => socket.bind_device(Some(name.as_bytes())),
            Some(Outbound::Address(addr)) => {
                setsockopt(socket, sockopt::IpBindAddressNoPort, &true)?;
                socket.bind(&SocketAddr::new(*addr, 0).into())
            }
        }
    }

    const fn outbound(&self, ipv6: bool) -> Option<&Outbound> {
        if ipv6 {
            self.outbound6.as_ref()
        } else {
            self.outbound.as_ref()
        }
    }

    /// Whether sockets can be bound as the configuration wants it, so that a wrong address or name is
    /// told at the start and not by every connection.
    ///
    /// # Errors
    /// What binding reports: not an address of this host, no such interface.
    pub fn check_outbound(&self) -> io::Result<()> {
        for ipv6 in [false, true] {
            let Some(outbound) = self.outbound(ipv6) else {
                continue;
            };
            match nonblocking(family(ipv6), Type::DGRAM, None) {
                Ok(socket) => self.bind_outbound(&socket, unspecified(ipv6))?,
                // An interface is for both families, of which this kernel has one.
                Err(error)
                    if error.raw_os_error() == Some(libc::EAFNOSUPPORT)
                        && matches!(outbound, Outbound::Interface(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn watch(&self, fd: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        self.poller.get_ref().add(fd, token.0)
    }
}

fn nonblocking(
    domain: Domain,
    kind: Type,
    protocol: Option<socket2::Protocol>,
) -> io::Result<Socket> {
    Socket::new_raw(domain, kind.nonblocking().cloexec(), protocol)
}

impl Host for KernelHost {
    type Tcp = KernelTcp;
    type Listener = Socket;
    type Udp = KernelUdp;
    type Echo = KernelEcho;

    fn resolvers(&mut self) -> &[SocketAddr] {
        match &mut self.resolvers {
            Resolvers::Fixed(addrs) => addrs,
            Resolvers::File {
                source,
                fresh: true,
            } => &source.known().resolvers,
            Resolvers::File { source, fresh } => {
                *fresh = true;
                &source.current().resolvers
            }
        }
    }

    fn tcp_connect(&mut self, token: Token, remote: SocketAddr) -> io::Result<KernelTcp> {
        let socket = nonblocking(Domain::for_address(remote), Type::STREAM, None)?;
        self.bind_outbound(&socket, remote.ip())?;
        match socket.connect(&remote.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(error) => return Err(error),
        }
        let socket = KernelTcp::new(socket);
        self.watch(socket.0.as_fd(), token)?;
        Ok(socket)
    }

    fn tcp_listen(&mut self, token: Token, local: SocketAddr) -> io::Result<Socket> {
        let socket = nonblocking(Domain::for_address(local), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        if local.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.bind(&local.into())?;
        socket.listen(LISTEN_BACKLOG)?;
        self.watch(socket.as_fd(), token)?;
        Ok(socket)
    }

    fn tcp_accept(&mut self, listener: &Socket) -> io::Result<(KernelTcp, SocketAddr)> {
        let (socket, peer) = listener.accept()?;
        socket.set_nonblocking(true)?;
        let peer = peer.as_socket().ok_or(io::ErrorKind::InvalidData)?;
        Ok((KernelTcp::new(socket), peer))
    }

    fn tcp_watch(&mut self, token: Token, socket: &KernelTcp) -> io::Result<()> {
        self.watch(socket.0.as_fd(), token)
    }

    fn udp_open(&mut self, token: Token, role: DatagramRole) -> io::Result<KernelUdp> {
        let ipv6 = match role {
            DatagramRole::Outbound { ipv6 } => ipv6,
            DatagramRole::Loopback => false,
            DatagramRole::Connected(addr) | DatagramRole::Published(addr) => addr.is_ipv6(),
        };
        let socket = nonblocking(family(ipv6), Type::DGRAM, None)?;
        let any = SocketAddr::new(unspecified(ipv6), 0);
        match role {
            DatagramRole::Outbound { .. } if self.outbound(ipv6).is_some() => {
                self.bind_outbound(&socket, any.ip())?;
            }
            DatagramRole::Outbound { .. } | DatagramRole::Loopback => socket.bind(&any.into())?,
            DatagramRole::Published(addr) => {
                if ipv6 {
                    socket.set_only_v6(true)?;
                }
                socket.bind(&addr.into())?;
            }
            DatagramRole::Connected(addr) => {
                self.bind_outbound(&socket, addr.ip())?;
                socket.connect(&addr.into())?;
            }
        }
        let socket = KernelUdp::new(socket, ipv6)?;
        if matches!(role, DatagramRole::Published(addr) if addr.ip().is_unspecified()) {
            socket.note_addresses()?;
        }
        self.watch(socket.as_fd(), token)?;
        Ok(socket)
    }

    fn echo_open(&mut self, token: Token, ipv6: bool) -> io::Result<KernelEcho> {
        let protocol = if ipv6 {
            socket2::Protocol::ICMPV6
        } else {
            socket2::Protocol::ICMPV4
        };
        let socket = nonblocking(family(ipv6), Type::DGRAM, Some(protocol))?;
        self.bind_outbound(&socket, unspecified(ipv6))?;
        let socket = KernelEcho::new(socket, ipv6);
        self.watch(socket.as_fd(), token)?;
        Ok(socket)
    }
}

const fn family(ipv6: bool) -> Domain {
    if ipv6 { Domain::IPV6 } else { Domain::IPV4 }
}

const fn unspecified(ipv6: bool) -> IpAddr {
    if ipv6 {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    } else {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    }
}

/// A TCP socket of the kernel.
#[derive(Debug)]
pub struct KernelTcp(Socket);

impl KernelTcp {
    fn new(socket: Socket) -> Self {
        // The guest decides when small segments are sent; its choice is not to be delayed again.
        let _ = socket.set_tcp_nodelay(true);
        let _ = socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE_IDLE));
        Self(socket)
    }
}

impl TcpSocket for KernelTcp {
    fn connect_outcome(&mut self) -> io::Result<()> {
        match self.0.take_error()? {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send_with_flags(bytes, libc::MSG_NOSIGNAL)
    }

    fn recv(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        io::Read::read(&mut &self.0, bytes)
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        self.0.shutdown(std::net::Shutdown::Write)
    }

    fn reset(self) {
        // RFC 9293 3.10.5 ABORT: closing with a zero linger time sends a RST.
        let _ = self.0.set_linger(Some(Duration::ZERO));
    }
}
