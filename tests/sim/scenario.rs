//! Bytes to a whole scenario: frames of a guest, events of the host, steps of time.
//!
//! In: any bytes. Out: [`Seen`], or what did not hold. The first bytes choose the configuration, each
//! further step takes a few. Frames are made of templates with right checksums, so that what lies
//! behind the parser is reached, and may be mutated afterwards. After every step the stack's own
//! invariants must hold, every frame to the guest be well formed and every destination allowed; at
//! the end everything is reset or falls silent, and nothing may be left once its time has passed.
//! `tests/sim_whole.rs` and the fuzz target `whole_stack` run it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use tapgate::buf::{LinkId, TxBatch, TxCapabilities};
use tapgate::config::{AddressPlan, Config, Dns, Protocol, UdpFiltering};
use tapgate::host::simulated::{ConnectAnswer, Network, SimulatedHost, SocketId};
use tapgate::net::{Instant, Mac};
use tapgate::stack::{LinkInfo, Stack};

mod packets;
mod scenario_checks;
mod scenario_guest;
mod scenario_host;

use packets::GUEST_MAC;

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
    /// Those of all these that were IPv6.
    pub(crate) ipv6: Ipv6Seen,
    pub(crate) connections: usize,
    /// Bytes of the guest's that a host's server read.
    pub(crate) read: usize,
}

/// How deep it got over IPv6.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ipv6Seen {
    pub(crate) to_guest: usize,
    pub(crate) to_host: usize,
    pub(crate) connections: usize,
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
    remote: (IpAddr, u16),
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
    /// The family of what the guest sends in this step.
    six: bool,
    connections: Vec<GuestConnection>,
    last_frame: Vec<u8>,
    /// The last datagrams that went out: socket, destination, first bytes.
    sent: Vec<(SocketId, SocketAddr, Vec<u8>)>,
    published: Vec<usize>,
    /// Frames of the guest so far.
    frames: u64,
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

fn remote_host(choices: &mut Choices<'_>, six: bool) -> IpAddr {
    let hosts: &[&str] = if six { &HOSTS6 } else { &HOSTS };
    address(choices.of(hosts))
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED))
}

/// Whom a guest may ask for: the outside, the gateway and its resolver, nobody, the forbidden.
const HOSTS: [&str; 15] = [
    "192.0.2.1",
    "192.0.2.1",
    "198.51.100.7",
    "10.0.2.2",
    "10.0.2.2",
    "10.0.2.3",
    "10.0.2.3",
    "10.0.2.7",
    "127.0.0.1",
    "0.0.0.0",
    "224.0.0.251",
    "240.0.0.1",
    "255.255.255.255",
    "10.0.2.255",
    "10.0.2.0",
];

/// The same over IPv6.
const HOSTS6: [&str; 18] = [
    "2001:db8::1",
    "2001:db8::1",
    "2001:db8:7::7",
    "fd00::2",
    "fd00::2",
    "fd00::3",
    "fd00::3",
    "fe80::2",
    "fd00::77",
    "::1",
    "::",
    "ff02::1",
    "ff02::1:2",
    "ff0e::fb",
    "::ffff:127.0.0.1",
    "::127.0.0.1",
    "fe80::77",
    "fd00::",
];

fn port(choices: &mut Choices<'_>) -> u16 {
    choices.of(&[80, 53, 5000, 5001, 5002, 67, 8080, 65_535, 1, 0])
}

/// A guest's own address, mostly.
fn source(choices: &mut Choices<'_>) -> Ipv4Addr {
    match choices.byte() {
        0..240 => packets::GUEST,
        240..250 => Ipv4Addr::new(10, 0, 2, 77),
        250..253 => Ipv4Addr::UNSPECIFIED,
        _ => Ipv4Addr::new(192, 168, 1, 1),
    }
}

fn source6(choices: &mut Choices<'_>) -> Ipv6Addr {
    match choices.byte() {
        0..220 => packets::v6::GUEST,
        220..240 => packets::v6::GUEST_LOCAL,
        240..250 => Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x77),
        250..253 => Ipv6Addr::UNSPECIFIED,
        _ => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1),
    }
}

/// Clients of published ports, and senders of what nobody asked for.
const CLIENTS: [&str; 13] = [
    "192.0.2.9:5000",
    "127.0.0.1:5000",
    "127.0.0.2:5000",
    "192.0.2.1:53",
    "10.0.2.100:5000",
    "[2001:db8::1]:5000",
    "224.0.0.1:0",
    "[2001:db8::1]:53",
    "[::1]:5000",
    "[fe80::9]:5000",
    "[fd00::100]:5000",
    "[ff02::1]:0",
    "[::ffff:192.0.2.9]:5000",
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
        let max_flows = choices.of(&[16, 1, 2, 4, 64]);
        let mtu = choices.of(&[1500, 576, 9000, 65_520, 1280]);
        let mut plan = AddressPlan::default().for_mtu(mtu);
        if flags & 32 != 0 {
            plan = plan.without_ipv6();
        }
        let filtering = [
            UdpFiltering::Open,
            UdpFiltering::Address,
            UdpFiltering::Endpoint,
            UdpFiltering::Open,
        ];
        let config = Arc::new(Config {
            plan,
            max_flows,
            mtu,
            udp_filtering: filtering[usize::from(flags >> 6)],
            host_loopback: flags & 1 == 0,
            dns: if flags & 6 == 6 { Dns::Off } else { Dns::Host },
            search: vec!["example.org".into()],
            slaac: flags & 64 == 0,
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
                uso: offload,
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
            six: false,
            connections: Vec::new(),
            last_frame: Vec::new(),
            sent: Vec::new(),
            published: Vec::new(),
            frames: 0,
            seen: Seen::default(),
        };
        world.set_resolvers(choices);
        world.publish(Protocol::Tcp)?;
        world.publish(Protocol::Udp)?;
        if plan.subnet6().is_some() {
            world.six = true;
            world.publish(Protocol::Tcp)?;
            world.publish(Protocol::Udp)?;
        }
        Ok(world)
    }

    fn step(&mut self, choices: &mut Choices<'_>) -> Outcome {
        let kind = choices.byte();
        // The upper half is the lower over IPv6, where that makes a difference.
        self.six = kind & 0x80 != 0;
        match kind % 32 {
            0 if self.six => self.discovery(choices),
            0 => self.arp(choices),
            1..=3 => self.tcp_syn(choices),
            4..=8 => self.tcp_segment(choices),
            9 => self.tcp_stranger(choices),
            10..=12 => self.udp(choices),
            13 | 14 => self.dns(choices),
            15 | 16 => self.icmp(choices),
            17 if self.six => self.dhcp6(choices),
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
}
