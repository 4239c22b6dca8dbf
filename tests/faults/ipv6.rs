//! Rows 35 to 37: neighbour discovery, extension headers and checksums that no honest station sends.
//!
//! In: IPv6 packets with headers and options of any kind, number and length. Out: what was obeyed, which
//! must be little, what was said, and that nothing runs in circles.

use std::net::Ipv6Addr;

use tapgate::net::DropReason;

use crate::frames::resum;
use crate::packets::UDP;
use crate::packets::v6::{
    ALL_NODES, ALL_ROUTERS, DESTINATION, Extension, FRAGMENT, GUEST, GUEST_LOCAL, HOP_BY_HOP, Ipv6,
    NEIGHBOUR_ADVERTISEMENT, NEIGHBOUR_SOLICITATION, PADDING, ROUTER_ADVERTISEMENT,
    ROUTER_SOLICITATION, ROUTING,
};
use crate::rig::{Rig, pattern};
use crate::{Random, count};

const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
const OUTSIDE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// A question for the gateway, with options.
fn solicitation(hop_limit: u8, code: u8, options: &[u8]) -> Vec<u8> {
    let ip = Ipv6 {
        hop_limit,
        ..Ipv6::discovery(GUEST, GATEWAY6)
    };
    let body = [&GATEWAY6.octets()[..], options].concat();
    ip.frame(&ip.icmp([NEIGHBOUR_SOLICITATION, code], [0, 0], &body))
}

#[test]
fn row_35_neighbour_discovery() {
    let mut rig = Rig::new();
    let mac = [1, 1, 2, 0, 0, 0, 0, 100];
    rig.frame(&solicitation(255, 0, &mac));
    assert_eq!(rig.take().len(), 1, "the good one");
    // From further than the link, with a code, with an option of no length, or one that is cut off.
    for hop_limit in 1..255 {
        rig.frame(&solicitation(hop_limit, 0, &mac));
        rig.frame(&solicitation(255, hop_limit, &mac));
    }
    for kind in 0..=u8::MAX {
        rig.frame(&solicitation(255, 0, &[kind, 0, 0, 0, 0, 0, 0, 0]));
        rig.frame(&solicitation(255, 0, &[kind, 2, 0, 0, 0, 0, 0, 0]));
        rig.frame(&solicitation(255, 0, &[kind]));
    }
    assert_eq!(rig.take(), Vec::<Vec<u8>>::new());
    // A guest that says it is a router, or where the gateway is, or that there is a better way (137).
    let random_body =
        |random: &mut Random, len: usize| -> Vec<u8> { (0..len).map(|_| random.byte()).collect() };
    let mut random = Random::new(35);
    let (mut answered, total) = (0, count(10_000, 100_000));
    for nth in 0..total {
        let kinds = [
            ROUTER_ADVERTISEMENT,
            137,
            NEIGHBOUR_ADVERTISEMENT,
            ROUTER_SOLICITATION,
            NEIGHBOUR_SOLICITATION,
        ];
        let kind = kinds[nth % kinds.len()];
        let src = [GUEST, GUEST_LOCAL, Ipv6Addr::UNSPECIFIED][random.below(3)];
        let dst = [GATEWAY6, ALL_NODES, ALL_ROUTERS][random.below(3)];
        let ip = Ipv6::discovery(src, dst);
        let mut body = random_body(&mut random, 16);
        if random.below(2) == 0 {
            body.copy_from_slice(&GATEWAY6.octets());
        }
        let len = random.below(6) * 8;
        body.extend(random_body(&mut random, len));
        rig.frame(&ip.frame(&ip.icmp([kind, 0], [0, 0], &body)));
        let frames = rig.take();
        assert!(frames.len() <= 1);
        let asks = kind == ROUTER_SOLICITATION || kind == NEIGHBOUR_SOLICITATION;
        assert!(asks || frames.is_empty(), "nobody asked");
        answered += frames.len();
    }
    assert!(answered > 0 && answered < total);
    // The gateway is where it was, and knows where the guest is.
    rig.frame(&solicitation(255, 0, &mac));
    let frames = rig.take();
    assert_eq!(
        (frames.len(), &frames[0][..6]),
        (1, &crate::packets::GUEST_MAC[..])
    );
    rig.recovers(0);
}

