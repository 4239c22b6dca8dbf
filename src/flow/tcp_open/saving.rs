//! What an open TCP flow gives up where memory is scarce.
//!
//! Comes in: how much its rings hold, and what their share is. Goes out: whether it is to have another engine, or memory of
//! what its receive ring has passed on.

use super::Open;
use crate::buf::TxBatch;
use crate::flow::tcp_engine::Engine;
use crate::host::TcpSocket;
use crate::net::Instant;

/// Rings that hold no more than this are not exchanged for empty ones (`config/limits.rs` counts on it).
const LITTLE: usize = 8 * 1024;

impl<S: TcpSocket> Open<S> {
    /// Memory is scarce, and it holds more than its share, of which it needs nothing at this moment.
    pub(in crate::flow) fn has_too_much(&mut self, now: Instant) -> bool {
        self.is_beyond_share() && self.is_even(now)
    }

    fn is_beyond_share(&self) -> bool {
        let extent = &self.engine.extent;
        extent.is_scarce() && extent.held() > extent.share().max(LITTLE)
    }

    /// Memory is scarce, and it holds more than its share, but needs some at this moment: what it has passed on to the host
    /// it holds no longer. The guest hears that there is more room. False where that has to wait for a turn that has some.
    pub(in crate::flow) fn save_memory(&mut self, now: Instant, tx: &mut TxBatch) -> bool {
        if self.is_beyond_share()
            && self.engine.give_passed_back(LITTLE)
            && !self.guest_ended
            && !self.silent
        {
            self.engine.owes_window = true;
            self.engine.open_window(now, tx);
        }
        !self.engine.owes_window
    }
}

impl Engine {
    /// Gives the memory back of what the receive ring has passed on, where that is more than `most` bytes; true when it
    /// did. The ring itself goes on from where it is, to its end and over again.
    fn give_passed_back(&mut self, most: usize) -> bool {
        let (taken, end) = (self.line.next_in, self.line.furthest);
        let much = self.extent.behind(taken, end) > most;
        if much {
            for part in self.extent.forget_behind(taken, end) {
                self.rx_pages.give_back(part);
            }
        }
        much
    }
}
