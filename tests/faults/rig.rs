//! A stack alone, driven frame by frame in virtual time, and what it means that it is alive.
//!
//! In: frames of a guest, what the simulated host's servers do, time. Out: frames to the guest. Nothing
//! here is in proportion to the number of flows, so a hundred thousand of them are no trouble; the
//! invariants, which look at every flow, are asked for when a test says so.

use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;

use tapgate::buf::{LinkId, Offload, RxMeta, TxBatch, TxCapabilities};
use tapgate::config::Config;
use tapgate::flow::Turn;
use tapgate::host::simulated::{ConnectAnswer, Network, SimulatedHost, SocketId};
use tapgate::net::{DropReason, Duration, Instant, Mac};
use tapgate::stack::{LinkInfo, Stack};

use crate::heap;
use crate::log::Log;
use crate::packets::{self, Ipv4, Received};
use crate::peer::Peer;

pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
pub(crate) const RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
pub(crate) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

/// The server that [`Rig::is_alive`] connects to.
const ECHO: &str = "198.51.100.7:7";
/// Frames and bytes of a turn, as in `event_loop.rs`.
const TX_FRAMES: usize = 512;
const TX_BYTES: usize = 256 * 1024;
/// Bytes that a stack at rest may hold beyond what a fresh one holds: warm engines are not among them,
/// what a table keeps for the next crowd is. The issue allows a process 32 MiB.
const LEFT_OVER: i64 = 4 << 20;
/// Longer than any flow lives without a move: a guest that is gone is given up after 2 h 10 min.
const LONGEST: Duration = Duration::from_secs(3 * 3600);

/// A stack, its host and the time.
pub(crate) struct Rig {
    pub(crate) stack: Stack<SimulatedHost>,
    pub(crate) net: Network,
    pub(crate) now: Instant,
    host: SimulatedHost,
    tx: TxBatch,
    /// Frames to the guest that nobody has looked at.
    out: Vec<Vec<u8>>,
    /// They are kept; else only counted.
    keep: bool,
    pub(crate) sent: u64,
    log: Log,
    /// Turns that began because a deadline had come.
    woken: u64,
    /// Frames of the guest so far.
    frames: u64,
    next_port: u16,
}

impl Rig {
    pub(crate) fn new() -> Self {
        Self::with(Config::default())
    }

    pub(crate) fn with(config: Config) -> Self {
        Self::seeded(config, [1, 2, 3, 4])
    }

    pub(crate) fn seeded(config: Config, seed: [u64; 4]) -> Self {
        heap::map_large_allocations();
        let net = Network::new();
        net.answer(echo(), ConnectAnswer::Accept);
        let link = LinkInfo {
            id: LinkId(0),
            capabilities: TxCapabilities::default(),
            guest_mac: Some(Mac(packets::GUEST_MAC)),
        };
        let mut rig = Self {
            stack: Stack::new(Arc::new(config), link, seed),
            host: net.host(),
            net,
            now: Instant::ZERO,
            tx: TxBatch::new(TX_FRAMES, TX_BYTES),
            out: Vec::new(),
            keep: true,
            sent: 0,
            log: Log::listen(),
            woken: 0,
            frames: 0,
            next_port: 61_000,
        };
        // The gateway introduces itself.
        rig.turn();
        rig.take();
        rig
    }

    /// Turns that began because a deadline had come, so far.
    pub(crate) fn woken(&self) -> u64 {
        self.woken
    }

    /// Every frame was answered, went on, or was dropped for a reason.
    fn all_are_counted(&self) {
        let counters = self.stack.counters();
        assert_eq!(counters.frames_in, self.frames, "every frame is counted");
        counters.check().unwrap();
    }

    /// The log stayed within its bounds until now.
    pub(crate) fn log_is_quiet(&self) {
        self.log.is_quiet();
    }

    /// Frames to the guest are counted from now on, and not kept.
    pub(crate) fn only_count(&mut self) {
        self.keep = false;
    }

    /// They are kept again.
    pub(crate) fn keep(&mut self) {
        self.keep = true;
    }

    /// The guest sends a frame.
    pub(crate) fn frame(&mut self, bytes: &[u8]) {
        self.batch([bytes]);
    }

