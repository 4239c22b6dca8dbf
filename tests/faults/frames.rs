//! Rows 1 to 3: frames that are not what they should be, of every protocol that is spoken.
//!
//! In: well-formed frames, each changed in one place or in several. Out: whether anything came of it that
//! should not have: a panic, a frame that is not well-formed, a socket call to where nothing may go. And frames that are as they
//! should be, but from another Ethernet address than those before.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tapgate::host::simulated::{ConnectAnswer, SocketId};
use tapgate::net::DropReason;

use crate::packets::v6::{
    ALL_ROUTERS, DESTINATION, Extension, GUEST_LOCAL, HOP_BY_HOP, Ipv6, NEIGHBOUR_SOLICITATION,
    PADDING, ROUTER_SOLICITATION,
};
use crate::packets::{self, ICMP, ICMPV6, Ip, Ipv4, Segment, TCP, UDP, checksum, icmp};
use crate::rig::{GATEWAY, OUTSIDE, RESOLVER, Rig, addr};
use crate::{Random, count};

const OUTSIDE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
/// Bytes of the Ethernet header.
const ETHERNET: usize = 14;

/// A question for the address of `a.b`.
pub(crate) fn query(id: u16) -> Vec<u8> {
    let mut query = id.to_be_bytes().to_vec();
    query.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    query.extend([1, b'a', 1, b'b', 0, 0, 1, 0, 1]);
    query
}

/// A frame of each kind, well-formed.
fn corpus() -> Vec<Vec<u8>> {
    let segment = |flags| Segment {
        from: 4000,
        to: 80,
        seq: 1000,
        flags,
        window: 65_535,
        ..Segment::default()
    };
    let options = [
        2, 4, 5, 0xb4, 4, 2, 3, 3, 7, 1, 8, 10, 0, 0, 0, 9, 0, 0, 0, 0,
    ];
    let mut frames = vec![packets::arp_frame(
        1,
        packets::GUEST_MAC,
        packets::GUEST,
        GATEWAY,
    )];
    let dhcp = packets::dhcp(packets::GUEST_MAC, Ipv4Addr::UNSPECIFIED, &[(53, &[1])]);
    let asks = Ipv4 {
        src: Ipv4Addr::UNSPECIFIED,
        ..Ipv4::new(Ipv4Addr::BROADCAST, UDP)
    };
    frames.push(asks.frame(&asks.udp(68, 67, &dhcp)));
    let resolver = Ipv4::new(RESOLVER, UDP);
    frames.push(resolver.frame(&resolver.udp(5000, 53, &query(7))));
    for outside in [IpAddr::from(OUTSIDE), IpAddr::from(OUTSIDE6)] {
        let (tcp, udp) = (Ip::new(outside, TCP), Ip::new(outside, UDP));
        frames.push(tcp.frame(&tcp.tcp(&segment(2), &options, &[])));
        frames.push(tcp.frame(&tcp.tcp(&segment(0x18), &[], b"data of nobody")));
        frames.push(udp.frame(&udp.udp(5000, 7, b"a datagram")));
    }
    let ping = Ipv4::new(GATEWAY, ICMP);
    frames.push(ping.frame(&packets::icmp(8, 0, [1, 2], b"ping")));
    let long = Ipv4::new(OUTSIDE, UDP);
    frames.extend(long.fragments(&long.udp(5001, 7, &[9; 64]), 32));
    frames.extend(corpus6());
    frames
}

