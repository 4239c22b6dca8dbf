//! [`Host`] in memory: servers that do what a test says, and events in a fixed order.
//!
//! A [`SimulatedHost`] is given to the stack; the test keeps its [`Network`], a second handle on
//! the same state, through which it plays every server: accepts, sends, closes, resets, stays
//! silent, lets calls fail ([`Fault`]). No clock, no randomness but by seed: the same calls give the
//! same events.

mod faults;
mod network;
mod sockets;
mod state;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;

use super::{DatagramRole, Host, Pipe, Token};
use crate::net::Marks;
use state::{Connection, DatagramState, ListenerState, State};

pub use faults::{Call, Fault};
pub use network::Network;
pub use sockets::{SimulatedDatagram, SimulatedListener, SimulatedPipe, SimulatedTcp};
pub use state::{ConnectAnswer, Inside, Sent, SocketId};

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

    fn reaches_ipv6(&mut self) -> Option<bool> {
        Some(!self.state.borrow().without_ipv6)
    }

    fn tcp_connect(
        &mut self,
        token: Token,
        remote: SocketAddr,
        marks: Marks,
    ) -> io::Result<SimulatedTcp> {
        let mut state = self.state.borrow_mut();
        state.may_fail(Call::Connect)?;
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
        self.state.borrow_mut().may_fail(Call::Listen)?;
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
        self.state.borrow_mut().may_fail_to_accept(listener.id)?;
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
        state.may_fail(Call::WatchTcp)?;
        state.connections[socket.id].watcher = Some((self.number, token));
        state.event_at(socket.id, true, true);
        Ok(())
    }

    fn tcp_connect_inside(&mut self, token: Token, to: SocketAddr) -> io::Result<SimulatedTcp> {
        let mut state = self.state.borrow_mut();
        if let Err(error) = state.may_fail(Call::ConnectInside) {
            if error.kind() == io::ErrorKind::WouldBlock {
                state.inside_waiting.push((self.number, token));
                state.answer_inside(false);
            }
            return Err(error);
        }
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

    fn pass_over_inside(&mut self) {
        let mut state = self.state.borrow_mut();
        state.inside = Inside::Nowhere;
        state.answer_inside(true);
    }

    fn pipe(&mut self) -> io::Result<SimulatedPipe> {
        self.state.borrow_mut().may_fail(Call::OpenPipe)?;
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
        self.state.borrow_mut().may_fail(Call::OpenUdp)?;
        self.open()?;
        let id = self.datagram(None, Some(role));
        Ok(SimulatedDatagram {
            state: Rc::clone(&self.state),
            id,
        })
    }

    fn udp_watch(&mut self, token: Token, socket: &SimulatedDatagram) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        state.may_fail(Call::WatchUdp)?;
        let datagram = &mut state.datagrams[socket.id];
        datagram.watcher = Some((self.number, token));
        if !datagram.incoming.is_empty() {
            let watcher = datagram.watcher;
            state.event(watcher, true, false);
        }
        Ok(())
    }

    fn echo_open(&mut self, token: Token, _ipv6: bool) -> io::Result<SimulatedDatagram> {
        self.state.borrow_mut().may_fail(Call::OpenEcho)?;
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
