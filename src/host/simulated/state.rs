//! The simulated network as both sides share it: connections, datagram sockets, listeners, and what is to
//! become of calls.
//!
//! Owns all of them, and the events that wait to be taken. What the stack does to it is in `sockets`, what the
//! test does in `network`.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};

use super::super::{DatagramRole, Event, QueuedError, Token};
use super::faults::Faults;
use crate::net::Marks;

/// Bytes that a simulated connection holds in each direction before it would block, unless the test
/// says otherwise.
const SOCKET_BUFFER: usize = 256 * 1024;

/// What becomes of a connect to an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectAnswer {
    /// Established at once.
    Accept,
    /// Fails at once with this OS error, as `connect(2)` does without a route.
    Fail(i32),
    /// Fails a moment later with this OS error, as a refused connection does.
    FailLater(i32),
    /// Nobody answers.
    Silent,
}

/// Whether there is a way past the link, to sockets inside the guest's namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Inside {
    /// There is none.
    #[default]
    Nowhere,
    /// Sockets are in stock.
    Ready,
    /// The next one has to be waited for, then there are more.
    Slow,
    /// Whoever opens them says nothing.
    Silent,
}

/// Whom an event is for: which of the hosts, and its token.
pub(super) type Watcher = (usize, Token);

/// Names a simulated connection or datagram socket, in order of creation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SocketId(pub usize);

/// One TCP connection, as both ends and the test see it.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) watcher: Option<Watcher>,
    pub(super) remote: Option<SocketAddr>,
    pub(super) outcome: Option<i32>,
    pub(super) to_server: VecDeque<u8>,
    pub(super) to_client: VecDeque<u8>,
    /// How many of them were peeked at.
    pub(super) peeked: usize,
    pub(super) client_shut: bool,
    pub(super) server_shut: bool,
    pub(super) reset_by_client: bool,
    pub(super) reset_by_server: bool,
    /// The error of that was told, which is done once.
    pub(super) error_told: bool,
    /// A fault ended it.
    pub(super) broken: bool,
    pub(super) closed: bool,
    /// The server reads nothing until told to.
    pub(super) paused: bool,
    /// The server has sent urgent data.
    pub(super) urgent: bool,
    /// What the network says about a connect that fails.
    pub(super) error: Option<QueuedError>,
    pub(super) tos: u8,
    /// Seconds of silence after which it is asked whether anybody is there, and for the answer.
    pub(super) asked_after: Option<(u32, u32)>,
    /// Bytes that fit in each direction.
    pub(super) buffer: usize,
}

impl Connection {
    pub(super) fn new(remote: SocketAddr, buffer: usize) -> Self {
        Self {
            watcher: None,
            remote: Some(remote),
            outcome: None,
            to_server: VecDeque::new(),
            to_client: VecDeque::new(),
            peeked: 0,
            client_shut: false,
            server_shut: false,
            reset_by_client: false,
            reset_by_server: false,
            error_told: false,
            broken: false,
            closed: false,
            paused: false,
            urgent: false,
            buffer,
            error: None,
            tos: 0,
            asked_after: None,
        }
    }

