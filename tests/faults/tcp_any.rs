//! Row 20: segments of any kind, with numbers at every distance that means something, in any order and several a turn.
//!
//! In: connections that either side began, at every stage, whose guest says whatever it likes while its host does what hosts
//! do. Out: that the network lives on and nothing of it is left.

use std::net::SocketAddr;

use tapgate::config::Config;
use tapgate::config::{Protocol, Timeouts};
use tapgate::host::simulated::{ConnectAnswer, SocketId};
use tapgate::net::Duration;

use crate::peer::{ACK, FIN, Peer, RST, SYN};
use crate::published::{TCP_PORT, publish};
use crate::rig::{OUTSIDE, Rig, addr, pattern};
use crate::{Random, count};

/// Distances of numbers, both ways.
const DISTANCES: [u32; 18] = [
    0,
    0,
    0,
    0,
    1,
    2,
    48,
    1400,
    32_768,
    65_535,
    65_536,
    1 << 20,
    1 << 21,
    (1 << 30) - 1,
    1 << 30,
    (1 << 31) - 65_536,
    (1 << 31) - 1,
    1 << 31,
];
const LENGTHS: [usize; 10] = [0, 0, 0, 1, 2, 100, 1400, 1460, 32_768, 65_000];
/// Payload of the longest packet.
const LONGEST: usize = 65_495;
const WINDOWS: [u16; 8] = [0, 1, 2, 100, 1460, 32_768, 65_534, 65_535];
const FLAGS: [u8; 12] = [
    ACK,
    ACK,
    ACK,
    ACK,
    ACK | 8,
    ACK | FIN,
    ACK | FIN,
    ACK | SYN,
    SYN,
    RST,
    ACK | RST,
    0,
];
const PSH_AND_URG: u8 = 0x28;

fn of<T: Copy>(random: &mut Random, all: &[T]) -> T {
    all[random.below(all.len())]
}

fn near(random: &mut Random, number: u32) -> u32 {
    let by = of(random, &DISTANCES);
    if random.below(2) == 0 {
        number.wrapping_add(by)
    } else {
        number.wrapping_sub(by)
    }
}

/// What the guest offers in its SYN.
fn options(random: &mut Random) -> Vec<u8> {
    let mut options = Vec::new();
    if random.below(4) > 0 {
        let [high, low] = of(random, &[0_u16, 1, 536, 1460, 65_495, 65_535]).to_be_bytes();
        options.extend([2, 4, high, low]);
    }
    if random.below(2) == 0 {
        options.extend([3, 3, of(random, &[0, 1, 7, 14, 255]), 0]);
    }
    if random.below(2) == 0 {
        options.extend([1, 1, 4, 2]);
    }
    options
}

/// A connection that is asked for, by either side, and may have been agreed to.
fn begun(rig: &mut Rig, random: &mut Random, nth: u16) -> (Peer, SocketId) {
    let id = SocketId(rig.net.connections().len());
    let mut peer;
    if random.below(2) == 0 {
        peer = Peer::new(2000 + nth, SocketAddr::new(OUTSIDE.into(), 80));
        peer.options = options(random);
        peer.next.seq = near(random, 0);
        rig.frame(&peer.syn());
    } else {
        let client = SocketAddr::new(addr("192.0.2.9:0").ip(), 2000 + nth);
        assert_eq!(rig.net.client_connect(addr(TCP_PORT), client), Some(id));
        if random.below(4) == 0 {
            rig.crowded_turn();
        }
        rig.turn();
        peer = Peer::new(80, client);
        peer.options = options(random);
        peer.next.seq = near(random, 0);
        let came = peer.read(&rig.received());
        peer.take_all(&came);
        let answer = peer.with_options(SYN | ACK, &peer.options, &[]);
        peer.next.seq = peer.next.seq.wrapping_add(1);
        if random.below(2) == 0 {
            rig.frame(&answer);
        }
    }
    let came = peer.read(&rig.received());
    peer.take_all(&came);
    if random.below(2) == 0 {
        rig.frame(&peer.ack());
    }
    (peer, id)
}

