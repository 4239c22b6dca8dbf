//! What can't be delivered, and what the network says about it: ICMPv6, and ICMP where both must agree.

use std::net::{IpAddr, SocketAddr};

use tapgate::host::QueuedError;
use tapgate::host::simulated::ConnectAnswer;
use tapgate::net::emit::IcmpError;

use crate::lab::{FIRST, Lab, addr, filled, millis};
use crate::packets::v6::{
    DESTINATION, Extension, FRAGMENT, GUEST_LOCAL, HOP_BY_HOP, Ipv6, PADDING,
};
use crate::packets::{ICMPV6, Ip, Ipv4, Segment, TCP, UDP};
use crate::sim::{GUEST, GUEST6};
use crate::{GATEWAY6, OUTSIDE6, RESOLVER6, icmp_frame};

/// Both families' outside, and the guest's sockets of the other, so that TCP comes back as it is.
const FAMILIES: [(&str, IpAddr); 2] = [("[2001:db8::1]:7", GUEST), ("192.0.2.1:7", GUEST6)];

#[test]
fn what_can_t_be_delivered_is_told_as_a_router_would() {
    let mut lab = Lab::new();
    let ip = Ipv6::new(OUTSIDE6, UDP);
    let neighbour = Ipv6::new("fd00::77".parse().unwrap(), UDP);
    let on_link = Ipv6::new("fe80::77".parse().unwrap(), UDP);
    let local = Ipv6 {
        src: GUEST_LOCAL,
        ..ip
    };
    let last = Ipv6 { hop_limit: 1, ..ip };
    let unknown = Ipv6::new(OUTSIDE6, 99);
    let names = Ipv6::new(RESOLVER6, UDP);
    let cases = [
        (last.frame(&ip.udp(5000, 7, b"x")), (3, 0), 0, GATEWAY6),
        (
            neighbour.frame(&neighbour.udp(5000, 7, b"x")),
            (1, 3),
            0,
            GATEWAY6,
        ),
        (
            on_link.frame(&on_link.udp(5000, 7, b"x")),
            (1, 3),
            0,
            GATEWAY6,
        ),
        (local.frame(&local.udp(5000, 7, b"x")), (1, 2), 0, GATEWAY6),
        (
            names.frame(&names.udp(5000, 54, b"x")),
            (1, 4),
            0,
            RESOLVER6,
        ),
        // The parameter problem points at the field that names what is not known.
        (unknown.frame(b"x"), (4, 1), 6, GATEWAY6),
        (
            unknown.extended_frame(&[Extension(DESTINATION, PADDING)], b"x"),
            (4, 1),
            40,
            GATEWAY6,
        ),
        (
            unknown.extended_frame(
                &[
                    Extension(HOP_BY_HOP, &[PADDING, &[1, 6, 0, 0, 0, 0, 0, 0]].concat()),
                    Extension(FRAGMENT, &[0, 0, 0, 0, 0, 9]),
                ],
                b"x",
            ),
            (4, 1),
            56,
            GATEWAY6,
        ),
    ];
    for (frame, said, word, by) in cases {
        lab.send(frame.clone());
        let reply = lab.reply();
        assert_eq!((reply.icmp(), reply.src), (Some(said), by.into()));
        assert_eq!((reply.word(4), reply.word(6)), (0, word), "{said:?}");
        assert_eq!(reply.payload[8..], frame[14..], "the packet is quoted");
    }
    assert_eq!(lab.sent(), vec![]);
    lab.rest();
}

#[test]
fn an_error_is_no_longer_than_1280_bytes() {
    for mtu in crate::MTUS {
        let mut lab = crate::with_mtu(mtu);
        let ip = Ipv6::new("fd00::77".parse().unwrap(), UDP);
        for len in [1183, 1184, 1185, 30_000, 65_527] {
            let datagram = ip.udp(5000, 7, &filled(len));
            for frame in ip.fragments(9, &datagram, 1232) {
                lab.0.inject(frame);
            }
            lab.wait(millis(1));
            let reply = lab.reply();
            assert_eq!(reply.icmp(), Some((1, 3)));
            let room = 1280 - 40 - 8 - 40;
            assert_eq!(reply.payload[48..], datagram[..datagram.len().min(room)]);
            assert_eq!(reply.pieces, 1);
        }
        lab.rest();
    }
}

