//! Dialogues in virtual time for the gateway's services but names: ARP, ICMP, DHCP and UDP.
//!
//! The guest's frames are written by `sim/packets.rs`, the host's servers are played by the test.
//! Each test ends with [`Lab::rest`]: when every idle time is over, no flow and no socket is left.
#![allow(
    clippy::unwrap_used,
    reason = "a scenario that can not go on has failed"
)]

#[path = "sim/lab.rs"]
mod lab;
#[path = "sim/packets.rs"]
mod packets;
mod sim;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::{Arc, Mutex};

use lab::{FIRST, GATEWAY, Lab, OUTSIDE, RESOLVER, addr, filled, millis, secs};
use packets::{ICMP, Ipv4, Segment, TCP, UDP};
use smoltcp::socket::tcp::State;
use tapgate::buf::{LinkId, RxMeta};
use tapgate::config::Config;
use tapgate::host::QueuedError;
use tapgate::host::simulated::{ConnectAnswer, SocketId};
use tapgate::net::DropReason;
use tapgate::net::emit::IcmpError;

const EACCES: i32 = 13;

fn echo_frame(to: Ipv4Addr, data: &[u8]) -> Vec<u8> {
    Ipv4::new(to, ICMP).frame(&packets::icmp(8, 0, [7, 1], data))
}

// --- ARP, ICMP, DHCP -----------------------------------------------------------------------------

#[test]
fn arp_is_answered_for_the_gateway_and_the_resolver_only() {
    let mut lab = Lab::new();
    for (target, answered) in [
        ("10.0.2.2", true),
        ("10.0.2.3", true),
        ("10.0.2.1", false),
        ("10.0.2.15", false),
        ("192.0.2.1", false),
    ] {
        let target: Ipv4Addr = target.parse().unwrap();
        lab.send(packets::arp_frame(
            1,
            packets::GUEST_MAC,
            packets::GUEST,
            target,
        ));
        let replies = std::mem::take(&mut lab.0.received);
        assert_eq!(replies.len(), usize::from(answered), "{target}");
        if let Some(reply) = replies.first() {
            assert_eq!(reply[..6], packets::GUEST_MAC);
            assert_eq!(reply[20..22], [0, 2], "a reply");
            assert_eq!(reply[22..28], packets::GATEWAY_MAC);
            assert_eq!(reply[28..32], target.octets());
        }
    }
    // A probe for its own address (RFC 5227) stays unanswered.
    lab.send(packets::arp_frame(
        1,
        packets::GUEST_MAC,
        Ipv4Addr::UNSPECIFIED,
        packets::GUEST,
    ));
    assert!(lab.0.received.is_empty());
    lab.rest();
}

#[test]
fn an_arp_reply_tells_where_a_guest_is() {
    let mut lab = Lab::new();
    let other = [2, 0, 0, 0, 0, 9];
    let mut frame = packets::arp_frame(2, other, packets::GUEST, GATEWAY);
    frame[..6].copy_from_slice(&packets::GATEWAY_MAC);
    frame[6..12].copy_from_slice(&other);
    lab.send(frame);
    lab.publish();
    lab.0.net.deliver(FIRST, addr("192.0.2.9:4000"), b"hello");
    lab.wait(millis(1));
    assert_eq!(lab.0.received[0][..6], other);
    assert!(lab.0.stack.unpublish(1, None));
    lab.rest();
}

