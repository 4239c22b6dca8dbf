//! What becomes of one TCP connection, decided by a seed before it begins.
//!
//! In: a seed. Out: a [`Plan`]: who opens, over which link, what each side sends and how it reads,
//! and how and when each side ends. Nothing here acts; `actor.rs` follows the plan.
#![allow(
    clippy::unwrap_used,
    reason = "a scenario that can not go on has failed"
)]
#![allow(
    dead_code,
    reason = "each test program uses its part of the vocabulary"
)]

use std::net::SocketAddr;

use tapgate::buf::TxCapabilities;
use tapgate::config::{MIN_MTU, MIN_MTU6};
use tapgate::host::simulated::ConnectAnswer;
use tapgate::net::Duration;

use crate::sim::{Faults, GUEST, GUEST6, LinkKind, Random};

/// Whether connections use IPv6.
const FAMILIES: &[bool] = &[false, true];

/// The most that one side sends, bytes.
pub(crate) const MOST: usize = 300 * 1024;

/// Who speaks with whom.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Addresses {
    /// The guest's server.
    pub(crate) guest: SocketAddr,
    /// The server that a guest connects to.
    pub(crate) server: SocketAddr,
    /// Where the guest's server is published.
    pub(crate) published: SocketAddr,
    /// Clients of the published port: from outside, and on the host's loopback.
    pub(crate) clients: [SocketAddr; 2],
}

/// The addresses of a connection of this family.
pub(crate) fn addresses(ipv6: bool) -> Addresses {
    let at = |addr: &str| addr.parse().unwrap();
    if ipv6 {
        return Addresses {
            guest: SocketAddr::new(GUEST6, 80),
            server: at("[2001:db8::1]:80"),
            published: at("[::]:8080"),
            clients: [at("[2001:db8::9]:5000"), at("[::1]:5001")],
        };
    }
    Addresses {
        guest: SocketAddr::new(GUEST, 80),
        server: at("192.0.2.1:80"),
        published: at("0.0.0.0:8080"),
        clients: [at("192.0.2.9:5000"), at("127.0.0.1:5001")],
    }
}

/// How a connection begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Opening {
    /// The guest connects out; the host's network answers this.
    Out(ConnectAnswer),
    /// As a host that takes this long to accept.
    OutLate(Duration),
    /// A client of the published port comes in; the guest listens.
    In(SocketAddr),
    /// The guest refuses it.
    InRefused(SocketAddr),
    /// The guest is not there.
    InAbsent(SocketAddr),
}

/// At most so many bytes at a time, and a time's distance; none means as fast as it goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    pub(crate) most: usize,
    pub(crate) every: Duration,
}

/// How a side ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// Sends no more, and reads on: `shutdown(2)`.
    Close,
    /// Closes for good: what still comes is answered with a RST, as `close(2)` has it.
    Leave,
    /// Resets the connection: `SO_LINGER` with no time.
    Reset,
    /// The guest starts anew and knows of nothing.
    Forget,
    /// The guest is never heard again.
    Vanish,
}

/// When a side ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// Once it has sent everything.
    AllSent,
    /// Once it has sent everything and seen the other's end.
    OtherEnded,
    /// Once this much has been read, or no more can come.
    Received(usize),
    /// This long after the connection began.
    After(Duration),
}

/// How one side behaves.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Side {
    pub(crate) total: usize,
    pub(crate) write: Pace,
    pub(crate) read: Pace,
    /// After this many bytes it reads nothing for this long.
    pub(crate) pause: Option<(usize, Duration)>,
    pub(crate) end: End,
    pub(crate) when: When,
}

/// The life of one connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) addresses: Addresses,
    pub(crate) opening: Opening,
    pub(crate) kind: LinkKind,
    pub(crate) workers: usize,
    pub(crate) faults: Faults,
    /// The link is down from a time on for a time.
    pub(crate) outage: Option<(Duration, Duration)>,
    pub(crate) mtu: u16,
    /// Limit on the stack's buffers: plenty, little, or none beyond a segment each way.
    pub(crate) buffer_memory: usize,
    /// Bytes of the guest's buffers, each way; its window and the scale of it follow from this.
    pub(crate) guest_buffer: usize,
    /// Bytes of the buffers of the host's socket.
    pub(crate) host_buffer: usize,
    /// A guest that waits for a connection gives up after this time.
    pub(crate) patience: Duration,
    pub(crate) guest: Side,
    pub(crate) host: Side,
}

fn millis(random: &mut Random, limit: u64) -> Duration {
    Duration::from_millis(random.below(limit))
}

impl Plan {
    /// What this seed decides.
    pub(crate) fn new(seed: u64) -> Self {
        let random = &mut Random::new(seed ^ 0x11fe);
        // The first numbers of neighbouring seeds are alike.
        for _ in 0..8 {
            random.next();
        }
        Self::drawn(random)
    }

