//! The test's handle on the simulated network: plays every server, sees what the stack did.
//!
//! Owns the state that both sides share. What the test does here becomes events for the stack, in
//! the same order every time.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use super::super::{DatagramRole, Event, QueuedError, Token};
use super::SimulatedHost;
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

/// The test's handle on the simulated network.
#[derive(Debug, Clone, Default)]
pub struct Network {
    pub(super) state: Rc<RefCell<State>>,
}

impl Network {
    /// An empty network, in which every connect is refused.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The side that the stack uses.
    #[must_use]
    pub fn host(&self) -> SimulatedHost {
        self.host_of(0)
    }

    /// The side that one of several stacks uses, by its number from 0.
    #[must_use]
    pub fn host_of(&self, number: usize) -> SimulatedHost {
        SimulatedHost {
            state: Rc::clone(&self.state),
            number,
            resolvers: Vec::new(),
        }
    }

    /// Decides what a connect to `addr` does.
    pub fn answer(&self, addr: SocketAddr, answer: ConnectAnswer) {
        self.state.borrow_mut().answers.insert(addr, answer);
    }

    /// Decides what a connect to any other address does.
    pub fn answer_all(&self, answer: ConnectAnswer) {
        self.state.borrow_mut().default_answer = Some(answer);
    }

    /// Decides what the network says about a connect to `addr` that fails.
    pub fn explain_failure(&self, addr: SocketAddr, error: QueuedError) {
        self.state.borrow_mut().connect_errors.insert(addr, error);
    }

    /// Takes the host's route to global IPv6 addresses away, or gives it back.
    pub fn set_ipv6(&self, reachable: bool) {
        self.state.borrow_mut().without_ipv6 = !reachable;
    }

    /// Makes longer datagrams fail with `EMSGSIZE`.
    pub fn limit_datagrams(&self, bytes: Option<usize>) {
        self.state.borrow_mut().largest_datagram = bytes;
    }

    /// Makes every datagram fail.
    pub fn fail_datagrams(&self, errno: Option<i32>) {
        self.state.borrow_mut().fail_datagrams = errno;
    }

    /// The calls by which datagrams were sent until now.
    #[must_use]
    pub fn datagram_calls(&self) -> usize {
        self.state.borrow().datagram_calls
    }

    /// The type of service that connection `id` has.
    #[must_use]
    pub fn tos(&self, id: SocketId) -> u8 {
        self.state.borrow().connections[id.0].tos
    }

    /// Decides whether there is a way past the link. Who waits for one hears of it.
    pub fn set_inside(&self, inside: Inside) {
        let mut state = self.state.borrow_mut();
        state.inside = inside;
        match inside {
            Inside::Nowhere => state.answer_inside(true),
            Inside::Ready | Inside::Slow => state.answer_inside(false),
            Inside::Silent => {}
        }
    }

    /// Sets the host's resolvers.
    pub fn set_resolvers(&self, resolvers: &[SocketAddr]) {
        self.state.borrow_mut().resolvers = resolvers.to_vec();
    }

    /// Sets how many bytes the connections to come hold in each direction before they would block.
    pub fn set_socket_buffer(&self, bytes: usize) {
        self.state.borrow_mut().socket_buffer = Some(bytes);
    }

    /// Makes every call that opens a socket fail with this OS error, or work again.
    pub fn fail_open(&self, errno: Option<i32>) {
        self.state.borrow_mut().fail_open = errno;
    }

    /// Makes calls that open a socket fail with `EMFILE` while so many are open.
    pub fn limit_open(&self, most: Option<usize>) {
        self.state.borrow_mut().most_open = most;
    }

    /// Makes every opening of an echo socket fail with this OS error, or work again.
    pub fn fail_echo(&self, errno: Option<i32>) {
        self.state.borrow_mut().fail_echo = errno;
    }

    /// Makes every opening of a pipe fail with this OS error, or work again.
    pub fn fail_pipe(&self, errno: Option<i32>) {
        self.state.borrow_mut().fail_pipe = errno;
    }

