//! Rows 38 and 39: clients of the address server that are too many, or make no sense.
//!
//! In: messages of ten thousand clients, and of one with every field wrong. Out: which address each was
//! given, and who was told nothing.

use std::collections::HashSet;
use std::net::Ipv4Addr;

use tapgate::net::DropReason;

use crate::packets::{self, GUEST_MAC, Ipv4, UDP};
use crate::rig::{GATEWAY, Rig};
use crate::{Random, count};

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const NAK: u8 = 6;
const RELEASE: u8 = 7;
const INFORM: u8 = 8;
/// Option codes: the address asked for, and the server that is meant.
const WANTED: u8 = 50;
const SERVER: u8 = 54;

/// The kind of the answer and the address in it.
type Answer = (u8, Ipv4Addr);

fn send(rig: &mut Rig, src: Ipv4Addr, message: &[u8]) -> Option<Answer> {
    let ip = Ipv4 {
        src,
        ..Ipv4::new(Ipv4Addr::BROADCAST, UDP)
    };
    rig.take();
    rig.frame(&ip.frame(&ip.udp(68, 67, message)));
    let answers = rig.received();
    assert!(answers.len() <= 1);
    let bytes = answers.first()?.udp()?.2;
    let yours: [u8; 4] = bytes[16..20].try_into().unwrap();
    assert_eq!(bytes[240..242], [53, 1], "the kind comes first");
    assert_eq!(bytes[24..28], [0; 4], "no relay");
    Some((bytes[242], yours.into()))
}

fn ask(rig: &mut Rig, mac: [u8; 6], options: &[(u8, &[u8])]) -> Option<Answer> {
    let message = packets::dhcp(mac, Ipv4Addr::UNSPECIFIED, options);
    send(rig, Ipv4Addr::UNSPECIFIED, &message)
}

fn request(rig: &mut Rig, mac: [u8; 6], addr: Ipv4Addr) -> Option<Answer> {
    let options = [
        (53, &[REQUEST][..]),
        (WANTED, &addr.octets()),
        (SERVER, &GATEWAY.octets()),
    ];
    ask(rig, mac, &options)
}

#[test]
fn row_38_starvation() {
    let mut rig = Rig::new();
    let mut random = Random::new(38);
    let (kind, own) = ask(&mut rig, GUEST_MAC, &[(53, &[DISCOVER])]).unwrap();
    assert_eq!(kind, OFFER);
    assert_eq!(request(&mut rig, GUEST_MAC, own), Some((ACK, own)));
    heard(&mut rig, GUEST_MAC, own);
    let mut offered = HashSet::new();
    let mut unserved = 0;
    for nth in 0..count(2_000, 10_000) {
        let [a, b, c, d, ..] = random.next().to_be_bytes();
        match ask(&mut rig, [2, 7, a, b, c, d], &[(53, &[DISCOVER])]) {
            Some((kind, addr)) => {
                assert_eq!(kind, OFFER);
                offered.insert(addr);
            }
            None => unserved += 1,
        }
        // What was offered and not taken is free again after a minute.
        if nth % 100 == 99 {
            rig.secs(61);
        }
        if nth % 1000 == 0 {
            assert_eq!(
                request(&mut rig, GUEST_MAC, own),
                Some((ACK, own)),
                "it keeps its own"
            );
        }
    }
    assert!(!offered.contains(&own), "{own} is in use");
    assert_eq!(offered.len(), 15, "the other addresses go round");
    assert!(unserved > 0, "and are never given twice");
    rig.secs(61);
    given_back(&mut rig);
    taken_and_never_used(&mut rig, own);
    taken_and_used(&mut rig, own);
    assert_eq!(request(&mut rig, GUEST_MAC, own), Some((ACK, own)));
    rig.recovers(0);
}

/// A client sends something from its address.
fn heard(rig: &mut Rig, mac: [u8; 6], own: Ipv4Addr) {
    let ip = Ipv4 {
        src: own,
        ..Ipv4::new(GATEWAY, packets::ICMP)
    };
    let mut frame = ip.frame(&packets::icmp(8, 0, [1, 2], b"ping"));
    frame[6..12].copy_from_slice(&mac);
    rig.frame(&frame);
}

/// A client asks for an address and takes it.
fn takes(rig: &mut Rig, mac: [u8; 6]) -> Option<Ipv4Addr> {
    let (_, addr) = ask(rig, mac, &[(53, &[DISCOVER])])?;
    assert_eq!(request(rig, mac, addr), Some((ACK, addr)));
    Some(addr)
}

/// Clients that take what is offered and are never heard again: the oldest goes for the next.
fn taken_and_never_used(rig: &mut Rig, own: Ipv4Addr) {
    let mut taken = 0;
    for nth in 0..count(1_000, 10_000) {
        let [.., a, b] = nth.to_be_bytes();
        let addr = takes(rig, [2, 9, 0, 0, a, b]);
        assert_ne!(addr, Some(own));
        taken += usize::from(addr.is_some());
        rig.millis(500);
    }
    assert!(taken >= count(1_000, 10_000) / 2, "they go round: {taken}");
    // One that is real gets an address ten seconds later at the latest, and keeps it.
    rig.secs(10);
    let real = [2, 9, 1, 0, 0, 0];
    let addr = takes(rig, real).unwrap();
    heard(rig, real, addr);
    for nth in 0..100 {
        assert_ne!(takes(rig, [2, 9, 2, 0, 0, nth]), Some(addr));
        rig.secs(1);
    }
    assert_eq!(request(rig, real, addr), Some((ACK, addr)));
    assert_eq!(request(rig, GUEST_MAC, own), Some((ACK, own)));
    let message = packets::dhcp(real, addr, &[(53, &[RELEASE])]);
    assert_eq!(send(rig, addr, &message), None);
    rig.secs(10);
}