#[test]
fn the_gateway_s_addresses_answer_pings_of_any_size() {
    for mtu in [576, 1500] {
        let mut lab = Lab::with(Config {
            mtu,
            ..Config::default()
        });
        for (to, len) in [
            (GATEWAY, 0),
            (RESOLVER, 56),
            (GATEWAY, 1473),
            (RESOLVER, 20_001),
            (GATEWAY, 65_507),
        ] {
            let data = filled(len);
            let message = packets::icmp(8, 0, [7, 1], &data);
            let step = usize::from(mtu - 20) & !7;
            for frame in Ipv4::new(to, ICMP).fragments(&message, step) {
                assert!(frame.len() <= 14 + usize::from(mtu));
                lab.0.inject(frame);
            }
            lab.wait(millis(1));
            assert!(
                lab.0
                    .received
                    .iter()
                    .all(|frame| frame.len() <= 14 + usize::from(mtu))
            );
            let reply = lab.reply();
            assert_eq!((reply.src, reply.icmp()), (to.into(), Some((0, 0))));
            assert_eq!((reply.word(4), reply.word(6)), (7, 1));
            assert_eq!(reply.payload[8..], data, "{len} bytes");
        }
        assert_eq!(lab.0.stack.flows(), 0);
        lab.rest();
    }
}

#[test]
fn pings_to_the_outside_go_by_an_echo_socket() {
    let mut lab = Lab::new();
    lab.send(echo_frame(OUTSIDE, b"data"));
    let sent = lab.sent();
    assert_eq!(
        (sent[0].to.ip(), &sent[0].payload[2..]),
        (OUTSIDE.into(), &b"data"[..])
    );
    lab.0.net.deliver_echo(FIRST, OUTSIDE.into(), 1, b"data");
    lab.wait(millis(1));
    let reply = lab.reply();
    assert_eq!((reply.src, reply.icmp()), (OUTSIDE.into(), Some((0, 0))));
    assert_eq!(
        (reply.word(4), reply.word(6)),
        (7, 1),
        "the guest's own identifier"
    );
    assert_eq!(reply.payload[8..], *b"data");
    lab.wait(secs(50));
    assert_eq!(lab.0.net.open_sockets(), 1, "RFC 5508 REQ-2: 60 s");
    lab.rest();
}

/// What a subscriber of the log writes to.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn without_echo_sockets_the_guest_is_told_and_the_log_once() {
    let lines = Lines::default();
    let writer = lines.clone();
    let log = tracing_subscriber::fmt()
        .with_writer(move || writer.clone())
        .with_max_level(tracing::Level::WARN)
        .finish();
    tracing::subscriber::with_default(log, || {
        let mut lab = Lab::new();
        lab.0.net.fail_echo(Some(EACCES));
        for _ in 0..3 {
            lab.send(echo_frame(OUTSIDE, b""));
            assert_eq!(lab.icmp_error(), (3, 13));
        }
        assert!(lab.sent().is_empty());
        lab.rest();
    });
    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    assert_eq!(text.matches("ping_group_range='0").count(), 1, "{text}");
}

#[test]
fn a_client_without_an_address_gets_one() {
    let mut lab = Lab::new();
    let ip = Ipv4 {
        src: Ipv4Addr::UNSPECIFIED,
        ..Ipv4::new(Ipv4Addr::BROADCAST, UDP)
    };
    for (options, kind) in [
        (&[(53_u8, &[1_u8][..])][..], 2),
        (
            &[(53, &[3]), (50, &[10, 0, 2, 15]), (54, &[10, 0, 2, 2])],
            5,
        ),
    ] {
        let message = packets::dhcp(packets::GUEST_MAC, Ipv4Addr::UNSPECIFIED, options);
        let datagram = ip.udp(68, 67, &message);
        lab.send(packets::ethernet(
            packets::BROADCAST_MAC,
            0x800,
            &ip.packet(&datagram),
        ));
        let reply = lab.reply();
        let (from, to, message) = reply.udp().unwrap();
        assert_eq!((from, to), (addr("10.0.2.2:67"), 68));
        assert_eq!(message[16..20], [10, 0, 2, 15], "the first of the pool");
        assert_eq!(message[240..243], [53, 1, kind]);
    }
    lab.rest();
}

// --- UDP -----------------------------------------------------------------------------------------

