//! The sockets of a simulated host: what each call on one does.
//!
//! Owns a number each and a handle on the state that all share. In: the stack's calls. Out: bytes, datagrams
//! and errors as the kernel would give them.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;

use super::faults::Call;
use super::state::{Connection, Sent, SocketId, State};
use crate::host::{
    EchoSocket, Inbox, Outgoing, Pipe, QueuedError, Received, SendFailure, Sending, TcpSocket,
    UdpSocket,
};
use crate::net::Marks;

/// Bytes that a simulated pipe holds.
const PIPE: usize = 4096;

/// A simulated TCP connection.
#[derive(Debug)]
pub struct SimulatedTcp {
    pub(super) state: Rc<RefCell<State>>,
    pub(super) id: usize,
}

impl SimulatedTcp {
    fn with<R>(&self, act: impl FnOnce(&mut Connection) -> R) -> R {
        act(&mut self.state.borrow_mut().connections[self.id])
    }

    fn may_fail(&self, call: Call) -> io::Result<()> {
        self.state.borrow_mut().may_fail_at(call, self.id)
    }

    fn put(&self, bytes: &[u8]) -> io::Result<usize> {
        self.with(|connection| {
            connection.tell_error()?;
            if connection.reset_by_server {
                return Err(io::ErrorKind::BrokenPipe.into());
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

    fn take(&self, bytes: &mut [u8]) -> io::Result<usize> {
        let len = self.look(bytes, 0)?;
        self.drop_received(len);
        Ok(len)
    }

    /// Bytes leave the receive queue; who peeks goes on where it was (`sk_peek_offset_bwd`).
    fn drop_received(&self, len: usize) {
        self.with(|connection| {
            connection.to_client.drain(..len);
            connection.peeked = connection.peeked.saturating_sub(len);
        });
    }

    /// Copies what there is from a place in the receive queue on.
    fn look(&self, bytes: &mut [u8], from: usize) -> io::Result<usize> {
        self.with(|connection| {
            // As the kernel has it: what came before a RST can still be read, after a FIN the stream has
            // ended whatever follows (`SOCK_DONE` in tcp_recvmsg_locked, net/ipv4/tcp.c), and once an error
            // was told the stream looks ended, too (`RCV_SHUTDOWN` there).
            let Some(there) = connection.to_client.len().checked_sub(from + 1) else {
                if connection.server_shut {
                    return Ok(0);
                }
                connection.tell_error()?;
                return if connection.reset_by_server {
                    Ok(0)
                } else {
                    Err(io::ErrorKind::WouldBlock.into())
                };
            };
            let len = bytes.len().min(there + 1);
            for (target, byte) in bytes.iter_mut().zip(connection.to_client.range(from..)) {
                *target = *byte;
            }
            Ok(len)
        })
    }
}

impl TcpSocket for SimulatedTcp {
    fn connect_outcome(&mut self) -> io::Result<()> {
        self.may_fail(Call::Outcome)?;
        self.with(|connection| {
            connection.tell_error()?;
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

    fn ask_after(&mut self, after: u32, answer: u32) -> io::Result<()> {
        self.with(|connection| connection.asked_after = Some((after, answer)));
        Ok(())
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.may_fail(Call::Send)?;
        self.put(bytes)
    }

    fn recv(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.may_fail(Call::Receive)?;
        self.take(bytes)
    }

    fn begin_peeking(&mut self) -> io::Result<()> {
        self.may_fail(Call::BeginPeeking)?;
        self.with(|connection| connection.peeked = 0);
        Ok(())
    }

    fn peek(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.may_fail(Call::Peek)?;
        let from = self.with(|connection| connection.peeked);
        let len = self.look(bytes, from)?;
        self.with(|connection| connection.peeked += len);
        Ok(len)
    }

    fn discard(&mut self, len: usize) -> io::Result<()> {
        self.may_fail(Call::Discard)?;
        let peeked = self.with(|connection| connection.peeked);
        assert!(len <= peeked, "{len} bytes of {peeked} that were peeked at");
        self.drop_received(len);
        Ok(())
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        self.may_fail(Call::Shutdown)?;
        self.with(|connection| {
            if connection.reset_by_server {
                return Err(io::ErrorKind::NotConnected.into());
            }
            connection.client_shut = true;
            Ok(())
        })
    }

    fn has_delivered(&self) -> bool {
        self.with(|connection| connection.to_server.len() <= connection.buffer / 2)
    }

    fn reset(self) {
        self.with(|connection| {
            // Half of what is kept for the server its own system has, and so acknowledged.
            connection.to_server.truncate(connection.buffer / 2);
            connection.reset_by_client = true;
        });
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
    pub(super) state: Rc<RefCell<State>>,
    pub(super) held: VecDeque<u8>,
}

impl Pipe<SimulatedTcp> for SimulatedPipe {
    fn fill(&mut self, from: &mut SimulatedTcp, urgent: bool) -> io::Result<usize> {
        assert!(self.held.is_empty(), "only an empty pipe is filled");
        from.may_fail(Call::Fill)?;
        // As in the kernel, urgent data are passed by none of this but by a copy.
        let waits = |connection: &mut Connection| connection.urgent && !connection.server_shut;
        if from.with(waits) && !urgent {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut bytes = [0; PIPE];
        let len = from.take(&mut bytes)?;
        from.with(|connection| connection.urgent = false);
        self.held.extend(&bytes[..len]);
        Ok(len)
    }

    fn drain(&mut self, to: &mut SimulatedTcp) -> io::Result<usize> {
        to.may_fail(Call::Drain)?;
        let len = to.put(self.held.make_contiguous())?;
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
    pub(super) state: Rc<RefCell<State>>,
    pub(super) id: usize,
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
    pub(super) state: Rc<RefCell<State>>,
    pub(super) id: usize,
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

    fn may_fail(&self, call: Call) -> io::Result<()> {
        let mut state = self.state.borrow_mut();
        let watcher = state.datagrams[self.id].watcher;
        state.may_fail_for(call, watcher)
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
    fn send(&mut self, datagram: &Outgoing<'_>) -> Result<(), SendFailure> {
        let mut state = self.state.borrow_mut();
        state.datagram_calls += 1;
        let mut sending = Sending::default();
        for payload in datagram.datagrams() {
            sending.attempt(payload.len(), || {
                state.may_send(payload.len())?;
                state.sent.push(Sent {
                    socket: SocketId(self.id),
                    to: datagram.to,
                    payload: payload.to_vec(),
                    marks: datagram.marks,
                });
                Ok(())
            });
        }
        sending.end()
    }

    fn recv(&mut self, inbox: &mut Inbox) -> io::Result<()> {
        inbox.clear();
        self.may_fail(Call::ReceiveDatagrams)?;
        self.failed()?;
        let mut state = self.state.borrow_mut();
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
        let failure = self.state.borrow().fail_datagrams;
        if let Some(errno) = failure {
            return Err(io::Error::from_raw_os_error(errno));
        }
        self.state.borrow_mut().may_fail(Call::SendEcho)?;
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
        inbox.clear();
        self.may_fail(Call::ReceiveEchoes)?;
        self.failed()?;
        let mut state = self.state.borrow_mut();
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
