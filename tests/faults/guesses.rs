//! Rows 20 and 32: numbers that a stranger would have to guess, who has seen as many of them as he likes (RFC 6528,
//! RFC 6056, RFC 5452, RFC 7739).
//!
//! In: many connections, datagrams and queries of one guest. Out: the numbers that each was given, which must be spread
//! over all there are, must not follow from the one before, and must be others for another secret.

use std::collections::HashSet;
use std::net::SocketAddr;

use tapgate::config::{Config, Protocol, Publish, Splice};
use tapgate::host::simulated::{ConnectAnswer, SocketId};
use tapgate::host::{DatagramRole, PortWish};

use crate::frames;
use crate::packets::{Ipv4, UDP, read};
use crate::peer::{Peer, SYN};
use crate::rig::{OUTSIDE, RESOLVER, Rig, addr, pattern};

/// Numbers that are looked at.
const MANY: usize = 1024;

fn rig(seed: [u64; 4]) -> Rig {
    let mut rig = Rig::seeded(Config::default(), seed);
    rig.net.answer_all(ConnectAnswer::Accept);
    rig.net.set_resolvers(&[addr("192.0.2.53:53")]);
    let rule = Publish {
        protocol: Protocol::Tcp,
        host: addr("0.0.0.0:8080"),
        guest: addr("10.0.2.100:80"),
        splice: Splice::default(),
    };
    rig.with_stack(|stack, turn| stack.publish(turn.host, rule).unwrap());
    rig
}

/// Numbers of so many bits are spread as if they were drawn: over all sixteenths of their range, with steps between one
/// and the next that are spread alike. Of 1,024 drawn ones a sixteenth has 64, within 40 but once in a million times.
fn are_drawn(what: &str, bits: u32, numbers: &[u32]) {
    let steps: Vec<u32> = numbers
        .windows(2)
        .map(|pair| pair[1].wrapping_sub(pair[0]) & (u32::MAX >> (32 - bits)))
        .collect();
    for (of, numbers) in [("numbers", numbers), ("steps", &steps)] {
        let mut counts = [0_usize; 16];
        for number in numbers {
            counts[usize::try_from(number >> (bits - 4)).unwrap()] += 1;
        }
        let fair = MANY / 16;
        let spread = counts.iter().all(|count| count.abs_diff(fair) < 40);
        assert!(spread, "{what}: {of} by sixteenths: {counts:?}");
    }
    let distinct = numbers.iter().collect::<HashSet<_>>().len();
    assert!(distinct > MANY - 30, "{what}: {distinct} different ones");
}

/// What it is like for one secret; others must differ.
fn for_each_secret(what: &str, bits: u32, draw: impl Fn(&mut Rig) -> Vec<u32>) {
    let drawn = [[1, 2, 3, 4], [1, 9, 3, 4]].map(|seed| draw(&mut rig(seed)));
    for numbers in &drawn {
        assert_eq!(numbers.len(), MANY, "{what}");
        are_drawn(what, bits, numbers);
    }
    let same = drawn[0].iter().zip(&drawn[1]).filter(|(a, b)| a == b);
    assert!(same.count() < 10, "{what}: the secret decides");
}

#[test]
fn row_20_sequence_numbers_can_not_be_guessed() {
    for_each_secret("SYN|ACK", 32, |rig| {
        let ports = (0..MANY).map(|nth| u16::try_from(1000 + nth).unwrap());
        let opened = ports.map(|port| rig.open(port, addr("192.0.2.1:80")).0);
        opened.map(|peer| peer.next.ack.wrapping_sub(1)).collect()
    });
    for_each_secret("SYN", 32, |rig| {
        let calls = (0..MANY).map(|nth| {
            let port = u16::try_from(1000 + nth).unwrap();
            let client = SocketAddr::new(addr("192.0.2.9:0").ip(), port);
            rig.take();
            rig.net
                .client_connect(addr("0.0.0.0:8080"), client)
                .unwrap();
            rig.turn();
            let syn = Peer::new(80, client).read(&rig.received()).pop().unwrap();
            assert_eq!(syn.flags, SYN);
            syn.seq
        });
        calls.collect()
    });
}

#[test]
fn row_32_identifiers_and_ports_can_not_be_guessed() {
    for_each_secret("query", 16, |rig| {
        let ip = Ipv4::new(RESOLVER, UDP);
        let asked = (0..MANY).map(|nth| {
            let query = frames::query(u16::try_from(nth).unwrap());
            rig.frame(&ip.frame(&ip.udp(5000, 53, &query)));
            let sent = rig.net.take_sent();
            u32::from(u16::from_be_bytes([sent[0].payload[0], sent[0].payload[1]]))
        });
        asked.collect()
    });
    // Where the guest's own port is taken, the search for another begins anywhere.
    for_each_secret("port", 15, |rig| {
        let ip = Ipv4::new(OUTSIDE, UDP);
        let opened = (0..MANY).map(|nth| {
            let socket = SocketId(rig.net.datagram_sockets());
            let port = u16::try_from(1000 + nth).unwrap();
            rig.frame(&ip.frame(&ip.udp(port, 7, b"x")));
            let Some(DatagramRole::Outbound(PortWish { spare, .. })) = rig.net.role(socket) else {
                unreachable!("a port of a guest's to the outside")
            };
            u32::from(spare & 0x7fff)
        });
        opened.collect()
    });
    // Fragments of what is longer than the MTU.
    for_each_secret("IPv4 identification", 16, |rig| {
        let ip = Ipv4::new(OUTSIDE, UDP);
        rig.frame(&ip.frame(&ip.udp(5000, 7, b"x")));
        let came = (0..MANY).map(|_| {
            rig.take();
            rig.net
                .deliver(SocketId(0), addr("192.0.2.1:7"), &pattern(2_000));
            rig.turn();
            let frames = rig.take();
            assert!(frames.len() == 2 && read(&frames).is_ok());
            let id = |frame: &[u8]| u32::from(u16::from_be_bytes([frame[18], frame[19]]));
            assert_eq!(id(&frames[0]), id(&frames[1]), "both are of one datagram");
            id(&frames[0])
        });
        came.collect()
    });
}