#[test]
fn one_port_of_a_guest_is_one_socket_and_anybody_may_answer() {
    let mut lab = Lab::new();
    for to in ["192.0.2.1:7", "198.51.100.1:9", "10.0.2.2:7"] {
        lab.udp(5000, to, b"hello");
    }
    let sent = lab.sent();
    assert!(sent.iter().all(|sent| sent.socket == FIRST));
    assert_eq!(sent[2].to, addr("127.0.0.1:7"));
    for (from, seen) in [
        ("192.0.2.1:7", "192.0.2.1:7"),
        ("203.0.113.9:1234", "203.0.113.9:1234"),
        ("127.0.0.1:7", "10.0.2.2:7"),
    ] {
        lab.deliver(FIRST, from, b"answer");
        assert_eq!(lab.reply().udp(), Some((addr(seen), 5000, &b"answer"[..])));
    }
    lab.udp(5001, "192.0.2.1:7", b"another");
    assert_eq!(lab.sent()[0].socket, SocketId(1));
    lab.rest();
}

#[test]
fn without_host_loopback_nothing_reaches_or_leaves_it() {
    let mut lab = Lab::with(Config {
        host_loopback: false,
        ..Config::default()
    });
    lab.udp(5000, "10.0.2.2:7", b"hello");
    assert_eq!(lab.icmp_error(), (3, 0));
    lab.udp(5000, "192.0.2.1:7", b"hello");
    for from in ["127.0.0.1:7", "127.0.0.53:53"] {
        lab.deliver(FIRST, from, b"from inside");
    }
    assert_eq!(lab.received(), []);
    let connect = lab.0.connect("10.0.2.2:80");
    lab.wait(millis(1));
    assert_eq!(lab.icmp_error(), (3, 0));
    lab.0.socket(connect).abort();
    assert_eq!(lab.0.net.connections(), []);
    assert_eq!(lab.sent().len(), 1);
    lab.rest();
}

#[test]
fn idle_ports_are_closed_in_time_and_not_before() {
    // To names only 10 s, answered or not; unanswered 30 s; else 180 s (RFC 4787 REQ-5).
    let cases = [
        ("192.0.2.1:53", false, 10),
        ("192.0.2.1:53", true, 10),
        ("192.0.2.1:5000", false, 30),
        ("192.0.2.1:5000", true, 180),
    ];
    for (to, answered, idle) in cases {
        let mut lab = Lab::new();
        lab.udp(5000, to, b"hello");
        if answered {
            lab.deliver(FIRST, to, b"answer");
        }
        lab.wait(secs(idle) - millis(10));
        assert_eq!(lab.0.net.open_sockets(), 1, "{to} {answered}");
        lab.wait(millis(10));
        assert_eq!(
            (lab.0.net.open_sockets(), lab.0.stack.flows()),
            (0, 0),
            "{to} {answered}"
        );
        lab.rest();
    }
}

#[test]
fn errors_of_the_network_reach_the_guest_from_who_reported_them() {
    let mut lab = Lab::new();
    lab.udp(5000, "192.0.2.1:7", b"hello");
    let cases = [
        (
            IcmpError::PortUnreachable,
            Some([192, 0, 2, 1]),
            [192, 0, 2, 1],
            (3, 3),
        ),
        (
            IcmpError::Raw(11, 0, 0),
            Some([203, 0, 113, 1]),
            [203, 0, 113, 1],
            (11, 0),
        ),
        (IcmpError::HostUnreachable, None, [10, 0, 2, 2], (3, 1)),
    ];
    for (error, reporter, from, said) in cases {
        let queued = QueuedError {
            error,
            reporter: reporter.map(Into::into),
            destination: addr("192.0.2.1:7"),
            quoted: 0,
        };
        lab.0.net.report_error(FIRST, queued, b"hello");
        lab.wait(millis(1));
        let reply = lab.reply();
        assert_eq!((reply.src, reply.icmp()), (IpAddr::from(from), Some(said)));
        let quoted = &reply.payload[8..];
        assert_eq!(
            (quoted[9], &quoted[12..20]),
            (UDP, &[10, 0, 2, 100, 192, 0, 2, 1][..])
        );
        assert_eq!(quoted[20..24], [0x13, 0x88, 0, 7], "both ports");
        assert_eq!(quoted[28..], *b"hello");
    }
    lab.rest();
}

