//! UDP, pings and names over IPv6, and what the headers of datagrams carry in both families.

use std::net::{IpAddr, Ipv6Addr};

use tapgate::config::{Config, Outbound, UdpFiltering};
use tapgate::host::simulated::{ConnectAnswer, SocketId};
use tapgate::host::{DatagramRole, PortWish, QueuedError};
use tapgate::net::emit::IcmpError;
use tapgate::net::{DropReason, Marks};

use crate::lab::{FIRST, Lab, OUTSIDE, addr, filled, millis};
use crate::packets::v6::{GUEST, GUEST_LOCAL, Ipv6};
use crate::packets::{self, ICMPV6, Ip, Ipv4, Segment, TCP, UDP};
use crate::{GATEWAY6, MTUS, OUTSIDE6, RESOLVER6, ROUTER, fits, icmp_frame, with_mtu};

/// Addresses that no socket may ever be given.
const FORBIDDEN: [&str; 9] = [
    "::1",
    "::",
    "ff02::1",
    "ff0e::1234",
    "::ffff:127.0.0.1",
    "::ffff:192.0.2.1",
    "::127.0.0.1",
    "::2",
    "ff01::1",
];

#[test]
fn one_port_of_a_guest_is_one_socket_and_anybody_may_answer() {
    let mut lab = Lab::new();
    for to in ["[2001:db8::1]:7", "[2001:db8:7::7]:9", "[fd00::2]:7"] {
        lab.udp(5000, to, b"hello");
    }
    let sent = lab.sent();
    let to: Vec<_> = sent.iter().map(|sent| sent.to).collect();
    assert_eq!(
        to,
        ["[2001:db8::1]:7", "[2001:db8:7::7]:9", "[::1]:7"].map(addr)
    );
    assert!(sent.iter().all(|sent| sent.socket == FIRST));
    for (from, seen) in [
        ("[2001:db8::1]:7", "[2001:db8::1]:7"),
        ("[2001:db8:ffff::9]:1234", "[2001:db8:ffff::9]:1234"),
        ("[::1]:7", "[fd00::2]:7"),
        ("[fe80::9%3]:7", "[fd00::2]:7"),
        ("[fd00::77]:7", "[fd00::2]:7"),
        ("[::ffff:192.0.2.1]:7", "[fd00::2]:7"),
    ] {
        lab.deliver(FIRST, from, b"answer");
        let reply = lab.reply();
        assert_eq!(
            reply.udp(),
            Some((addr(seen), 5000, &b"answer"[..])),
            "{from}"
        );
        assert_eq!(reply.dst, IpAddr::from(GUEST));
    }
    lab.udp(5000, "192.0.2.1:7", b"IPv4 is another port");
    assert_eq!(lab.sent()[0].socket, SocketId(1));
    lab.rest();
}

#[test]
fn without_host_loopback_nothing_reaches_or_leaves_it() {
    let mut lab = Lab::with(Config {
        host_loopback: false,
        ..Config::default()
    });
    lab.udp(5000, "[fd00::2]:7", b"hello");
    assert_eq!(lab.icmp_error(), (1, 0));
    lab.udp(5000, "[2001:db8::1]:7", b"hello");
    lab.deliver(FIRST, "[::1]:7", b"from inside");
    assert_eq!(lab.received(), []);
    assert_eq!(lab.sent().len(), 1);
    lab.rest();
}