    /// What has ended the connection, which a socket says once.
    pub(super) fn tell_error(&mut self) -> io::Result<()> {
        if self.reset_by_server && !std::mem::replace(&mut self.error_told, true) {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        Ok(())
    }
}

/// One datagram socket.
#[derive(Debug)]
pub(super) struct DatagramState {
    pub(super) watcher: Option<Watcher>,
    pub(super) role: Option<DatagramRole>,
    pub(super) incoming: VecDeque<(SocketAddr, Vec<u8>, Marks)>,
    pub(super) errors: VecDeque<(QueuedError, Vec<u8>)>,
    pub(super) echoes: VecDeque<(IpAddr, u16, Vec<u8>)>,
    pub(super) closed: bool,
}

/// One listening socket.
#[derive(Debug)]
pub(super) struct ListenerState {
    pub(super) watcher: Watcher,
    pub(super) local: SocketAddr,
    /// Connections that wait to be accepted, and whose they are.
    pub(super) waiting: VecDeque<(usize, SocketAddr)>,
    pub(super) open: bool,
}

/// A datagram that the stack sent to the host's network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    /// The socket it left by.
    pub socket: SocketId,
    /// Its destination.
    pub to: SocketAddr,
    /// Its payload.
    pub payload: Vec<u8>,
    /// How it is to look, where that was said.
    pub marks: Option<Marks>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) answers: HashMap<SocketAddr, ConnectAnswer>,
    pub(super) default_answer: Option<ConnectAnswer>,
    pub(super) connections: Vec<Connection>,
    pub(super) datagrams: Vec<DatagramState>,
    pub(super) sent: Vec<Sent>,
    pub(super) listeners: Vec<ListenerState>,
    pub(super) events: VecDeque<(usize, Event)>,
    pub(super) resolvers: Vec<SocketAddr>,
    pub(super) open: usize,
    /// As many sockets may be open, as `RLIMIT_NOFILE` has it.
    pub(super) most_open: Option<usize>,
    /// Buffer of the connections to come, where the test has set one.
    pub(super) socket_buffer: Option<usize>,
    pub(super) fail_open: Option<i32>,
    pub(super) fail_echo: Option<i32>,
    pub(super) fail_pipe: Option<i32>,
    pub(super) connect_errors: HashMap<SocketAddr, QueuedError>,
    pub(super) without_ipv6: bool,
    pub(super) largest_datagram: Option<usize>,
    pub(super) fail_datagrams: Option<i32>,
    pub(super) datagram_calls: usize,
    pub(super) faults: Faults,
    pub(super) inside: Inside,
    /// Who waits for a socket inside.
    pub(super) inside_waiting: Vec<Watcher>,
}

impl State {
    /// What a connect to `remote` does.
    pub(super) fn answer(&self, remote: SocketAddr) -> ConnectAnswer {
        let fallback = self
            .default_answer
            .unwrap_or(ConnectAnswer::FailLater(libc::ECONNREFUSED));
        self.answers.get(&remote).copied().unwrap_or(fallback)
    }

    /// Tells who waits for a socket inside that there is one, or never will be.
    pub(super) fn answer_inside(&mut self, error: bool) {
        for watcher in std::mem::take(&mut self.inside_waiting) {
            self.push(Some(watcher), [false, true, false, error]);
        }
    }

    /// An event at a socket that is well.
    pub(super) fn event(&mut self, watcher: Option<Watcher>, readable: bool, writable: bool) {
        self.push(watcher, [readable, writable, false, false]);
    }

    /// An event at connection `id`, which says whether the peer has ended its stream or reset it, as
    /// every event of the kernel's does.
    pub(super) fn event_at(&mut self, id: usize, readable: bool, writable: bool) {
        let connection = &self.connections[id];
        let failed = connection.reset_by_server || connection.outcome.is_some();
        let hangup = failed || connection.server_shut;
        let watcher = connection.watcher;
        let flags = [readable || hangup, writable || failed, hangup, failed];
        self.push(watcher, flags);
    }

    /// An event at a datagram socket of which the network has reported an error.
    pub(super) fn error_event(&mut self, watcher: Option<Watcher>) {
        self.push(watcher, [true, true, false, true]);
    }

    fn push(&mut self, watcher: Option<Watcher>, [readable, writable, hangup, error]: [bool; 4]) {
        if let Some((host, token)) = watcher {
            let event = Event {
                token,
                readable,
                writable,
                hangup,
                error,
                urgent: false,
            };
            self.events.push_back((host, event));
        }
    }

    pub(super) fn buffer(&self) -> usize {
        self.socket_buffer.unwrap_or(SOCKET_BUFFER)
    }
}
