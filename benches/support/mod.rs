//! What the benchmark needs around the stack: a host that costs nothing, a guest that writes its
//! frames in advance, and an allocator that counts.
//!
//! [`Bed`] is the event loop without link and runtime: it does the steps of a turn in their order.

pub(crate) mod alloc;
pub(crate) mod guest;
pub(crate) mod host;

use std::sync::Arc;

use tapgate::buf::{LinkId, RxMeta, TxBatch, TxCapabilities};
use tapgate::config::{AddressPlan, Config};
use tapgate::flow::Turn;
use tapgate::host::Event;
use tapgate::net::{Duration, Instant};
use tapgate::stack::{LinkInfo, Stack};

use host::BenchHost;

/// The only link.
pub(crate) const LINK: LinkId = LinkId(0);

/// Virtual time that a turn takes. Long enough for timers to come due while a scenario runs.
const TURN: Duration = Duration::from_micros(50);

/// Frames and bytes of a turn, as in `event_loop.rs`.
const TX_FRAMES: usize = 512;
const TX_BYTES: usize = 256 * 1024;

/// A stack between a guest and a host that exist for the benchmark only.
pub(crate) struct Bed {
    stack: Stack<BenchHost>,
    pub(crate) host: BenchHost,
    tx: TxBatch,
    now: Instant,
}

impl Bed {
    pub(crate) fn new(capabilities: TxCapabilities) -> Self {
        let link = LinkInfo {
            id: LINK,
            capabilities,
            guest_mac: Some(guest::GUEST_MAC),
        };
        // IPv4 alone: no advertisement comes in between.
        let config = Config {
            plan: AddressPlan::default().without_ipv6(),
            ..Config::default()
        };
        Self {
            stack: Stack::new(Arc::new(config), link, [1, 2, 3, 4]),
            host: BenchHost::default(),
            tx: TxBatch::new(TX_FRAMES, TX_BYTES),
            now: Instant::ZERO,
        }
    }

    /// A frame of the guest.
    pub(crate) fn frame(&mut self, bytes: &[u8], meta: RxMeta) {
        let mut turn = Turn {
            now: self.now,
            host: &mut self.host,
            tx: &mut self.tx,
        };
        self.stack.handle_frame(&mut turn, bytes, meta);
    }

    /// The host's socket became ready; which way the service says that it stands for.
    pub(crate) fn ready(&mut self) {
        self.host.refill();
        let event = Event {
            token: self.host.token(),
            readable: true,
            writable: true,
            hangup: self.host.ended(),
            error: false,
            urgent: false,
        };
        let mut turn = Turn {
            now: self.now,
            host: &mut self.host,
            tx: &mut self.tx,
        };
        self.stack.handle_host(&mut turn, event);
    }

    /// Ends the turn: timers, flows, and the frames that were produced go to `sees`.
    pub(crate) fn finish(&mut self, mut sees: impl FnMut(&[u8])) {
        loop {
            let mut turn = Turn {
                now: self.now,
                host: &mut self.host,
                tx: &mut self.tx,
            };
            self.stack.handle_timeout(&mut turn);
            let more = self.stack.poll_transmit(&mut turn);
            for frame in self.tx.frames() {
                sees(frame.bytes());
            }
            self.tx.clear();
            // The loop asks for this before it sleeps.
            self.stack.poll_timeout();
            self.now += TURN;
            if !more {
                return;
            }
        }
    }

    /// Nothing comes for a while, but timers that are due act; what they send goes to `sees`.
    pub(crate) fn rest(&mut self, time: Duration, sees: impl FnMut(&[u8])) {
        self.now += time;
        self.finish(sees);
    }

    /// Number of flows in the table.
    pub(crate) fn flows(&self) -> usize {
        self.stack.flows()
    }
}