#[test]
fn forbidden_destinations_reach_no_socket() {
    let mut lab = Lab::new();
    lab.0.net.answer_all(ConnectAnswer::Accept);
    for (nth, to) in FORBIDDEN.iter().enumerate() {
        let to: Ipv6Addr = to.parse().unwrap();
        let syn = Segment {
            from: 4000,
            to: 80,
            flags: 2,
            ..Segment::default()
        };
        let tcp = Ipv6::new(to, TCP);
        let udp = Ipv6::new(to, UDP);
        lab.send(udp.frame(&udp.udp(5000, 7, b"x")));
        lab.send(udp.frame(&udp.udp(5000, 53, b"x")));
        lab.send(icmp_frame(Ipv6::new(to, ICMPV6), [128, 0], [7, 1], b"x"));
        lab.send(tcp.frame(&tcp.tcp(&syn, &[], &[])));
        // Neither a hop limit that runs out nor an unknown protocol is a reason to speak.
        let last = Ipv6 {
            hop_limit: 1,
            ..udp
        };
        lab.send(last.frame(&udp.udp(5000, 7, b"x")));
        lab.send(Ipv6::new(to, 99).frame(b"x"));
        assert_eq!(lab.received(), [], "{to}");
        let dropped = lab.dropped(DropReason::Destination) + lab.dropped(DropReason::Protocol);
        assert_eq!(dropped, 6 * (nth as u64 + 1), "{to}");
    }
    assert_eq!((lab.sent(), lab.0.net.connections()), (vec![], vec![]));
    lab.rest();
}

#[test]
fn a_checksum_of_zero_is_refused() {
    let mut lab = Lab::new();
    let ip = Ipv6::new(OUTSIDE6, UDP);
    let mut datagram = ip.udp(5000, 7, b"hello");
    datagram[6..8].fill(0);
    lab.send(ip.frame(&datagram));
    assert_eq!(lab.dropped(DropReason::Checksum), 1);
    assert_eq!((lab.received(), lab.sent()), (vec![], vec![]));
    lab.rest();
}

#[test]
fn a_stranger_s_address_is_not_carried() {
    let mut lab = Lab::new();
    for src in [
        "fd01::1",
        "2001:db8::9",
        "fd00::2",
        "fd00::3",
        "fe80::2",
        "fd00::",
        "::1",
        "::",
        "ff02::1",
    ] {
        let ip = Ipv6 {
            src: src.parse().unwrap(),
            ..Ipv6::new(OUTSIDE6, UDP)
        };
        let before = lab.dropped(DropReason::Source);
        lab.send(ip.frame(&ip.udp(5000, 7, b"x")));
        assert_eq!(lab.dropped(DropReason::Source), before + 1, "{src}");
    }
    assert_eq!((lab.received(), lab.sent()), (vec![], vec![]));
    lab.rest();
}

#[test]
fn datagrams_of_any_size_go_both_ways() {
    for mtu in MTUS {
        let step = (usize::from(mtu) - 48) & !7;
        let mut lab = with_mtu(mtu);
        let edge = usize::from(mtu) - 48;
        for len in [0, 1, edge - 1, edge, edge + 1, 9000, 40_001, 65_507] {
            let data = filled(len);
            let ip = Ipv6::new(OUTSIDE6, UDP);
            let datagram = ip.udp(5000, 7, &data);
            let room = if len == edge { edge + 8 } else { step };
            for frame in ip.fragments(7, &datagram, room) {
                assert!(frame.len() <= 14 + usize::from(mtu));
                lab.0.inject(frame);
            }
            lab.wait(millis(1));
            let sent = lab.sent();
            assert!(
                sent.len() == 1 && sent[0].payload == data,
                "{len} bytes, MTU {mtu}"
            );
            lab.deliver(FIRST, "[2001:db8::1]:7", &data);
            assert!(fits(&lab, mtu), "{len} bytes, MTU {mtu}");
            let reply = lab.reply();
            let whole = len + 8 + 40 <= usize::from(mtu);
            let pieces = if whole { 1 } else { (len + 8).div_ceil(step) };
            assert_eq!(reply.pieces, pieces, "{len} bytes, MTU {mtu}");
            assert!(reply.udp().unwrap().2 == data);
        }
        lab.rest();
    }
}

