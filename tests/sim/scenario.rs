//! Bytes to a whole scenario: frames of a guest, events of the host, steps of time.
//!
//! In: any bytes. Out: [`Seen`], or what did not hold. The first bytes choose the configuration, each
//! further step takes a few. Frames are made of templates with right checksums, so that what lies
//! behind the parser is reached, and may be mutated afterwards. After every step the stack's own
//! invariants must hold, every frame to the guest be well formed and every destination allowed; at
//! the end everything is reset or falls silent, and nothing may be left once its time has passed.
//! `tests/sim_whole.rs` and the fuzz target `whole_stack` run it.

use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;

use tapgate::buf::{LinkId, RxMeta, TxBatch, TxCapabilities};
use tapgate::config::{Config, Dns, Protocol};
use tapgate::flow::Turn;
use tapgate::host::simulated::{ConnectAnswer, Network, SimulatedHost, SocketId};
use tapgate::net::{Instant, Mac};
use tapgate::stack::{LinkInfo, Stack};

mod packets;
mod scenario_host;

use packets::{GUEST_MAC, Ipv4, Segment};

/// Longer inputs gain nothing: they are cut here.
const MAX_STEPS: usize = 400;

type Outcome<T = ()> = Result<T, String>;

/// How deep a scenario got.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Seen {
    pub(crate) steps: usize,
    pub(crate) flows_opened: u64,
    pub(crate) most_flows: usize,
    pub(crate) forwarded: u64,
    pub(crate) answered: u64,
    pub(crate) to_guest: usize,
    pub(crate) to_host: usize,
    pub(crate) connections: usize,
    /// Bytes of the guest's that a host's server read.
    pub(crate) read: usize,
}

