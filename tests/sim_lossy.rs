//! Transfers over a link that loses, repeats and reorders: intact for every seed, and nothing left.
//!
//! A thousand seeds for each family, up to 10 % of each fault, and as many in which the host sends much at once, which
//! goes past smoltcp's ring where the link cuts segments up. The data is a function of its position, so a byte out
//! of place is noticed where it stands.
#![allow(
    clippy::unwrap_used,
    reason = "a scenario that can not go on has failed"
)]

mod sim;

use std::net::IpAddr;

use sim::{Faults, GUEST, GUEST6, LinkKind, Random, Sim, seconds};
use smoltcp::iface::SocketHandle;
use tapgate::buf::TxCapabilities;
use tapgate::config::Config;
use tapgate::host::simulated::{ConnectAnswer, SocketId};

const SEEDS: u64 = 1000;
/// The smallest link first, of which IPv6 asks more (RFC 8200 section 5).
const IPV4: Family = (GUEST, "192.0.2.1:80", [576, 1500, 9000]);
const IPV6: Family = (GUEST6, "[2001:db8::1]:80", [1280, 1500, 9000]);
const FIRST: SocketId = SocketId(0);

/// The guest's address, a server's, and the MTUs of the link.
type Family = (IpAddr, &'static str, [u16; 3]);

/// How much goes to the guest, and how much of it at a time.
#[derive(Clone, Copy)]
enum Size {
    Little,
    /// Over a link that cuts segments up.
    Bulk,
}

impl Size {
    fn link(self) -> LinkKind {
        let mut kind = LinkKind::default();
        if matches!(self, Self::Bulk) {
            kind.capabilities = TxCapabilities {
                checksum: true,
                tso4: true,
                tso6: true,
                uso: true,
            };
        }
        kind
    }

    /// Bytes in all at most, at a time, and in the guest's buffer.
    const fn bytes(self) -> [usize; 3] {
        match self {
            Self::Little => [60_000, 4096, 16 * 1024],
            Self::Bulk => [600_000, 100_000, 128 * 1024],
        }
    }
}

fn pattern(at: usize, salt: usize) -> u8 {
    u8::try_from((at.wrapping_mul(31) + salt) % 251).unwrap()
}

/// What has gone one way so far.
struct Stream {
    total: usize,
    sent: usize,
    seen: usize,
    salt: usize,
    ended: bool,
}

impl Stream {
    fn new(total: usize, salt: usize) -> Self {
        Self {
            total,
            sent: 0,
            seen: 0,
            salt,
            ended: false,
        }
    }

    fn next(&self, max: usize) -> Vec<u8> {
        (self.sent..self.total.min(self.sent + max))
            .map(|at| pattern(at, self.salt))
            .collect()
    }

    fn arrived(&mut self, bytes: &[u8], seed: u64) {
        for &byte in bytes {
            assert_eq!(
                byte,
                pattern(self.seen, self.salt),
                "seed {seed}, byte {}",
                self.seen
            );
            self.seen += 1;
        }
    }

    fn done(&self) -> bool {
        self.seen == self.total
    }
}

fn transfer((guest, server, mtus): Family, size: Size, seed: u64) {
    let mut random = Random::new(seed ^ 0x5eed);
    let faults = Faults {
        loss: random.below(11),
        duplicate: random.below(11),
        reorder: random.below(11),
    };
    let mtu = mtus[usize::try_from(random.below(3)).unwrap()];
    let mut sim = Sim::over(
        size.link(),
        guest,
        seed,
        Config {
            mtu,
            ..Config::default()
        },
        faults,
    );
    sim.net.answer_all(ConnectAnswer::Accept);
    let mut up = Stream::new(usize::try_from(random.below(60_000)).unwrap(), 1);
    let [most, at_once, buffer] = size.bytes();
    let mut down = Stream::new(random.size(most), 2);
    let handle = sim.connect_with(server, buffer);
    let complete = sim.run(seconds(3600), |sim| {
        guest_side(sim, handle, &mut up, &mut down, seed);
        host_side(sim, &mut up, (&mut down, at_once), seed);
        up.done() && down.done() && sim.net.server_sees_end(FIRST)
    });
    assert!(
        complete,
        "seed {seed}: {}/{} up, {}/{} down at {}, guest {}",
        up.seen,
        up.total,
        down.seen,
        down.total,
        sim.clock.now(),
        sim.socket(handle).state()
    );
    sim.settle(seconds(4 * 3600));
    assert_eq!(
        (sim.stack.flows(), sim.net.open_sockets()),
        (0, 0),
        "seed {seed}"
    );
}

fn guest_side(sim: &mut Sim, handle: SocketHandle, up: &mut Stream, down: &mut Stream, seed: u64) {
    let mut room = [0; 4096];
    let socket = sim.socket(handle);
    if socket.may_send() {
        up.sent += socket.send_slice(&up.next(4096)).unwrap_or(0);
        if up.sent == up.total {
            socket.close();
        }
    }
    while let Ok(len @ 1..) = socket.recv_slice(&mut room) {
        down.arrived(&room[..len], seed);
    }
}

fn host_side(sim: &Sim, up: &mut Stream, (down, at_once): (&mut Stream, usize), seed: u64) {
    if sim.net.connections().is_empty() {
        return;
    }
    up.arrived(&sim.net.server_read(FIRST, 4096), seed);
    if down.sent < down.total {
        down.sent += sim.net.server_write(FIRST, &down.next(at_once));
    }
    if down.sent == down.total && !std::mem::replace(&mut down.ended, true) {
        sim.net.server_shutdown(FIRST);
    }
}

/// Seeds are divided among the test threads.
fn seeds(family: Family, size: Size, part: u64, parts: u64) {
    for seed in (part..SEEDS).step_by(usize::try_from(parts).unwrap()) {
        transfer(family, size, seed);
    }
}

#[test]
fn every_transfer_arrives_intact_first_quarter() {
    seeds(IPV4, Size::Little, 0, 4);
}

#[test]
fn every_transfer_arrives_intact_second_quarter() {
    seeds(IPV4, Size::Little, 1, 4);
}

#[test]
fn every_transfer_arrives_intact_third_quarter() {
    seeds(IPV4, Size::Little, 2, 4);
}

#[test]
fn every_transfer_arrives_intact_fourth_quarter() {
    seeds(IPV4, Size::Little, 3, 4);
}

#[test]
fn every_transfer_arrives_intact_over_ipv6_first_quarter() {
    seeds(IPV6, Size::Little, 0, 4);
}

#[test]
fn every_transfer_arrives_intact_over_ipv6_second_quarter() {
    seeds(IPV6, Size::Little, 1, 4);
}

#[test]
fn every_transfer_arrives_intact_over_ipv6_third_quarter() {
    seeds(IPV6, Size::Little, 2, 4);
}

#[test]
fn every_transfer_arrives_intact_over_ipv6_fourth_quarter() {
    seeds(IPV6, Size::Little, 3, 4);
}

#[test]
fn bulk_arrives_intact_first_quarter() {
    seeds(IPV4, Size::Bulk, 0, 4);
}

#[test]
fn bulk_arrives_intact_second_quarter() {
    seeds(IPV4, Size::Bulk, 1, 4);
}

#[test]
fn bulk_arrives_intact_third_quarter() {
    seeds(IPV4, Size::Bulk, 2, 4);
}

#[test]
fn bulk_arrives_intact_fourth_quarter() {
    seeds(IPV4, Size::Bulk, 3, 4);
}

#[test]
fn bulk_arrives_intact_over_ipv6_first_quarter() {
    seeds(IPV6, Size::Bulk, 0, 4);
}

#[test]
fn bulk_arrives_intact_over_ipv6_second_quarter() {
    seeds(IPV6, Size::Bulk, 1, 4);
}

#[test]
fn bulk_arrives_intact_over_ipv6_third_quarter() {
    seeds(IPV6, Size::Bulk, 2, 4);
}

#[test]
fn bulk_arrives_intact_over_ipv6_fourth_quarter() {
    seeds(IPV6, Size::Bulk, 3, 4);
}
