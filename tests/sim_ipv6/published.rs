//! Published ports over IPv6, and guests of either family that refuse a client by ICMP.

use std::net::{IpAddr, SocketAddr};

use smoltcp::socket::tcp::State;
use tapgate::config::{Config, Protocol, Publish, Splice};
use tapgate::host::simulated::SocketId;
use tapgate::net::{DropReason, Duration};

use crate::lab::{FIRST, Lab, addr, filled, millis, secs};
use crate::packets::{self, GATEWAY_MAC, ICMP, ICMPV6, Ip, TCP, read::Received};
use crate::segments::{ACK, Peer, SYN, seen};
use crate::sim::{Faults, GUEST, GUEST6, Sim};

fn rule(protocol: Protocol, guest: &str) -> Publish {
    Publish {
        protocol,
        host: addr("[::]:8080"),
        guest: addr(guest),
        splice: Splice::default(),
    }
}

/// How clients look to a guest of either family.
const CLIENTS: [(&str, &str, &str); 5] = [
    ("[2001:db8::9]:5000", "[2001:db8::9]:5000", "10.0.2.2:5000"),
    ("[::1]:5001", "[fd00::2]:5001", "10.0.2.2:5001"),
    ("[fe80::9%3]:5002", "[fd00::2]:5002", "10.0.2.2:5002"),
    ("192.0.2.9:5003", "[fd00::2]:5003", "192.0.2.9:5003"),
    ("[fd00::100]:5004", "[fd00::2]:5004", "10.0.2.2:5004"),
];

#[test]
fn a_published_stream_shows_the_client_s_address() {
    for guest in [GUEST6, GUEST] {
        let mut sim = Sim::of(guest, 6, Config::default(), Faults::default());
        sim.publish(rule(Protocol::Tcp, &SocketAddr::new(guest, 80).to_string()));
        for (client, six, four) in CLIENTS {
            let listener = sim.listen(80);
            let id = sim
                .net
                .client_connect(addr("[::]:8080"), addr(client))
                .unwrap();
            assert!(sim.run(secs(1), |sim| sim.socket(listener).state()
                == State::Established));
            let remote = sim.socket(listener).remote_endpoint().unwrap();
            let expected = if guest.is_ipv6() { six } else { four };
            let remote = SocketAddr::new(remote.addr.into(), remote.port);
            assert_eq!(remote, addr(expected), "{client}");
            assert_eq!(sim.net.server_write(id, &filled(5000)), 5000);
            assert!(sim.run(secs(1), |sim| sim.socket(listener).recv_queue() == 5000));
            sim.socket(listener).send_slice(b"answer").unwrap();
            let mut got: Vec<u8> = Vec::new();
            assert!(sim.run(secs(1), |sim| {
                got.extend(sim.net.server_read(id, 100));
                got == b"answer"
            }));
            sim.socket(listener).abort();
            assert!(sim.run(secs(1), |sim| sim.net.server_sees_reset(id)));
        }
        let refused = sim
            .net
            .client_connect(addr("[::]:8080"), addr(CLIENTS[0].0))
            .unwrap();
        assert!(sim.run(secs(1), |sim| sim.net.server_sees_reset(refused)));
        assert_eq!(sim.stack.flows(), 0);
    }
}

#[test]
fn a_published_datagram_shows_the_client_s_address_and_is_answered() {
    for guest in ["[fd00::100]:5000", "10.0.2.100:5000"] {
        let mut lab = Lab::new();
        lab.0.publish(rule(Protocol::Udp, guest));
        for (client, six, four) in CLIENTS {
            lab.deliver(FIRST, client, &filled(3000));
            let expected = addr(if addr(guest).is_ipv6() { six } else { four });
            let reply = lab.reply();
            let (from, to, data) = reply.udp().unwrap();
            assert_eq!((from, to, data == filled(3000)), (expected, 5000, true));
            lab.send(packets::udp_frame(5000, expected, b"answer"));
            let sent = lab.sent().remove(0);
            assert_eq!((sent.to, &sent.payload[..]), (addr(client), &b"answer"[..]));
            assert_eq!(sent.socket, FIRST, "by the published port");
        }
        // Two that look alike inside are kept apart.
        lab.deliver(FIRST, "[fe80::7%3]:5001", b"x");
        let other = lab.reply().udp().unwrap().0;
        assert_ne!(other.port(), 5001);
        lab.send(packets::udp_frame(5000, other, b"answer"));
        assert_eq!(lab.sent()[0].to, addr("[fe80::7%3]:5001"));
        assert!(lab.0.stack.unpublish(1, None));
        lab.rest();
    }
}