/// The bytes that decide, taken from the front; zeros once they are used up.
struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        first
    }

    fn word(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::from(self.byte()) % limit.max(1)
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    fn chance(&mut self, one_in: u8) -> bool {
        self.byte() % one_in == 1
    }

    fn take(&mut self, max: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(max.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// A length, mostly short, sometimes at a limit.
    fn len(&mut self) -> usize {
        match self.byte() {
            short @ 0..200 => usize::from(short),
            long @ 200..240 => usize::from(long - 200) * 64,
            limit => [1459, 1460, 1461, 1472, 1473, 8_192, 20_000, 65_507][usize::from(limit) % 8],
        }
    }
}

/// A TCP connection as the guest's frames show it.
struct GuestConnection {
    from: u16,
    remote: (Ipv4Addr, u16),
    /// The next sequence number of the guest's, as the stack has acknowledged it.
    seq: u32,
    /// The next of the stack's.
    ack: u32,
}

struct World {
    stack: Stack<SimulatedHost>,
    host: SimulatedHost,
    net: Network,
    tx: TxBatch,
    now: Instant,
    config: Arc<Config>,
    connections: Vec<GuestConnection>,
    last_frame: Vec<u8>,
    /// The last datagrams that went out: socket, destination, first bytes.
    sent: Vec<(SocketId, SocketAddr, Vec<u8>)>,
    published: Vec<usize>,
    seen: Seen,
}

/// Runs the scenario that `bytes` stand for.
pub(crate) fn run(bytes: &[u8]) -> Outcome<Seen> {
    let mut choices = Choices(bytes);
    let mut world = World::new(&mut choices)?;
    while !choices.0.is_empty() && world.seen.steps < MAX_STEPS {
        world.seen.steps += 1;
        world.step(&mut choices)?;
    }
    world.end()
}

fn remote_host(choices: &mut Choices<'_>) -> Ipv4Addr {
    choices.of(&[
        Ipv4Addr::new(192, 0, 2, 1),
        Ipv4Addr::new(192, 0, 2, 1),
        Ipv4Addr::new(198, 51, 100, 7),
        Ipv4Addr::new(10, 0, 2, 2),
        Ipv4Addr::new(10, 0, 2, 2),
        Ipv4Addr::new(10, 0, 2, 3),
        Ipv4Addr::new(10, 0, 2, 3),
        Ipv4Addr::new(10, 0, 2, 7),
        Ipv4Addr::new(127, 0, 0, 1),
        Ipv4Addr::new(0, 0, 0, 0),
        Ipv4Addr::new(224, 0, 0, 251),
        Ipv4Addr::new(240, 0, 0, 1),
        Ipv4Addr::new(255, 255, 255, 255),
        Ipv4Addr::new(10, 0, 2, 255),
        Ipv4Addr::new(10, 0, 2, 0),
    ])
}

fn port(choices: &mut Choices<'_>) -> u16 {
    choices.of(&[80, 53, 5000, 5001, 5002, 67, 8080, 65_535, 1, 0])
}

fn source(choices: &mut Choices<'_>) -> Ipv4Addr {
    match choices.byte() {
        0..240 => packets::GUEST,
        240..250 => Ipv4Addr::new(10, 0, 2, 77),
        250..253 => Ipv4Addr::UNSPECIFIED,
        _ => Ipv4Addr::new(192, 168, 1, 1),
    }
}

/// Clients of published ports, and senders of what nobody asked for.
const CLIENTS: [&str; 7] = [
    "192.0.2.9:5000",
    "127.0.0.1:5000",
    "127.0.0.2:5000",
    "192.0.2.1:53",
    "10.0.2.100:5000",
    "[2001:db8::1]:5000",
    "224.0.0.1:0",
];

fn client(choices: &mut Choices<'_>) -> SocketAddr {
    let unspecified = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0);
    choices.of(&CLIENTS).parse().unwrap_or(unspecified)
}

fn filled(len: usize) -> Vec<u8> {
    b"tapgate ".iter().copied().cycle().take(len).collect()
}

impl World {
    fn new(choices: &mut Choices<'_>) -> Outcome<Self> {
        let flags = choices.byte();
        let config = Arc::new(Config {
            max_flows: choices.of(&[16, 1, 2, 4, 64]),
            mtu: choices.of(&[1500, 576, 9000, 65_520]),
            host_loopback: flags & 1 == 0,
            dns: if flags & 6 == 6 { Dns::Off } else { Dns::Host },
            search: vec!["example.org".into()],
            ..Config::default()
        });
        let net = Network::new();
        let offload = flags & 8 != 0;
        let link = LinkInfo {
            id: LinkId(0),
            capabilities: TxCapabilities {
                checksum: offload,
                tso4: offload,
                tso6: offload,
            },
            guest_mac: (flags & 16 == 0).then_some(Mac(GUEST_MAC)),
        };
        net.answer_all(ConnectAnswer::Accept);
        let mut world = Self {
            stack: Stack::new(Arc::clone(&config), link, [1, 2, 3, 4]),
            host: net.host(),
            net,
            tx: TxBatch::new(256, 256 * 1024),
            now: Instant::ZERO,
            config,
            connections: Vec::new(),
            last_frame: Vec::new(),
            sent: Vec::new(),
            published: Vec::new(),
            seen: Seen::default(),
        };
        world.set_resolvers(choices);
        world.publish(Protocol::Tcp)?;
        world.publish(Protocol::Udp)?;
        Ok(world)
    }

    fn step(&mut self, choices: &mut Choices<'_>) -> Outcome {
        match choices.byte() % 32 {
            0 => self.arp(choices),
            1..=3 => self.tcp_syn(choices),
            4..=8 => self.tcp_segment(choices),
            9 => self.tcp_stranger(choices),
            10..=12 => self.udp(choices),
            13 | 14 => self.dns(choices),
            15 | 16 => self.icmp(choices),
            17 => self.dhcp(choices),
            18 => self.raw(choices),
            19 => self.mutated(choices),
            20 | 21 => self.server(choices),
            22 | 23 => self.datagram_arrives(choices),
            24 => self.network_reports(choices),
            25 => self.world_changes(choices),
            26 => self.client_comes(choices),
            27 => self.stray_event(choices),
            28 => self.publish_or_not(choices)?,
            29 | 30 => self.time_passes(choices)?,
            _ => self.next_deadline(),
        }
        self.turn()
    }

    // --- frames ----------------------------------------------------------------------------------

    fn frame(&mut self, bytes: &[u8], meta: RxMeta) {
        let mut turn = Turn {
            now: self.now,
            host: &mut self.host,
            tx: &mut self.tx,
        };
        self.stack.handle_frame(&mut turn, bytes, meta);
        self.last_frame.clear();
        self.last_frame.extend(bytes);
    }

    /// Sends a packet whole, or in fragments that may be reversed, repeated, shifted or missing.
    fn packet(&mut self, choices: &mut Choices<'_>, ip: Ipv4, payload: &[u8]) {
        let plain = RxMeta::plain(LinkId(0));
        let style = choices.byte();
        let room = 65_535 - 20;
        let payload = &payload[..payload.len().min(room)];
        if style < 200 {
            let meta = RxMeta {
                checksum_verified: style & 1 == 1,
                udp_segment: NonZeroU16::new(if style & 14 == 14 { choices.word() } else { 0 }),
                ..plain
            };
            return self.frame(&ip.frame(payload), meta);
        }
        let step = choices
            .of(&[8, 24, 552, 1480])
            .max((payload.len() / 64) & !7);
        let id = u16::from(choices.byte());
        let mut pieces = Ipv4 { id, ..ip }.fragments(payload, step);
        match style % 8 {
            0 | 1 => pieces.reverse(),
            2 => drop(pieces.pop()),
            3 => pieces.extend(pieces.first().cloned()),
            4 => {
                let offset = u16::from(choices.byte());
                let fragment = offset | if choices.chance(2) { 0x2000 } else { 0 };
                let odd = choices.take(24);
                pieces.insert(pieces.len() / 2, Ipv4 { id, fragment, ..ip }.frame(odd));
            }
            _ => {}
        }
        for piece in pieces {
            self.frame(&piece, plain);
        }
    }

    fn ip(choices: &mut Choices<'_>, protocol: u8) -> Ipv4 {
        let dst = remote_host(choices);
        let ttl = if choices.chance(32) { 1 } else { 64 };
        Ipv4 {
            src: source(choices),
            ttl,
            ..Ipv4::new(dst, protocol)
        }
    }

    fn arp(&mut self, choices: &mut Choices<'_>) {
        let target = remote_host(choices);
        let sender = source(choices);
        let op = choices.of(&[1, 1, 1, 2, 3]);
        let frame = packets::arp_frame(op, GUEST_MAC, sender, target);
        self.frame(&frame, RxMeta::plain(LinkId(0)));
    }

    fn tcp_syn(&mut self, choices: &mut Choices<'_>) {
        let from = 40_000 + u16::from(choices.byte() % 32);
        let ip = Self::ip(choices, packets::TCP);
        let to = port(choices);
        let seq = if choices.chance(4) {
            u32::MAX - 3
        } else {
            1000
        };
        let fields = Segment {
            from,
            to,
            seq,
            flags: 2,
            window: choices.of(&[65_535, 0, 1, 1000]),
            ..Segment::default()
        };
        let raw: &[u8] = &[];
        let options = match choices.byte() % 6 {
            0 => raw,
            1 => &[2, 4, 5, 0xb4, 4, 2, 3, 3, 7, 1, 1, 1],
            2 => &[2, 4, 0, 0],
            3 => &[2, 4, 0, 1, 3, 3, 255, 1],
            4 => &[2, 4, 255, 255],
            _ => {
                let raw = choices.take(40);
                &raw[..raw.len() & !3]
            }
        };
        let segment = ip.tcp(&fields, options, &[]);
        self.packet(choices, ip, &segment);
    }

    /// A segment of a connection under way: near what is expected.
    fn tcp_segment(&mut self, choices: &mut Choices<'_>) {
        if self.connections.is_empty() {
            return self.tcp_syn(choices);
        }
        let nth = choices.below(self.connections.len());
        let kind = choices.byte();
        let flags =
            [0x10, 0x10, 0x18, 0x11, 0x14, 0x04, 0x02, 0x12, 0x31, 0xff][usize::from(kind % 10)];
        let len = if kind & 0x40 == 0 { choices.len() } else { 0 };
        let (seq_off, ack_off) = if kind & 0x80 == 0 {
            (0, 0)
        } else {
            (
                i32::from(choices.word().cast_signed()),
                i32::from(choices.word().cast_signed()),
            )
        };
        let window = choices.of(&[65_535, 65_535, 0, 1, 500]);
        let connection = &self.connections[nth];
        let ip = Ipv4::new(connection.remote.0, packets::TCP);
        let fields = Segment {
            from: connection.from,
            to: connection.remote.1,
            seq: connection.seq.wrapping_add_signed(seq_off),
            ack: connection.ack.wrapping_add_signed(ack_off),
            flags,
            window,
        };
        let segment = ip.tcp(&fields, &[], &filled(len));
        self.packet(choices, ip, &segment);
    }

    fn tcp_stranger(&mut self, choices: &mut Choices<'_>) {
        let ip = Self::ip(choices, packets::TCP);
        let fields = Segment {
            from: 40_000 + u16::from(choices.byte()),
            to: port(choices),
            seq: u32::from(choices.word()),
            ack: u32::from(choices.word()),
            flags: choices.byte(),
            window: choices.word(),
        };
        let segment = ip.tcp(&fields, &[], choices.take(8));
        self.packet(choices, ip, &segment);
    }

    fn udp(&mut self, choices: &mut Choices<'_>) {
        let ip = Self::ip(choices, packets::UDP);
        let from = choices.of(&[5000, 5001, 5002, 80, 68, 0]);
        let to = port(choices);
        let len = choices.len();
        let mut datagram = ip.udp(from, to, &filled(len));
        if choices.chance(16) {
            datagram[6..8].fill(0);
        }
        if choices.chance(32) {
            datagram[4..6].copy_from_slice(&choices.word().to_be_bytes());
        }
        self.packet(choices, ip, &datagram);
    }

    fn dns(&mut self, choices: &mut Choices<'_>) {
        let ip = Ipv4::new(Ipv4Addr::new(10, 0, 2, 3), packets::UDP);
        let mut query = vec![
            0,
            choices.byte(),
            choices.byte() & 0x81,
            0,
            0,
            1,
            0,
            0,
            0,
            0,
            0,
            0,
        ];
        query.extend(choices.take(8));
        query.truncate(if choices.chance(16) {
            choices.below(13)
        } else {
            20
        });
        let datagram = ip.udp(choices.of(&[5000, 5001]), 53, &query);
        self.packet(choices, ip, &datagram);
    }

    fn icmp(&mut self, choices: &mut Choices<'_>) {
        let ip = Self::ip(choices, packets::ICMP);
        let kind = choices.of(&[8, 8, 8, 8, 0, 3, 13]);
        let len = choices.len();
        let words = [u16::from(choices.byte() % 4), u16::from(choices.byte())];
        let message = packets::icmp(kind, 0, words, &filled(len));
        self.packet(choices, ip, &message);
    }

    fn dhcp(&mut self, choices: &mut Choices<'_>) {
        let mac = [2, 0, 0, 0, 1, choices.byte() % 24];
        let kind = [choices.byte() % 10];
        let asked = [10, 0, 2, choices.byte()];
        let server = [10, 0, 2, choices.of(&[2, 2, 9])];
        let known = if choices.chance(4) {
            Ipv4Addr::from(asked)
        } else {
            Ipv4Addr::UNSPECIFIED
        };
        let mut options: Vec<(u8, &[u8])> = vec![(53, &kind)];
        let parts = choices.byte();
        if parts & 1 != 0 {
            options.push((50, &asked));
        }
        if parts & 2 != 0 {
            options.push((54, &server));
        }
        if parts & 4 != 0 {
            options.push((choices.byte(), choices.take(6)));
        }
        let mut message = packets::dhcp(mac, known, &options);
        if parts & 0xc0 == 0xc0 {
            message.truncate(usize::from(choices.word()) % message.len());
        }
        let ip = Ipv4 {
            src: known,
            ..Ipv4::new(Ipv4Addr::BROADCAST, packets::UDP)
        };
        let datagram = ip.udp(68, 67, &message);
        let frame = packets::ethernet(
            packets::BROADCAST_MAC,
            packets::ETHERTYPE_IPV4,
            &ip.packet(&datagram),
        );
        self.frame(&frame, RxMeta::plain(LinkId(0)));
    }

    fn raw(&mut self, choices: &mut Choices<'_>) {
        let len = choices.below(80);
        let bytes = choices.take(len);
        let frame = match choices.byte() % 4 {
            0 => bytes.to_vec(),
            1 => packets::ethernet(packets::GATEWAY_MAC, choices.word(), bytes),
            2 => packets::ethernet(packets::GATEWAY_MAC, packets::ETHERTYPE_IPV4, bytes),
            _ => {
                let protocol = choices.byte();
                let ip = Self::ip(choices, protocol);
                ip.frame(bytes)
            }
        };
        self.frame(&frame, RxMeta::plain(LinkId(0)));
    }

    /// The last frame again, with some bytes changed; the header's checksum may be put right.
    fn mutated(&mut self, choices: &mut Choices<'_>) {
        let mut frame = std::mem::take(&mut self.last_frame);
        if frame.is_empty() {
            return;
        }
        for _ in 0..=choices.below(4) {
            let at = usize::from(choices.byte()) % frame.len();
            frame[at] = choices.byte();
        }
        if choices.chance(4) {
            frame.truncate(usize::from(choices.word()) % frame.len() + 1);
        }
        if frame.len() >= 34 && !choices.chance(8) {
            let end = (14 + usize::from(frame[14] & 15) * 4).clamp(34, frame.len());
            frame[24..26].fill(0);
            let sum = packets::checksum(&[&frame[14..end]]);
            frame[24..26].copy_from_slice(&sum.to_be_bytes());
        }
        let meta = RxMeta {
            checksum_verified: !choices.chance(4),
            ..RxMeta::plain(LinkId(0))
        };
        self.frame(&frame, meta);
    }
}
