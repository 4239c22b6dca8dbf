//! Calls of a simulated host that fail: which one, with which error, once or for as long as it lasts.
//!
//! In: the faults that a test plans, or a seed. Out: for each call of the stack's whether it fails. What an
//! error does to the socket itself, beside being reported, is what the kernel does: one that ends a
//! connection has ended it, and "would block" is followed by an event.

use std::io;

use libc::{
    EACCES, EADDRINUSE, EADDRNOTAVAIL, EAFNOSUPPORT, EAGAIN, EBADF, ECONNABORTED, ECONNREFUSED,
    ECONNRESET, EDESTADDRREQ, EEXIST, EFAULT, EHOSTDOWN, EHOSTUNREACH, EINTR, EINVAL, EIO, EISCONN,
    ELOOP, EMFILE, EMSGSIZE, ENETDOWN, ENETUNREACH, ENFILE, ENOBUFS, ENODEV, ENOENT, ENOMEM,
    ENONET, ENOPROTOOPT, ENOSPC, ENOSYS, ENOTCONN, ENOTSOCK, EOPNOTSUPP, EPERM, EPIPE, EPROTO,
    EPROTONOSUPPORT, EPROTOTYPE, ESPIPE, ETIMEDOUT,
};

use super::network::Network;
use super::state::{SocketId, State, Watcher};

/// A call of the host's traits that can fail, by what the kernel is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Call {
    /// `Host::tcp_connect`: socket(2), setsockopt(2), bind(2), connect(2).
    Connect,
    /// `Host::tcp_listen`: socket(2), setsockopt(2), bind(2), listen(2).
    Listen,
    /// `Host::tcp_accept`: accept(2).
    Accept,
    /// `Host::tcp_watch`: `epoll_ctl(2)`.
    WatchTcp,
    /// `Host::tcp_connect_inside`: as `Connect`.
    ConnectInside,
    /// `Host::pipe`: pipe(2).
    OpenPipe,
    /// `Host::udp_open`: socket(2), setsockopt(2), bind(2), connect(2).
    OpenUdp,
    /// `Host::udp_watch`: `epoll_ctl(2)`.
    WatchUdp,
    /// `Host::echo_open`: socket(2), setsockopt(2), bind(2), `epoll_ctl(2)`.
    OpenEcho,
    /// `TcpSocket::connect_outcome`: getsockopt(2) and the `SO_ERROR` that it tells.
    Outcome,
    /// `TcpSocket::send`: send(2).
    Send,
    /// `TcpSocket::recv`: recv(2).
    Receive,
    /// `TcpSocket::begin_peeking`: setsockopt(2).
    BeginPeeking,
    /// `TcpSocket::peek`: recv(2).
    Peek,
    /// `TcpSocket::discard`: recv(2).
    Discard,
    /// `TcpSocket::shutdown_write`: shutdown(2).
    Shutdown,
    /// `Pipe::fill`: splice(2) from a connection.
    Fill,
    /// `Pipe::drain`: splice(2) to a connection.
    Drain,
    /// `UdpSocket::send`: sendmsg(2).
    SendDatagram,
    /// `UdpSocket::recv`: recvmmsg(2).
    ReceiveDatagrams,
    /// `EchoSocket::send`: sendmsg(2).
    SendEcho,
    /// `EchoSocket::recv`: recvmmsg(2).
    ReceiveEchoes,
}

