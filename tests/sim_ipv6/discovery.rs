//! Neighbour discovery, router advertisements, and the switch that turns all of it off.

use std::net::Ipv6Addr;

use tapgate::config::{Config, Dns, Protocol, Publish, Splice};
use tapgate::net::DropReason;

use crate::lab::{FIRST, Lab, addr, millis, secs};
use crate::packets::v6::{self, ALL_NODES, ALL_ROUTERS, GUEST, GUEST_LOCAL, Ipv6, link_address};
use crate::packets::{self, GATEWAY_MAC, GUEST_MAC, ICMPV6};
use crate::sim::{Faults, GUEST6, Sim};
use crate::{GATEWAY6, OUTSIDE6, RESOLVER6, ROUTER, without_ipv6};

const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

/// A frame of the gateway's, byte for byte, but for the message's checksum, which is filled in.
fn expected(mac: [u8; 6], src: Ipv6Addr, dst: Ipv6Addr, message: Vec<u8>) -> Vec<u8> {
    let mut frame = mac.to_vec();
    frame.extend(GATEWAY_MAC);
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend(u16::try_from(message.len()).unwrap().to_be_bytes());
    frame.extend([ICMPV6, 255]);
    frame.extend(src.octets());
    frame.extend(dst.octets());
    frame.extend(Ipv6::new(dst, ICMPV6).summed_from(src, message));
    frame
}

fn advertisement(flags: u8, target: Ipv6Addr) -> Vec<u8> {
    let mut message = vec![136, 0, 0, 0, flags, 0, 0, 0];
    message.extend(target.octets());
    message.extend([2, 1]);
    message.extend(GATEWAY_MAC);
    message
}

#[test]
fn solicitations_are_answered_for_our_addresses_only() {
    let mut lab = Lab::new();
    let source = link_address(1, GUEST_MAC);
    let mut ignored = 0;
    for (target, ours) in [
        (GATEWAY6, true),
        (RESOLVER6, true),
        (ROUTER, true),
        (GUEST, false),
        (GUEST_LOCAL, false),
        ("fd00::".parse().unwrap(), false),
        ("fd00::1".parse().unwrap(), false),
        ("fd00::77".parse().unwrap(), false),
        ("fe80::1".parse().unwrap(), false),
        ("fe80::3".parse().unwrap(), false),
        (OUTSIDE6, false),
        (Ipv6Addr::LOCALHOST, false),
    ] {
        for src in [GUEST, GUEST_LOCAL] {
            for dst in [target, v6::solicited_node(target)] {
                let ip = Ipv6::discovery(src, dst);
                lab.send(ip.frame(&ip.solicitation(target, &source)));
                let answers = std::mem::take(&mut lab.0.received);
                if ours {
                    let answer = expected(GUEST_MAC, target, src, advertisement(0xe0, target));
                    assert_eq!(answers, [answer], "{target} asked by {src} at {dst}");
                } else {
                    ignored += 1;
                    assert!(answers.is_empty(), "{target} asked by {src} at {dst}");
                }
            }
        }
    }
    assert_eq!(lab.dropped(DropReason::NdpIgnored), ignored);
}

#[test]
fn who_has_no_address_yet_is_answered_by_telling_all() {
    let mut lab = Lab::new();
    for target in [GATEWAY6, RESOLVER6, ROUTER] {
        let ip = Ipv6::discovery(Ipv6Addr::UNSPECIFIED, v6::solicited_node(target));
        lab.send(ip.frame(&ip.solicitation(target, &[])));
        let answer = expected(
            ALL_NODES_MAC,
            target,
            ALL_NODES,
            advertisement(0xa0, target),
        );
        assert_eq!(std::mem::take(&mut lab.0.received), [answer], "{target}");
    }
    // The guest's probes for its own addresses (RFC 4862 5.4) stay unanswered.
    for target in [GUEST, GUEST_LOCAL, "fd00::5055:ff:fe00:1".parse().unwrap()] {
        let ip = Ipv6::discovery(Ipv6Addr::UNSPECIFIED, v6::solicited_node(target));
        lab.send(ip.frame(&ip.solicitation(target, &[])));
        assert!(lab.0.received.is_empty(), "{target}");
    }
    assert_eq!(lab.dropped(DropReason::NdpIgnored), 3);
}

