//! [`Host`] in memory: servers that do what a test says, and events in a fixed order.
//!
//! A [`SimulatedHost`] is given to the stack; the test keeps its [`Network`], a second handle on
//! the same state, through which it plays every server: accepts, sends, closes, resets, stays
//! silent. No clock, no randomness: the same calls give the same events.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::rc::Rc;

use super::{DatagramRole, EchoSocket, Event, Host, QueuedError, TcpSocket, Token, UdpSocket};

/// Bytes that a simulated connection holds in each direction before it would block.
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

/// Names a simulated connection or datagram socket, in order of creation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SocketId(pub usize);

/// One TCP connection, as both ends and the test see it.
#[derive(Debug, Default)]
struct Connection {
    token: Option<Token>,
    remote: Option<SocketAddr>,
    outcome: Option<i32>,
    to_server: VecDeque<u8>,
    to_client: VecDeque<u8>,
    client_shut: bool,
    server_shut: bool,
    reset_by_client: bool,
    reset_by_server: bool,
    closed: bool,
    /// The server reads nothing until told to.
    paused: bool,
}

/// One datagram socket.
#[derive(Debug)]
struct DatagramState {
    token: Token,
    role: Option<DatagramRole>,
    incoming: VecDeque<(SocketAddr, Vec<u8>)>,
    errors: VecDeque<(QueuedError, Vec<u8>)>,
    echoes: VecDeque<(IpAddr, u16, Vec<u8>)>,
    closed: bool,
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
}

#[derive(Debug, Default)]
struct State {
    answers: HashMap<SocketAddr, ConnectAnswer>,
    default_answer: Option<ConnectAnswer>,
    connections: Vec<Connection>,
    datagrams: Vec<DatagramState>,
    sent: Vec<Sent>,
    listeners: Vec<(Token, SocketAddr, VecDeque<(usize, SocketAddr)>, bool)>,
    events: VecDeque<Event>,
    resolvers: Vec<SocketAddr>,
    open: usize,
    fail_open: Option<i32>,
    fail_echo: Option<i32>,
}

impl State {
    fn event(&mut self, token: Option<Token>, readable: bool, writable: bool) {
        if let Some(token) = token {
            self.events.push_back(Event { token, readable, writable, hangup: readable });
        }
    }
}