/// Clients that use what they have taken: they keep it, for an hour where there are so many.
fn taken_and_used(rig: &mut Rig, own: Ipv4Addr) {
    for nth in 0..15 {
        let mac = [2, 10, 0, 0, 0, nth];
        let addr = takes(rig, mac).unwrap();
        heard(rig, mac, addr);
    }
    rig.secs(60);
    assert_eq!(takes(rig, [2, 11, 0, 0, 0, 0]), None);
    assert_eq!(request(rig, GUEST_MAC, own), Some((ACK, own)));
    rig.secs(3600);
    assert!(takes(rig, [2, 11, 0, 0, 0, 0]).is_some_and(|addr| addr != own));
}

/// Leases that are used and given back go round as well, and never to two.
fn given_back(rig: &mut Rig) {
    for round in 0..50 {
        let held: HashSet<Ipv4Addr> = (0..15)
            .filter_map(|nth| ask(rig, [2, 8, round, nth, 0, 0], &[(53, &[DISCOVER])]))
            .map(|(_, addr)| addr)
            .collect();
        assert_eq!(held.len(), 15);
        for nth in 0..15 {
            let mac = [2, 8, round, nth, 0, 0];
            let (_, addr) = ask(rig, mac, &[(53, &[DISCOVER])]).unwrap();
            assert_eq!(request(rig, mac, addr), Some((ACK, addr)));
            let message = packets::dhcp(mac, addr, &[(53, &[RELEASE])]);
            assert_eq!(send(rig, addr, &message), None);
        }
    }
}

#[test]
fn row_39_messages_that_make_no_sense() {
    let mut rig = Rig::new();
    let own = Ipv4Addr::new(10, 0, 2, 100);
    // INFORM from an address of the subnet is acknowledged without a lease; from elsewhere not.
    let inform = packets::dhcp(GUEST_MAC, own, &[(53, &[INFORM])]);
    assert_eq!(
        send(&mut rig, own, &inform),
        Some((ACK, Ipv4Addr::UNSPECIFIED))
    );
    assert_eq!(send(&mut rig, Ipv4Addr::UNSPECIFIED, &inform), None);
    // What is not there to be given is refused, so that the client begins anew.
    for wrong in [
        "10.0.2.2",
        "10.0.2.100",
        "10.0.2.255",
        "192.0.2.1",
        "0.0.0.0",
        "127.0.0.1",
    ] {
        let wrong = wrong.parse().unwrap();
        let answer = request(&mut rig, GUEST_MAC, wrong);
        assert_eq!(answer, Some((NAK, Ipv4Addr::UNSPECIFIED)), "{wrong}");
    }
    // A relay is not served as one: the answer comes to the link.
    let discover = packets::dhcp(GUEST_MAC, Ipv4Addr::UNSPECIFIED, &[(53, &[DISCOVER])]);
    let mut relayed = discover.clone();
    relayed[24..28].copy_from_slice(&[192, 0, 2, 1]);
    assert_eq!(
        send(&mut rig, Ipv4Addr::UNSPECIFIED, &relayed).unwrap().0,
        OFFER
    );
    // Cut off anywhere before the kind it is nothing; each byte of the fixed part wrong, and lengths of
    // options that lead beyond the end.
    let before = rig.dropped(DropReason::DhcpIgnored);
    let kind_ends = 243;
    for len in 0..kind_ends {
        assert_eq!(
            send(&mut rig, Ipv4Addr::UNSPECIFIED, &discover[..len]),
            None,
            "{len}"
        );
    }
    for at in [0, 1, 2, 236, 237, 238, 239] {
        let mut wrong = discover.clone();
        wrong[at] ^= 0x55;
        assert_eq!(
            send(&mut rig, Ipv4Addr::UNSPECIFIED, &wrong),
            None,
            "byte {at}"
        );
    }
    for kind in (9..=u8::MAX).chain([0]) {
        assert_eq!(
            ask(&mut rig, GUEST_MAC, &[(53, &[kind])]),
            None,
            "kind {kind}"
        );
    }
    let dropped = rig.dropped(DropReason::DhcpIgnored) - before;
    assert_eq!(dropped, kind_ends as u64 + 7 + 248);
    any_options(&mut rig, &discover);
    rig.recovers(0);
}

/// Options of any kind and length, by seed: who is given an address is given one of the pool.
fn any_options(rig: &mut Rig, discover: &[u8]) {
    let mut random = Random::new(39);
    for _ in 0..count(5_000, 100_000) {
        let mut options: Vec<u8> = (0..random.below(60)).map(|_| random.byte()).collect();
        options.splice(0..0, [53, 1, 1 + random.byte() % 8]);
        let mut message = discover[..240].to_vec();
        message.extend(options);
        let answer = send(rig, Ipv4Addr::UNSPECIFIED, &message);
        let pool = |addr: Ipv4Addr| {
            addr.octets()[..3] == [10, 0, 2] && (15..31).contains(&addr.octets()[3])
        };
        let right = match answer {
            None | Some((NAK, Ipv4Addr::UNSPECIFIED)) => true,
            Some((_, addr)) => pool(addr),
        };
        assert!(right, "{answer:?}");
    }
}
