//! A stack between a simulated guest and a simulated host, in virtual time.
//!
//! The guest is smoltcp behind an in-memory link that loses, repeats and reorders frames by seed; the
//! host is `host::simulated`, whose servers the test plays. Time moves only from one event to the
//! next, so a scenario of hours takes milliseconds and every run of a seed is the same. After each
//! step the stack's invariants are checked.
#![allow(
    clippy::unwrap_used,
    reason = "a scenario that can not go on has failed"
)]
#![allow(
    dead_code,
    reason = "each test program uses its part of the vocabulary"
)]

mod link;
mod workers;

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::sync::Arc;

use smoltcp::iface::{Config as InterfaceConfig, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::wire::{HardwareAddress, IpCidr, IpEndpoint};

use tapgate::buf::{LinkId, RxMeta, TxBatch};
use tapgate::config::Config;
use tapgate::flow::Turn;
use tapgate::flow::key::KeyedState;
use tapgate::host::simulated::{Network, SimulatedHost, VirtualClock};
use tapgate::net::{Duration, Instant, Mac};
use tapgate::stack::share::{Handed, Place};
use tapgate::stack::{LinkInfo, Stack};

pub(crate) use link::{Faults, LinkKind, Random};
use link::{Windows, Wire, sum_tcp};
use workers::{Other, Queues};

pub(crate) const GUEST_MAC: Mac = Mac([2, 0, 0, 0, 0, 100]);
pub(crate) const GATEWAY_MAC: Mac = Mac([0x52, 0x55, 10, 0, 2, 2]);
pub(crate) const GUEST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 2, 100));
pub(crate) const GUEST6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x100));

/// Turns without a move of the clock, after which the stack is taken to spin.
const MOST_TURNS: usize = 10_000;

/// Where router advertisements to all go: to 33:33:00:00:00:01 (RFC 2464), with ICMPv6 type 134.
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const ROUTER_ADVERTISEMENT: u8 = 134;

/// The guest's side of the link: IP packets in and out.
struct GuestDevice {
    incoming: VecDeque<Vec<u8>>,
    outgoing: Vec<Vec<u8>>,
    mtu: usize,
    /// Checksums and the cutting of segments are left to the link.
    offload: bool,
}

pub(crate) struct Packet(Vec<u8>);

impl RxToken for Packet {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

pub(crate) struct Outgoing<'a>(&'a mut Vec<Vec<u8>>);

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut packet = vec![0; len];
        let result = f(&mut packet);
        self.0.push(packet);
        result
    }
}