/// What connect(2) and what stands before it report.
#[rustfmt::skip]
const CONNECT: &[i32] = &[
    EACCES, EPERM, EADDRINUSE, EADDRNOTAVAIL, EAFNOSUPPORT, EAGAIN, EBADF, ECONNREFUSED, EFAULT,
    EHOSTUNREACH, EINTR, EINVAL, EISCONN, EMFILE, ENETDOWN, ENETUNREACH, ENFILE, ENOBUFS, ENOMEM,
    ENOPROTOOPT, ENOTSOCK, EPROTONOSUPPORT, EPROTOTYPE, ETIMEDOUT,
];
/// The same for a connection inside; that there is no way at all is told by the first.
#[rustfmt::skip]
const CONNECT_INSIDE: &[i32] = &[
    ENOSYS, EACCES, EADDRNOTAVAIL, EAGAIN, ECONNREFUSED, EHOSTUNREACH, EINTR, EINVAL, EMFILE,
    ENETUNREACH, ENOBUFS, ENOMEM, EPERM, ETIMEDOUT,
];
/// What socket(2), bind(2) and listen(2) report.
#[rustfmt::skip]
const BIND: &[i32] = &[
    EACCES, EPERM, EADDRINUSE, EADDRNOTAVAIL, EAFNOSUPPORT, EBADF, EFAULT, EINVAL, ELOOP, EMFILE,
    ENETUNREACH, ENFILE, ENOBUFS, ENODEV, ENOENT, ENOMEM, ENOPROTOOPT, ENOTSOCK, EOPNOTSUPP,
    EPROTONOSUPPORT,
];
/// What accept(2) reports, those of the new connection included.
#[rustfmt::skip]
const ACCEPT: &[i32] = &[
    EAGAIN, EBADF, ECONNABORTED, EFAULT, EINTR, EINVAL, EMFILE, ENFILE, ENOBUFS, ENOMEM, ENOTSOCK,
    EOPNOTSUPP, EPERM, EACCES, EPROTO, ENETDOWN, ENOPROTOOPT, EHOSTDOWN, ENONET, EHOSTUNREACH,
    ENETUNREACH, ETIMEDOUT, ECONNREFUSED,
];
/// What `epoll_ctl(2)` reports.
const WATCH: &[i32] = &[EBADF, EEXIST, EINVAL, ELOOP, ENOENT, ENOMEM, ENOSPC, EPERM];
/// What pipe(2) reports.
const PIPE: &[i32] = &[EFAULT, EINVAL, EMFILE, ENFILE, ENOMEM];
/// How a connect may have ended, and what getsockopt(2) reports.
#[rustfmt::skip]
const OUTCOME: &[i32] = &[
    ECONNREFUSED, ECONNRESET, ETIMEDOUT, EHOSTUNREACH, ENETUNREACH, ENETDOWN, EACCES, EPERM,
    EADDRNOTAVAIL, ENOBUFS, ENOMEM, EBADF, EPROTO, EPIPE,
];
/// What send(2) reports for a connection.
#[rustfmt::skip]
const SEND: &[i32] = &[
    EACCES, EAGAIN, EBADF, ECONNRESET, ECONNABORTED, EDESTADDRREQ, EFAULT, EINTR, EINVAL, EMSGSIZE,
    ENOBUFS, ENOMEM, ENOTCONN, ENOTSOCK, EOPNOTSUPP, EPIPE, EPERM, ETIMEDOUT, EHOSTUNREACH,
    ENETUNREACH, ENETDOWN,
];
/// What setsockopt(2) reports.
#[rustfmt::skip]
const SET_OPTION: &[i32] = &[EBADF, EFAULT, EINVAL, ENOMEM, ENOPROTOOPT, ENOTSOCK, EOPNOTSUPP];
/// What recv(2) reports for a connection.
#[rustfmt::skip]
const RECEIVE: &[i32] = &[
    EAGAIN, EBADF, ECONNREFUSED, ECONNRESET, ECONNABORTED, EFAULT, EINTR, EINVAL, ENOMEM, ENOTCONN,
    ENOTSOCK, EPIPE, ETIMEDOUT, EHOSTUNREACH, ENETUNREACH, EIO,
];
/// What shutdown(2) reports.
const SHUTDOWN: &[i32] = &[EBADF, EINVAL, ENOTCONN, ENOTSOCK, ENOBUFS];
/// What splice(2) reports, and what it passes on of the connection.
#[rustfmt::skip]
const SPLICE: &[i32] = &[
    EAGAIN, EBADF, EINVAL, ENOMEM, ESPIPE, EINTR, ECONNRESET, ECONNABORTED, EPIPE, ETIMEDOUT,
    ENOTCONN, EHOSTUNREACH, ENOBUFS, EIO,
];
/// What sendmsg(2) reports for a datagram, those of the network about an earlier one included.
#[rustfmt::skip]
const SEND_DATAGRAM: &[i32] = &[
    EACCES, EAGAIN, EBADF, ECONNREFUSED, EDESTADDRREQ, EFAULT, EINTR, EINVAL, EIO, EMSGSIZE,
    ENOBUFS, ENOMEM, ENOTCONN, ENOTSOCK, EOPNOTSUPP, EPERM, EPIPE, EHOSTUNREACH, EHOSTDOWN,
    ENETUNREACH, ENETDOWN, EADDRNOTAVAIL, EAFNOSUPPORT, EPROTO,
];
/// What recvmmsg(2) reports for datagrams.
#[rustfmt::skip]
const RECEIVE_DATAGRAMS: &[i32] = &[
    EAGAIN, EBADF, ECONNREFUSED, EFAULT, EINTR, EINVAL, ENOMEM, ENOTCONN, ENOTSOCK, EHOSTUNREACH,
    EHOSTDOWN, ENETUNREACH, ENETDOWN, EACCES, EMSGSIZE, EPROTO, ENOPROTOOPT, EIO,
];