#[test]
fn what_discovery_forbids_is_dropped_and_counted() {
    let mut lab = Lab::new();
    let ip = Ipv6::discovery(GUEST, GATEWAY6);
    let nobody = Ipv6::discovery(Ipv6Addr::UNSPECIFIED, v6::solicited_node(GATEWAY6));
    let source = link_address(1, GUEST_MAC);
    let good = ip.solicitation(GATEWAY6, &source);
    let far = Ipv6 {
        hop_limit: 254,
        ..ip
    };
    let mut damaged = good.clone();
    *damaged.last_mut().unwrap() ^= 1;
    let mut coded = good.clone();
    coded[1] = 1;
    let with = |options: &[u8]| ip.frame(&ip.solicitation(GATEWAY6, options));
    let to_one = Ipv6::discovery(Ipv6Addr::UNSPECIFIED, GATEWAY6);
    let router = Ipv6::discovery(Ipv6Addr::UNSPECIFIED, ALL_ROUTERS);
    let cases = [
        ("hop limit", far.frame(&good), DropReason::Malformed),
        ("checksum", ip.frame(&damaged), DropReason::Checksum),
        ("code", ip.frame(&ip.summed(coded)), DropReason::Malformed),
        (
            "option of no length",
            with(&[1, 0, 2, 0, 0, 0, 0, 1]),
            DropReason::Malformed,
        ),
        (
            "second option of no length",
            with(&[14, 1, 0, 0, 0, 0, 0, 0, 1, 0]),
            DropReason::Malformed,
        ),
        (
            "option cut short",
            with(&[1, 2, 2, 0, 0, 0, 0, 1]),
            DropReason::Truncated,
        ),
        ("half an option", with(&[1]), DropReason::Truncated),
        (
            "group as target",
            ip.frame(&ip.solicitation(ALL_NODES, &source)),
            DropReason::Malformed,
        ),
        (
            "no target",
            ip.frame(&ip.icmp([135, 0], [0, 0], &[0; 15])),
            DropReason::Truncated,
        ),
        (
            "source of nobody",
            nobody.frame(&nobody.solicitation(GATEWAY6, &source)),
            DropReason::Malformed,
        ),
        (
            "nobody to one",
            to_one.frame(&to_one.solicitation(GATEWAY6, &[])),
            DropReason::Malformed,
        ),
        (
            "source of nobody's router",
            router.frame(&router.router_solicitation(&source)),
            DropReason::Malformed,
        ),
        (
            "a guest as router",
            ip.frame(&ip.icmp([134, 0], [0, 0], &[0; 8])),
            DropReason::IcmpType,
        ),
    ];
    for (what, frame, reason) in cases {
        let before = lab.dropped(reason);
        lab.send(frame);
        assert_eq!(lab.dropped(reason), before + 1, "{what}");
        assert!(lab.0.received.is_empty(), "{what}");
    }
    assert!(
        lab.0.advertised.len() <= 1,
        "the first one at the beginning"
    );
}

#[test]
fn a_guest_s_advertisement_tells_where_it_is() {
    let mut lab = Lab::new();
    let rule = Publish {
        protocol: Protocol::Udp,
        host: addr("[::]:5353"),
        guest: addr("[fd00::77]:5000"),
        splice: Splice::default(),
    };
    lab.0.publish(rule);
    let other = [2, 0, 0, 0, 0, 9];
    let ip = Ipv6::discovery(GUEST_LOCAL, ALL_NODES);
    let here = link_address(2, other);
    let target = "fd00::77".parse().unwrap();
    lab.send(ip.frame(&ip.advertisement(0x20, target, &here)));
    // Our own addresses are nobody else's.
    lab.send(ip.frame(&ip.advertisement(0x20, GATEWAY6, &here)));
    lab.deliver(FIRST, "[2001:db8::9]:4000", b"hello");
    assert_eq!(lab.0.received[0][..6], other);
    assert!(lab.reply().udp().is_some());
}

/// What the advertisement must say, from the header of its message on.
struct Told<'a> {
    lifetime: [u8; 2],
    prefix_flags: u8,
    mtu: u16,
    resolver: Option<Ipv6Addr>,
    search: &'a [u8],
}