/// A datagram behind these headers reached the host.
fn passes(rig: &mut Rig, chain: &[Extension<'_>]) -> bool {
    let ip = Ipv6::new(OUTSIDE6, UDP);
    let datagram = ip.udp(5000, 7, b"behind");
    rig.frame(&ip.extended_frame(chain, &datagram));
    let sent = rig.net.take_sent();
    assert!(sent.iter().all(|it| it.payload == b"behind"));
    sent.len() == 1
}

#[test]
fn row_36_extension_headers() {
    let mut rig = Rig::new();
    // Eight headers may be passed over, nine may not; options of hop-by-hop come first or not at all.
    for number in 0..20 {
        let chain = vec![Extension(DESTINATION, PADDING); number];
        assert_eq!(passes(&mut rig, &chain), number <= 8, "{number} headers");
    }
    assert!(passes(&mut rig, &[Extension(HOP_BY_HOP, PADDING)]));
    let late = [
        Extension(DESTINATION, PADDING),
        Extension(HOP_BY_HOP, PADDING),
    ];
    assert!(!passes(&mut rig, &late));
    // A hundred options, in one header: padding is nothing, what must be understood is not.
    let mut options = [1, 0].repeat(99);
    options.extend([1, 2, 0, 0]);
    options.truncate(198);
    assert!(passes(&mut rig, &[Extension(DESTINATION, &options)]));
    for kind in [0x40, 0x80, 0xc0, 0xc2] {
        options[100] = kind;
        assert!(!passes(&mut rig, &[Extension(DESTINATION, &options)]));
    }
    // RFC 5095: a routing header that leads somewhere is not followed; one that has arrived is nothing.
    for kind in 0..=u8::MAX {
        let leads = [kind, 1, 0, 0, 0, 0];
        assert!(!passes(&mut rig, &[Extension(ROUTING, &leads)]));
    }
    assert!(passes(&mut rig, &[Extension(ROUTING, &[0, 0, 0, 0, 0, 0])]));
    rig.take();
    // A next header that nobody knows is pointed at (RFC 8200 section 4).
    let unknown = Ipv6::new(OUTSIDE6, 253);
    rig.frame(&unknown.frame(b"what is this"));
    let told = rig.received();
    assert_eq!(told[0].icmp(), Some((4, 1)));
    assert_eq!(told[0].payload[4..8], 6_u32.to_be_bytes());
    fragments_of_fragments(&mut rig);
    any_chain(&mut rig);
    rig.secs(61);
    rig.recovers(0);
}

fn fragments_of_fragments(rig: &mut Rig) {
    let before = rig.dropped(DropReason::Malformed);
    // What is put together turns out to be a fragment again.
    let inner = [&[UDP, 0, 0, 9, 0, 0, 0, 1][..], &pattern(56)].concat();
    let ip = Ipv6::new(OUTSIDE6, FRAGMENT);
    for fragment in ip.fragments(4, &inner, 32) {
        rig.frame(&fragment);
    }
    assert_eq!(rig.dropped(DropReason::Malformed), before + 1);
    assert!(rig.net.take_sent().is_empty());
}

/// Headers of any kind and length, by seed: no loop, no panic, and the datagram behind them or nothing.
fn any_chain(rig: &mut Rig) {
    let mut random = Random::new(36);
    for _ in 0..count(2_000, 10_000) {
        let bodies: Vec<Vec<u8>> = (0..random.below(12))
            .map(|_| {
                let len = 6 + 8 * random.below(4);
                match random.below(3) {
                    0 => (0..len).map(|_| random.byte()).collect(),
                    _ => vec![0; len],
                }
            })
            .collect();
        let kinds = [HOP_BY_HOP, DESTINATION, ROUTING, FRAGMENT, 51, 59, 135, 254];
        let chain: Vec<_> = bodies
            .iter()
            .map(|body| Extension(kinds[random.below(kinds.len())], body))
            .collect();
        let ip = Ipv6::new(OUTSIDE6, UDP);
        let mut frame = ip.extended_frame(&chain, &ip.udp(5000, 7, b"behind"));
        for _ in 0..random.below(3) {
            let at = 14 + random.below(frame.len() - 14);
            frame[at] = random.byte();
        }
        rig.frame(&frame);
        assert!(rig.net.take_sent().len() <= 1);
        assert!(rig.received().len() <= 1);
    }
    rig.stack.check().unwrap();
}

#[test]
fn row_37_udp_without_checksum_over_ipv6() {
    let mut rig = Rig::new();
    let before = rig.dropped(DropReason::Checksum);
    let total = count(1_000, 1_000);
    for nth in 0..total {
        let ip = Ipv6::new(OUTSIDE6, UDP);
        let mut datagram = ip.udp(u16::try_from(5000 + nth).unwrap(), 7, &pattern(nth));
        datagram[6..8].fill(0);
        rig.frame(&ip.frame(&datagram));
    }
    assert_eq!(rig.dropped(DropReason::Checksum) - before, total as u64);
    assert!(rig.net.take_sent().is_empty());
    // The same with one is carried.
    let ip = Ipv6::new(OUTSIDE6, UDP);
    let mut frame = ip.frame(&ip.udp(5000, 7, b"x"));
    frame[14 + 40 + 6..14 + 40 + 8].fill(0);
    resum(&mut frame);
    rig.frame(&frame);
    assert_eq!(rig.net.take_sent().len(), 1);
    rig.recovers(0);
}
