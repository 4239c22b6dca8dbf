//! Datagrams that travel together, in virtual time: whatever leaves or arrives as a train, both ends see
//! each datagram as it was sent, in order, over links that cut trains up and over those that do not.
#![allow(
    clippy::unwrap_used,
    reason = "a scenario that can not go on has failed"
)]

#[path = "sim/lab.rs"]
mod lab;
#[path = "sim/packets.rs"]
mod packets;
mod sim;

use std::net::{IpAddr, SocketAddr};

use lab::{FIRST, Lab, addr, filled, millis};
use sim::{Faults, GUEST, GUEST6, LinkKind, Random, Sim};
use tapgate::buf::TxCapabilities;
use tapgate::config::Config;
use tapgate::net::DropReason;

const ENETUNREACH: i32 = 101;

/// A guest at rest over a link that cuts trains up, or not.
fn lab(guest: IpAddr, uso: bool, uncut: bool, mtu: u16) -> Lab {
    let kind = LinkKind {
        capabilities: TxCapabilities {
            checksum: uso,
            uso,
            ..TxCapabilities::default()
        },
        uncut,
        ..LinkKind::default()
    };
    let config = Config {
        mtu,
        ..Config::default()
    };
    let mut lab = Lab(Sim::over(kind, guest, 1, config, Faults::default()));
    lab.wait(millis(1));
    lab.0.received.clear();
    lab
}

/// Payloads in which runs of one length are frequent, as is what ends a train: a shorter one, a longer
/// one, none at all.
fn payloads(random: &mut Random, longest: usize) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for _ in 0..=random.size(12) {
        let length = random.size(longest);
        for _ in 0..=random.size(40) {
            all.push(filled(length));
        }
        all.push(filled(random.of(&[0, 1, length / 2, longest])));
    }
    for (number, payload) in (0_u32..).zip(&mut all) {
        if let Some(start) = payload.first_chunk_mut() {
            *start = number.to_be_bytes();
        }
    }
    all
}

fn remote(guest: IpAddr) -> SocketAddr {
    addr(if guest.is_ipv4() {
        "192.0.2.1:7"
    } else {
        "[2001:db8::1]:7"
    })
}

#[test]
fn what_a_guest_sends_in_a_burst_arrives_piece_by_piece() {
    for seed in 0..100 {
        let mut random = Random::new(seed);
        let guest = random.of(&[GUEST, GUEST6]);
        let mut lab = lab(guest, false, false, 1500);
        let to = remote(guest);
        let all = payloads(&mut random, 1400);
        for payload in &all {
            lab.0.inject(packets::udp_frame(5000, to, payload));
        }
        lab.wait(millis(1));
        let sent = lab.sent();
        assert!(sent.iter().all(|it| it.to == to && it.socket == FIRST));
        let got: Vec<_> = sent.into_iter().map(|it| it.payload).collect();
        assert_eq!(got, all, "seed {seed}");
        lab.rest();
    }
}

#[test]
fn datagrams_that_differ_do_not_travel_together() {
    let mut lab = lab(GUEST, false, false, 1500);
    let limited = |ttl| packets::Ipv4 {
        ttl,
        ..packets::Ipv4::new(lab::OUTSIDE, packets::UDP)
    };
    let (plain, marked) = (limited(64), limited(17));
    for ip in [plain, plain, marked, marked, plain] {
        lab.0.inject(ip.frame(&ip.udp(5000, 7, b"same")));
    }
    for port in [8, 9, 9] {
        lab.0.inject(plain.frame(&plain.udp(5000, port, b"same")));
    }
    lab.0.inject(plain.frame(&plain.udp(5001, 9, b"same")));
    lab.wait(millis(1));
    let sent = lab.sent();
    let marks: Vec<_> = sent.iter().map(|it| it.marks.unwrap().hop_limit).collect();
    assert_eq!(marks, [63, 63, 16, 16, 63, 63, 63, 63, 63]);
    let ports: Vec<_> = sent.iter().map(|it| it.to.port()).collect();
    assert_eq!(ports, [7, 7, 7, 7, 7, 8, 9, 9, 9]);
    assert_eq!(
        (sent[7].socket == FIRST, sent[8].socket == FIRST),
        (true, false)
    );
    lab.rest();
}

#[test]
fn a_burst_leaves_by_few_calls() {
    let mut lab = lab(GUEST, false, false, 1500);
    for _ in 0..64 {
        lab.udp_later(5000, "192.0.2.1:7", &filled(1000));
    }
    lab.wait(millis(1));
    assert_eq!((lab.sent().len(), lab.0.net.datagram_calls()), (64, 1));
    lab.rest();
}

