//! Several workers behind one link, in virtual time: whichever queue a frame comes by, the guest and the
//! host's servers see one gateway.
//!
//! Frames come to workers as `sim/workers.rs` decides, which forgets flows at random, so everything is tried
//! with many ports. Connections are tried by `sim_lives.rs`, of whose lives two in five have several workers.
#![allow(
    clippy::unwrap_used,
    reason = "a scenario that can not go on has failed"
)]

#[path = "sim/lab.rs"]
mod lab;
#[path = "sim/packets.rs"]
mod packets;
mod sim;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use lab::{FIRST, GATEWAY, Lab, OUTSIDE, addr, filled, millis, secs};
use packets::{ICMP, Ip, Ipv4, Segment, TCP, UDP};

use smoltcp::socket::tcp::State;
use tapgate::config::{Config, Protocol, Publish, Splice};
use tapgate::host::simulated::{Call, ConnectAnswer, Fault, SocketId};
use tapgate::stack::share::Handed;

const WORKERS: usize = 3;
const PORTS: std::ops::Range<u16> = 5000..5024;

fn lab() -> Lab {
    Lab::shared(WORKERS, Config::default())
}

fn publish(lab: &mut Lab, protocol: Protocol, host: &str, guest: &str) -> usize {
    let rule = Publish {
        protocol,
        host: addr(host),
        guest: addr(guest),
        splice: Splice::default(),
    };
    let id = lab
        .0
        .with_stack(|stack, turn| stack.publish(turn.host, rule));
    lab.wait(millis(1));
    id.unwrap()
}

#[test]
fn a_port_has_one_socket_whatever_it_speaks_to() {
    let mut lab = lab();
    for port in PORTS {
        for server in [
            "192.0.2.1:7",
            "192.0.2.2:7",
            "198.51.100.3:9",
            "192.0.2.1:8",
        ] {
            lab.udp(port, server, b"ask");
        }
    }
    let sent = lab.sent();
    assert_eq!(sent.len(), 4 * PORTS.len(), "each once");
    let sockets: BTreeSet<SocketId> = sent.iter().map(|sent| sent.socket).collect();
    assert_eq!(sockets.len(), PORTS.len());
    for (socket, port) in sockets.iter().copied().zip(PORTS) {
        lab.deliver(socket, "192.0.2.9:99", b"answer");
        let expected = (addr("192.0.2.9:99"), port, &b"answer"[..]);
        assert_eq!(lab.reply().udp(), Some(expected));
    }
    lab.rest();
}

#[test]
fn work_is_divided() {
    let mut lab = lab();
    lab.0.net.answer_all(ConnectAnswer::Accept);
    for port in PORTS {
        lab.udp(port, "192.0.2.1:7", b"ask");
    }
    for _ in PORTS {
        lab.0.connect("192.0.2.1:80");
    }
    lab.wait(millis(5));
    let flows = lab.0.flows_of_each();
    assert_eq!(flows.iter().sum::<usize>(), 2 * PORTS.len());
    let fair = PORTS.len() * 2 / WORKERS;
    assert!(
        flows.iter().all(|count| *count > fair / 2),
        "of {fair} each has {flows:?}"
    );
}

#[test]
fn names_pings_and_fragments_are_served_whoever_gets_them() {
    let mut lab = lab();
    lab.0.net.set_resolvers(&[addr("192.0.2.53:53")]);
    for port in PORTS {
        let mut query = port.to_be_bytes().to_vec();
        query.extend(b"\x01\0\0\x01\0\0\0\0\0\0\x07example\x03org\0\0\x01\0\x01");
        lab.udp(port, "10.0.2.3:53", &query);
        let sent = lab.sent();
        assert_eq!(sent.len(), 1);
        assert_eq!(sent[0].to, addr("192.0.2.53:53"));
        let mut answer = sent[0].payload.clone();
        answer[2] |= 0x80;
        lab.deliver(sent[0].socket, "192.0.2.53:53", &answer);
        assert_eq!(lab.reply().word(2), port, "the answer came");

        let ping = packets::icmp(8, 0, [port, 1], b"ping");
        lab.send(Ipv4::new(GATEWAY, ICMP).frame(&ping));
        assert_eq!(lab.icmp_error(), (0, 0), "a reply");
        lab.send(Ipv4::new(OUTSIDE, ICMP).frame(&ping));
        assert_eq!(lab.sent().len(), 1, "went on");

        let payload = filled(3000);
        let whole = Ipv4 {
            id: port,
            ..Ipv4::new(OUTSIDE, UDP)
        };
        for piece in whole.fragments(&whole.udp(port, 7, &payload), 1400) {
            lab.send(piece);
        }
        let sent = lab.sent();
        assert_eq!(sent.len(), 1, "put together");
        assert!(sent[0].payload == payload);
    }
    lab.rest();
}