/// A segment of the guest's; mostly its stream goes on with it.
fn any_segment(random: &mut Random, peer: &mut Peer, edge: u32) -> Vec<u8> {
    let flags = of(random, &FLAGS)
        | if random.below(8) == 0 {
            random.byte() & PSH_AND_URG
        } else {
            0
        };
    // Some fill the window to its end.
    let left = usize::try_from(edge.wrapping_sub(peer.next.seq)).unwrap();
    let data = if random.below(3) == 0 {
        left.min(LONGEST)
    } else {
        of(random, &LENGTHS)
    };
    let data = pattern(data);
    let base = if random.below(3) == 0 {
        edge
    } else {
        peer.next.seq
    };
    let seq = if random.below(2) == 0 {
        base
    } else {
        near(random, base)
    };
    let ack = if random.below(3) == 0 {
        near(random, peer.next.ack)
    } else {
        peer.next.ack
    };
    let window = of(random, &WINDOWS);
    let frame = peer.with(flags, &data, |it| {
        (it.seq, it.ack, it.window) = (seq, ack, window);
    });
    if seq == peer.next.seq && random.below(8) > 0 {
        let length = u32::try_from(data.len()).unwrap() + u32::from(flags & FIN);
        peer.next.seq = peer.next.seq.wrapping_add(length);
    }
    frame
}

fn host_acts(rig: &Rig, random: &mut Random, id: SocketId) {
    match random.below(12) {
        0 => rig.net.server_pause(id, true),
        1..=3 => rig.net.server_pause(id, false),
        4 => rig.net.server_shutdown(id),
        5 if random.below(4) == 0 => rig.net.server_reset(id),
        6 | 7 => drop(
            rig.net
                .server_write(id, &pattern(of(random, &[1, 1460, 200_000]))),
        ),
        8 => rig.net.server_urges(id),
        _ => drop(
            rig.net
                .server_read(id, of(random, &[1, 10_000, usize::MAX])),
        ),
    }
}

#[test]
fn row_20_any_numbers_in_any_order() {
    for seed in 0..u64::try_from(count(150, 20_000)).unwrap() {
        let mut random = Random::new(seed + 1);
        let mut rig = Rig::with(Config {
            timeouts: Timeouts {
                tcp_idle: of(&mut random, &[60, 7_800]),
                ..Timeouts::default()
            },
            ..Config::default()
        });
        rig.net.answer_all(ConnectAnswer::Accept);
        publish(&mut rig, Protocol::Tcp, TCP_PORT);
        for nth in 0..4 {
            let (mut peer, id) = begun(&mut rig, &mut random, nth);
            let mut edge = peer.next.seq.wrapping_add(65_535);
            for _ in 0..random.below(30) {
                let frames: Vec<_> = (0..random.below(6))
                    .map(|_| any_segment(&mut random, &mut peer, edge))
                    .collect();
                rig.batch(frames.iter().map(Vec::as_slice));
                let came = peer.read(&rig.received());
                if let Some(last) = came.iter().rfind(|it| it.flags & (SYN | RST) == 0) {
                    let shift = of(&mut random, &[0, 5]);
                    edge = last.ack.wrapping_add(u32::from(last.window) << shift);
                    if random.below(2) == 0 {
                        peer.next.seq = last.ack;
                    }
                }
                if random.below(4) > 0 {
                    peer.take_all(&came);
                }
                host_acts(&rig, &mut random, id);
                match random.below(10) {
                    0 => rig.crowded_turn(),
                    1 => rig.with_stack(|stack, turn| stack.handle_link_back(turn.now)),
                    2 => rig.secs(of(&mut random, &[1, 5, 61, 300])),
                    3 => rig.millis(of(&mut random, &[1, 10, 250])),
                    _ => rig.turn(),
                }
            }
        }
        rig.only_count();
        rig.pass(Duration::from_secs(600));
        rig.is_alive();
    }
}