#[test]
fn the_gateway_s_addresses_answer_pings_of_any_size() {
    for mtu in MTUS {
        let mut lab = with_mtu(mtu);
        for (to, len) in [
            (GATEWAY6, 0),
            (RESOLVER6, 56),
            (ROUTER, 1233),
            (GATEWAY6, 1453),
            (RESOLVER6, 20_001),
            (GATEWAY6, 65_527),
        ] {
            let data = filled(len);
            let src = if to == ROUTER { GUEST_LOCAL } else { GUEST };
            // It is not routed, so the last hop is enough.
            let ip = Ipv6 {
                src,
                hop_limit: 1,
                ..Ipv6::new(to, ICMPV6)
            };
            let message = ip.icmp([128, 0], [7, 1], &data);
            for frame in ip.fragments(9, &message, (usize::from(mtu) - 48) & !7) {
                lab.0.inject(frame);
            }
            lab.wait(millis(1));
            assert!(fits(&lab, mtu));
            let reply = lab.reply();
            assert_eq!((reply.src, reply.dst), (to.into(), src.into()));
            assert_eq!((reply.icmp(), reply.hop_limit), (Some((129, 0)), 64));
            assert_eq!((reply.word(4), reply.word(6)), (7, 1));
            assert!(reply.payload[8..] == data, "{len} bytes, MTU {mtu}");
        }
        lab.rest();
    }
}

#[test]
fn pings_to_the_outside_go_by_an_echo_socket() {
    let mut lab = Lab::new();
    let ip = Ipv6 {
        hop_limit: 30,
        class: 0xb8,
        ..Ipv6::new(OUTSIDE6, ICMPV6)
    };
    lab.send(icmp_frame(ip, [128, 0], [7, 1], b"data"));
    let sent = lab.sent().remove(0);
    assert_eq!(
        (sent.to.ip(), &sent.payload[2..]),
        (OUTSIDE6.into(), &b"data"[..])
    );
    let marks = sent.marks.unwrap();
    assert_eq!((marks.hop_limit, marks.tos), (29, 0xb8));
    lab.0
        .net
        .deliver_echo(FIRST, OUTSIDE6.into(), 1, &filled(3000));
    lab.wait(millis(1));
    let reply = lab.reply();
    assert_eq!((reply.src, reply.icmp()), (OUTSIDE6.into(), Some((129, 0))));
    assert_eq!(
        (reply.word(4), reply.word(6)),
        (7, 1),
        "the guest's own identifier"
    );
    assert_eq!(
        (reply.payload[8..] == filled(3000), reply.pieces),
        (true, 3)
    );
    lab.rest();
    // EACCES, and EAFNOSUPPORT of a kernel without IPv6.
    for (errno, told) in [(13, (1, 1)), (97, (1, 0))] {
        let mut lab = Lab::new();
        lab.0.net.fail_echo(Some(errno));
        lab.send(icmp_frame(ip, [128, 0], [7, 1], b"data"));
        assert_eq!(lab.icmp_error(), told, "errno {errno}");
        lab.rest();
    }
}

#[test]
fn a_guest_s_marks_reach_the_wire_one_hop_further() {
    let mut lab = Lab::new();
    let six = Ipv6 {
        hop_limit: 17,
        class: 0xb9,
        ..Ipv6::new(OUTSIDE6, UDP)
    };
    let inside = Ipv6 {
        dst: GATEWAY6,
        ..six
    };
    let four = Ipv4 {
        ttl: 17,
        ..Ipv4::new(OUTSIDE, UDP)
    };
    let unfragmented = Ipv4 {
        fragment: 0x4000,
        ..four
    };
    let long = six.udp(5000, 7, &filled(3000));
    let expected = [
        (vec![six.frame(&six.udp(5000, 7, b"x"))], (16, 0xb9, true)),
        (
            vec![inside.frame(&inside.udp(5000, 7, b"x"))],
            (17, 0xb9, true),
        ),
        // Who sends fragments does not mind them.
        (six.fragments(3, &long, 1448), (16, 0xb9, false)),
        (vec![four.frame(&four.udp(5000, 7, b"x"))], (16, 0, false)),
        (
            vec![unfragmented.frame(&four.udp(5000, 7, b"x"))],
            (16, 0, true),
        ),
    ];
    for (frames, (hop_limit, tos, dont_fragment)) in expected {
        frames.into_iter().for_each(|frame| lab.0.inject(frame));
        lab.wait(millis(1));
        let marks = Marks {
            hop_limit,
            tos,
            dont_fragment,
        };
        assert_eq!(lab.sent()[0].marks, Some(marks));
    }
    lab.rest();
}