#[test]
fn an_error_is_never_answered_by_an_error() {
    let mut lab = Lab::new();
    let quoted = Ipv6::new("fd00::100".parse().unwrap(), TCP).packet(&[0; 20]);
    for (src, hop_limit) in [("fd00::100", 1), ("fe80::100", 64)] {
        let ip = Ipv6 {
            src: src.parse().unwrap(),
            hop_limit,
            ..Ipv6::new(OUTSIDE6, ICMPV6)
        };
        for kind in [[1, 4], [2, 0], [3, 0], [4, 1], [100, 0]] {
            lab.send(icmp_frame(ip, kind, [0, 0], &quoted));
            assert_eq!(lab.received(), [], "{kind:?} from {src}");
        }
    }
    let four = Ipv4 {
        ttl: 1,
        ..Ipv4::new("192.0.2.1".parse().unwrap(), 1)
    };
    let mut packet = Ipv4::new(four.src, TCP).packet(&[0; 20]);
    packet[12..16].copy_from_slice(&[192, 0, 2, 1]);
    lab.send(four.frame(&Ip::V4(four).icmp([3, 3], [0, 0], &packet)));
    assert_eq!(lab.received(), []);
    lab.rest();
}

/// What the network reports, where from, and how the guest sees both: by whom, type, code and number.
type Report = (IcmpError, Option<&'static str>, &'static str, (u8, u8, u16));

const REPORTS: [Report; 11] = [
    (
        IcmpError::PortUnreachable,
        Some("2001:db8::1"),
        "2001:db8::1",
        (1, 4, 0),
    ),
    (
        IcmpError::HostUnreachable,
        Some("2001:db8:f::1"),
        "2001:db8:f::1",
        (1, 3, 0),
    ),
    (IcmpError::NetUnreachable, None, "fd00::2", (1, 0, 0)),
    (
        IcmpError::AdministrativelyProhibited,
        Some("::1"),
        "fd00::2",
        (1, 1, 0),
    ),
    (
        IcmpError::TimeExceeded,
        Some("2001:db8:f::1"),
        "2001:db8:f::1",
        (3, 0, 0),
    ),
    (
        IcmpError::ReassemblyTimeExceeded,
        None,
        "fd00::2",
        (3, 1, 0),
    ),
    (
        IcmpError::TooBig(1400),
        Some("2001:db8:f::1"),
        "2001:db8:f::1",
        (2, 0, 1400),
    ),
    (
        IcmpError::BeyondScope,
        Some("fe80::9"),
        "fd00::2",
        (1, 2, 0),
    ),
    (
        IcmpError::ProtocolUnreachable,
        Some("fd00::77"),
        "fd00::2",
        (4, 1, 6),
    ),
    (
        IcmpError::Raw(1, 6, 0),
        Some("192.0.2.1"),
        "fd00::2",
        (1, 6, 0),
    ),
    (
        IcmpError::Raw(4, 2, 48),
        Some("2001:db8::1"),
        "2001:db8::1",
        (4, 2, 48),
    ),
];

fn queued(error: IcmpError, reporter: Option<&str>, destination: SocketAddr) -> QueuedError {
    QueuedError {
        error,
        reporter: reporter.map(|text| text.parse().unwrap()),
        destination,
        quoted: 0,
    }
}

#[test]
fn errors_of_the_network_reach_the_guest_s_port() {
    let mut lab = Lab::new();
    lab.udp(5000, "[2001:db8::1]:7", b"hello");
    let ip = Ipv6::new(OUTSIDE6, UDP);
    for (error, reporter, from, (kind, code, word)) in REPORTS {
        let report = queued(error, reporter, addr("[2001:db8::1]:7"));
        lab.0.net.report_error(FIRST, report, b"hello");
        lab.wait(millis(1));
        let reply = lab.reply();
        assert_eq!(reply.src.to_string(), from, "{error:?}");
        assert_eq!((reply.icmp(), reply.word(6)), (Some((kind, code)), word));
        // All that is not known of the guest's packet is its flow label.
        let mut original = ip.packet(&ip.udp(5000, 7, b"hello"));
        original[1..4].fill(0);
        assert_eq!(reply.payload[8..], original, "{error:?}");
    }
    // About the host's loopback, which the guest knows as the gateway.
    let report = queued(IcmpError::PortUnreachable, Some("::1"), addr("[::1]:7"));
    lab.0.net.report_error(FIRST, report, &filled(2000));
    lab.wait(millis(1));
    let reply = lab.reply();
    assert_eq!((reply.src, reply.icmp()), (GATEWAY6.into(), Some((1, 4))));
    assert_eq!(reply.payload[8 + 24..8 + 40], GATEWAY6.octets());
    assert!(reply.payload.len() <= 1280 - 40);
    lab.rest();
}