    /// Sockets of all kinds that the stack has open: a leak shows here.
    #[must_use]
    pub fn open_sockets(&self) -> usize {
        self.state.borrow().open
    }

    /// Takes the events that are due.
    #[must_use]
    pub fn take_events(&self) -> Vec<Event> {
        self.take_events_of(0)
    }

    /// Takes the events that are due at one of several hosts.
    #[must_use]
    pub fn take_events_of(&self, number: usize) -> Vec<Event> {
        let events = &mut self.state.borrow_mut().events;
        let (due, rest): (VecDeque<_>, _) = events.drain(..).partition(|(host, _)| *host == number);
        *events = rest;
        due.into_iter().map(|(_, event)| event).collect()
    }

    /// Some events are due.
    #[must_use]
    pub fn has_events(&self) -> bool {
        !self.state.borrow().events.is_empty()
    }

    /// The connections that the stack opened or accepted so far, live or not.
    #[must_use]
    pub fn connections(&self) -> Vec<SocketId> {
        (0..self.state.borrow().connections.len())
            .map(SocketId)
            .collect()
    }

    /// The address that connection `id` went to.
    #[must_use]
    pub fn remote(&self, id: SocketId) -> Option<SocketAddr> {
        self.state.borrow().connections[id.0].remote
    }

    /// A server that was [`ConnectAnswer::Silent`] so far accepts, or refuses with this OS error.
    pub fn server_answers(&self, id: SocketId, refusal: Option<i32>) {
        let mut state = self.state.borrow_mut();
        state.connections[id.0].outcome = refusal;
        state.event_at(id.0, false, true);
    }

    /// The server takes up to `max` bytes that arrived.
    #[must_use]
    pub fn server_read(&self, id: SocketId, max: usize) -> Vec<u8> {
        let mut state = self.state.borrow_mut();
        let connection = &mut state.connections[id.0];
        let was_full = connection.to_server.len() >= connection.buffer;
        let len = max.min(connection.to_server.len());
        let bytes = connection.to_server.drain(..len).collect();
        if was_full && len > 0 {
            state.event_at(id.0, false, true);
        }
        bytes
    }

    /// Bytes that arrived and the server has not taken yet.
    #[must_use]
    pub fn server_unread(&self, id: SocketId) -> usize {
        self.state.borrow().connections[id.0].to_server.len()
    }

    /// The server sends; returns how many bytes its socket took.
    #[must_use]
    pub fn server_write(&self, id: SocketId, bytes: &[u8]) -> usize {
        let mut state = self.state.borrow_mut();
        let connection = &mut state.connections[id.0];
        let len = bytes
            .len()
            .min(connection.buffer.saturating_sub(connection.to_client.len()));
        connection.to_client.extend(&bytes[..len]);
        if len > 0 {
            state.event_at(id.0, true, false);
        }
        len
    }

    /// The server marks what it has sent last as urgent.
    pub fn server_urges(&self, id: SocketId) {
        let mut state = self.state.borrow_mut();
        let connection = &mut state.connections[id.0];
        connection.urgent = !connection.to_client.is_empty();
        if let Some((host, token)) = connection.watcher {
            let event = Event {
                token,
                readable: true,
                writable: false,
                hangup: false,
                error: false,
                urgent: true,
            };
            state.events.push_back((host, event));
        }
    }

    /// The server ends its direction.
    pub fn server_shutdown(&self, id: SocketId) {
        let mut state = self.state.borrow_mut();
        state.connections[id.0].server_shut = true;
        state.event_at(id.0, true, false);
    }

    /// The server resets the connection.
    pub fn server_reset(&self, id: SocketId) {
        let mut state = self.state.borrow_mut();
        state.connections[id.0].reset_by_server = true;
        state.event_at(id.0, true, true);
    }

    /// The server stops or resumes taking data off its socket.
    pub fn server_pause(&self, id: SocketId, paused: bool) {
        let mut state = self.state.borrow_mut();
        state.connections[id.0].paused = paused;
        if !paused {
            state.event_at(id.0, false, true);
        }
    }