#[test]
fn a_lease_is_given_once() {
    let mut lab = lab();
    let mut addresses = BTreeMap::new();
    for round in 0..4_u8 {
        for client in 0..8_u8 {
            let mac = [2, 0, 0, 0, 1, client];
            let message = packets::dhcp(mac, Ipv4Addr::UNSPECIFIED, &[(53, &[1])]);
            let ip = Ipv4 {
                src: Ipv4Addr::UNSPECIFIED,
                ..Ipv4::new(Ipv4Addr::BROADCAST, UDP)
            };
            let datagram = ip.packet(&ip.udp(68, 67, &message));
            lab.send(packets::ethernet(packets::BROADCAST_MAC, 0x800, &datagram));
            let offer = lab.reply();
            let address = offer.payload[8 + 16..8 + 20].to_vec();
            let known = addresses.entry(client).or_insert_with(|| address.clone());
            assert_eq!(*known, address, "in round {round}");
        }
    }
    let different: BTreeSet<_> = addresses.values().collect();
    assert_eq!(different.len(), 8);
}

#[test]
fn a_segment_of_no_connection_gets_one_reset() {
    let mut lab = lab();
    for port in PORTS {
        let stray = Segment {
            from: port,
            to: 80,
            flags: 0x10,
            seq: 1,
            ack: 77,
            window: 1000,
        };
        let packet = Ip::new("2001:db8::1".parse().unwrap(), TCP);
        lab.send(packet.frame(&packet.tcp(&stray, &[], &[])));
        let reset = lab.reply();
        assert_eq!((reset.protocol, reset.word(2)), (TCP, port));
        assert_eq!(reset.payload[13] & 4, 4);
    }
}

/// Its fragments come by any queue, and go by way of the first worker; whoever handed them on has not looked for its flow.
#[test]
fn a_segment_in_fragments_reaches_its_connection() {
    let mut lab = lab();
    lab.0.net.answer_all(ConnectAnswer::Accept);
    for (port, server) in (5000..5200).zip((1..=23).cycle()) {
        let server = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, server);
        let ip = packets::v6::Ipv6::new(server, TCP);
        let syn = Segment {
            from: port,
            to: 80,
            flags: 2,
            seq: 1,
            ack: 0,
            window: 60_000,
        };
        lab.send(ip.frame(&ip.tcp(&syn, &[], &[])));
        let answer = lab.reply();
        assert_eq!(answer.payload[13], 0x12, "SYN|ACK");
        let theirs = u32::from(answer.word(4)) << 16 | u32::from(answer.word(6));
        let next = Segment {
            flags: 0x10,
            seq: 2,
            ack: theirs.wrapping_add(1),
            ..syn
        };
        lab.send(ip.frame(&ip.tcp(&next, &[], &[])));
        for piece in ip.fragments(port.into(), &ip.tcp(&next, &[], &filled(1000)), 400) {
            lab.send(piece);
        }
        let id = *lab.0.net.connections().last().unwrap();
        assert_eq!(lab.0.net.server_read(id, usize::MAX), filled(1000));
        assert!(!lab.0.net.server_sees_reset(id));
        lab.wait(millis(10));
        lab.0.received.clear();
    }
}

/// The first one alone speaks to all guests: whoever asks, it hears what the host says.
#[test]
fn all_guests_hear_what_one_asked_for() {
    let mut lab = lab();
    for nth in 1..=16_u16 {
        let reachable = nth % 2 == 0;
        lab.0.net.set_ipv6(reachable);
        // The host is not asked for its routes more often than that, whatever the guest asks.
        lab.wait(millis(20));
        lab.0.advertised.clear();
        let src = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 1, nth);
        let routers = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
        let ip = packets::v6::Ipv6::discovery(src, routers);
        lab.send(ip.frame(&ip.router_solicitation(&[])));
        lab.wait(millis(10));
        let told = lab
            .0
            .advertised
            .iter()
            .map(|(_, frame)| frame[60..62] != [0, 0]);
        assert_eq!(told.collect::<Vec<_>>(), [reachable], "asked by {src}");
    }
}

#[test]
fn a_port_that_its_worker_can_not_serve_is_not_listed() {
    let mut lab = lab();
    for port in PORTS {
        lab.0.net.fail_call(Fault {
            call: Call::WatchUdp,
            errno: libc::ENOSPC,
            nth: 0,
            lasts: false,
        });
        let rule = Publish {
            protocol: Protocol::Udp,
            host: addr(&format!("0.0.0.0:{port}")),
            guest: addr(&format!("10.0.2.100:{port}")),
            splice: Splice::default(),
        };
        drop(
            lab.0
                .with_stack(|stack, turn| stack.publish(turn.host, rule)),
        );
        lab.wait(millis(1));
        assert_eq!(lab.0.stack.published().count(), 0, "{port}");
    }
    lab.rest();
}

