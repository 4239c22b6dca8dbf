//! [`Host`] by the kernel's sockets, with a private edge-triggered epoll set.
//!
//! Owns the epoll descriptor and the source of resolvers; sockets are owned by the flows. One
//! descriptor (the epoll set) is watched by tokio, so a thousand sockets cost the runtime one
//! registration. Sockets inside the guest's namespace come by a line that is watched here
//! ([`inside`]). What guests ask for leaves some descriptors to others ([`Reserve`]). No policy: whether a destination may be reached is decided
//! before a call comes here.

mod datagram;
mod depth;
mod echo;
mod error_queue;
pub mod inside;
mod marks;
mod pipe;
mod ports;
mod stream;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::task::{Context, Poll};

use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Socket, Type};

use super::resolv_conf::Source;
use super::{DatagramRole, Event, Host, PortWish, Token};
use crate::config::{Config, Dns, Outbound};
use crate::net::Marks;
use crate::sys::readiness::{EventSet, Look, Watched};
use crate::sys::reserve::Reserve;
use crate::sys::socket::{accept, lacks_means};
use inside::Inside;
use pipe::Pipes;
use ports::Ports;

pub use datagram::KernelUdp;
pub use echo::KernelEcho;
pub use pipe::KernelPipe;
pub use stream::KernelTcp;

/// Events taken from the kernel in one turn: the budget of a turn.
const EVENTS_PER_TURN: usize = 256;

/// Connections that may wait for us at a published port; the kernel caps it at `somaxconn`.
const LISTEN_BACKLOG: i32 = 1024;

/// An address that stands for all of IPv6 beyond the host's own networks: a route to it is a route to
/// the Internet. Nothing is sent there.
const ANYWHERE: Ipv6Addr = Ipv6Addr::new(0x2001, 0x500, 0x2, 0, 0, 0, 0, 0xc);

/// Names the line to whoever opens sockets inside.
const LINE: Token = Token(u64::MAX);

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
    poller: Watched<EventSet>,
    events: Vec<EpollEvent>,
    config: Arc<Config>,
    resolvers: Resolvers,
    ports: Ports,
    inside: Inside,
    ports_inside: Ports,
    pipes: Pipes,
    reserve: Reserve,
    /// Events that came about without the kernel.
    own_events: Vec<Event>,
}