#[test]
fn a_train_that_can_not_leave_is_told_of_once_and_counted_whole() {
    let mut lab = lab(GUEST, false, false, 1500);
    lab.udp(5000, "192.0.2.1:7", b"first");
    lab.0.net.fail_datagrams(Some(ENETUNREACH));
    for _ in 0..5 {
        lab.udp_later(5000, "192.0.2.1:7", b"later");
    }
    lab.wait(millis(1));
    assert_eq!(lab.icmp_error(), (3, 0));
    // ENOBUFS: nobody says anything.
    lab.0.net.fail_datagrams(Some(105));
    for _ in 0..5 {
        lab.udp_later(5000, "192.0.2.1:7", b"later");
    }
    lab.wait(millis(1));
    assert!(lab.received().is_empty());
    assert_eq!(lab.dropped(DropReason::HostBusy), 5);
    lab.0.net.fail_datagrams(None);
    lab.rest();
}

#[test]
fn one_of_a_train_that_can_not_leave_does_not_keep_the_others() {
    let mut lab = lab(GUEST, false, false, 1500);
    lab.udp(5000, "192.0.2.1:7", b"first");
    // The shorter last one has room where the others have none.
    lab.0.net.limit_datagrams(Some(1000));
    for length in [1400, 1400, 1400, 900] {
        lab.udp_later(5000, "192.0.2.1:7", &filled(length));
    }
    lab.wait(millis(1));
    let left: Vec<_> = lab.sent().iter().map(|it| it.payload.len()).collect();
    assert_eq!(left, [5, 900]);
    assert_eq!(lab.dropped(DropReason::HostBusy), 3);
    lab.0.net.limit_datagrams(None);
    lab.rest();
}

#[test]
fn what_the_host_receives_in_a_burst_reaches_the_guest_in_order() {
    for seed in 0..200 {
        let mut random = Random::new(seed);
        let guest = random.of(&[GUEST, GUEST6]);
        let mtu = random.of(&[1280, 1500, 65_520]);
        let mut lab = lab(guest, random.percent(70), false, mtu);
        lab.0
            .inject(packets::udp_frame(5000, remote(guest), b"opens"));
        lab.wait(millis(1));
        let longest = random.of(&[200, 1400, 60_000]);
        let all = payloads(&mut random, longest);
        for payload in &all {
            lab.0.net.deliver(FIRST, remote(guest), payload);
        }
        lab.wait(millis(1));
        let received = lab.received();
        let got: Vec<_> = received.iter().map(|it| it.udp().unwrap()).collect();
        let expected: Vec<_> = all
            .iter()
            .map(|it| (remote(guest), 5000, &it[..]))
            .collect();
        assert!(
            got == expected,
            "seed {seed}: {} of {}",
            got.len(),
            expected.len()
        );
        lab.rest();
    }
}

#[test]
fn a_train_is_one_frame_on_a_link_that_cuts_it() {
    for guest in [GUEST, GUEST6] {
        let mut lab = lab(guest, true, true, 1500);
        lab.0
            .inject(packets::udp_frame(5000, remote(guest), b"opens"));
        lab.wait(millis(1));
        for length in [1000, 1000, 1000, 17, 1000] {
            lab.0.net.deliver(FIRST, remote(guest), &filled(length));
        }
        // Of another sender, though it looks alike.
        let other = SocketAddr::new(remote(guest).ip(), 8);
        lab.0.net.deliver(FIRST, other, &filled(1000));
        lab.wait(millis(1));
        let lengths: Vec<_> = lab.0.received.drain(..).map(|frame| frame.len()).collect();
        let headers = 14 + 8 + if guest.is_ipv4() { 20 } else { 40 };
        assert_eq!(lengths, [headers + 3017, headers + 1000, headers + 1000]);
        lab.rest();
    }
}

#[test]
fn clients_of_a_published_port_keep_apart() {
    let mut lab = lab(GUEST, true, false, 1500);
    lab.publish();
    let clients = ["192.0.2.9:1000", "192.0.2.9:1001"];
    for client in [0, 0, 1, 1, 0] {
        lab.0.net.deliver(FIRST, addr(clients[client]), b"question");
    }
    lab.wait(millis(1));
    let received = lab.received();
    let from: Vec<_> = received
        .iter()
        .map(|it| it.udp().unwrap().0.port())
        .collect();
    assert_eq!(from, [1000, 1000, 1001, 1001, 1000]);
    for client in [0, 0, 1] {
        lab.udp_later(5000, clients[client], b"answer");
    }
    lab.wait(millis(1));
    let to: Vec<_> = lab.sent().iter().map(|it| it.to).collect();
    assert_eq!(to, [0, 0, 1].map(|client| addr(clients[client])));
}