/// The test's handle on the simulated network.
#[derive(Debug, Clone, Default)]
pub struct Network {
    state: Rc<RefCell<State>>,
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
        SimulatedHost { state: Rc::clone(&self.state), resolvers: Vec::new() }
    }

    /// Decides what a connect to `addr` does.
    pub fn answer(&self, addr: SocketAddr, answer: ConnectAnswer) {
        self.state.borrow_mut().answers.insert(addr, answer);
    }

    /// Decides what a connect to any other address does.
    pub fn answer_all(&self, answer: ConnectAnswer) {
        self.state.borrow_mut().default_answer = Some(answer);
    }

    /// Sets the host's resolvers.
    pub fn set_resolvers(&self, resolvers: &[SocketAddr]) {
        self.state.borrow_mut().resolvers = resolvers.to_vec();
    }

    /// Makes every call that opens a socket fail with this OS error, or work again.
    pub fn fail_open(&self, errno: Option<i32>) {
        self.state.borrow_mut().fail_open = errno;
    }

    /// Makes every opening of an echo socket fail with this OS error, or work again.
    pub fn fail_echo(&self, errno: Option<i32>) {
        self.state.borrow_mut().fail_echo = errno;
    }

    /// Sockets of all kinds that the stack has open: a leak shows here.
    #[must_use]
    pub fn open_sockets(&self) -> usize {
        self.state.borrow().open
    }

    /// Takes the events that are due.
    #[must_use]
    pub fn take_events(&self) -> Vec<Event> {
        self.state.borrow_mut().events.drain(..).collect()
    }

    /// Some events are due.
    #[must_use]
    pub fn has_events(&self) -> bool {
        !self.state.borrow().events.is_empty()
    }

    /// The connections that the stack opened or accepted so far, live or not.
    #[must_use]
    pub fn connections(&self) -> Vec<SocketId> {
        (0..self.state.borrow().connections.len()).map(SocketId).collect()
    }

    /// The address that connection `id` went to.
    #[must_use]
    pub fn remote(&self, id: SocketId) -> Option<SocketAddr> {
        self.state.borrow().connections[id.0].remote
    }

    /// The server takes up to `max` bytes that arrived.
    #[must_use]
    pub fn server_read(&self, id: SocketId, max: usize) -> Vec<u8> {
        let mut state = self.state.borrow_mut();
        let connection = &mut state.connections[id.0];
        let was_full = connection.to_server.len() >= SOCKET_BUFFER;
        let len = max.min(connection.to_server.len());
        let bytes = connection.to_server.drain(..len).collect();
        let token = connection.token.filter(|_| was_full && len > 0);
        state.event(token, false, true);
        bytes
    }

    /// The server sends; returns how many bytes its socket took.
    #[must_use]
    pub fn server_write(&self, id: SocketId, bytes: &[u8]) -> usize {
        let mut state = self.state.borrow_mut();
        let connection = &mut state.connections[id.0];
        let len = bytes.len().min(SOCKET_BUFFER.saturating_sub(connection.to_client.len()));
        connection.to_client.extend(&bytes[..len]);
        let token = connection.token.filter(|_| len > 0);
        state.event(token, true, false);
        len
    }

    /// The server ends its direction.
    pub fn server_shutdown(&self, id: SocketId) {
        let mut state = self.state.borrow_mut();
        let connection = &mut state.connections[id.0];
        connection.server_shut = true;
        let token = connection.token;
        state.event(token, true, false);
    }

    /// The server resets the connection.
    pub fn server_reset(&self, id: SocketId) {
        let mut state = self.state.borrow_mut();
        let connection = &mut state.connections[id.0];
        connection.reset_by_server = true;
        let token = connection.token;
        state.event(token, true, true);
    }

    /// The server stops or resumes taking data off its socket.
    pub fn server_pause(&self, id: SocketId, paused: bool) {
        let mut state = self.state.borrow_mut();
        let connection = &mut state.connections[id.0];
        connection.paused = paused;
        let token = connection.token.filter(|_| !paused);
        state.event(token, false, true);
    }

    /// The stack ended its direction, and everything before that was read.
    #[must_use]
    pub fn server_sees_end(&self, id: SocketId) -> bool {
        let state = self.state.borrow();
        let connection = &state.connections[id.0];
        (connection.client_shut || connection.closed) && !connection.reset_by_client && connection.to_server.is_empty()
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
        let token = {
            let (token, _, waiting, _) = state.listeners.iter_mut().find(|(_, addr, _, open)| *open && *addr == to)?;
            waiting.push_back((id, from));
            *token
        };
        state.connections.push(Connection { remote: Some(from), ..Connection::default() });
        state.event(Some(token), true, false);
        Some(SocketId(id))
    }

    /// Takes the datagrams and echo requests that the stack sent.
    #[must_use]
    pub fn take_sent(&self) -> Vec<Sent> {
        std::mem::take(&mut self.state.borrow_mut().sent)
    }

    /// A datagram from `from` arrives at a socket. Dropped where the socket would not hear it.
    pub fn deliver(&self, socket: SocketId, from: SocketAddr, payload: &[u8]) {
        let mut state = self.state.borrow_mut();
        let target = &mut state.datagrams[socket.0];
        let heard = !matches!(target.role, Some(DatagramRole::Connected(peer)) if peer != from);
        if heard && !target.closed {
            target.incoming.push_back((from, payload.to_vec()));
            let token = target.token;
            state.event(Some(token), true, false);
        }
    }

    /// An echo reply arrives.
    pub fn deliver_echo(&self, socket: SocketId, from: IpAddr, seq: u16, data: &[u8]) {
        let mut state = self.state.borrow_mut();
        state.datagrams[socket.0].echoes.push_back((from, seq, data.to_vec()));
        let token = state.datagrams[socket.0].token;
        state.event(Some(token), true, false);
    }

    /// The network reports an error about a datagram sent by `socket`.
    pub fn report_error(&self, socket: SocketId, error: QueuedError, payload: &[u8]) {
        let mut state = self.state.borrow_mut();
        state.datagrams[socket.0].errors.push_back((error, payload.to_vec()));
        let token = state.datagrams[socket.0].token;
        state.event(Some(token), true, true);
    }

    /// The role of a datagram socket; `None` for echo sockets.
    #[must_use]
    pub fn role(&self, socket: SocketId) -> Option<DatagramRole> {
        self.state.borrow().datagrams[socket.0].role
    }

    /// Datagram sockets still open.
    #[must_use]
    pub fn open_datagram_sockets(&self) -> Vec<SocketId> {
        let state = self.state.borrow();
        (0..state.datagrams.len()).filter(|&id| !state.datagrams[id].closed).map(SocketId).collect()
    }
}

