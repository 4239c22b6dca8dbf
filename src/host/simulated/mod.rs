//! [`Host`] in memory: servers that do what a test says, and events in a fixed order.
//!
//! A [`SimulatedHost`] is given to the stack; the test keeps its [`Network`], a second handle on
//! the same state, through which it plays every server: accepts, sends, closes, resets, stays
//! silent. No clock, no randomness: the same calls give the same events.

mod network;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use super::{
    DatagramRole, EchoSocket, Host, Inbox, Outgoing, Pipe, QueuedError, Received, TcpSocket, Token,
    UdpSocket, datagrams,
};
use crate::net::Marks;
use network::{Connection, DatagramState, ListenerState, State};

pub use network::{ConnectAnswer, Inside, Network, Sent, SocketId};

/// Bytes that a simulated pipe holds.
const PIPE: usize = 4096;

/// The stack's side of a [`Network`].
#[derive(Debug)]
pub struct SimulatedHost {
    state: Rc<RefCell<State>>,
    /// Which of several that share the network.
    number: usize,
    resolvers: Vec<SocketAddr>,
}

impl SimulatedHost {
    fn open(&self) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        if let Some(errno) = state.fail_open {
            return Err(io::Error::from_raw_os_error(errno));
        }
        if state.most_open.is_some_and(|most| state.open >= most) {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        state.open += 1;
        Ok(())
    }