/// A client of a published port of a guest whose TCP the test is; the SYN that came to it.
fn called(guest: SocketAddr) -> (Lab, SocketId, Received) {
    let other: IpAddr = if guest.is_ipv6() { GUEST } else { GUEST6 };
    let mut lab = Lab::of(other, Config::default());
    lab.0.publish(rule(Protocol::Tcp, &guest.to_string()));
    let client = if guest.is_ipv6() {
        "[2001:db8::9]:5000"
    } else {
        "192.0.2.9:5000"
    };
    let id = lab
        .0
        .net
        .client_connect(addr("[::]:8080"), addr(client))
        .unwrap();
    lab.wait(millis(1));
    let syn = lab.reply();
    assert_eq!(
        (seen(&syn).flags, SocketAddr::new(syn.src, syn.word(0))),
        (SYN, addr(client))
    );
    (lab, id, syn)
}

/// The packet of which `received` is the payload, as the guest quotes it.
fn quote(received: &Received) -> Vec<u8> {
    let mut frame = Ip::new(received.dst, received.protocol).frame(&received.payload);
    match (received.src, received.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            frame[26..30].copy_from_slice(&src.octets());
            frame[30..34].copy_from_slice(&dst.octets());
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            frame[22..38].copy_from_slice(&src.octets());
            frame[38..54].copy_from_slice(&dst.octets());
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => unreachable!(),
    }
    frame[14..].to_vec()
}

/// The guest says `kind` about a packet that came to it.
fn complain(lab: &mut Lab, about: &Received, kind: [u8; 2], quoted: &[u8]) {
    let protocol = if about.src.is_ipv6() { ICMPV6 } else { ICMP };
    let ip = Ip::new(about.src, protocol);
    let frame = ip.frame(&ip.icmp(kind, [0, 0], quoted));
    assert_eq!(frame[..6], GATEWAY_MAC);
    lab.send(frame);
}

const GUESTS: [&str; 2] = ["[fd00::100]:80", "10.0.2.100:80"];

#[test]
fn a_guest_that_refuses_by_icmp_resets_the_client_at_once() {
    for (guest, codes) in [
        (GUESTS[0], [[1, 4], [1, 1]]),
        (GUESTS[1], [[3, 3], [3, 10]]),
    ] {
        for kind in codes {
            let (mut lab, id, syn) = called(addr(guest));
            let begin = lab.0.clock.now();
            complain(&mut lab, &syn, kind, &quote(&syn));
            assert!(lab.0.net.server_sees_reset(id), "{kind:?} by {guest}");
            assert!(lab.0.clock.now() - begin <= Duration::from_millis(2));
            assert_eq!(lab.0.stack.flows(), 0);
        }
    }
}

#[test]
fn what_is_no_refusal_leaves_the_connection_alone() {
    for guest in GUESTS.map(addr) {
        let (mut lab, id, syn) = called(guest);
        let quoted = quote(&syn);
        let header = if guest.is_ipv6() { 40 } else { 20 };
        let mut other_port = quoted.clone();
        other_port[header] ^= 1;
        let mut other_protocol = quoted.clone();
        other_protocol[if guest.is_ipv6() { 6 } else { 9 }] = 17;
        let not_refused = if guest.is_ipv6() { [2, 0] } else { [3, 4] };
        let refused = if guest.is_ipv6() { [1, 4] } else { [3, 3] };
        for (kind, quoted, reason) in [
            (not_refused, &quoted[..], DropReason::IcmpType),
            (refused, &other_port, DropReason::TcpNoFlow),
            (refused, &other_protocol, DropReason::IcmpType),
            (refused, &quoted[..header + 3], DropReason::Truncated),
            (refused, &quoted[..header - 1], DropReason::IcmpType),
            (refused, &[], DropReason::Malformed),
            (refused, &[0x70; 60], DropReason::Malformed),
        ] {
            let before = lab.dropped(reason);
            complain(&mut lab, &syn, kind, quoted);
            assert_eq!(
                lab.dropped(reason),
                before + 1,
                "{kind:?} about {} bytes",
                quoted.len()
            );
        }
        assert_eq!(lab.0.stack.flows(), 1);
        // Once it is open, a complaint is not the end of it (RFC 1122 4.2.3.9).
        let mut peer = Peer::new(SocketAddr::new(syn.src, syn.word(0)), syn.word(2));
        peer.take(&seen(&syn));
        peer.next.seq = 1000;
        lab.send(peer.frame(SYN | ACK, &[2, 4, 5, 0xa0], &[]));
        assert_eq!(seen(&lab.reply()).flags & (SYN | ACK), ACK);
        complain(&mut lab, &syn, refused, &quote(&syn));
        peer.next.seq += 1;
        lab.send(peer.frame(ACK, &[], b"hello"));
        assert_eq!(lab.0.net.server_read(id, 100), b"hello");
        assert!(!lab.0.net.server_sees_reset(id));
        assert!(lab.received().iter().all(|it| it.protocol == TCP));
    }
}