/// The stack's side of a [`Network`].
#[derive(Debug)]
pub struct SimulatedHost {
    state: Rc<RefCell<State>>,
    resolvers: Vec<SocketAddr>,
}

impl SimulatedHost {
    fn open(&self) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        if let Some(errno) = state.fail_open {
            return Err(io::Error::from_raw_os_error(errno));
        }
        state.open += 1;
        Ok(())
    }

    fn datagram(&self, token: Token, role: Option<DatagramRole>) -> usize {
        let mut state = self.state.borrow_mut();
        state.datagrams.push(DatagramState {
            token,
            role,
            incoming: VecDeque::new(),
            errors: VecDeque::new(),
            echoes: VecDeque::new(),
            closed: false,
        });
        state.datagrams.len() - 1
    }
}

impl Host for SimulatedHost {
    type Tcp = SimulatedTcp;
    type Listener = SimulatedListener;
    type Udp = SimulatedDatagram;
    type Echo = SimulatedDatagram;

    fn resolvers(&mut self) -> &[SocketAddr] {
        self.resolvers.clone_from(&self.state.borrow().resolvers);
        &self.resolvers
    }

    fn tcp_connect(&mut self, token: Token, remote: SocketAddr) -> io::Result<SimulatedTcp> {
        let mut state = self.state.borrow_mut();
        let fallback = state.default_answer.unwrap_or(ConnectAnswer::FailLater(libc::ECONNREFUSED));
        let answer = state.answers.get(&remote).copied().unwrap_or(fallback);
        if let ConnectAnswer::Fail(errno) = answer {
            return Err(io::Error::from_raw_os_error(errno));
        }
        drop(state);
        self.open()?;
        state = self.state.borrow_mut();
        let outcome = if let ConnectAnswer::FailLater(errno) = answer { Some(errno) } else { None };
        state.connections.push(Connection { token: Some(token), remote: Some(remote), outcome, ..Connection::default() });
        if answer != ConnectAnswer::Silent {
            state.event(Some(token), outcome.is_some(), true);
        }
        Ok(SimulatedTcp { state: Rc::clone(&self.state), id: state.connections.len() - 1 })
    }

    fn tcp_listen(&mut self, token: Token, local: SocketAddr) -> io::Result<SimulatedListener> {
        self.open()?;
        let mut state = self.state.borrow_mut();
        if state.listeners.iter().any(|(_, addr, _, open)| *open && *addr == local) {
            state.open -= 1;
            return Err(io::ErrorKind::AddrInUse.into());
        }
        state.listeners.push((token, local, VecDeque::new(), true));
        Ok(SimulatedListener { state: Rc::clone(&self.state), id: state.listeners.len() - 1 })
    }

    fn tcp_accept(&mut self, listener: &SimulatedListener) -> io::Result<(SimulatedTcp, SocketAddr)> {
        if self.state.borrow().listeners[listener.id].2.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.open()?;
        let next = self.state.borrow_mut().listeners[listener.id].2.pop_front();
        let (id, from) = next.ok_or(io::ErrorKind::WouldBlock)?;
        Ok((SimulatedTcp { state: Rc::clone(&self.state), id }, from))
    }

    fn tcp_watch(&mut self, token: Token, socket: &SimulatedTcp) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        state.connections[socket.id].token = Some(token);
        state.event(Some(token), true, true);
        Ok(())
    }

    fn udp_open(&mut self, token: Token, role: DatagramRole) -> io::Result<SimulatedDatagram> {
        self.open()?;
        let id = self.datagram(token, Some(role));
        Ok(SimulatedDatagram { state: Rc::clone(&self.state), id })
    }

    fn echo_open(&mut self, token: Token, _ipv6: bool) -> io::Result<SimulatedDatagram> {
        if let Some(errno) = self.state.borrow().fail_echo {
            return Err(io::Error::from_raw_os_error(errno));
        }
        self.open()?;
        let id = self.datagram(token, None);
        Ok(SimulatedDatagram { state: Rc::clone(&self.state), id })
    }
}

/// A simulated TCP connection.
#[derive(Debug)]
pub struct SimulatedTcp {
    state: Rc<RefCell<State>>,
    id: usize,
}

impl SimulatedTcp {
    fn with<R>(&self, act: impl FnOnce(&mut Connection) -> R) -> R {
        act(&mut self.state.borrow_mut().connections[self.id])
    }
}

