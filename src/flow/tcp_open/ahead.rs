//! An open TCP flow's way to the guest past the ring: what is asked of the host's socket for it.
//!
//! Comes in: what became possible at the host's socket, what the guest has acknowledged. Goes out: frames to the
//! guest, and what the host's socket may forget. Whether a flow goes this way is [`crate::flow::tcp_ahead`]'s.

use std::io::ErrorKind;

use super::{CHUNK, Failure, Open};
use crate::buf::TxBatch;
use crate::flow::tcp_ahead::Way;
use crate::host::TcpSocket;
use crate::net::Instant;

impl<S: TcpSocket> Open<S> {
    /// The host's socket need not keep what the guest has, and gives again what was lost.
    pub(super) fn settle_ahead(&mut self, now: Instant) -> Result<(), Failure> {
        self.engine.skip_known();
        let arrived = self.engine.ahead.take_arrived();
        if arrived > 0 {
            self.forget(arrived)?;
        }
        if self.engine.has_lost(now) {
            self.engine.fall_back();
            // It was told that there is something before.
            self.readable = true;
        }
        Ok(())
    }

    fn forget(&mut self, bytes: usize) -> Result<(), Failure> {
        loop {
            match self.socket.discard(bytes) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(Failure::Host),
            }
        }
    }

    /// Host to guest, past the ring: `peek` writes into the frame, and the host's socket keeps what it wrote.
    pub(super) fn carry_ahead(&mut self, now: Instant, tx: &mut TxBatch) -> usize {
        if self.engine.ahead.must_begin() {
            let begun = self.socket.begin_peeking().is_ok();
            self.engine.ahead.begin(begun);
            if !begun {
                return self.carry_to_guest();
            }
        }
        let mut moved = 0;
        while self.readable && moved < CHUNK && tx.has_room() {
            let Some(most) = self.engine.room_ahead() else {
                break;
            };
            let socket = &mut self.socket;
            match self
                .engine
                .send_ahead(now, tx, most, |room| socket.peek(room))
            {
                None => break,
                // The end of the stream comes by the ring's way, once the guest has what was before it.
                Some(Ok(0)) => {
                    self.engine.ahead.note_read(0);
                    return match self.engine.way() {
                        Way::Ahead | Way::Wait => moved,
                        Way::Ring => self.carry_to_guest(),
                    };
                }
                Some(Ok(len)) => {
                    moved += len;
                    self.readable = len == most || self.hangup || self.urgent;
                }
                Some(Err(error)) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    self.urgent = false;
                }
                Some(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                Some(Err(_)) => {
                    self.lose_host();
                    return moved + self.carry_to_guest();
                }
            }
        }
        moved
    }
}
