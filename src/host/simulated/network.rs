//! The test's handle on the simulated network: plays every server, sees what the stack did.
//!
//! Owns a handle on the state that both sides share. What the test does here becomes events for the
//! stack, in the same order every time.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use super::super::{DatagramRole, Event, QueuedError};
use super::SimulatedHost;
use super::state::{ConnectAnswer, Connection, Inside, Sent, SocketId, State};
use crate::net::Marks;

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

    /// The seconds after which connection `id` is asked whether anybody is there, and those that an answer may
    /// take; none where the host's own hold.
    #[must_use]
    pub fn asked_after(&self, id: SocketId) -> Option<(u32, u32)> {
        self.state.borrow().connections[id.0].asked_after
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
