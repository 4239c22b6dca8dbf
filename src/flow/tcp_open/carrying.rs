//! Bytes of an open TCP flow from one side to the other, by smoltcp's rings or past them.
//!
//! Comes in: what is in the rings, at the host's socket, in a segment of the guest. Goes out: the same bytes on
//! the other side, once; and the end of a stream behind the last of them.

use std::io::ErrorKind;

use smoltcp::socket::tcp::RecvError;

use super::{CHUNK, Open};
use crate::host::TcpSocket;
use crate::net::parse::TcpSegment;

impl<S: TcpSocket> Open<S> {
    /// Lets the host's socket have a segment's payload at once, if it may; gives how much it took.
    pub(super) fn pass_directly(&mut self, segment: &TcpSegment, packet: &[u8]) -> usize {
        let waits = self.guest_deadline.is_some() || self.host_failed;
        if self.guest_ended || waits || !self.engine.may_skip(segment) {
            return 0;
        }
        self.wake();
        if !self.writable {
            return 0;
        }
        let payload = &packet[packet.len() - segment.payload_len..];
        match self.socket.send(payload) {
            Ok(taken) => {
                let taken = taken.min(payload.len());
                self.writable = taken == payload.len();
                taken
            }
            Err(error) => {
                let busy = error.kind() == ErrorKind::WouldBlock;
                self.writable = !busy;
                if !busy && error.kind() != ErrorKind::Interrupted {
                    self.lose_host();
                }
                0
            }
        }
    }

    /// Guest to host: the receive ring is handed to `send` in place.
    pub(super) fn carry_to_host(&mut self) -> usize {
        let mut moved = 0;
        while self.writable && !self.host_failed && self.engine.socket().recv_queue() > 0 {
            let socket = &mut self.socket;
            let sent = self.engine.socket().recv(|bytes| match socket.send(bytes) {
                Ok(len) => (len, Ok((len, bytes.len()))),
                Err(error) => (0, Err(error)),
            });
            match sent {
                Ok(Ok((len, offered))) => {
                    moved += len;
                    self.engine.note_taken(len);
                    self.writable = len == offered;
                }
                Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                Ok(Err(_)) => self.lose_host(),
                Err(RecvError::Finished | RecvError::InvalidState) => break,
            }
        }
        self.pass_guest_end();
        moved
    }

    fn pass_guest_end(&mut self) {
        if self.guest_ended || self.engine.socket().recv_queue() > 0 {
            return;
        }
        match self.engine.socket().recv(|_| (0, ())) {
            Err(RecvError::Finished) => {
                self.guest_ended = true;
                if self.socket.shutdown_write().is_err() {
                    self.lose_host();
                }
            }
            // Without a connection any more `transfer` sees what that means.
            Ok(()) | Err(RecvError::InvalidState) => {}
        }
    }

    /// Host to guest: `recv` writes into the send ring in place.
    pub(super) fn carry_to_guest(&mut self) -> usize {
        let mut moved = 0;
        // What was peeked at and is under way would be received once more: first it arrives, or is lost.
        let under_way = self.engine.ahead.is_outstanding();
        while self.readable && !self.host_ended && !under_way && self.engine.can_send() {
            let socket = &mut self.socket;
            let received = self.engine.send(|room| {
                let chunk = room.len().min(CHUNK);
                match socket.recv(&mut room[..chunk]) {
                    Ok(len) => (len, Ok((len, chunk))),
                    Err(error) => (0, Err(error)),
                }
            });
            match received {
                // So looks the stream of a socket that has told its error.
                Ok(Ok((0, _))) if self.host_failed => self.readable = false,
                Ok(Ok((0, _))) => {
                    self.host_ended = true;
                    // A RST may have come with the end, in one event: the kernel tells the end first.
                    self.look_for_error |= self.error;
                    self.owes_end = true;
                }
                Ok(Ok((len, room))) => {
                    moved += len;
                    self.engine.ahead.note_read(len);
                    // A short read found the end of what is there; the next edge tells of more.
                    self.readable = len == room || self.hangup || self.urgent;
                    break;
                }
                Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    self.urgent = false;
                }
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                // Behind all that it had received.
                Ok(Err(_)) => {
                    self.lose_host();
                    self.readable = false;
                }
                Err(_) => break,
            }
        }
        if self.owes_end {
            self.owes_end = !self.engine.close();
        }
        moved
    }
}