    fn datagram(&self, token: Option<Token>, role: Option<DatagramRole>) -> usize {
        let mut state = self.state.borrow_mut();
        state.datagrams.push(DatagramState {
            watcher: token.map(|token| (self.number, token)),
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
    type Pipe = SimulatedPipe;

    fn resolvers(&mut self) -> &[SocketAddr] {
        self.resolvers.clone_from(&self.state.borrow().resolvers);
        &self.resolvers
    }

    fn reaches_ipv6(&mut self) -> bool {
        !self.state.borrow().without_ipv6
    }

    fn tcp_connect(
        &mut self,
        token: Token,
        remote: SocketAddr,
        marks: Marks,
    ) -> io::Result<SimulatedTcp> {
        let mut state = self.state.borrow_mut();
        let answer = state.answer(remote);
        if let ConnectAnswer::Fail(errno) = answer {
            return Err(io::Error::from_raw_os_error(errno));
        }
        drop(state);
        self.open()?;
        state = self.state.borrow_mut();
        let outcome = if let ConnectAnswer::FailLater(errno) = answer {
            Some(errno)
        } else {
            None
        };
        let error = state.connect_errors.get(&remote).copied();
        let id = state.connections.len();
        let mut connection = Connection::new(remote, state.buffer());
        connection.watcher = Some((self.number, token));
        connection.outcome = outcome;
        connection.error = error;
        connection.tos = marks.tos;
        state.connections.push(connection);
        if answer != ConnectAnswer::Silent {
            state.event_at(id, false, true);
        }
        Ok(SimulatedTcp {
            state: Rc::clone(&self.state),
            id,
        })
    }

    fn tcp_listen(&mut self, token: Token, local: SocketAddr) -> io::Result<SimulatedListener> {
        self.open()?;
        let mut state = self.state.borrow_mut();
        if state
            .listeners
            .iter()
            .any(|listener| listener.open && listener.local == local)
        {
            state.open -= 1;
            return Err(io::ErrorKind::AddrInUse.into());
        }
        state.listeners.push(ListenerState {
            watcher: (self.number, token),
            local,
            waiting: VecDeque::new(),
            open: true,
        });
        Ok(SimulatedListener {
            state: Rc::clone(&self.state),
            id: state.listeners.len() - 1,
        })
    }

    fn tcp_accept(
        &mut self,
        listener: &SimulatedListener,
    ) -> io::Result<(SimulatedTcp, SocketAddr)> {
        if self.state.borrow().listeners[listener.id]
            .waiting
            .is_empty()
        {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.open()?;
        let next = self.state.borrow_mut().listeners[listener.id]
            .waiting
            .pop_front();
        let (id, from) = next.ok_or(io::ErrorKind::WouldBlock)?;
        Ok((
            SimulatedTcp {
                state: Rc::clone(&self.state),
                id,
            },
            from,
        ))
    }

    fn tcp_watch(&mut self, token: Token, socket: &SimulatedTcp) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        state.connections[socket.id].watcher = Some((self.number, token));
        state.event_at(socket.id, true, true);
        Ok(())
    }

    fn tcp_connect_inside(&mut self, token: Token, to: SocketAddr) -> io::Result<SimulatedTcp> {
        let mut state = self.state.borrow_mut();
        match state.inside {
            Inside::Nowhere => return Err(io::ErrorKind::Unsupported.into()),
            Inside::Ready => {}
            Inside::Slow | Inside::Silent => {
                state.inside_waiting.push((self.number, token));
                if state.inside == Inside::Slow {
                    state.inside = Inside::Ready;
                    state.answer_inside(false);
                }
                return Err(io::ErrorKind::WouldBlock.into());
            }
        }
        drop(state);
        self.tcp_connect(token, to, Marks::default())
    }

    fn give_inside_up(&mut self) {
        let mut state = self.state.borrow_mut();
        state.inside = Inside::Nowhere;
        state.answer_inside(true);
    }

    fn pipe(&mut self) -> io::Result<SimulatedPipe> {
        if let Some(errno) = self.state.borrow().fail_pipe {
            return Err(io::Error::from_raw_os_error(errno));
        }
        self.open()?;
        Ok(SimulatedPipe {
            state: Rc::clone(&self.state),
            held: VecDeque::new(),
        })
    }

    fn return_pipe(&mut self, pipe: SimulatedPipe) {
        assert_eq!(pipe.held(), 0, "a pipe is given back empty");
    }

    fn udp_open(&mut self, role: DatagramRole) -> io::Result<SimulatedDatagram> {
        self.open()?;
        let id = self.datagram(None, Some(role));
        Ok(SimulatedDatagram {
            state: Rc::clone(&self.state),
            id,
        })
    }

    fn udp_watch(&mut self, token: Token, socket: &SimulatedDatagram) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        let datagram = &mut state.datagrams[socket.id];
        datagram.watcher = Some((self.number, token));
        if !datagram.incoming.is_empty() {
            let watcher = datagram.watcher;
            state.event(watcher, true, false);
        }
        Ok(())
    }

    fn echo_open(&mut self, token: Token, _ipv6: bool) -> io::Result<SimulatedDatagram> {
        if let Some(errno) = self.state.borrow().fail_echo {
            return Err(io::Error::from_raw_os_error(errno));
        }
        self.open()?;
        let id = self.datagram(Some(token), None);
        Ok(SimulatedDatagram {
            state: Rc::clone(&self.state),
            id,
        })
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
        self.with(|connection| {
            if connection.reset_by_server {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            connection
                .outcome
                .map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
        })
    }

    fn connect_error(&mut self) -> Option<QueuedError> {
        self.with(|connection| connection.error.take())
    }

    fn set_tos(&mut self, tos: u8) {
        self.with(|connection| connection.tos = tos);
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.with(|connection| {
            if connection.reset_by_server {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            let room = if connection.paused {
                0
            } else {
                connection.buffer.saturating_sub(connection.to_server.len())
            };
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
            // As the kernel has it: what came before a RST can still be read, and after a FIN the
            // stream has ended whatever follows (`SOCK_DONE` in tcp_recvmsg_locked, net/ipv4/tcp.c).
            if connection.to_client.is_empty() {
                return if connection.server_shut {
                    Ok(0)
                } else if connection.reset_by_server {
                    Err(io::ErrorKind::ConnectionReset.into())
                } else {
                    Err(io::ErrorKind::WouldBlock.into())
                };
            }
            let len = bytes.len().min(connection.to_client.len());
            for (target, byte) in bytes.iter_mut().zip(connection.to_client.drain(..len)) {
                *target = byte;
            }
            Ok(len)
        })
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        self.with(|connection| {
            if connection.reset_by_server {
                return Err(io::ErrorKind::NotConnected.into());
            }
            connection.client_shut = true;
            Ok(())
        })
    }

    fn reset(self) {
        self.with(|connection| connection.reset_by_client = true);
    }
}

impl Drop for SimulatedTcp {
    fn drop(&mut self) {
        self.with(|connection| {
            connection.closed = true;
            connection.watcher = None;
            // close(2) with data unread is a RST (RFC 2525 2.17).
            connection.reset_by_client |= !connection.to_client.is_empty();
        });
        self.state.borrow_mut().open -= 1;
    }
}

/// A simulated pipe.
#[derive(Debug)]
pub struct SimulatedPipe {
    state: Rc<RefCell<State>>,
    held: VecDeque<u8>,
}

impl Pipe<SimulatedTcp> for SimulatedPipe {
    fn fill(&mut self, from: &mut SimulatedTcp, urgent: bool) -> io::Result<usize> {
        assert!(self.held.is_empty(), "only an empty pipe is filled");
        // As in the kernel, urgent data are passed by none of this but by a copy.
        if from.with(|connection| connection.urgent) && !urgent {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut bytes = [0; PIPE];
        let len = from.recv(&mut bytes)?;
        from.with(|connection| connection.urgent = false);
        self.held.extend(&bytes[..len]);
        Ok(len)
    }

    fn drain(&mut self, to: &mut SimulatedTcp) -> io::Result<usize> {
        let len = to.send(self.held.make_contiguous())?;
        self.held.drain(..len);
        Ok(len)
    }

    fn held(&self) -> usize {
        self.held.len()
    }
}

impl Drop for SimulatedPipe {
    fn drop(&mut self) {
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
        state.listeners[self.id].open = false;
        state.open -= 1;
    }
}

/// A simulated UDP or echo socket.
#[derive(Debug)]
pub struct SimulatedDatagram {
    state: Rc<RefCell<State>>,
    id: usize,
}

impl SimulatedDatagram {
    /// The error of an earlier datagram, which a socket reports before anything else.
    fn failed(&self) -> io::Result<()> {
        if self.state.borrow().datagrams[self.id].errors.is_empty() {
            Ok(())
        } else {
            Err(io::ErrorKind::ConnectionRefused.into())
        }
    }

    fn next_error(&self, bytes: &mut [u8]) -> Option<QueuedError> {
        let (mut error, payload) = self.state.borrow_mut().datagrams[self.id]
            .errors
            .pop_front()?;
        error.quoted = payload.len().min(bytes.len());
        bytes[..error.quoted].copy_from_slice(&payload[..error.quoted]);
        Some(error)
    }
}

impl UdpSocket for SimulatedDatagram {
    fn send(&mut self, datagram: &Outgoing<'_>) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        state.datagram_calls += 1;
        let limit = state.largest_datagram.unwrap_or(usize::MAX);
        if datagrams(datagram.payload, datagram.segment).any(|payload| payload.len() > limit) {
            return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
        }
        if let Some(errno) = state.fail_datagrams {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let sent = datagrams(datagram.payload, datagram.segment).map(|payload| Sent {
            socket: SocketId(self.id),
            to: datagram.to,
            payload: payload.to_vec(),
            marks: datagram.marks,
        });
        state.sent.extend(sent);
        Ok(())
    }

    fn recv(&mut self, inbox: &mut Inbox) -> io::Result<()> {
        self.failed()?;
        let mut state = self.state.borrow_mut();
        inbox.clear();
        while !inbox.is_full()
            && let Some((from, payload, marks)) = state.datagrams[self.id].incoming.pop_front()
        {
            let received = Received {
                from,
                asked: None,
                marks,
            };
            inbox.add(received, &payload);
        }
        if inbox.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(())
    }

    fn queued_error(&mut self, bytes: &mut [u8]) -> Option<QueuedError> {
        self.next_error(bytes)
    }
}

impl EchoSocket for SimulatedDatagram {
    fn send(&mut self, to: IpAddr, seq: u16, data: &[u8], marks: Marks) -> io::Result<()> {
        let mut payload = seq.to_be_bytes().to_vec();
        payload.extend(data);
        let sent = Sent {
            socket: SocketId(self.id),
            to: SocketAddr::new(to, 0),
            payload,
            marks: Some(marks),
        };
        self.state.borrow_mut().sent.push(sent);
        Ok(())
    }

    fn recv(&mut self, inbox: &mut Inbox) -> io::Result<()> {
        self.failed()?;
        let mut state = self.state.borrow_mut();
        inbox.clear();
        while !inbox.is_full()
            && let Some((from, seq, bytes)) = state.datagrams[self.id].echoes.pop_front()
        {
            let received = Received {
                from: SocketAddr::new(from, 0),
                asked: None,
                marks: Marks::default(),
            };
            let [high, low] = seq.to_be_bytes();
            let mut message = vec![0, 0, 0, 0, 0, 0, high, low];
            message.extend(bytes);
            inbox.add(received, &message);
        }
        if inbox.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(())
    }

    fn queued_error(&mut self, bytes: &mut [u8]) -> Option<QueuedError> {
        self.next_error(bytes)
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