    /// The stack ended its direction, and everything before that was read.
    #[must_use]
    pub fn server_sees_end(&self, id: SocketId) -> bool {
        let state = self.state.borrow();
        let connection = &state.connections[id.0];
        (connection.client_shut || connection.closed)
            && !connection.reset_by_client
            && connection.to_server.is_empty()
    }

    /// The stack reset the connection.
    #[must_use]
    pub fn server_sees_reset(&self, id: SocketId) -> bool {
        self.state.borrow().connections[id.0].reset_by_client
    }

    /// The stack has given up the socket.
    #[must_use]
    pub fn is_closed(&self, id: SocketId) -> bool {
        self.state.borrow().connections[id.0].closed
    }

    /// A client connects to a published address; `None` when nobody listens there.
    #[must_use]
    pub fn client_connect(&self, to: SocketAddr, from: SocketAddr) -> Option<SocketId> {
        let mut state = self.state.borrow_mut();
        let id = state.connections.len();
        let watcher = {
            let listener = state
                .listeners
                .iter_mut()
                .find(|l| l.open && l.local == to)?;
            listener.waiting.push_back((id, from));
            listener.watcher
        };
        let buffer = state.buffer();
        state.connections.push(Connection::new(from, buffer));
        state.event(Some(watcher), true, false);
        Some(SocketId(id))
    }

    /// Takes the datagrams and echo requests that the stack sent.
    #[must_use]
    pub fn take_sent(&self) -> Vec<Sent> {
        std::mem::take(&mut self.state.borrow_mut().sent)
    }

    /// A datagram from `from` arrives at a socket. Dropped where the socket would not hear it.
    pub fn deliver(&self, socket: SocketId, from: SocketAddr, payload: &[u8]) {
        self.deliver_marked(socket, from, payload, Marks::default());
    }

    /// [`Network::deliver`] of a datagram that looks like this.
    pub fn deliver_marked(&self, socket: SocketId, from: SocketAddr, payload: &[u8], marks: Marks) {
        let mut state = self.state.borrow_mut();
        let target = &mut state.datagrams[socket.0];
        let heard = !matches!(target.role, Some(DatagramRole::Connected(peer)) if peer != from);
        if heard && !target.closed {
            target.incoming.push_back((from, payload.to_vec(), marks));
            let watcher = target.watcher;
            state.event(watcher, true, false);
        }
    }

    /// An echo reply arrives.
    pub fn deliver_echo(&self, socket: SocketId, from: IpAddr, seq: u16, data: &[u8]) {
        let mut state = self.state.borrow_mut();
        state.datagrams[socket.0]
            .echoes
            .push_back((from, seq, data.to_vec()));
        let watcher = state.datagrams[socket.0].watcher;
        state.event(watcher, true, false);
    }

    /// The network reports an error about a datagram sent by `socket`.
    pub fn report_error(&self, socket: SocketId, error: QueuedError, payload: &[u8]) {
        let mut state = self.state.borrow_mut();
        state.datagrams[socket.0]
            .errors
            .push_back((error, payload.to_vec()));
        let watcher = state.datagrams[socket.0].watcher;
        state.error_event(watcher);
    }

    /// The role of a datagram socket; `None` for echo sockets.
    #[must_use]
    pub fn role(&self, socket: SocketId) -> Option<DatagramRole> {
        self.state.borrow().datagrams[socket.0].role
    }

    /// Datagram sockets that the stack has opened so far, live or not: the name of the next one.
    #[must_use]
    pub fn datagram_sockets(&self) -> usize {
        self.state.borrow().datagrams.len()
    }

    /// Datagram sockets still open.
    #[must_use]
    pub fn open_datagram_sockets(&self) -> Vec<SocketId> {
        let state = self.state.borrow();
        (0..state.datagrams.len())
            .filter(|&id| !state.datagrams[id].closed)
            .map(SocketId)
            .collect()
    }
}