    /// The guest sends a frame that is several datagrams of this size, as its kernel leaves them to its network card to take apart.
    pub(crate) fn segmented(&mut self, bytes: &[u8], size: u16) {
        self.frames += 1;
        let meta = RxMeta {
            udp_segment: NonZeroU16::new(size),
            ..RxMeta::plain(LinkId(0))
        };
        self.with_stack(|stack, turn| stack.handle_frame(turn, bytes, meta));
        self.turn();
        self.all_are_counted();
    }

    /// The guest sends frames, which the loop takes in one turn.
    pub(crate) fn batch<'a>(&mut self, frames: impl IntoIterator<Item = &'a [u8]>) {
        let mut turn = Turn {
            now: self.now,
            host: &mut self.host,
            tx: &mut self.tx,
        };
        for frame in frames {
            self.frames += 1;
            self.stack
                .handle_frame(&mut turn, frame, RxMeta::plain(LinkId(0)));
        }
        self.turn();
        self.all_are_counted();
    }

    /// The guest sends frames, which come in batches of a turn's size.
    pub(crate) fn flood<'a>(&mut self, frames: impl IntoIterator<Item = &'a [u8]>) {
        let frames: Vec<&[u8]> = frames.into_iter().collect();
        for batch in frames.chunks(128) {
            self.batch(batch.iter().copied());
        }
    }

    /// Turns at this time, until there is nothing left to do.
    pub(crate) fn turn(&mut self) {
        while self.one_turn() {}
    }

    /// One turn at this time; true when there is more to do.
    pub(crate) fn one_turn(&mut self) -> bool {
        let mut turn = Turn {
            now: self.now,
            host: &mut self.host,
            tx: &mut self.tx,
        };
        for event in self.net.take_events() {
            self.stack.handle_host(&mut turn, event);
        }
        self.stack.handle_timeout(&mut turn);
        let more = self.stack.poll_transmit(&mut turn);
        for frame in self.tx.frames() {
            self.sent += 1;
            if self.keep {
                self.out.push(frame.bytes().to_vec());
            }
        }
        self.tx.clear();
        more || self.net.has_events()
    }

    /// One turn for which others have left no room: what it sends anew is lost to it.
    pub(crate) fn crowded_turn(&mut self) {
        let fill = |_: &mut [u8]| (Offload::NONE, ());
        for len in [1514, 60, 0] {
            while self.tx.push(LinkId(0), len, fill).is_some() {}
        }
        let keep = std::mem::replace(&mut self.keep, false);
        self.one_turn();
        self.keep = keep;
    }

    /// Lets time pass, from deadline to deadline as the loop does.
    pub(crate) fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(at) = self.stack.poll_timeout()
            && at <= end
        {
            // A deadline that is over and stays is a loop that does not sleep; time moves all the same.
            self.now = at.max(self.now + Duration::from_micros(1));
            self.log.pass(self.now);
            self.woken += 1;
            self.turn();
        }
        self.now = end;
        self.log.pass(end);
        self.turn();
    }

    /// Lets time pass in which the loop does not run at all.
    pub(crate) fn jump(&mut self, secs: u64) {
        self.now += Duration::from_secs(secs);
        self.log.pass(self.now);
        self.turn();
    }

    pub(crate) fn millis(&mut self, millis: u64) {
        self.pass(Duration::from_millis(millis));
    }

    pub(crate) fn secs(&mut self, secs: u64) {
        self.pass(Duration::from_secs(secs));
    }

    /// The frames to the guest since the last time.
    pub(crate) fn take(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.out)
    }

    /// The packets in them, each checksum and length verified; ARP is passed over.
    pub(crate) fn received(&mut self) -> Vec<Received> {
        packets::read(&self.take()).unwrap()
    }

    /// None of the frames that came is above the MTU.
    pub(crate) fn fits(&self, mtu: usize) -> bool {
        self.out.iter().all(|frame| frame.len() <= 14 + mtu)
    }

    pub(crate) fn dropped(&self, reason: DropReason) -> u64 {
        self.stack.counters().dropped(reason)
    }

    /// A port of the guest's that nobody has used.
    pub(crate) fn port(&mut self) -> u16 {
        self.next_port = if self.next_port == u16::MAX {
            61_000
        } else {
            self.next_port + 1
        };
        self.next_port
    }

    /// A connection of the guest's that is open at both ends, and the host's end of it.
    pub(crate) fn open(&mut self, from: u16, to: SocketAddr) -> (Peer, SocketId) {
        let id = SocketId(self.net.connections().len());
        let mut peer = Peer::new(from, to);
        self.frame(&peer.syn());
        let answer = peer.read(&self.received()).pop().unwrap();
        assert_eq!(answer.flags, 0x12, "SYN|ACK");
        peer.take(&answer);
        self.frame(&peer.ack());
        (peer, id)
    }

    /// A turn of the stack with the host at hand.
    pub(crate) fn with_stack<R>(
        &mut self,
        act: impl FnOnce(&mut Stack<SimulatedHost>, &mut Turn<'_, SimulatedHost>) -> R,
    ) -> R {
        let mut turn = Turn {
            now: self.now,
            host: &mut self.host,
            tx: &mut self.tx,
        };
        act(&mut self.stack, &mut turn)
    }

    /// What "alive" means while the fault goes on: the gateway answers a ping, a new connection carries
    /// bytes both ways at once, the invariants hold, the log is quiet.
    pub(crate) fn is_alive(&mut self) {
        self.keep();
        self.turn();
        self.take();
        let ip = Ipv4::new(GATEWAY, packets::ICMP);
        self.frame(&ip.frame(&packets::icmp(8, 0, [77, 1], b"alive?")));
        let pong = self.received();
        assert!(
            pong.iter().any(|it| it.icmp() == Some((0, 0))),
            "no answer to a ping: {pong:?}"
        );
        let port = self.port();
        let (mut peer, id) = self.open(port, echo());
        self.frame(&peer.data(b"echo"));
        assert_eq!(self.net.server_read(id, 100), b"echo");
        assert_eq!(self.net.server_write(id, b"echo"), 4);
        self.turn();
        let answers = peer.read(&self.received());
        assert!(
            answers.iter().any(|it| it.data == b"echo"),
            "no echo: {answers:?}"
        );
        peer.take_all(&answers);
        self.net.server_shutdown(id);
        self.turn();
        let ends = peer.read(&self.received());
        peer.take_all(&ends);
        self.frame(&peer.fin());
        let ends = peer.read(&self.received());
        peer.take_all(&ends);
        assert!(self.net.server_sees_end(id), "an orderly end");
        self.stack.check().unwrap();
        self.log.is_quiet();
    }

    /// [`Rig::is_alive`], and once everything that the fault began has had its time nothing is left of it:
    /// no flow, no socket but those that listen, no memory, no reason to wake.
    pub(crate) fn recovers(mut self, listening: usize) {
        self.is_alive();
        self.only_count();
        self.pass(LONGEST);
        assert_eq!(
            (self.stack.flows(), self.net.open_sockets()),
            (0, listening),
            "flows and sockets that are left"
        );
        self.stack.check().unwrap();
        self.is_alive();
        self.secs(300);
        let (woken, sent) = (self.woken, self.sent);
        self.secs(3600);
        // An advertisement every 200 s at the soonest; nothing else is there to be done.
        assert!(self.woken - woken <= 20, "{} wakes", self.woken - woken);
        assert!(self.sent - sent <= 20, "{} frames", self.sent - sent);
        self.log.is_quiet();
        let weight = self.weight();
        let fresh = Self::new().weight();
        assert!(
            weight - fresh <= LEFT_OVER,
            "{weight} bytes are held, {fresh} by a fresh stack"
        );
    }

    /// Bytes that the stack holds: what its end gives back. The simulated network's do not count.
    fn weight(self) -> i64 {
        let Self { stack, .. } = self;
        let before = heap::held();
        drop(stack);
        before - heap::held()
    }
}

pub(crate) fn echo() -> SocketAddr {
    ECHO.parse().unwrap()
}

pub(crate) fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// Bytes that tell where they belong.
pub(crate) fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from(at * 7 % 251).unwrap())
        .collect()
}