#[test]
fn datagrams_of_any_size_go_both_ways() {
    for mtu in [576, 1500] {
        let mut lab = Lab::with(Config {
            mtu,
            ..Config::default()
        });
        let step = usize::from(mtu - 20) & !7;
        for len in [0, step - 8, step - 7, 65_507] {
            let data = filled(len);
            let ip = Ipv4::new(OUTSIDE, UDP);
            let datagram = ip.udp(5000, 7, &data);
            // The last fragment first, and twice.
            let mut frames = ip.fragments(&datagram, step);
            frames.reverse();
            frames.insert(0, frames[0].clone());
            for frame in frames {
                lab.0.inject(frame);
            }
            lab.wait(millis(1));
            let sent = lab.sent();
            let copies = if datagram.len() <= step { 2 } else { 1 };
            assert_eq!(sent.len(), copies, "{len} bytes");
            assert!(sent[0].payload == data, "{len} bytes");
            lab.deliver(FIRST, "192.0.2.1:7", &data);
            assert!(
                lab.0
                    .received
                    .iter()
                    .all(|frame| frame.len() <= 14 + usize::from(mtu))
            );
            assert_eq!(
                lab.reply().udp(),
                Some((addr("192.0.2.1:7"), 5000, &data[..]))
            );
        }
        lab.rest();
    }
}

#[test]
fn fragments_that_overlap_are_no_datagram() {
    let mut lab = Lab::new();
    let ip = Ipv4::new(OUTSIDE, UDP);
    let datagram = ip.udp(5000, 7, &filled(100));
    let frames = ip.fragments(&datagram, 56);
    let teardrop = Ipv4 { fragment: 3, ..ip };
    lab.send(frames[0].clone());
    lab.send(teardrop.frame(&[0xff; 24]));
    assert_eq!(lab.dropped(DropReason::FragmentOverlap), 1);
    lab.send(frames[1].clone());
    assert_eq!(lab.sent(), []);
    lab.rest();
}

#[test]
fn a_segmented_frame_is_several_datagrams() {
    let mut lab = Lab::new();
    let frame = packets::udp_frame(5000, addr("192.0.2.1:7"), &filled(250));
    let meta = RxMeta {
        checksum_verified: true,
        udp_segment: NonZeroU16::new(100),
        ..RxMeta::plain(LinkId(0))
    };
    lab.0
        .with_stack(|stack, turn| stack.handle_frame(turn, &frame, meta));
    let lengths: Vec<usize> = lab.sent().iter().map(|sent| sent.payload.len()).collect();
    assert_eq!(lengths, [100, 100, 50]);
    lab.rest();
}

#[test]
fn forbidden_destinations_reach_no_socket() {
    let mut lab = Lab::new();
    lab.0.net.answer_all(ConnectAnswer::Accept);
    let forbidden = [
        "0.0.0.0",
        "0.1.2.3",
        "127.0.0.1",
        "127.255.0.1",
        "224.0.0.251",
        "239.1.2.3",
        "240.0.0.1",
        "255.255.255.255",
        "10.0.2.255",
    ];
    for (nth, to) in forbidden.iter().enumerate() {
        let to: Ipv4Addr = to.parse().unwrap();
        lab.send(packets::udp_frame(
            5000,
            SocketAddr::new(to.into(), 7),
            b"x",
        ));
        lab.send(echo_frame(to, b"x"));
        let ip = Ipv4::new(to, TCP);
        let syn = Segment {
            from: 4000,
            to: 80,
            flags: 2,
            ..Segment::default()
        };
        lab.send(ip.frame(&ip.tcp(&syn, &[], &[])));
        // An unknown protocol, too, is no reason to speak.
        lab.send(Ipv4::new(to, 99).frame(b"x"));
        assert_eq!(lab.received(), [], "{to}");
        let dropped = lab.dropped(DropReason::Destination) + lab.dropped(DropReason::Protocol);
        assert_eq!(dropped, 4 * (nth as u64 + 1), "{to}");
    }
    assert_eq!((lab.sent(), lab.0.net.connections()), (vec![], vec![]));
    lab.rest();
}

