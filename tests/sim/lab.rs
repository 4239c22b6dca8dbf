//! A guest at rest that sends what it is told: the vocabulary of dialogues that are not TCP.
//!
//! In: frames of `packets.rs`, datagrams of the host. Out: what came to the guest, read and checked.
//! Time passes exactly as asked, in contrast to [`Sim::run`], which goes from event to event.
#![allow(
    clippy::unwrap_used,
    reason = "a scenario that can not go on has failed"
)]
#![allow(
    dead_code,
    reason = "each test program uses its part of the vocabulary"
)]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use tapgate::config::{Config, Protocol, Publish, Splice};
use tapgate::host::simulated::{Sent, SocketId};
use tapgate::net::{DropReason, Duration};

use crate::packets::{self, read::Received};
use crate::sim::{Faults, GUEST, LinkKind, Sim};

pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
pub(crate) const RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
pub(crate) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// The first socket that the stack opens.
pub(crate) const FIRST: SocketId = SocketId(0);

pub(crate) fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

pub(crate) fn micros(micros: u64) -> Duration {
    Duration::from_micros(micros)
}

pub(crate) fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

pub(crate) fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A guest, a stack and a host at rest.
pub(crate) struct Lab(pub(crate) Sim);

impl Lab {
    pub(crate) fn new() -> Self {
        Self::with(Config::default())
    }

    pub(crate) fn with(config: Config) -> Self {
        Self::of(GUEST, config)
    }

    /// A guest whose own sockets have that address.
    pub(crate) fn of(guest: IpAddr, config: Config) -> Self {
        Self::begun(Sim::of(guest, 1, config, Faults::default()))
    }

    /// A guest over a link of a certain kind.
    pub(crate) fn over(kind: LinkKind, config: Config) -> Self {
        Self::begun(Sim::over(kind, GUEST, 1, config, Faults::default()))
    }

    /// A stack of several workers.
    pub(crate) fn shared(workers: usize, config: Config) -> Self {
        let guest = (LinkKind::default(), GUEST);
        Self::begun(Sim::shared(workers, guest, 1, config, Faults::default()))
    }

    fn begun(sim: Sim) -> Self {
        let mut lab = Self(sim);
        // The gateway has introduced itself; what comes from now on is about what the test does.
        lab.wait(millis(1));
        lab.0.received.clear();
        lab
    }

    /// Lets exactly `time` pass; frames under way arrive within 150 us.
    pub(crate) fn wait(&mut self, time: Duration) {
        let start = self.0.clock.now();
        for micros in [50, 100, 150] {
            self.0.step();
            self.0
                .clock
                .advance_to(start + Duration::from_micros(micros));
        }
        self.0.step();
        self.0.clock.advance_to(start + time);
        self.0.step();
    }

    /// The guest sends a frame, and its answers have time to come.
    pub(crate) fn send(&mut self, frame: Vec<u8>) {
        self.0.inject(frame);
        self.wait(millis(1));
    }

    /// The guest sends a datagram.
    pub(crate) fn udp(&mut self, from: u16, to: &str, payload: &[u8]) {
        self.send(packets::udp_frame(from, addr(to), payload));
    }

    /// The same, without waiting for what comes of it.
    pub(crate) fn udp_later(&mut self, from: u16, to: &str, payload: &[u8]) {
        self.0.inject(packets::udp_frame(from, addr(to), payload));
    }

    /// What came to the guest since the last time, but ARP, TCP and advertisements to all.
    pub(crate) fn received(&mut self) -> Vec<Received> {
        packets::read(&std::mem::take(&mut self.0.received)).unwrap()
    }

    /// The only packet that came.
    pub(crate) fn reply(&mut self) -> Received {
        let mut all = self.received();
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }

    pub(crate) fn sent(&self) -> Vec<Sent> {
        self.0.net.take_sent()
    }

    pub(crate) fn icmp_error(&mut self) -> (u8, u8) {
        self.reply().icmp().unwrap()
    }

    pub(crate) fn dropped(&self, reason: DropReason) -> u64 {
        self.0.stack.counters().dropped(reason)
    }

    pub(crate) fn publish(&mut self) -> usize {
        let rule = Publish {
            protocol: Protocol::Udp,
            host: addr("0.0.0.0:5353"),
            guest: addr("10.0.2.100:5000"),
            splice: Splice::default(),
        };
        let mut id = None;
        self.0
            .with_stack(|stack, turn| id = stack.publish(turn.host, rule).ok());
        id.unwrap()
    }

    pub(crate) fn deliver(&mut self, socket: SocketId, from: &str, payload: &[u8]) {
        self.0.net.deliver(socket, addr(from), payload);
        self.wait(millis(1));
    }

    /// After the longest idle time nothing is left.
    pub(crate) fn rest(mut self) {
        for _ in 0..4 {
            self.wait(secs(61));
        }
        assert_eq!((self.0.flows(), self.0.net.open_sockets()), (0, 0));
        self.0.stack.check().unwrap();
    }
}

pub(crate) fn filled(len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from(at * 7 % 251).unwrap())
        .collect()
}