impl Call {
    /// Every call.
    pub const ALL: [Self; 22] = [
        Self::Connect,
        Self::Listen,
        Self::Accept,
        Self::WatchTcp,
        Self::ConnectInside,
        Self::OpenPipe,
        Self::OpenUdp,
        Self::WatchUdp,
        Self::OpenEcho,
        Self::Outcome,
        Self::Send,
        Self::Receive,
        Self::BeginPeeking,
        Self::Peek,
        Self::Discard,
        Self::Shutdown,
        Self::Fill,
        Self::Drain,
        Self::SendDatagram,
        Self::ReceiveDatagrams,
        Self::SendEcho,
        Self::ReceiveEchoes,
    ];

    /// Every error that the call can give, as the man pages have it.
    #[must_use]
    pub const fn errnos(self) -> &'static [i32] {
        match self {
            Self::Connect => CONNECT,
            Self::ConnectInside => CONNECT_INSIDE,
            Self::Listen | Self::OpenUdp | Self::OpenEcho => BIND,
            Self::Accept => ACCEPT,
            Self::WatchTcp | Self::WatchUdp => WATCH,
            Self::OpenPipe => PIPE,
            Self::Outcome => OUTCOME,
            Self::Send => SEND,
            Self::Receive | Self::Peek | Self::Discard => RECEIVE,
            Self::BeginPeeking => SET_OPTION,
            Self::Shutdown => SHUTDOWN,
            Self::Fill | Self::Drain => SPLICE,
            Self::SendDatagram | Self::SendEcho => SEND_DATAGRAM,
            Self::ReceiveDatagrams | Self::ReceiveEchoes => RECEIVE_DATAGRAMS,
        }
    }

    /// The call can fail so again and again, for as long as the host is in that state. What a socket has
    /// kept about one packet or one connection it tells once, and a signal comes once.
    #[must_use]
    pub fn can_last(self, errno: i32) -> bool {
        if errno == EINTR || errno == EAGAIN {
            return false;
        }
        match self {
            Self::Accept => matches!(
                errno,
                EBADF
                    | EFAULT
                    | EINVAL
                    | EMFILE
                    | ENFILE
                    | ENOBUFS
                    | ENOMEM
                    | ENOTSOCK
                    | EPERM
                    | EACCES
            ),
            Self::ReceiveDatagrams | Self::ReceiveEchoes => matches!(
                errno,
                EBADF | EFAULT | EINVAL | ENOMEM | ENOTSOCK | EACCES | ENOTCONN | EIO
            ),
            Self::Connect
            | Self::Listen
            | Self::WatchTcp
            | Self::ConnectInside
            | Self::OpenPipe
            | Self::OpenUdp
            | Self::WatchUdp
            | Self::OpenEcho
            | Self::Outcome
            | Self::Send
            | Self::Receive
            | Self::BeginPeeking
            | Self::Peek
            | Self::Discard
            | Self::Shutdown
            | Self::Fill
            | Self::Drain
            | Self::SendDatagram
            | Self::SendEcho => true,
        }
    }
}

/// A call that is to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Which.
    pub call: Call,
    /// How many of its kind come before it.
    pub nth: usize,
    /// The error.
    pub errno: i32,
    /// All of its kind that follow fail so, too.
    pub lasts: bool,
}

/// The faults of a network.
#[derive(Debug, Default)]
pub(super) struct Faults {
    planned: Option<Fault>,
    /// The state of the generator, and how many of a thousand calls fail.
    random: Option<(u64, u64)>,
    calls: [usize; Call::ALL.len()],
    struck: usize,
}

impl Faults {
    fn strike(&mut self, call: Call) -> Option<i32> {
        if self.planned.is_none() && self.random.is_none() {
            return None;
        }
        let calls = &mut self.calls[call as usize];
        let nth = *calls;
        *calls += 1;
        let planned = self
            .planned
            .filter(|it| it.call == call && (it.nth == nth || (it.lasts && it.nth < nth)));
        let errno = planned.map(|it| it.errno).or_else(|| self.by_chance(call));
        self.struck += usize::from(errno.is_some());
        errno
    }

