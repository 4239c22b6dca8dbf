//! Rows 33 and 34: where a guest may not send to, nor say that it comes from, however it spells it.
//!
//! In: packets of every protocol with forbidden sources and destinations. Out: the calls that the host saw,
//! of which there must be none, and that nothing is said about them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tapgate::config::{Config, Dns};
use tapgate::host::simulated::ConnectAnswer;
use tapgate::net::DropReason;

use crate::packets::v6::Ipv6;
use crate::packets::{ICMP, ICMPV6, Ip, Ipv4, Received, Segment, TCP, UDP};
use crate::rig::{OUTSIDE, Rig, addr};
use crate::{Random, count};

/// A connection request, a datagram and a ping between two addresses.
fn packets(src: IpAddr, dst: IpAddr) -> Vec<Vec<u8>> {
    let ip = |protocol| match (Ip::new(dst, protocol), src) {
        (Ip::V4(ip), IpAddr::V4(src)) => Ip::V4(Ipv4 { src, ..ip }),
        (Ip::V6(ip), IpAddr::V6(src)) => Ip::V6(Ipv6 { src, ..ip }),
        (ip, _) => ip,
    };
    let syn = Segment {
        from: 4000,
        to: 80,
        flags: 2,
        window: 1000,
        ..Segment::default()
    };
    let (ping, protocol) = if dst.is_ipv4() {
        ([8, 0], ICMP)
    } else {
        ([128, 0], ICMPV6)
    };
    let (tcp, udp, icmp) = (ip(TCP), ip(UDP), ip(protocol));
    vec![
        tcp.frame(&tcp.tcp(&syn, &[], &[])),
        udp.frame(&udp.udp(4000, 53, b"x")),
        icmp.frame(&icmp.icmp(ping, [1, 2], b"x")),
    ]
}

fn own(dst: IpAddr) -> IpAddr {
    match dst {
        IpAddr::V4(_) => crate::packets::GUEST.into(),
        IpAddr::V6(_) => crate::packets::v6::GUEST.into(),
    }
}

/// No socket call came of these packets; gives what was said about them.
fn nowhere(rig: &mut Rig, src: IpAddr, dst: IpAddr) -> Vec<Received> {
    for frame in packets(src, dst) {
        rig.frame(&frame);
        assert!(rig.net.connections().is_empty(), "{src} to {dst}");
        assert!(rig.net.take_sent().is_empty(), "{src} to {dst}");
        assert_eq!(rig.net.open_sockets(), 0, "{src} to {dst}");
    }
    rig.received()
}

/// Addresses below these prefixes: the first, the last, and some between.
fn below(prefixes: &[(&str, u32)], random: &mut Random, some: usize) -> Vec<IpAddr> {
    let mut all = Vec::new();
    for (prefix, len) in prefixes {
        let addr: IpAddr = prefix.parse().unwrap();
        let picks = (0..some).map(|nth| match nth {
            0 => 0,
            1 => u128::MAX,
            _ => u128::from(random.next()) << 64 | u128::from(random.next()),
        });
        all.extend(picks.map(|pick| match addr {
            IpAddr::V4(addr) => {
                let mask = u128::from(u32::MAX.checked_shr(*len).unwrap_or(0));
                let host = u32::try_from(pick & mask).unwrap();
                IpAddr::from(Ipv4Addr::from(u32::from(addr) | host))
            }
            IpAddr::V6(addr) => {
                let mask = u128::MAX.checked_shr(*len).unwrap_or(0);
                IpAddr::from(Ipv6Addr::from(u128::from(addr) | (pick & mask)))
            }
        }));
    }
    all
}