#[test]
fn what_can_t_be_delivered_is_told_as_a_router_would() {
    let mut lab = Lab::new();
    let ip = Ipv4::new(OUTSIDE, UDP);
    let datagram = ip.udp(5000, 7, b"x");
    let neighbour = Ipv4::new(Ipv4Addr::new(10, 0, 2, 77), UDP);
    let at_resolver = Ipv4::new(RESOLVER, UDP);
    let cases = [
        (Ipv4 { ttl: 1, ..ip }.frame(&datagram), (11, 0), GATEWAY),
        (Ipv4::new(OUTSIDE, 99).frame(b"x"), (3, 2), GATEWAY),
        (
            neighbour.frame(&neighbour.udp(5000, 7, b"x")),
            (3, 1),
            GATEWAY,
        ),
        (
            at_resolver.frame(&at_resolver.udp(5000, 54, b"x")),
            (3, 3),
            RESOLVER,
        ),
    ];
    for (frame, said, by) in cases {
        lab.send(frame.clone());
        let reply = lab.reply();
        assert_eq!((reply.icmp(), reply.src), (Some(said), by.into()));
        assert_eq!(reply.payload[8..], frame[14..], "the packet is quoted");
    }
    let connect = lab.0.connect("10.0.2.3:80");
    lab.wait(millis(1));
    assert_eq!(lab.0.socket(connect).state(), State::Closed, "a RST");
    assert_eq!((lab.received(), lab.sent()), (vec![], vec![]));
    lab.rest();
}

#[test]
fn a_stranger_s_address_is_not_carried() {
    let mut lab = Lab::new();
    for src in [
        "10.0.3.1",
        "192.0.2.9",
        "10.0.2.2",
        "10.0.2.0",
        "10.0.2.255",
        "127.0.0.1",
        "0.0.0.0",
    ] {
        let ip = Ipv4 {
            src: src.parse().unwrap(),
            ..Ipv4::new(OUTSIDE, UDP)
        };
        let before = lab.dropped(DropReason::Source);
        lab.send(ip.frame(&ip.udp(5000, 7, b"x")));
        assert_eq!(lab.dropped(DropReason::Source), before + 1, "{src}");
    }
    assert_eq!((lab.received(), lab.sent()), (vec![], vec![]));
    lab.rest();
}

/// One frame after the other is many queries that nobody need ask a resolver about.
#[test]
fn what_is_answered_at_once_leaves_others_their_room() {
    let mut lab = Lab::new();
    let meta = RxMeta {
        udp_segment: NonZeroU16::new(12),
        ..RxMeta::plain(LinkId(0))
    };
    // Queries whose one question is not there.
    let query = [b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0".as_slice(); 8].concat();
    let frame = packets::udp_frame(5000, addr("10.0.2.3:53"), &query);
    let (answered, room) = lab.0.with_stack(|stack, turn| {
        for _ in 0..500 {
            stack.handle_frame(turn, &frame, meta);
        }
        let state = (turn.tx.len(), turn.tx.has_room());
        turn.tx.clear();
        state
    });
    assert!(answered > 50 && room, "{answered}");
    assert!(lab.dropped(DropReason::TransmitFull) > 1000);
}

#[test]
fn over_the_limit_a_port_is_refused() {
    let mut lab = Lab::with(Config {
        max_flows: 1,
        ..Config::default()
    });
    lab.udp(5000, "192.0.2.1:7", b"first");
    lab.udp(5001, "192.0.2.1:7", b"second");
    assert_eq!(lab.icmp_error(), (3, 13));
    assert_eq!(lab.0.stack.counters().flows_refused, 1);
    lab.udp(5000, "192.0.2.1:7", b"first again");
    assert_eq!(lab.sent().len(), 2, "the one that was there goes on");
    lab.rest();
}