    /// What these choices decide.
    pub(crate) fn drawn(random: &mut Random) -> Self {
        let ipv6 = random.of(FAMILIES);
        let addresses = addresses(ipv6);
        let opening = opening(random, &addresses);
        let faults = faults(random);
        let lossy = faults != Faults::default();
        let totals = [total(random), total(random)];
        let mut guest = side(random, totals[0], totals[1], true);
        let host = side(random, totals[1], totals[0], false);
        if guest.when == When::OtherEnded && host.when == When::OtherEnded {
            guest.when = When::AllSent;
        }
        Self {
            addresses,
            opening,
            kind: link(random),
            faults,
            outage: (lossy && random.percent(10))
                .then(|| (millis(random, 3000), millis(random, 30_000))),
            mtu: random
                .of(&[576, 1280, 1500, 1500, 9000, 65_520])
                .max(if ipv6 { MIN_MTU6 } else { MIN_MTU }),
            buffer_memory: random.of(&[256 << 20, 256 << 20, 1 << 20, 128 << 10, 0]),
            guest_buffer: random.of(&[1, 4, 16, 64, 256]) * 1024,
            host_buffer: random.of(&[1, 4, 16, 64, 256]) * 1024,
            patience: Duration::from_secs(1 + random.below(200)),
            workers: random.of(&[1, 1, 1, 2, 3]),
            guest,
            host,
        }
    }
}

fn opening(random: &mut Random, addresses: &Addresses) -> Opening {
    let client = random.of(&addresses.clients);
    // ENETUNREACH and EMFILE at once, ECONNREFUSED, ETIMEDOUT and EHOSTUNREACH later.
    let refusal = random.of(&[
        ConnectAnswer::Fail(101),
        ConnectAnswer::Fail(24),
        ConnectAnswer::FailLater(111),
        ConnectAnswer::FailLater(110),
        ConnectAnswer::FailLater(113),
        ConnectAnswer::Silent,
    ]);
    match random.below(100) {
        0..45 => Opening::Out(ConnectAnswer::Accept),
        45..55 => Opening::OutLate(millis(random, 5000)),
        55..60 => Opening::Out(refusal),
        60..97 => Opening::In(client),
        97..99 => Opening::InRefused(client),
        _ => Opening::InAbsent(client),
    }
}

fn faults(random: &mut Random) -> Faults {
    if random.percent(40) {
        return Faults::default();
    }
    Faults {
        loss: random.below(11),
        duplicate: random.below(11),
        reorder: random.below(11),
    }
}

fn link(random: &mut Random) -> LinkKind {
    let tso4 = random.percent(40);
    LinkKind {
        capabilities: TxCapabilities {
            checksum: tso4 || random.percent(50),
            tso4,
            tso6: tso4,
            uso: tso4,
        },
        guest_offload: random.percent(40),
        uncut: random.percent(50),
        mss: random.of(&[None, None, Some(88), Some(536), Some(1220), Some(65_495)]),
        unscaled: random.percent(25),
        no_sack: random.percent(25),
    }
}

/// Often nothing, mostly little, sometimes more than every buffer on the way holds.
fn total(random: &mut Random) -> usize {
    let limit = match random.below(100) {
        0..20 => 1,
        20..60 => 2000,
        60..92 => 40_000,
        _ => MOST,
    };
    random.size(limit)
}

/// A pace at which `total` bytes take no more than some hundred steps.
fn pace(random: &mut Random, total: usize) -> Pace {
    let least = total / 50 + 1;
    Pace {
        most: least + random.size(20_000),
        every: if random.percent(70) {
            Duration::ZERO
        } else {
            Duration::from_micros(1 + random.below(100_000))
        },
    }
}

fn side(random: &mut Random, total: usize, others: usize, is_guest: bool) -> Side {
    let pauses = random.percent(15);
    let end = match random.below(100) {
        0..72 => End::Close,
        72..82 => End::Leave,
        82..94 => End::Reset,
        94..97 if is_guest => End::Forget,
        97.. if is_guest => End::Vanish,
        _ => End::Close,
    };
    let when = match random.below(100) {
        0..40 => When::AllSent,
        40..60 => When::OtherEnded,
        60..80 => When::Received(random.size(others + 1)),
        80..90 => When::After(millis(random, 20)),
        90..97 => When::After(millis(random, 2000)),
        _ => When::After(millis(random, 100_000)),
    };
    Side {
        total,
        write: pace(random, total),
        read: pace(random, others),
        pause: pauses.then(|| {
            let longest = random.of(&[100, 5000, 200_000]);
            (random.size(others + 1), millis(random, longest))
        }),
        end,
        when,
    }
}