fn corpus6() -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let ping = Ipv6::new(GATEWAY6, ICMPV6);
    frames.push(ping.frame(&ping.icmp([128, 0], [1, 2], b"ping")));
    let udp = Ipv6::new(OUTSIDE6, UDP);
    let datagram = udp.udp(5002, 7, &[8; 64]);
    frames.extend(udp.fragments(9, &datagram, 32));
    let chain = [
        Extension(HOP_BY_HOP, PADDING),
        Extension(DESTINATION, PADDING),
    ];
    frames.push(udp.extended_frame(&chain, &datagram));
    let routers = Ipv6::discovery(GUEST_LOCAL, ALL_ROUTERS);
    let mac = [&[1, 1][..], &packets::GUEST_MAC].concat();
    frames.push(routers.frame(&routers.icmp([ROUTER_SOLICITATION, 0], [0, 0], &mac)));
    let neighbour = Ipv6::discovery(packets::v6::GUEST, GATEWAY6);
    let target = [&GATEWAY6.octets()[..], &mac].concat();
    frames.push(neighbour.frame(&neighbour.icmp([NEIGHBOUR_SOLICITATION, 0], [0, 0], &target)));
    let servers = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);
    let dhcp = Ipv6 {
        src: GUEST_LOCAL,
        ..Ipv6::new(servers, UDP)
    };
    // A solicitation with an identifier and an association that wants an address.
    let mut solicit = vec![1, 1, 2, 3, 0, 1, 0, 10, 0, 3, 0, 1];
    solicit.extend(packets::GUEST_MAC);
    solicit.extend([0, 3, 0, 12, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    frames.push(dhcp.frame(&dhcp.udp(546, 547, &solicit)));
    frames
}

/// Sums a frame anew where its headers say how, so that what is changed gets past the checksums.
pub(crate) fn resum(frame: &mut [u8]) {
    let (addresses, protocol, start) = match frame.get(ETHERNET).map(|first| first >> 4) {
        Some(4) if frame.len() >= ETHERNET + 20 => {
            let header = usize::from(frame[ETHERNET] & 15) * 4;
            let Some(bytes) = frame.get_mut(ETHERNET..ETHERNET + header.max(20)) else {
                return;
            };
            bytes[10..12].fill(0);
            let sum = checksum(&[bytes]);
            bytes[10..12].copy_from_slice(&sum.to_be_bytes());
            (
                ETHERNET + 12..ETHERNET + 20,
                frame[ETHERNET + 9],
                ETHERNET + header,
            )
        }
        Some(6) if frame.len() >= ETHERNET + 40 => (
            ETHERNET + 8..ETHERNET + 40,
            frame[ETHERNET + 6],
            ETHERNET + 40,
        ),
        Some(_) | None => return,
    };
    let at = match protocol {
        TCP => 16,
        UDP => 6,
        ICMP | ICMPV6 => 2,
        _ => return,
    };
    if frame.len() < start + at + 2 {
        return;
    }
    let length = u32::try_from(frame.len() - start).unwrap();
    let mut pseudo = frame[addresses].to_vec();
    pseudo.extend(length.to_be_bytes());
    pseudo.extend([0, 0, 0, protocol]);
    if protocol == ICMP {
        pseudo.clear();
    }
    frame[start + at..start + at + 2].fill(0);
    let sum = checksum(&[&pseudo, &frame[start..]]);
    frame[start + at..start + at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// Nothing went where nothing may go, and what came back is well-formed.
fn harmless(rig: &mut Rig) {
    let sent = rig.net.take_sent().into_iter().map(|it| it.to.ip());
    let connected = rig.net.connections();
    let connected = connected.iter().filter_map(|id| rig.net.remote(*id));
    for to in sent.chain(connected.map(|to| to.ip())) {
        let forbidden = match to {
            // The gateway stands for 127.0.0.1 and ::1, and for no other address of theirs.
            IpAddr::V4(to) => {
                let first = to.octets()[0];
                to != Ipv4Addr::LOCALHOST && (first == 0 || first == 127 || first >= 224)
            }
            IpAddr::V6(to) => {
                to != Ipv6Addr::LOCALHOST
                    && (to.is_multicast() || to.is_unspecified() || to.to_ipv4_mapped().is_some())
            }
        };
        assert!(!forbidden, "{to} was spoken to");
    }
    let frames: Vec<Vec<u8>> = rig.take();
    // One by one: fragments of a long answer stand next to each other, or not at all.
    packets::read(&frames).unwrap();
}

fn listening() -> Rig {
    let rig = Rig::new();
    rig.net.answer_all(ConnectAnswer::Accept);
    rig
}

#[test]
fn row_01_malformed_frames() {
    let corpus = corpus();
    // Each place, each value that lengths go wrong with, with checksums that are right and that are not.
    let mut rig = listening();
    for frame in &corpus {
        // None of them has any padding: what is cut off is missed.
        let before = dropped(&rig);
        rig.flood((0..frame.len()).map(|len| &frame[..len]));
        assert_eq!(dropped(&rig) - before, frame.len() as u64, "{frame:x?}");
        let mut changed = Vec::new();
        for at in 0..frame.len() {
            let old = frame[at];
            for value in [
                0,
                1,
                0x7f,
                0x80,
                0xff,
                old.wrapping_add(1),
                old.wrapping_sub(1),
            ] {
                let mut other = frame.clone();
                other[at] = value;
                changed.push(other.clone());
                resum(&mut other);
                changed.push(other);
            }
        }
        for at in 0..frame.len() - 1 {
            let old = u16::from_be_bytes([frame[at], frame[at + 1]]);
            for value in [0, 1, 0xffff, old.wrapping_add(1), old.wrapping_sub(1)] {
                let mut other = frame.clone();
                other[at..at + 2].copy_from_slice(&value.to_be_bytes());
                resum(&mut other);
                changed.push(other);
            }
        }
        rig.flood(changed.iter().map(Vec::as_slice));
        harmless(&mut rig);
    }
    rig.recovers(0);
    let seeds = count(10, 100);
    for seed in 0..seeds {
        mutated(&corpus, u64::try_from(seed).unwrap(), count(2_000, 10_000));
    }
}

/// Frames with up to four places changed by seed, cut off or grown, by the thousand.
fn mutated(corpus: &[Vec<u8>], seed: u64, frames: usize) {
    let mut random = Random::new(seed);
    let mut rig = listening();
    for batch in 0..frames / 100 {
        let mut changed = Vec::new();
        for _ in 0..100 {
            let mut frame = corpus[random.below(corpus.len())].clone();
            for _ in 0..=random.below(4) {
                let at = random.below(frame.len());
                frame[at] = random.byte();
            }
            match random.below(8) {
                0 => frame.truncate(random.below(frame.len())),
                1 => frame.resize(frame.len() + random.below(100), random.byte()),
                _ => {}
            }
            if random.below(4) > 0 {
                resum(&mut frame);
            }
            changed.push(frame);
        }
        rig.batch(changed.iter().map(Vec::as_slice));
        harmless(&mut rig);
        if batch % 10 == 0 {
            rig.millis(100);
        }
    }
    rig.recovers(0);
}

#[test]
fn row_02_arp() {
    let mut rig = Rig::new();
    let good = packets::arp_frame(1, packets::GUEST_MAC, packets::GUEST, GATEWAY);
    // Each byte up to the operation: hardware and protocol type, both lengths, the operation itself.
    for at in 0..8 {
        for value in 0..=u8::MAX {
            let mut frame = good.clone();
            frame[ETHERNET + at] = value;
            rig.frame(&frame);
            let expected = usize::from(frame == good);
            assert_eq!(rig.take().len(), expected, "byte {at} is {value}");
        }
    }
    // Every address of the subnet: ours are answered for, nobody else's (no proxy ARP), whoever asks; a
    // guest that probes for its own (RFC 5227) would think that it is taken.
    for last in 0..=u8::MAX {
        let target = Ipv4Addr::new(10, 0, 2, last);
        for sender in [packets::GUEST, Ipv4Addr::UNSPECIFIED, target] {
            let asks = packets::arp_frame(1, packets::GUEST_MAC, sender, target);
            rig.frame(&asks);
            let expected = usize::from(target == GATEWAY || target == RESOLVER);
            assert_eq!(rig.take().len(), expected, "{target} for {sender}");
        }
    }
    // A guest that claims to be the gateway changes nothing for anybody.
    rig.frame(&packets::arp_frame(2, packets::GUEST_MAC, GATEWAY, GATEWAY));
    rig.frame(&packets::arp_frame(2, [6; 6], RESOLVER, RESOLVER));
    rig.recovers(0);
}

#[test]
fn row_03_ipv4_headers() {
    let mut rig = Rig::new();
    let ip = Ipv4::new(OUTSIDE, UDP);
    let good = ip.frame(&ip.udp(5000, 7, b"x"));
    let with = |at: usize, value: u8, sum: bool| {
        let mut frame = good.clone();
        frame[ETHERNET + at] = value;
        if sum {
            resum(&mut frame);
        }
        frame
    };
    // Version and header length, total length above the frame and below the header, no time left, a sum
    // that does not match.
    let mut bad: Vec<Vec<u8>> = (0..=u8::MAX)
        .filter(|first| *first != 0x45)
        // A header of more words takes the datagram for options: dropped for that, see below.
        .filter(|first| first >> 4 != 4 || first & 15 < 5 || first & 15 > 7)
        .map(|first| with(0, first, true))
        .collect();
    bad.extend([
        with(2, 1, true),
        with(3, 30, true),
        with(3, 19, true),
        with(3, 0, true),
    ]);
    bad.push(with(8, 0, true));
    bad.extend((0..20).map(|at| with(at, good[ETHERNET + at] ^ 0x10, false)));
    for frame in &bad {
        let before = dropped(&rig);
        rig.frame(frame);
        assert_eq!(dropped(&rig), before + 1, "{:x?}", &frame[ETHERNET..]);
        assert_eq!((rig.received(), rig.net.take_sent()), (vec![], vec![]));
    }
    // One hop left is none beyond the gateway (RFC 1812 5.3.1).
    let last = Ipv4 { ttl: 1, ..ip };
    rig.frame(&last.frame(&last.udp(5000, 7, b"x")));
    let said = rig.received();
    assert_eq!(said[0].icmp(), Some((11, 0)));
    assert!(rig.net.take_sent().is_empty());
    // Options are passed over, whatever they ask for: NOP, record route, a source route, one too long.
    for options in [
        [1; 4],
        [7, 4, 4, 0],
        [0x83, 4, 4, 0],
        [0x83, 40, 4, 0],
        [68, 0, 0, 0],
    ] {
        let mut packet = ip.packet(&ip.udp(5000, 7, b"x"));
        packet[0] = 0x46;
        packet[3] += 4;
        packet.splice(20..20, options);
        let mut frame = packets::ethernet(packets::GATEWAY_MAC, packets::ETHERTYPE_IPV4, &packet);
        resum(&mut frame);
        rig.frame(&frame);
        let sent = rig.net.take_sent();
        assert_eq!(sent.len(), 1, "{options:?}");
        assert_eq!(sent[0].to.ip(), IpAddr::from(OUTSIDE), "no other way");
    }
    rig.recovers(0);
}

fn dropped(rig: &Rig) -> u64 {
    DropReason::ALL
        .iter()
        .map(|reason| rig.dropped(*reason))
        .sum()
}

#[test]
fn answers_follow_the_guest_to_another_ethernet_address() {
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 101];
    let mut rig = Rig::new();
    rig.net.answer_all(ConnectAnswer::Accept);
    let (mut peer, id) = rig.open(2000, addr("192.0.2.1:80"));
    let (udp, ping) = (Ipv4::new(OUTSIDE, UDP), Ipv4::new(OUTSIDE, ICMP));
    rig.frame(&udp.frame(&udp.udp(9000, 7, b"x")));
    rig.frame(&ping.frame(&icmp(8, 0, [7, 1], b"x")));
    let sent: Vec<SocketId> = rig.net.take_sent().iter().map(|it| it.socket).collect();
    let [port, echo] = sent[..] else {
        panic!("{sent:?}")
    };
    let moved = |mut frame: Vec<u8>| {
        frame[6..12].copy_from_slice(&OTHER);
        frame
    };
    rig.frame(&moved(peer.data(b"x")));
    rig.frame(&moved(udp.frame(&udp.udp(9000, 7, b"x"))));
    rig.frame(&moved(ping.frame(&icmp(8, 0, [7, 1], b"x"))));
    rig.millis(100);
    rig.take();
    assert_eq!(rig.net.server_write(id, b"answer"), 6);
    rig.net
        .deliver(port, SocketAddr::new(OUTSIDE.into(), 7), b"answer");
    rig.net.deliver_echo(echo, OUTSIDE.into(), 2, b"x");
    rig.turn();
    let to: Vec<Vec<u8>> = rig.take().iter().map(|it| it[..6].to_vec()).collect();
    assert_eq!(to, [OTHER; 3]);
}