#[test]
fn row_33_forbidden_sources_and_destinations() {
    let mut rig = Rig::new();
    rig.net.answer_all(ConnectAnswer::Accept);
    let mut random = Random::new(33);
    let some = count(50, 5_000);
    // Never sent to, whatever the options say.
    let destinations = [
        ("0.0.0.0", 8),
        ("127.0.0.0", 8),
        ("224.0.0.0", 4),
        ("240.0.0.0", 4),
        ("10.0.2.255", 32),
        ("::", 96),
        ("::ffff:0.0.0.0", 96),
        ("ff00::", 8),
    ];
    for dst in below(&destinations, &mut random, some) {
        assert_eq!(nowhere(&mut rig, own(dst), dst), [], "{dst}");
    }
    // Links of their own, of which the guest's has nobody there; that is said, a thousand times a second at most.
    for dst in below(&[("169.254.0.0", 16), ("fe80::", 10)], &mut random, some) {
        let said = nowhere(&mut rig, own(dst), dst);
        let unreachable = if dst.is_ipv4() { (3, 1) } else { (1, 3) };
        assert!(
            said.iter().all(|it| it.icmp() == Some(unreachable)),
            "{dst}: {said:?}"
        );
    }
    // Never come from (RFC 2827): the same, the world, the gateway's own, the subnet's two ends.
    let sources = [
        ("0.0.0.0", 8),
        ("127.0.0.0", 8),
        ("169.254.0.0", 16),
        ("224.0.0.0", 4),
        ("240.0.0.0", 4),
        ("192.0.2.0", 24),
        ("10.0.3.0", 24),
        ("10.0.2.0", 32),
        ("10.0.2.2", 32),
        ("10.0.2.3", 32),
        ("10.0.2.255", 32),
        ("::", 128),
        ("::1", 128),
        ("::ffff:0.0.0.0", 96),
        ("ff00::", 8),
        ("2001:db8::", 32),
        ("fd00::2", 128),
        ("fe80::2", 128),
    ];
    let before = rig.dropped(DropReason::Source);
    let all = below(&sources, &mut random, some);
    for src in &all {
        let dst: IpAddr = match src {
            IpAddr::V4(_) => OUTSIDE.into(),
            IpAddr::V6(_) => "2001:db8::1".parse().unwrap(),
        };
        assert_eq!(nowhere(&mut rig, *src, dst), [], "{src}");
    }
    let dropped = usize::try_from(rig.dropped(DropReason::Source) - before).unwrap();
    assert_eq!(dropped, 3 * all.len(), "each for that reason");
    rig.recovers(0);
}

#[test]
fn row_34_no_host_loopback_and_no_dns() {
    let mut rig = Rig::with(Config {
        host_loopback: false,
        dns: Dns::Off,
        ..Config::default()
    });
    rig.net.answer_all(ConnectAnswer::Accept);
    rig.net.set_resolvers(&[addr("127.0.0.1:53")]);
    let spellings = [
        "10.0.2.2",
        "fd00::2",
        "fe80::2",
        "10.0.2.3",
        "fd00::3",
        "127.0.0.1",
        "127.0.0.53",
        "127.1.2.3",
        "127.255.255.254",
        "0.0.0.0",
        "0.0.0.1",
        "::1",
        "::",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:0.0.0.0",
        "::ffff:10.0.2.2",
    ];
    for dst in spellings {
        let dst: IpAddr = dst.parse().unwrap();
        let said = nowhere(&mut rig, own(dst), dst);
        // The gateway's own addresses answer pings and refuse the rest; nothing else is said.
        let ours = ["10.0.2.2", "10.0.2.3", "fd00::2", "fd00::3", "fe80::2"];
        let ours = ours.iter().any(|it| it.parse() == Ok(dst));
        assert_eq!(said.len(), if ours { 3 } else { 0 }, "{dst}: {said:?}");
    }
    // Nor does anything of the loopback come in by a port that is open for the world.
    let ip = Ipv4::new(OUTSIDE, UDP);
    rig.frame(&ip.frame(&ip.udp(5000, 7, b"x")));
    let sent = rig.net.take_sent();
    for from in ["127.0.0.1:7", "127.0.0.53:53"] {
        rig.net
            .deliver(sent[0].socket, from.parse::<SocketAddr>().unwrap(), b"in");
    }
    rig.turn();
    assert_eq!(rig.received(), []);
    rig.recovers(0);
}