#[test]
fn a_sender_s_marks_reach_the_guest_one_hop_further() {
    let mut lab = Lab::new();
    lab.udp(5000, "[2001:db8::1]:7", b"hello");
    lab.udp(5000, "192.0.2.1:7", b"hello");
    for (socket, from, [sent, seen]) in [
        (FIRST, "[2001:db8::1]:7", [57, 56]),
        (FIRST, "[2001:db8::1]:7", [1, 1]),
        (FIRST, "[::1]:7", [57, 57]),
        (SocketId(1), "192.0.2.1:7", [57, 56]),
        (SocketId(1), "127.0.0.1:7", [57, 57]),
    ] {
        for len in [5, 3000] {
            let marks = Marks {
                hop_limit: sent,
                tos: 0x2f,
                dont_fragment: false,
            };
            let data = filled(len);
            lab.0.net.deliver_marked(socket, addr(from), &data, marks);
            lab.wait(millis(1));
            let reply = lab.reply();
            assert_eq!((reply.hop_limit, reply.tos), (seen, 0x2f), "{from}");
        }
    }
    lab.rest();
}

#[test]
fn a_port_s_wish_is_the_guest_s_own_port() {
    let mut lab = Lab::with(Config {
        outbound6: Some(Outbound::Address(OUTSIDE6.into())),
        ..Config::default()
    });
    let wish = |lab: &Lab, id: usize| match lab.0.net.role(SocketId(id)).unwrap() {
        DatagramRole::Outbound(PortWish { ipv6, port, .. }) => (false, ipv6, port),
        DatagramRole::Loopback(PortWish { ipv6, port, .. }) => (true, ipv6, port),
        DatagramRole::Connected(_) | DatagramRole::Published(_) => panic!("a guest's port"),
    };
    for (nth, (from, to, expected)) in [
        (5001, "[2001:db8::1]:7", (false, true, 5001)),
        (5002, "192.0.2.1:7", (false, false, 5002)),
        // Past the outbound address of that family, for the host's own loopback.
        (5001, "[fd00::2]:7", (true, true, 5001)),
        (5003, "10.0.2.2:7", (false, false, 5003)),
    ]
    .into_iter()
    .enumerate()
    {
        lab.udp(from, to, b"x");
        assert_eq!(wish(&lab, nth), expected, "{to}");
    }
    lab.rest();
}

#[test]
fn filtering_lets_in_whom_it_is_told_to() {
    for (filtering, same_address, stranger) in [
        (UdpFiltering::Open, true, true),
        (UdpFiltering::Address, true, false),
        (UdpFiltering::Endpoint, false, false),
    ] {
        for [to, other_port, other] in [
            ["[2001:db8::1]:7", "[2001:db8::1]:8", "[2001:db8::2]:7"],
            ["192.0.2.1:7", "192.0.2.1:8", "192.0.2.2:7"],
        ] {
            let mut lab = Lab::with(Config {
                udp_filtering: filtering,
                ..Config::default()
            });
            lab.udp(5000, to, b"hello");
            for (from, heard) in [(to, true), (other_port, same_address), (other, stranger)] {
                lab.deliver(FIRST, from, b"answer");
                assert_eq!(
                    lab.received().len(),
                    usize::from(heard),
                    "{filtering:?} {from}"
                );
            }
            let unheard = u64::from(!same_address) + u64::from(!stranger);
            assert_eq!(lab.dropped(DropReason::Filtered), unheard);
            lab.rest();
        }
    }
    // What the gateway stands for is known under the host's name.
    let mut lab = Lab::with(Config {
        udp_filtering: UdpFiltering::Endpoint,
        ..Config::default()
    });
    lab.udp(5000, "[fd00::2]:7", b"hello");
    lab.deliver(FIRST, "[::1]:7", b"answer");
    assert_eq!(lab.reply().udp().unwrap().0, addr("[fd00::2]:7"));
    lab.rest();
}