impl KernelHost {
    /// Opens the epoll set. Needs a tokio runtime. Without a source nobody will ask for the host's resolvers.
    /// Guests get none of the descriptors in `reserve`, and one of so many `workers` its part of the large pipes.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn new(
        config: Arc<Config>,
        resolv_conf: Option<Source>,
        reserve: Reserve,
        workers: usize,
    ) -> io::Result<Self> {
        Ok(Self {
            poller: Watched::new(EventSet::new()?)?,
            events: vec![EpollEvent::empty(); EVENTS_PER_TURN],
            resolvers: match (&config.dns, resolv_conf) {
                (Dns::Fixed(addrs), _) => Resolvers::Fixed(addrs.clone()),
                (Dns::Host, Some(source)) => Resolvers::File {
                    source,
                    fresh: false,
                },
                (Dns::Off, _) | (Dns::Host, None) => Resolvers::Fixed(Vec::new()),
            },
            ports: Ports::of_host(),
            inside: Inside::default(),
            ports_inside: Ports::of_namespace(),
            pipes: Pipes::new(workers),
            config,
            reserve,
            own_events: Vec::new(),
        })
    }

    /// Has sockets inside the guest's namespace opened by the process at the other end of `line`.
    ///
    /// # Errors
    /// What `epoll_ctl(2)` reports.
    pub fn set_inside(&mut self, line: UnixStream) -> io::Result<()> {
        self.inside = Inside::new(line);
        match self.inside.line() {
            Some(line) => self.watch(line, LINE),
            None => Ok(()),
        }
    }

    /// Has the task woken when [`KernelHost::poll_events`] may have something to tell, and says whether it may now.
    ///
    /// # Errors
    /// When the runtime goes away.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poller.poll_readable(cx)
    }

    /// It goes to another thread next: no runtime is to wake anybody for it.
    pub fn leave(&mut self) {
        self.poller.leave();
    }

    /// It is in this thread now, whose runtime is to wake it.
    ///
    /// # Errors
    /// When the runtime has no room; then nothing has changed.
    pub fn settle(&mut self) -> io::Result<()> {
        self.poller.settle()
    }

    /// Fills `events` with what became ready, up to a turn's budget; true when there may be more.
    ///
    /// # Errors
    /// What `epoll_wait(2)` reports.
    pub fn poll_events(&mut self, events: &mut Vec<Event>, look: Look) -> io::Result<bool> {
        events.clear();
        self.inside.begin_turn(events);
        if let Resolvers::File { fresh, .. } = &mut self.resolvers {
            *fresh = false;
        }
        let buffer = &mut self.events;
        let mut taken = 0;
        let polled = self.poller.try_read(look, |poller| {
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
        let mut inside = false;
        events.extend(buffer[..taken].iter().filter_map(|event| {
            let flags = event.events();
            inside |= event.data() == LINE.0;
            (event.data() != LINE.0).then(|| Event {
                token: Token(event.data()),
                readable: flags.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | failed),
                writable: flags.intersects(EpollFlags::EPOLLOUT | failed),
                hangup: flags.intersects(EpollFlags::EPOLLRDHUP | failed),
                error: flags.contains(EpollFlags::EPOLLERR),
                urgent: flags.contains(EpollFlags::EPOLLPRI),
            })
        }));
        events.append(&mut self.own_events);
        if inside {
            self.inside.collect(self.reserve, events);
        }
        Ok(more)
    }

    /// Events wait that nothing in the kernel will tell of.
    #[must_use]
    pub const fn has_own_events(&self) -> bool {
        !self.own_events.is_empty()
    }

    /// Whether sockets can be bound as the configuration wants it, so that a wrong address or name is
    /// told at the start and not by every connection.
    ///
    /// # Errors
    /// What binding reports: not an address of this host, no such interface.
    pub fn check_outbound(&self) -> io::Result<()> {
        for ipv6 in [false, true] {
            let Some(outbound) = self.config.outbound_of(ipv6) else {
                continue;
            };
            match nonblocking(family(ipv6), Type::DGRAM, None) {
                Ok(socket) => bind_outbound(&self.config, &socket, unspecified(ipv6))?,
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
        self.poller.get().add(fd, token.0)
    }
}

fn nonblocking(
    domain: Domain,
    kind: Type,
    protocol: Option<socket2::Protocol>,
) -> io::Result<Socket> {
    Socket::new_raw(domain, kind.nonblocking().cloexec(), protocol)
}

/// Binds an outgoing socket to the address or interface asked for.
fn bind_outbound(config: &Config, socket: &Socket, remote: IpAddr) -> io::Result<()> {
    // What leads to the host's own loopback does not leave by an interface.
    if remote.is_loopback() {
        return Ok(());
    }
    match config.outbound_of(remote.is_ipv6()) {
        None => Ok(()),
        Some(Outbound::Interface(name)) => socket.bind_device(Some(name.as_bytes())),
        Some(Outbound::Address(addr)) => {
            setsockopt(socket, sockopt::IpBindAddressNoPort, &true)?;
            socket.bind(&SocketAddr::new(*addr, 0).into())
        }
    }
}

/// Whether there is an address to connect from, as far as a socket for datagrams can tell; it sends nothing.
fn probe(config: &Config, remote: SocketAddr) -> io::Result<()> {
    let probed = nonblocking(Domain::for_address(remote), Type::DGRAM, None).and_then(|socket| {
        bind_outbound(config, &socket, remote.ip())?;
        socket.connect(&remote.into())
    });
    match probed {
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

impl Host for KernelHost {
    type Tcp = KernelTcp;
    type Listener = Socket;
    type Udp = KernelUdp;
    type Echo = KernelEcho;
    type Pipe = KernelPipe;

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

    fn reaches_ipv6(&mut self) -> Option<bool> {
        reaches_ipv6()
    }

    fn tcp_connect(
        &mut self,
        token: Token,
        remote: SocketAddr,
        marks: Marks,
    ) -> io::Result<KernelTcp> {
        let socket = nonblocking(Domain::for_address(remote), Type::STREAM, None)?;
        let socket = self.reserve.for_guest(socket)?;
        bind_outbound(&self.config, &socket, remote.ip())?;
        let socket = KernelTcp::connect(socket, remote, marks, &mut self.ports, || {
            probe(&self.config, remote)
        })?;
        self.watch(socket.as_fd(), token)?;
        Ok(socket)
    }

    fn tcp_listen(&mut self, token: Token, local: SocketAddr) -> io::Result<Socket> {
        let socket = nonblocking(Domain::for_address(local), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        if local.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.bind(&local.into())?;
        stream::prepare(&socket)?;
        socket.listen(LISTEN_BACKLOG)?;
        self.watch(socket.as_fd(), token)?;
        Ok(socket)
    }

    fn tcp_accept(&mut self, listener: &Socket) -> io::Result<(KernelTcp, SocketAddr)> {
        let (socket, peer) = accept(listener.as_fd())?;
        let peer = peer.as_socket().ok_or(io::ErrorKind::InvalidData)?;
        Ok((KernelTcp::accepted(socket.into(), peer), peer))
    }

    fn tcp_watch(&mut self, token: Token, socket: &KernelTcp) -> io::Result<()> {
        self.watch(socket.as_fd(), token)
    }

    fn tcp_connect_inside(&mut self, token: Token, to: SocketAddr) -> io::Result<KernelTcp> {
        let socket = Socket::from(self.inside.take(to.is_ipv6(), token)?);
        let socket = KernelTcp::connect_inside(socket, to, &mut self.ports_inside)?;
        self.watch(socket.as_fd(), token)?;
        Ok(socket)
    }

    fn pass_over_inside(&mut self) {
        self.inside.pass_over(&mut self.own_events);
    }

    fn pipe(&mut self) -> io::Result<KernelPipe> {
        self.pipes.take()
    }

    fn return_pipe(&mut self, pipe: KernelPipe) {
        self.pipes.put(pipe, self.reserve);
    }

    fn udp_open(&mut self, role: DatagramRole) -> io::Result<KernelUdp> {
        let ipv6 = match role {
            DatagramRole::Outbound(wish) | DatagramRole::Loopback(wish) => wish.ipv6,
            DatagramRole::Connected(addr) | DatagramRole::Published(addr) => addr.is_ipv6(),
        };
        let mut socket = nonblocking(family(ipv6), Type::DGRAM, None)?;
        if !matches!(role, DatagramRole::Published(_)) {
            socket = self.reserve.for_guest(socket)?;
        }
        match role {
            DatagramRole::Outbound(wish) => match self.config.outbound_of(ipv6) {
                Some(Outbound::Address(addr)) => bind_wish(&socket, *addr, wish)?,
                Some(Outbound::Interface(_)) => {
                    bind_outbound(&self.config, &socket, unspecified(ipv6))?;
                    bind_wish(&socket, unspecified(ipv6), wish)?;
                }
                None => bind_wish(&socket, unspecified(ipv6), wish)?,
            },
            DatagramRole::Loopback(wish) => bind_wish(&socket, loopback(ipv6), wish)?,
            DatagramRole::Published(addr) => {
                if ipv6 {
                    socket.set_only_v6(true)?;
                }
                socket.bind(&addr.into())?;
            }
            DatagramRole::Connected(addr) => {
                bind_outbound(&self.config, &socket, addr.ip())?;
                socket.connect(&addr.into())?;
            }
        }
        let socket = KernelUdp::new(socket, ipv6)?;
        match role {
            DatagramRole::Published(addr) => {
                socket.note_marks()?;
                if addr.ip().is_unspecified() {
                    socket.note_addresses()?;
                }
            }
            DatagramRole::Outbound(_) | DatagramRole::Loopback(_) => socket.note_marks()?,
            DatagramRole::Connected(_) => {}
        }
        Ok(socket)
    }

    fn udp_watch(&mut self, token: Token, socket: &KernelUdp) -> io::Result<()> {
        self.watch(socket.as_fd(), token)
    }

    fn echo_open(&mut self, token: Token, ipv6: bool) -> io::Result<KernelEcho> {
        let protocol = if ipv6 {
            socket2::Protocol::ICMPV6
        } else {
            socket2::Protocol::ICMPV4
        };
        let socket = nonblocking(family(ipv6), Type::DGRAM, Some(protocol))?;
        let socket = self.reserve.for_guest(socket)?;
        bind_outbound(&self.config, &socket, unspecified(ipv6))?;
        let socket = KernelEcho::new(socket, ipv6)?;
        self.watch(socket.as_fd(), token)?;
        Ok(socket)
    }
}

/// Binds a datagram socket to the port it should have, or to another where that one is taken or
/// privileged: two sockets never share one.
fn bind_wish(socket: &Socket, addr: IpAddr, wish: PortWish) -> io::Result<()> {
    if addr.is_ipv6() {
        // The guest's IPv4 port of the same number has a socket of its own.
        socket.set_only_v6(true)?;
    }
    let mut refused = None;
    for port in wish.candidates() {
        match socket.bind(&SocketAddr::new(addr, port).into()) {
            Ok(()) => return Ok(()),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied
                ) =>
            {
                refused = Some(error);
            }
            Err(error) => return Err(error),
        }
    }
    refused.map_or(Ok(()), Err)
}

/// Whether some route leads to global IPv6 addresses at this moment; none where the host has no means to tell.
#[must_use]
pub fn reaches_ipv6() -> Option<bool> {
    // Connecting a datagram socket looks the route up and sends nothing.
    let anywhere = SocketAddr::new(ANYWHERE.into(), 53);
    let looked = nonblocking(Domain::IPV6, Type::DGRAM, None)
        .and_then(|socket| socket.connect(&anywhere.into()));
    match looked {
        Err(error) if lacks_means(&error) => None,
        looked => Some(looked.is_ok()),
    }
}

const fn family(ipv6: bool) -> Domain {
    if ipv6 { Domain::IPV6 } else { Domain::IPV4 }
}

const fn loopback(ipv6: bool) -> IpAddr {
    if ipv6 {
        IpAddr::V6(Ipv6Addr::LOCALHOST)
    } else {
        IpAddr::V4(Ipv4Addr::LOCALHOST)
    }
}

const fn unspecified(ipv6: bool) -> IpAddr {
    if ipv6 {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED)
    } else {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    }
}