impl Told<'_> {
    fn message(&self) -> Vec<u8> {
        /// A day in seconds.
        const VALID: [u8; 4] = [0, 1, 0x51, 0x80];
        // Hop limit 64; managed and other configuration by DHCPv6.
        let mut message = vec![134, 0, 0, 0, 64, 0xc0];
        message.extend(self.lifetime);
        message.extend([0; 8]);
        message.extend(link_address(1, GATEWAY_MAC));
        message.extend([5, 1, 0, 0, 0, 0]);
        message.extend(self.mtu.to_be_bytes());
        message.extend([3, 4, 64, self.prefix_flags]);
        message.extend([VALID, VALID].concat());
        message.extend([0; 4]);
        message.extend(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0).octets());
        if let Some(resolver) = self.resolver {
            message.extend([25, 3, 0, 0]);
            message.extend(VALID);
            message.extend(resolver.octets());
        }
        if !self.search.is_empty() {
            let units = u8::try_from(1 + self.search.len() / 8).unwrap();
            message.extend([31, units, 0, 0]);
            message.extend(VALID);
            message.extend(self.search);
        }
        message
    }
}

#[test]
fn a_router_solicitation_is_answered_byte_for_byte() {
    // On-link, and autonomous where addresses are to be made up.
    let cases = [
        (Config::default(), 0xc0, Some(RESOLVER6), &b""[..]),
        (
            Config {
                slaac: false,
                mtu: 1280,
                search: vec!["example.org".into(), "a..b".into(), "b.test".into()],
                ..Config::default()
            },
            0x80,
            Some(RESOLVER6),
            b"\x07example\x03org\0\x01b\x04test\0\0\0\0",
        ),
        (
            Config {
                dns: Dns::Off,
                mtu: 65_520,
                ..Config::default()
            },
            0xc0,
            None,
            b"",
        ),
    ];
    for (config, prefix_flags, resolver, search) in cases {
        let told = Told {
            lifetime: 1800_u16.to_be_bytes(),
            prefix_flags,
            mtu: config.mtu,
            resolver,
            search,
        };
        let mut lab = Lab::with(config);
        for src in [GUEST_LOCAL, GUEST] {
            for dst in [ALL_ROUTERS, ROUTER] {
                let ip = Ipv6::discovery(src, dst);
                lab.send(ip.frame(&ip.router_solicitation(&link_address(1, GUEST_MAC))));
                let answer = expected(GUEST_MAC, ROUTER, src, told.message());
                assert_eq!(std::mem::take(&mut lab.0.received), [answer]);
            }
        }
        lab.0.advertised.clear();
        let nobody = Ipv6::discovery(Ipv6Addr::UNSPECIFIED, ALL_ROUTERS);
        lab.send(nobody.frame(&nobody.router_solicitation(&[])));
        let answer = expected(ALL_NODES_MAC, ROUTER, ALL_NODES, told.message());
        let told_all: Vec<_> = lab.0.advertised.iter().map(|(_, frame)| frame).collect();
        assert_eq!(told_all, [&answer]);
        lab.0.advertised.clear();
        lab.wait(secs(17));
        lab.wait(millis(1));
        assert_eq!(lab.0.advertised[0].1, answer, "the same unasked");
    }
}

#[test]
fn only_a_prefix_of_64_is_for_making_up_addresses() {
    for (subnet, flags) in [
        ("2001:db8:7::/48", 0x80),
        ("fd00:7::/64", 0xc0),
        ("fd00::/96", 0x80),
    ] {
        let mut config = Config::default();
        config.plan = config.plan.with_ipv6(subnet.parse().unwrap()).unwrap();
        let mut lab = Lab::with(config);
        let ip = Ipv6::discovery(GUEST_LOCAL, ALL_ROUTERS);
        lab.send(ip.frame(&ip.router_solicitation(&[])));
        let reply = lab.reply();
        let prefix = &reply.payload[32..64];
        assert_eq!(prefix[..2], [3, 4]);
        let (length, told) = (prefix[2], prefix[3]);
        let shown = format!(
            "{}/{length}",
            Ipv6Addr::from(<[u8; 16]>::try_from(&prefix[16..]).unwrap())
        );
        assert_eq!((shown.as_str(), told), (subnet, flags));
    }
}

#[test]
fn advertisements_come_three_times_soon_and_then_every_few_minutes() {
    let mut intervals = Vec::new();
    for seed in 1..4 {
        let mut sim = Sim::of(GUEST6, seed, Config::default(), Faults::default());
        sim.settle(secs(10_000));
        let times: Vec<i64> = sim.advertised.iter().map(|(at, _)| at.secs()).collect();
        assert_eq!(times[..3], [0, 16, 32], "RFC 4861 6.2.4");
        intervals.extend(times[2..].windows(2).map(|pair| pair[1] - pair[0]));
        assert!(
            intervals.iter().all(|it| (200..=600).contains(it)),
            "{intervals:?}"
        );
    }
    let (least, most) = (
        intervals.iter().min().unwrap(),
        intervals.iter().max().unwrap(),
    );
    assert!(most - least > 100, "they are spread: {intervals:?}");
}