#[test]
fn a_datagram_too_long_for_the_path_is_told_at_once() {
    for (to, guest_frame, said) in [
        ("[2001:db8::1]:7", 5000, (2, 0)),
        ("192.0.2.1:7", 5001, (3, 4)),
    ] {
        let mut lab = Lab::new();
        lab.udp(guest_frame, to, b"short");
        lab.0.net.limit_datagrams(Some(1000));
        let frame = packets::udp_frame(guest_frame, addr(to), &filled(1200));
        let quoted = frame[14..].to_vec();
        // Nobody knows how long it may be: the sender is not told what is not known.
        lab.send(frame.clone());
        assert_eq!(
            (lab.received(), lab.dropped(DropReason::HostBusy)),
            (vec![], 1)
        );
        for error in [IcmpError::PortUnreachable, IcmpError::TooBig(1024)] {
            let queued = QueuedError {
                error,
                reporter: None,
                destination: addr(to),
                quoted: 0,
            };
            lab.0.net.report_error(FIRST, queued, &filled(1200));
        }
        lab.0.with_stack(|stack, turn| {
            let meta = tapgate::buf::RxMeta::plain(tapgate::buf::LinkId(0));
            stack.handle_frame(turn, &frame, meta);
        });
        lab.wait(millis(1));
        // What the queue held of an earlier one is told as well.
        let mut received = lab.received();
        let reply = received.pop().unwrap();
        let earlier: Vec<_> = received.iter().map(packets::Received::icmp).collect();
        let refused = if said.0 == 2 { (1, 4) } else { (3, 3) };
        assert_eq!(earlier, [Some(refused)]);
        assert_eq!(reply.icmp(), Some(said));
        assert_eq!(
            (reply.word(4), reply.word(6)),
            (0, 1024),
            "the next hop's MTU"
        );
        assert!(
            quoted.starts_with(&reply.payload[8..]),
            "the guest's own packet"
        );
        assert!(reply.payload.len() > 500);
        lab.0.net.limit_datagrams(None);
        assert_eq!(lab.sent().len(), 1, "what was short went");
        lab.rest();
    }
}

#[test]
fn names_are_asked_for_at_the_resolver_of_either_family() {
    for (resolver, upstream) in [
        ("[fd00::3]:53", "192.0.2.53:53"),
        ("[fd00::3]:53", "[2001:db8::53]:53"),
        ("10.0.2.3:53", "[2001:db8::53]:53"),
    ] {
        let mut lab = Lab::new();
        lab.0.net.set_resolvers(&[addr(upstream)]);
        let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        query.extend(b"\x07example\x03org\x00\x00\x1c\x00\x01");
        lab.udp(5000, resolver, &query);
        let asked = lab.sent().remove(0);
        assert_eq!(
            (asked.to, &asked.payload[2..]),
            (addr(upstream), &query[2..])
        );
        let mut answer = asked.payload;
        answer[2] |= 0x80;
        answer.extend(filled(1800));
        lab.0.net.deliver(asked.socket, asked.to, &answer);
        lab.wait(millis(1));
        answer[..2].copy_from_slice(&query[..2]);
        assert_eq!(lab.reply().udp(), Some((addr(resolver), 5000, &answer[..])));
        lab.rest();
    }
}

#[test]
fn over_the_limit_a_port_is_refused() {
    let mut lab = Lab::with(Config {
        max_flows: 1,
        ..Config::default()
    });
    lab.udp(5000, "[2001:db8::1]:7", b"first");
    lab.udp(5001, "[2001:db8::1]:7", b"second");
    assert_eq!(lab.icmp_error(), (1, 1));
    let ip = Ip::new(OUTSIDE6.into(), TCP);
    let syn = Segment {
        from: 4000,
        to: 80,
        flags: 2,
        ..Segment::default()
    };
    lab.send(ip.frame(&ip.tcp(&syn, &[], &[])));
    assert_eq!(lab.reply().payload[13], 0x14, "a RST");
    assert_eq!(lab.0.stack.counters().flows_refused, 2);
    lab.rest();
}