impl Device for GuestDevice {
    type RxToken<'a> = Packet;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Packet, Outgoing<'_>)> {
        let packet = self.incoming.pop_front()?;
        Some((Packet(packet), Outgoing(&mut self.outgoing)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Outgoing<'_>> {
        Some(Outgoing(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut caps = DeviceCapabilities::default();
        caps.medium = Medium::Ip;
        caps.max_transmission_unit = self.mtu;
        if self.offload {
            caps.checksum.tcp = Checksum::Rx;
            caps.segmentation.tcpv4 = NonZeroUsize::new(65_535);
        }
        caps
    }
}

/// Everything of one scenario.
pub(crate) struct Sim {
    /// The first worker, in most scenarios the only one.
    pub(crate) stack: Stack<SimulatedHost>,
    others: Vec<Other>,
    queues: Queues,
    pub(crate) net: Network,
    pub(crate) clock: VirtualClock,
    pub(crate) random: Random,
    pub(crate) faults: Faults,
    /// Frames for the guest that are no TCP: answers of the gateway, ICMP, UDP.
    pub(crate) received: Vec<Vec<u8>>,
    /// The guest's sockets that a RST closed, and the state that it found them in.
    pub(crate) resets: Vec<(SocketHandle, tcp::State)>,
    /// The test itself has something to do at this time.
    pub(crate) wake: Option<Instant>,
    kind: LinkKind,
    windows: Windows,
    /// Router advertisements to all, which come by themselves, and when they came.
    pub(crate) advertised: Vec<(Instant, Vec<u8>)>,
    /// The address that the guest's own sockets have: smoltcp has room for one.
    guest: IpAddr,
    host: SimulatedHost,
    tx: TxBatch,
    to_stack: Wire,
    to_guest: Wire,
    interface: Interface,
    device: GuestDevice,
    sockets: SocketSet<'static>,
    /// Those that are to be closed once everything is acknowledged.
    closing: Vec<SocketHandle>,
    /// Frames that the workers were given, or gave each other.
    frames: u64,
    next_port: u16,
}

impl Sim {
    pub(crate) fn new(seed: u64) -> Self {
        Self::with(seed, Config::default(), Faults::default())
    }

    pub(crate) fn with(seed: u64, config: Config, faults: Faults) -> Self {
        Self::of(GUEST, seed, config, faults)
    }

    /// A scenario whose guest's own sockets have the address `guest`.
    pub(crate) fn of(guest: IpAddr, seed: u64, config: Config, faults: Faults) -> Self {
        Self::over(LinkKind::default(), guest, seed, config, faults)
    }

    /// A guest with the address `guest` over a link of a certain kind.
    pub(crate) fn over(
        kind: LinkKind,
        guest: IpAddr,
        seed: u64,
        config: Config,
        faults: Faults,
    ) -> Self {
        Self::shared(1, (kind, guest), seed, config, faults)
    }

    /// [`Sim::over`] with so many workers.
    pub(crate) fn shared(
        workers: usize,
        (kind, guest): (LinkKind, IpAddr),
        seed: u64,
        config: Config,
        faults: Faults,
    ) -> Self {
        let net = Network::new();
        let link = LinkInfo {
            id: LinkId(0),
            capabilities: kind.capabilities,
            guest_mac: Some(GUEST_MAC),
        };
        let mut device = GuestDevice {
            incoming: VecDeque::new(),
            outgoing: Vec::new(),
            mtu: usize::from(config.mtu),
            offload: kind.guest_offload,
        };
        let mut interface_config = InterfaceConfig::new(HardwareAddress::Ip);
        interface_config.random_seed = seed;
        let mut interface = Interface::new(interface_config, &mut device, Instant::ZERO);
        interface.update_ip_addrs(|addrs| {
            let prefix = if guest.is_ipv4() { 24 } else { 64 };
            addrs.push(IpCidr::new(guest.into(), prefix)).unwrap();
        });
        let config = Arc::new(config);
        let stack = |index: usize| {
            let place = Place {
                index,
                count: workers,
                hash: KeyedState::new((seed, 7)),
            };
            let distinct = u64::try_from(index).unwrap();
            let seed = [seed, 2 + distinct, 3, 4];
            Stack::worker(Arc::clone(&config), link, seed, place)
        };
        let other = |index| Other {
            stack: stack(index),
            host: net.host_of(index),
        };
        Self {
            stack: stack(0),
            others: (1..workers).map(other).collect(),
            queues: Queues::new(workers, seed),
            host: net.host(),
            net,
            clock: VirtualClock::default(),
            random: Random::new(seed),
            faults,
            received: Vec::new(),
            resets: Vec::new(),
            wake: None,
            kind,
            windows: Windows::default(),
            advertised: Vec::new(),
            guest,
            tx: TxBatch::new(256, 256 * 1024),
            to_stack: Wire::default(),
            to_guest: Wire::default(),
            interface,
            device,
            sockets: SocketSet::new(Vec::new()),
            closing: Vec::new(),
            frames: 0,
            next_port: 40_000,
        }
    }

    /// A guest's connection, begun.
    pub(crate) fn connect(&mut self, to: &str) -> SocketHandle {
        self.connect_with(to, 64 * 1024)
    }

    pub(crate) fn connect_with(&mut self, to: &str, buffer: usize) -> SocketHandle {
        let to: SocketAddr = to.parse().unwrap();
        let mut socket = self.guest_socket(buffer);
        let local = IpEndpoint::new(self.guest.into(), self.next_port);
        self.next_port += 1;
        let remote = IpEndpoint::new(to.ip().into(), to.port());
        socket
            .connect(self.interface.context(), remote, local)
            .unwrap();
        self.sockets.add(socket)
    }

    /// The next connection uses the ports of the last one again.
    pub(crate) fn reuse_port(&mut self) {
        self.next_port -= 1;
    }

    /// A guest's listening socket.
    pub(crate) fn listen(&mut self, port: u16) -> SocketHandle {
        self.listen_with(port, 64 * 1024)
    }

    pub(crate) fn listen_with(&mut self, port: u16, buffer: usize) -> SocketHandle {
        let mut socket = self.guest_socket(buffer);
        socket.listen(port).unwrap();
        self.sockets.add(socket)
    }

    fn guest_socket(&self, buffer: usize) -> tcp::Socket<'static> {
        let ring = || tcp::SocketBuffer::new(vec![0; buffer]);
        let mut socket = tcp::Socket::new(ring(), ring());
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        socket
    }

    pub(crate) fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// The guest ends its stream. smoltcp 0.14 does not hear in LAST-ACK that a window opens, so what has the
    /// other's end already closes when it has nothing left to send.
    pub(crate) fn close(&mut self, handle: SocketHandle) {
        self.closing.push(handle);
        self.close_drained();
    }

    fn close_drained(&mut self) {
        let sockets = &mut self.sockets;
        self.closing.retain(|handle| {
            let socket = sockets.get_mut::<tcp::Socket>(*handle);
            let waits = socket.state() == tcp::State::CloseWait && socket.send_queue() > 0;
            if !waits {
                socket.close();
            }
            waits
        });
    }

    /// The guest forgets a connection without a word, as one does that starts anew.
    pub(crate) fn forget(&mut self, handle: SocketHandle) {
        self.closing.retain(|closing| *closing != handle);
        self.sockets.remove(handle);
    }

    /// From now on nothing comes through any more, nor what is under way.
    pub(crate) fn cut_link(&mut self) {
        self.faults.loss = 100;
        self.to_stack.clear();
        self.to_guest.clear();
    }

    /// Nothing is under way, and no event of the host's waits.
    pub(crate) fn is_quiet(&self) -> bool {
        self.to_stack.next().is_none() && self.to_guest.next().is_none() && !self.net.has_events()
    }

    /// Puts a frame of the guest's on the wire as it is.
    pub(crate) fn inject(&mut self, frame: Vec<u8>) {
        let now = self.clock.now();
        self.to_stack
            .send(now, frame, Faults::default(), &mut self.random);
    }

    /// Calls the first worker's stack with what a turn needs.
    pub(crate) fn with_stack<R>(
        &mut self,
        act: impl FnOnce(&mut Stack<SimulatedHost>, &mut Turn<'_, SimulatedHost>) -> R,
    ) -> R {
        self.at(0, act)
    }

    pub(crate) fn publish(&mut self, rule: tapgate::config::Publish) {
        self.stack.publish(&mut self.host, rule).unwrap();
    }

    /// One turn of the stack and one of the guest at the present time.
    pub(crate) fn step(&mut self) {
        self.turn_of_stack();
        self.turn_of_guest();
        self.stack.check().unwrap();
        for other in &self.others {
            other.stack.check().unwrap();
        }
        // What became of each is in the sums that `check` compares with this.
        let others = self.others.iter().map(|other| &other.stack);
        let stacks = std::iter::once(&self.stack).chain(others);
        let counted: u64 = stacks.map(|stack| stack.counters().frames_in).sum();
        // A test may give a stack others by itself.
        assert!(counted >= self.frames, "every frame is counted");
    }

    /// Flows of all workers together.
    pub(crate) fn flows(&self) -> usize {
        self.flows_of_each().into_iter().sum()
    }

    /// Flows of each worker.
    pub(crate) fn flows_of_each(&self) -> Vec<usize> {
        let others = self.others.iter().map(|other| &other.stack);
        std::iter::once(&self.stack)
            .chain(others)
            .map(Stack::flows)
            .collect()
    }

    /// Lets a worker do something.
    fn at<R>(
        &mut self,
        worker: usize,
        act: impl FnOnce(&mut Stack<SimulatedHost>, &mut Turn<'_, SimulatedHost>) -> R,
    ) -> R {
        let (stack, host) = match worker.checked_sub(1) {
            None => (&mut self.stack, &mut self.host),
            Some(other) => {
                let other = &mut self.others[other];
                (&mut other.stack, &mut other.host)
            }
        };
        let mut turn = Turn {
            now: self.clock.now(),
            host,
            tx: &mut self.tx,
        };
        act(stack, &mut turn)
    }

    fn turn_of_stack(&mut self) {
        let now = self.clock.now();
        let mut more = true;
        let mut turns = 0;
        while more {
            more = false;
            turns += 1;
            assert!(turns < MOST_TURNS, "it spins at {now}");
            while let Some(frame) = self.to_stack.due(now) {
                let meta = RxMeta {
                    checksum_verified: self.kind.guest_offload,
                    ..RxMeta::plain(LinkId(0))
                };
                let worker = self.queues.choose(&frame);
                self.frames += 1;
                self.at(worker, |stack, turn| {
                    stack.handle_frame(turn, &frame, meta);
                });
                if self.queues.count() > 1 {
                    self.put_on_wire(worker);
                }
            }
            for worker in 0..self.queues.count() {
                let events = self.net.take_events_of(worker);
                more |= self.at(worker, |stack, turn| {
                    for event in events {
                        stack.handle_host(turn, event);
                    }
                    stack.handle_timeout(turn);
                    stack.poll_transmit(turn)
                });
                self.put_on_wire(worker);
            }
            more |= self.hand_over();
        }
    }

    /// What workers have for each other gets there; true when there was something.
    fn hand_over(&mut self) -> bool {
        let mut handed = Vec::new();
        for worker in 0..self.queues.count() {
            self.at(worker, |stack, _| {
                handed.extend(std::iter::from_fn(|| stack.next_handed()));
            });
        }
        let some = !handed.is_empty();
        for (worker, thing) in handed {
            let is_frame = matches!(thing, Handed::Frame { .. } | Handed::Whole { .. });
            self.frames += u64::from(is_frame);
            self.at(worker, |stack, turn| stack.handle_handed(turn, thing));
            self.put_on_wire(worker);
        }
        some
    }

    /// Sends what a worker has produced.
    fn put_on_wire(&mut self, worker: usize) {
        let now = self.clock.now();
        for frame in self.tx.frames() {
            self.queues.note(frame.bytes(), worker);
            let pieces = self
                .kind
                .pass_to_guest(frame.bytes(), frame.offload, self.device.mtu);
            for piece in pieces {
                self.windows.check(&piece);
                self.to_guest
                    .send(now, piece, self.faults, &mut self.random);
            }
        }
        self.tx.clear();
    }

    fn turn_of_guest(&mut self) {
        let now = self.clock.now();
        while let Some(frame) = self.to_guest.due(now) {
            let ipv4_tcp = frame.len() > 34 && frame[12..14] == [8, 0] && frame[23] == 6;
            let ipv6 = frame.len() > 54 && frame[12..14] == [0x86, 0xdd];
            let of_guest = ipv6 == self.guest.is_ipv6();
            if of_guest && (ipv4_tcp || ipv6 && frame[20] == 6) {
                let mut packet = frame[14..].to_vec();
                self.keep_guest_from_stalling(&mut packet);
                self.guest_takes(now, packet);
            } else if ipv6 && frame[..6] == ALL_NODES_MAC && frame[54] == ROUTER_ADVERTISEMENT {
                self.advertised.push((now, frame));
            } else {
                self.received.push(frame);
            }
        }
        self.close_drained();
        self.interface
            .poll(now, &mut self.device, &mut self.sockets);
        for mut packet in std::mem::take(&mut self.device.outgoing) {
            self.kind.pass_from_guest(&mut packet);
            self.windows.note(&packet);
            let faults = link::faults_of(&packet, self.faults);
            self.to_stack
                .send(now, ethernet(&packet), faults, &mut self.random);
        }
    }

    /// A segment comes to the guest's sockets; which of them a RST closes is noted.
    fn guest_takes(&mut self, now: Instant, packet: Vec<u8>) {
        let is_reset = link::tcp_at(&packet).is_some_and(|tcp| packet[tcp + 13] & 4 != 0);
        let open = |sockets: &SocketSet<'static>| -> Vec<(SocketHandle, tcp::State)> {
            let states = sockets.iter().map(|(handle, socket)| {
                let smoltcp::socket::Socket::Tcp(socket) = socket;
                (handle, socket.state())
            });
            let closed =
                |state: &tcp::State| matches!(state, tcp::State::Closed | tcp::State::Listen);
            states.filter(|(_, state)| !closed(state)).collect()
        };
        let before = if is_reset {
            open(&self.sockets)
        } else {
            Vec::new()
        };
        self.device.incoming.push_back(packet);
        self.interface
            .poll_ingress_single(now, &mut self.device, &mut self.sockets);
        if is_reset {
            let after = open(&self.sockets);
            let gone = before
                .into_iter()
                .filter(|(handle, _)| !after.iter().any(|(open, _)| open == handle));
            self.resets.extend(gone);
        }
    }

    /// smoltcp 0.14 forgets its retransmission timer when three duplicate acknowledgements arrive
    /// while nothing but its FIN is outstanding, and when a window closes in front of what is outstanding:
    /// what it sends again after a loss may lie beyond the window. Our engine guards itself (`flow/tcp_engine.rs`);
    /// the guest here is guarded by the link, in the same way: by a window that varies.
    fn keep_guest_from_stalling(&mut self, packet: &mut [u8]) {
        let header = if self.guest.is_ipv4() { 20 } else { 40 };
        let port = u16::from_be_bytes([packet[header + 2], packet[header + 3]]);
        let empty = packet.len() == header + usize::from(packet[header + 12] >> 4) * 4;
        let closing = self.sockets.iter_mut().any(|(_, socket)| {
            let smoltcp::socket::Socket::Tcp(socket) = socket;
            let fin_only = matches!(
                socket.state(),
                tcp::State::FinWait1 | tcp::State::Closing | tcp::State::LastAck
            );
            fin_only
                && socket.send_queue() == 0
                && socket
                    .local_endpoint()
                    .is_some_and(|local| local.port == port)
        });
        if (empty && closing) || self.windows.closes_behind(packet) {
            let window = 1 + u16::try_from(self.random.below(1000)).unwrap();
            packet[header + 14..header + 16].copy_from_slice(&window.to_be_bytes());
            sum_tcp(packet);
        }
    }

    /// When one of the workers has something to do.
    fn stack_timeout(&mut self) -> Option<Instant> {
        let others = self.others.iter_mut();
        let others = others.filter_map(|other| other.stack.poll_timeout()).min();
        self.stack.poll_timeout().into_iter().chain(others).min()
    }

    /// Moves time to the next thing that happens; false when nothing ever will.
    pub(crate) fn advance(&mut self) -> bool {
        let now = self.clock.now();
        let soon = self.net.has_events().then_some(now);
        let next = [
            soon,
            self.to_stack.next(),
            self.to_guest.next(),
            self.stack_timeout(),
            self.interface.poll_at(now, &self.sockets),
            self.wake,
        ];
        let Some(next) = next.into_iter().flatten().min() else {
            return false;
        };
        // A deadline that has passed is acted upon by the next step; time must still move.
        self.clock
            .advance_to(next.max(now + Duration::from_micros(1)));
        true
    }

    /// Runs for at most `limit` of virtual time until `done`; false when it was not.
    pub(crate) fn run(&mut self, limit: Duration, mut done: impl FnMut(&mut Self) -> bool) -> bool {
        let end = self.clock.now() + limit;
        loop {
            self.step();
            if done(self) {
                return true;
            }
            if !self.advance() || self.clock.now() > end {
                return done(self);
            }
        }
    }

    /// Lets everything that is under way come to rest, within `limit` of virtual time.
    pub(crate) fn settle(&mut self, limit: Duration) {
        self.run(limit, |_| false);
    }
}

/// An Ethernet frame from the guest to the gateway.
pub(crate) fn ethernet(packet: &[u8]) -> Vec<u8> {
    let mut frame = GATEWAY_MAC.0.to_vec();
    frame.extend(GUEST_MAC.0);
    frame.extend(if packet[0] >> 4 == 6 {
        [0x86, 0xdd]
    } else {
        [8, 0]
    });
    frame.extend(packet);
    frame
}

/// Type and code of an ICMP or ICMPv6 frame to the guest.
pub(crate) fn read_icmp(frame: &[u8]) -> Option<(u8, u8)> {
    let ipv4 = frame.len() > 36 && frame[12..14] == [8, 0] && frame[23] == 1;
    let ipv6 = frame.len() > 56 && frame[12..14] == [0x86, 0xdd] && frame[20] == 58;
    let at = if ipv6 { 54 } else { 34 };
    (ipv4 || ipv6).then(|| (frame[at], frame[at + 1]))
}

/// Seconds of virtual time.
pub(crate) fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}
