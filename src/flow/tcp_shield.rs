//! The calls that lead into smoltcp, and what keeps a fault of its within the connection that it concerns.
//!
//! smoltcp panics where its own rules are broken, over arithmetic on sequence numbers above all. No segment is known to bring
//! it there, and none may end the network if it does. Comes in: what smoltcp is to do. Goes out: what it made of that, or
//! that nothing of the engine is to be relied on any more: its connection ends, and nobody gets the engine after it.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use smoltcp::iface::{Interface, PollResult, SocketSet};

use super::tcp_device::OnePacket;
use super::tcp_engine::Engine;
use crate::buf::TxBatch;
use crate::net::parse::tcp_flags;
use crate::net::{Instant, emit};

impl Engine {
    /// Has smoltcp do something. None where it panics over it, or has before.
    pub(super) fn shielded<R>(&mut self, act: impl FnOnce(&mut Self) -> R) -> Option<R> {
        if self.broken {
            return None;
        }
        // What a panic leaves behind is dropped without another look.
        match catch_unwind(AssertUnwindSafe(|| act(self))) {
            Ok(outcome) => Some(outcome),
            Err(panic) => {
                self.broken = true;
                // Tests and fuzzers are to see it, but for the one of this.
                if cfg!(all(debug_assertions, not(test))) {
                    resume_unwind(panic);
                }
                let emit::Ends { src, dst } = self.ends;
                tracing::error!(guest = %src, remote = %dst, "connection given up after a panic");
                None
            }
        }
    }

    /// Its connection is to end.
    pub(super) const fn is_broken(&self) -> bool {
        self.broken
    }

    /// Resets the guest's side without smoltcp.
    pub(super) fn reset_guest(&mut self, now: Instant, tx: &mut TxBatch) {
        let expected = self.expected();
        let segment = emit::BareSegment {
            flags: tcp_flags::RST | tcp_flags::ACK,
            ..self.acknowledgement(now, expected)
        };
        emit::tcp_bare(tx, self.path.wire, segment);
    }

    /// Gives smoltcp a packet.
    pub(super) fn hear(&mut self, now: Instant, tx: &mut TxBatch, packet: &[u8]) {
        self.shielded(|it| it.poll_ingress(now, tx, packet));
    }

    fn poll_ingress(&mut self, now: Instant, tx: &mut TxBatch, packet: &[u8]) {
        let (mut device, interface, sockets) = self.device(now, tx, Some(packet), false);
        interface.poll_ingress_single(now, &mut device, sockets);
    }

    /// The link as smoltcp sees it: with one packet that comes in, or none. Beside it who looks.
    fn device<'a>(
        &'a mut self,
        now: Instant,
        tx: &'a mut TxBatch,
        packet: Option<&'a [u8]>,
        bulk: bool,
    ) -> (OnePacket<'a>, &'a mut Interface, &'a mut SocketSet<'static>) {
        let (mss, limit, reach) = (self.mss(), self.limit(), self.reach());
        let device = OnePacket {
            packet,
            bulk,
            tx,
            path: &self.path,
            mss,
            now,
            sent: &mut self.line.sent,
            limit,
            reach,
        };
        (device, &mut self.interface, &mut self.sockets)
    }

    /// Sends what is due, until nothing is or the batch is full; true when the batch stopped it, or a panic.
    /// `bulk` off lets a last segment (a RST) into the reserve for control frames.
    pub fn egress(&mut self, now: Instant, tx: &mut TxBatch, bulk: bool) -> bool {
        let stopped = self.shielded(|it| it.poll_egress(now, tx, bulk));
        stopped.unwrap_or(true)
    }

    fn poll_egress(&mut self, now: Instant, tx: &mut TxBatch, bulk: bool) -> bool {
        let mut at = self.sends_at(now);
        loop {
            let (mut device, interface, sockets) = self.device(now, tx, None, bulk);
            let sent = interface.poll_egress(at, &mut device, sockets);
            at = now;
            if matches!(sent, PollResult::None) {
                return !tx.has_room();
            }
        }
    }

    /// When the engine wants to be polled next.
    pub fn poll_at(&mut self, now: Instant) -> Option<Instant> {
        let at = self.shielded(|it| it.interface.poll_at(now, &it.sockets));
        // What is broken is to be ended.
        at.unwrap_or(Some(now))
    }
}