#[test]
fn errors_of_the_network_reach_who_pings() {
    for (to, expected, reporter) in [
        (
            addr("[2001:db8::1]:0"),
            [(1, 3), (3, 0), (2, 0)],
            "2001:db8:f::1",
        ),
        (
            addr("192.0.2.1:0"),
            [(3, 1), (11, 0), (3, 4)],
            "203.0.113.1",
        ),
    ] {
        let mut lab = Lab::new();
        let (protocol, kind) = if to.is_ipv6() { (ICMPV6, 128) } else { (1, 8) };
        let ip = Ip::new(to.ip(), protocol);
        lab.send(ip.frame(&ip.icmp([kind, 0], [7, 3], b"data")));
        let errors = [
            IcmpError::HostUnreachable,
            IcmpError::TimeExceeded,
            IcmpError::TooBig(1300),
        ];
        for (error, said) in errors.into_iter().zip(expected) {
            // The host's identifier, not the guest's, and a sum that goes with it.
            let message = [&[kind, 0, 9, 9, 0, 99, 0, 3], &b"data"[..]].concat();
            let report = queued(error, Some(reporter), to);
            lab.0.net.report_error(FIRST, report, &message);
            lab.wait(millis(1));
            let reply = lab.reply();
            assert_eq!(
                (reply.src.to_string().as_str(), reply.icmp()),
                (reporter, Some(said))
            );
            let quoted = if to.is_ipv6() { 48 } else { 28 };
            assert_eq!(reply.payload[quoted..], ip.icmp([kind, 0], [7, 3], b"data"));
        }
        assert_eq!(lab.0.stack.flows(), 1, "RFC 5508 REQ-6");
        lab.rest();
    }
}

#[test]
fn errors_of_the_network_reach_who_connects() {
    let explained = [
        (IcmpError::HostUnreachable, (1, 3), (3, 1)),
        (IcmpError::AdministrativelyProhibited, (1, 1), (3, 13)),
        (IcmpError::TimeExceeded, (3, 0), (11, 0)),
    ];
    for (to, guest) in FAMILIES {
        for (error, six, four) in explained {
            let mut lab = Lab::of(guest, tapgate::config::Config::default());
            let to = addr(to);
            let (reporter, said) = if to.is_ipv6() {
                ("2001:db8:f::1", six)
            } else {
                ("203.0.113.1", four)
            };
            lab.0.net.answer(to, ConnectAnswer::FailLater(113));
            lab.0
                .net
                .explain_failure(to, queued(error, Some(reporter), to));
            let ip = Ip::new(to.ip(), TCP);
            let syn = Segment {
                from: 4000,
                to: 7,
                seq: 77,
                flags: 2,
                window: 1000,
                ..Segment::default()
            };
            lab.send(ip.frame(&ip.tcp(&syn, &[2, 4, 5, 0xa0], &[])));
            let reply = lab.reply();
            assert_eq!(
                (reply.src.to_string().as_str(), reply.icmp()),
                (reporter, Some(said))
            );
            let quoted = &reply.payload[if to.is_ipv6() { 48 } else { 28 }..];
            assert_eq!(
                quoted[..8],
                [0x0f, 0xa0, 0, 7, 0, 0, 0, 77],
                "ports and number"
            );
            assert_eq!(lab.0.stack.flows(), 0);
            lab.rest();
        }
    }
}

#[test]
fn connects_that_fail_are_told_as_a_router_would() {
    // ENETUNREACH, EHOSTUNREACH and EPERM at once; ETIMEDOUT later; refused, and out of descriptors.
    let cases = [
        (ConnectAnswer::Fail(101), Some(((1, 0), (3, 0)))),
        (ConnectAnswer::Fail(113), Some(((1, 3), (3, 1)))),
        (ConnectAnswer::Fail(1), Some(((1, 1), (3, 13)))),
        (ConnectAnswer::FailLater(110), Some(((1, 3), (3, 1)))),
        (ConnectAnswer::FailLater(111), None),
        (ConnectAnswer::Fail(24), None),
    ];
    for (to, guest) in FAMILIES {
        for (answer, said) in cases {
            let mut lab = Lab::of(guest, tapgate::config::Config::default());
            lab.0.net.answer_all(answer);
            let to = addr(to);
            let ip = Ip::new(to.ip(), TCP);
            let syn = Segment {
                from: 4000,
                to: 7,
                seq: 77,
                flags: 2,
                window: 1000,
                ..Segment::default()
            };
            lab.send(ip.frame(&ip.tcp(&syn, &[], &[])));
            let reply = lab.reply();
            let Some((six, four)) = said else {
                assert_eq!((reply.src, reply.payload[13]), (to.ip(), 0x14), "a RST");
                assert_eq!(reply.payload[8..12], [0, 0, 0, 78]);
                continue;
            };
            let gateway: IpAddr = if to.is_ipv6() {
                GATEWAY6.into()
            } else {
                crate::lab::GATEWAY.into()
            };
            let expected = if to.is_ipv6() { six } else { four };
            assert_eq!(
                (reply.src, reply.icmp()),
                (gateway, Some(expected)),
                "{answer:?}"
            );
            lab.rest();
        }
    }
}