#[test]
fn without_a_way_out_the_gateway_is_no_default_router() {
    let mut lab = Lab::new();
    let ip = Ipv6::discovery(GUEST_LOCAL, ALL_ROUTERS);
    let ask = ip.frame(&ip.router_solicitation(&[]));
    for (reachable, lifetime) in [(false, 0), (true, 1800)] {
        lab.0.net.set_ipv6(reachable);
        // The host is not asked for its routes more often than that, whatever the guest asks.
        lab.wait(millis(20));
        lab.0.advertised.clear();
        lab.send(ask.clone());
        assert_eq!(lab.reply().word(6), lifetime);
        lab.wait(millis(1));
        let unasked = &lab.0.advertised[0].1;
        assert_eq!(unasked[60..62], lifetime.to_be_bytes(), "and unasked");
    }
}

#[test]
fn a_way_out_that_comes_late_is_told_soon() {
    let mut lab = Lab::new();
    let pass = |lab: &mut Lab, seconds| (0..seconds).for_each(|_| lab.wait(secs(1)));
    lab.0.net.set_ipv6(false);
    pass(&mut lab, 100);
    lab.0.advertised.clear();
    pass(&mut lab, 30);
    assert_eq!(lab.0.advertised.len(), 0, "nothing new");
    lab.0.net.set_ipv6(true);
    pass(&mut lab, 11);
    let told = &lab.0.advertised[0].1;
    assert_eq!(told[60..62], 1800_u16.to_be_bytes());
    assert_eq!(lab.0.advertised.len(), 1);
    // Also where somebody asks in between, who alone is answered.
    lab.0.net.set_ipv6(false);
    lab.wait(millis(20));
    let ip = Ipv6::discovery(GUEST_LOCAL, ALL_ROUTERS);
    lab.send(ip.frame(&ip.router_solicitation(&[])));
    assert_eq!(lab.reply().word(6), 0);
    lab.wait(millis(1));
    assert_eq!(lab.0.advertised.len(), 2);
}

#[test]
fn switched_off_everything_is_dropped_and_nothing_advertised() {
    let mut small = Config {
        mtu: 1279,
        ..Config::default()
    };
    small.plan = small.plan.for_mtu(small.mtu);
    for config in [without_ipv6(), small] {
        let mut lab = Lab::with(config);
        let ip = Ipv6::new(OUTSIDE6, packets::UDP);
        let ask = Ipv6::discovery(GUEST_LOCAL, ALL_ROUTERS);
        let who = Ipv6::discovery(GUEST, GATEWAY6);
        let frames = [
            ip.frame(&ip.udp(5000, 7, b"x")),
            ask.frame(&ask.router_solicitation(&[])),
            who.frame(&who.solicitation(GATEWAY6, &link_address(1, GUEST_MAC))),
            who.frame(&who.icmp([128, 0], [7, 1], b"x")),
            ip.fragment(7, (0, true), &[0; 8]),
        ];
        for (nth, frame) in frames.into_iter().enumerate() {
            lab.send(frame);
            assert_eq!(lab.dropped(DropReason::Ipv6), nth as u64 + 1);
        }
        lab.wait(secs(1000));
        assert_eq!(lab.received(), []);
        assert_eq!((lab.sent(), lab.0.advertised.len()), (vec![], 0));
        lab.udp(5000, "192.0.2.1:7", b"IPv4 goes on");
        assert_eq!(lab.sent().len(), 1);
        lab.rest();
    }
}

#[test]
fn a_flood_of_solicitations_stays_within_bounds() {
    let mut lab = Lab::new();
    for number in 0..3000_u16 {
        let src = Ipv6Addr::new(0xfd00, 0, 0, 0, 1, 0, 0, number);
        let ip = Ipv6::discovery(src, GATEWAY6);
        lab.0
            .inject(ip.frame(&ip.solicitation(GATEWAY6, &link_address(1, GUEST_MAC))));
        if number % 100 == 0 {
            lab.wait(millis(1));
        }
    }
    lab.wait(millis(1));
    assert_eq!(lab.0.stack.flows(), 0);
    lab.rest();
}