impl TcpSocket for SimulatedTcp {
    fn connect_outcome(&mut self) -> io::Result<()> {
        self.with(|connection| connection.outcome.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno))))
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.with(|connection| {
            if connection.reset_by_server {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            let room = if connection.paused { 0 } else { SOCKET_BUFFER.saturating_sub(connection.to_server.len()) };
            if room == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let len = room.min(bytes.len());
            connection.to_server.extend(&bytes[..len]);
            Ok(len)
        })
    }

    fn recv(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.with(|connection| {
            if connection.reset_by_server {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            if connection.to_client.is_empty() {
                return if connection.server_shut { Ok(0) } else { Err(io::ErrorKind::WouldBlock.into()) };
            }
            let len = bytes.len().min(connection.to_client.len());
            for (target, byte) in bytes.iter_mut().zip(connection.to_client.drain(..len)) {
                *target = byte;
            }
            Ok(len)
        })
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        self.with(|connection| connection.client_shut = true);
        Ok(())
    }

    fn reset(self) {
        self.with(|connection| connection.reset_by_client = true);
    }
}

impl Drop for SimulatedTcp {
    fn drop(&mut self) {
        self.with(|connection| {
            connection.closed = true;
            connection.token = None;
        });
        self.state.borrow_mut().open -= 1;
    }
}

/// A simulated listener.
#[derive(Debug)]
pub struct SimulatedListener {
    state: Rc<RefCell<State>>,
    id: usize,
}

impl Drop for SimulatedListener {
    fn drop(&mut self) {
        let mut state = self.state.borrow_mut();
        state.listeners[self.id].3 = false;
        state.open -= 1;
    }
}

/// A simulated UDP or echo socket.
#[derive(Debug)]
pub struct SimulatedDatagram {
    state: Rc<RefCell<State>>,
    id: usize,
}

impl UdpSocket for SimulatedDatagram {
    fn send_to(&mut self, to: SocketAddr, payload: &[u8], segment: Option<NonZeroU16>) -> io::Result<()> {
        let step = segment.map_or(payload.len(), |segment| usize::from(segment.get())).max(1);
        let mut state = self.state.borrow_mut();
        let socket = SocketId(self.id);
        if payload.is_empty() {
            state.sent.push(Sent { socket, to, payload: Vec::new() });
        }
        state.sent.extend(payload.chunks(step).map(|piece| Sent { socket, to, payload: piece.to_vec() }));
        Ok(())
    }

    fn recv_from(&mut self, bytes: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        let mut state = self.state.borrow_mut();
        let socket = &mut state.datagrams[self.id];
        if !socket.errors.is_empty() {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (from, payload) = socket.incoming.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        let len = payload.len().min(bytes.len());
        bytes[..len].copy_from_slice(&payload[..len]);
        Ok((len, from))
    }

    fn queued_error(&mut self, bytes: &mut [u8]) -> Option<QueuedError> {
        let (mut error, payload) = self.state.borrow_mut().datagrams[self.id].errors.pop_front()?;
        error.quoted = payload.len().min(bytes.len());
        bytes[..error.quoted].copy_from_slice(&payload[..error.quoted]);
        Some(error)
    }
}

impl EchoSocket for SimulatedDatagram {
    fn send_to(&mut self, to: IpAddr, seq: u16, data: &[u8]) -> io::Result<()> {
        let mut payload = seq.to_be_bytes().to_vec();
        payload.extend(data);
        let sent = Sent { socket: SocketId(self.id), to: SocketAddr::new(to, 0), payload };
        self.state.borrow_mut().sent.push(sent);
        Ok(())
    }

    fn recv_from(&mut self, data: &mut [u8]) -> io::Result<(IpAddr, u16, usize)> {
        let mut state = self.state.borrow_mut();
        let (from, seq, bytes) = state.datagrams[self.id].echoes.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        let len = bytes.len().min(data.len());
        data[..len].copy_from_slice(&bytes[..len]);
        Ok((from, seq, len))
    }
}

impl Drop for SimulatedDatagram {
    fn drop(&mut self) {
        let mut state = self.state.borrow_mut();
        state.datagrams[self.id].closed = true;
        state.open -= 1;
    }
}

/// A clock for simulations: moves only when told to.
#[derive(Debug, Default)]
pub struct VirtualClock {
    micros: Cell<i64>,
}

impl VirtualClock {
    /// Now.
    #[must_use]
    pub fn now(&self) -> crate::net::Instant {
        crate::net::Instant::from_micros(self.micros.get())
    }

    /// Moves on to `to`, never back.
    pub fn advance_to(&self, to: crate::net::Instant) {
        self.micros.set(self.micros.get().max(to.total_micros()));
    }
}