    fn by_chance(&mut self, call: Call) -> Option<i32> {
        let (state, of_thousand) = self.random.as_mut()?;
        // xorshift64*
        *state ^= *state >> 12;
        *state ^= *state << 25;
        *state ^= *state >> 27;
        let drawn = state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16;
        let errnos = call.errnos();
        let which = usize::try_from(drawn / 1000).unwrap_or(0) % errnos.len();
        (drawn % 1000 < *of_thousand).then(|| errnos[which])
    }
}

/// The connection is no more once its socket has told this (`tcp_reset` in net/ipv4/tcp_input.c,
/// `tcp_write_err` in net/ipv4/tcp_timer.c).
const fn is_final(errno: i32) -> bool {
    matches!(
        errno,
        ECONNRESET
            | ECONNABORTED
            | ECONNREFUSED
            | EPIPE
            | ETIMEDOUT
            | ENOTCONN
            | EHOSTUNREACH
            | ENETUNREACH
            | ENETDOWN
            | EPROTO
    )
}

impl State {
    /// A call that may fail, and does nothing beside.
    pub(super) fn may_fail(&mut self, call: Call) -> io::Result<()> {
        match self.faults.strike(call) {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => Ok(()),
        }
    }

    /// A datagram of `len` bytes that is to leave.
    pub(super) fn may_send(&mut self, len: usize) -> io::Result<()> {
        self.may_fail(Call::SendDatagram)?;
        let too_long = self.largest_datagram.is_some_and(|limit| len > limit);
        let errno = too_long.then_some(libc::EMSGSIZE).or(self.fail_datagrams);
        errno.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
    }

    /// A call on connection `id`.
    pub(super) fn may_fail_at(&mut self, call: Call, id: usize) -> io::Result<()> {
        let Some(errno) = self.faults.strike(call) else {
            return Ok(());
        };
        if call == Call::Outcome || is_final(errno) {
            let connection = &mut self.connections[id];
            connection.broken = true;
            connection.reset_by_server = true;
            // This call has told it.
            connection.error_told = true;
            self.event_at(id, true, true);
        } else if errno == EAGAIN {
            self.event_at(id, true, true);
        }
        Err(io::Error::from_raw_os_error(errno))
    }

    /// A call that receives from a datagram socket.
    pub(super) fn may_fail_for(&mut self, call: Call, watcher: Option<Watcher>) -> io::Result<()> {
        let failed = self.may_fail(call);
        if matches!(&failed, Err(error) if error.raw_os_error() == Some(EAGAIN)) {
            self.event(watcher, true, false);
        }
        failed
    }

    /// accept(2) at a listener; what concerns the new connection alone takes that away.
    pub(super) fn may_fail_to_accept(&mut self, listener: usize) -> io::Result<()> {
        let failed = self.may_fail(Call::Accept);
        if let Err(error) = &failed {
            let errno = error.raw_os_error().unwrap_or(0);
            if !Call::Accept.can_last(errno) && errno != EINTR && errno != EAGAIN {
                let gone = self.listeners[listener].waiting.pop_front();
                if let Some((id, _)) = gone {
                    self.connections[id].broken = true;
                    self.connections[id].closed = true;
                }
            }
            if errno == EAGAIN {
                let watcher = self.listeners[listener].watcher;
                self.event(Some(watcher), true, false);
            }
        }
        failed
    }
}

impl Network {
    /// Has a call fail, counted from now on.
    pub fn fail_call(&self, fault: Fault) {
        self.state.borrow_mut().faults = Faults {
            planned: Some(fault),
            ..Faults::default()
        };
    }

    /// Has calls of all kinds fail by a seed, so many of a thousand.
    pub fn fail_at_random(&self, seed: u64, of_thousand: u64) {
        let seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        self.state.borrow_mut().faults.random = Some((seed, of_thousand));
    }

    /// Nothing fails any more.
    pub fn heal(&self) {
        let faults = &mut self.state.borrow_mut().faults;
        faults.planned = None;
        faults.random = None;
    }

    /// How often this was called between the last [`Network::fail_call`] and [`Network::heal`].
    #[must_use]
    pub fn calls(&self, call: Call) -> usize {
        self.state.borrow().faults.calls[call as usize]
    }

    /// How many calls have failed so.
    #[must_use]
    pub fn faults_struck(&self) -> usize {
        self.state.borrow().faults.struck
    }

    /// A fault has ended connection `id`.
    #[must_use]
    pub fn is_broken(&self, id: SocketId) -> bool {
        self.state.borrow().connections[id.0].broken
    }
}