#[test]
fn published_datagrams_come_and_go_by_one_socket() {
    let mut lab = lab();
    let mut published = Vec::new();
    for port in PORTS {
        let host = format!("0.0.0.0:{port}");
        let guest = format!("10.0.2.100:{port}");
        published.push(publish(&mut lab, Protocol::Udp, &host, &guest));
    }
    assert_eq!(lab.0.stack.published().count(), PORTS.len());
    let sockets = lab.0.net.open_datagram_sockets();
    assert_eq!(sockets.len(), PORTS.len());
    for (socket, port) in sockets.iter().copied().zip(PORTS) {
        lab.deliver(socket, "192.0.2.9:4000", b"knock");
        let expected = (addr("192.0.2.9:4000"), port, &b"knock"[..]);
        assert_eq!(lab.reply().udp(), Some(expected));
        lab.udp(port, "192.0.2.9:4000", b"who");
        lab.udp(port, "192.0.2.10:4000", b"else");
        let sent = lab.sent();
        assert_eq!(
            (sent[0].socket, sent[0].payload.as_slice()),
            (socket, &b"who"[..])
        );
        assert_ne!(sent[1].socket, socket, "not the port's client");
    }
    let freed = Arc::new(AtomicUsize::new(0));
    for id in published {
        let count = Arc::clone(&freed);
        let says = Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert!(lab.0.stack.unpublish(id, Some(says)));
        assert!(!lab.0.stack.unpublish(id, None));
    }
    let closed = |lab: &Lab| {
        let open = lab.0.net.open_datagram_sockets();
        sockets
            .iter()
            .filter(|socket| !open.contains(socket))
            .count()
    };
    assert!(closed(&lab) < PORTS.len(), "some are with other workers");
    assert_eq!(
        freed.load(Ordering::Relaxed),
        closed(&lab),
        "no word of those"
    );
    lab.wait(millis(1));
    assert_eq!(closed(&lab), PORTS.len());
    assert_eq!(freed.load(Ordering::Relaxed), PORTS.len());
    lab.rest();
}

#[test]
fn a_port_that_its_worker_never_had_is_free() {
    let mut lab = lab();
    let freed = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&freed);
    let says = Box::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
    });
    let handed = Handed::Unpublish {
        id: 7,
        freed: Some(says),
    };
    lab.0
        .with_stack(|stack, turn| stack.handle_handed(turn, handed));
    assert_eq!(freed.load(Ordering::Relaxed), 1);
}

#[test]
fn clients_that_look_alike_are_told_apart() {
    let mut lab = lab();
    publish(&mut lab, Protocol::Tcp, "0.0.0.0:8080", "10.0.2.100:80");
    let mut seen = BTreeSet::new();
    let mut flows = vec![0; WORKERS];
    for port in 5000..5008 {
        for client in ["127.0.0.1", "127.0.0.2", "127.0.0.3"] {
            let socket = lab.0.listen(80);
            let from = addr(&format!("{client}:{port}"));
            let id = lab
                .0
                .net
                .client_connect(addr("0.0.0.0:8080"), from)
                .unwrap();
            lab.wait(millis(2));
            lab.wait(millis(2));
            let guest = lab.0.socket(socket);
            assert_eq!(guest.state(), State::Established);
            assert!(seen.insert(guest.remote_endpoint().unwrap().to_string()));
            assert_eq!(lab.0.net.server_write(id, b"hi"), 2);
            lab.wait(millis(2));
            assert_eq!(lab.0.socket(socket).recv_queue(), 2);
        }
        flows = lab.0.flows_of_each();
    }
    assert!(flows.iter().all(|count| *count > 2), "{flows:?}");
}

#[test]
fn limits_are_for_all_together() {
    for max_flows in 12..15 {
        let config = Config {
            max_flows,
            ..Config::default()
        };
        let mut lab = Lab::shared(WORKERS, config);
        for port in 5000..5100 {
            lab.udp(port, "192.0.2.1:7", b"ask");
        }
        let most = usize::try_from(max_flows).unwrap();
        assert_eq!((lab.0.flows(), lab.0.net.open_sockets()), (most, most));
    }
}

#[test]
fn smallest_limits_leave_room_for_a_client() {
    for workers in [1, WORKERS] {
        for max_flows in 1..10 {
            let config = Config {
                max_flows,
                ..Config::default()
            };
            let mut lab = Lab::shared(workers, config);
            let id = publish(&mut lab, Protocol::Udp, "0.0.0.0:5353", "10.0.2.100:5000");
            // The next in place of the one before, which nobody has answered.
            for client in ["192.0.2.9:99", "192.0.2.9:100"] {
                lab.deliver(FIRST, client, b"question");
                let expected = (addr(client), 5000, &b"question"[..]);
                assert_eq!(lab.reply().udp(), Some(expected));
                lab.wait(secs(2));
            }
            assert!(lab.0.stack.unpublish(id, None));
            lab.wait(secs(60));
            lab.rest();
        }
    }
}
