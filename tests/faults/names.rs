//! Rows 30 to 32: questions and answers of the name service that are long, nonsense, somebody else's, or never come.
//!
//! In: queries of a guest and answers of a resolver, of any bytes. Out: that what is passed on is passed on
//! unchanged, that nobody but who was asked is heard, and that nothing runs in circles.

use std::collections::HashSet;
use std::net::SocketAddr;

use tapgate::config::Config;
use tapgate::host::DatagramRole;
use tapgate::host::simulated::{ConnectAnswer, Sent};
use tapgate::net::DropReason;

use crate::frames::query;
use crate::packets::{self, Ipv4, UDP};
use crate::peer::{Peer, SYN};
use crate::rig::{RESOLVER, Rig, addr, pattern};
use crate::{Random, count};

const NAMES: &str = "192.0.2.53:53";

fn rig() -> Rig {
    let rig = Rig::new();
    rig.net.set_resolvers(&[addr(NAMES)]);
    rig
}

fn ask(rig: &mut Rig, from: u16, bytes: &[u8]) {
    let ip = Ipv4::new(RESOLVER, UDP);
    let datagram = ip.udp(from, 53, bytes);
    if datagram.len() <= 1480 {
        rig.frame(&ip.frame(&datagram));
    } else {
        let fragments = ip.fragments(&datagram, 1480);
        rig.flood(fragments.iter().map(Vec::as_slice));
    }
}

/// The one query that went to the resolver, by a socket that hears nobody else.
fn asked(rig: &Rig) -> Sent {
    let mut sent = rig.net.take_sent();
    assert_eq!(sent.len(), 1, "{sent:?}");
    let sent = sent.remove(0);
    assert_eq!(sent.to, addr(NAMES));
    assert_eq!(
        rig.net.role(sent.socket),
        Some(DatagramRole::Connected(addr(NAMES)))
    );
    sent
}

/// What the guest's port got from 10.0.2.3.
fn got(rig: &mut Rig) -> Vec<Vec<u8>> {
    let packets = rig.received();
    let datagrams = packets.iter().filter_map(|it| it.udp());
    datagrams.map(|(_, _, bytes)| bytes.to_vec()).collect()
}

#[test]
fn row_30_long_queries_and_answers() {
    let mut rig = rig();
    rig.net.answer(addr(NAMES), ConnectAnswer::Accept);
    let mut random = Random::new(30);
    for nth in 0..count(200, 10_000) {
        let id = u16::try_from(nth % 65_536).unwrap();
        // With an OPT record that says 4096 (RFC 6891), and options behind it.
        let mut question = query(id);
        question[11] = 1;
        question.extend([0, 0, 41, 0x10, 0, 0, 0, 0x80, 0]);
        let options = pattern(random.below(300));
        question.extend(u16::try_from(options.len()).unwrap().to_be_bytes());
        question.extend(&options);
        ask(&mut rig, 5000, &question);
        let sent = asked(&rig);
        assert_eq!(sent.payload[2..], question[2..], "all but the identifier");
        // An answer of any length, cut off (TC) or not.
        let mut answer = sent.payload.clone();
        answer[2] |= 0x80 | (u8::try_from(nth % 2).unwrap() << 1);
        let lengths = [0, 512, 1232, 1473, 4096, 65_000];
        answer.extend(pattern(lengths[nth % lengths.len()]));
        rig.net.deliver(sent.socket, sent.to, &answer);
        rig.turn();
        answer[..2].copy_from_slice(&id.to_be_bytes());
        assert!(got(&mut rig) == [answer], "unchanged");
        assert_eq!(rig.net.open_sockets(), 0);
    }
    // What did not fit is asked again over TCP (RFC 7766), where it may be 65,535 bytes long.
    let (mut peer, id) = rig.open(5001, SocketAddr::new(RESOLVER.into(), 53));
    let mut stream = vec![0, 21];
    stream.extend(query(7));
    rig.frame(&peer.data(&stream));
    assert_eq!(rig.net.server_read(id, 1000), stream);
    let mut answer = vec![0xff, 0xff];
    answer.extend(pattern(65_535));
    assert_eq!(rig.net.server_write(id, &answer), answer.len());
    let mut came: Vec<u8> = Vec::new();
    while came.len() < answer.len() {
        rig.turn();
        let segments = peer.read(&rig.received());
        assert!(!segments.is_empty());
        came.extend(segments.iter().flat_map(|it| &it.data));
        peer.take_all(&segments);
        rig.frame(&peer.ack());
    }
    assert!(came == answer);
    rig.frame(&peer.rst());
    rig.recovers(0);
}

/// A name that points at itself, at the one before it, behind the end; labels of every kind.
fn circles(random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for _ in 0..random.below(40) {
        match random.below(4) {
            0 => bytes.extend([0xc0, 12 + u8::try_from(random.below(60)).unwrap()]),
            1 => bytes.extend([0xc0 | random.byte(), random.byte()]),
            2 => bytes.extend([63, b'a', b'b']),
            _ => bytes.extend([3, b'a', b'b', b'c']),
        }
    }
    bytes.extend([0, 0, 1, 0, 1]);
    bytes
}

#[test]
fn row_31_garbage_queries_and_answers() {
    let mut rig = rig();
    let mut random = Random::new(31);
    let mut passed = 0;
    for nth in 0..count(20_000, 1_000_000) {
        let mut question = match random.below(4) {
            0 => circles(&mut random),
            1 => {
                let mut question = query(random.word());
                let at = random.below(question.len());
                question[at] = random.byte();
                question
            }
            2 => query(1)[..random.below(22)].to_vec(),
            _ => (0..random.below(80)).map(|_| random.byte()).collect(),
        };
        // A name of the gateway's own is read, not only passed on.
        if nth % 16 == 0 {
            question = query(1)[..12].to_vec();
            question.extend(b"\x04host\x07tapgate\x08internal\x00\x00\x01\x00\x01");
            let at = 2 + random.below(question.len() - 2);
            question[at] = random.byte();
        }
        ask(&mut rig, 5000, &question);
        let sent = rig.net.take_sent();
        assert!(sent.len() <= 1);
        if let Some(sent) = sent.first() {
            passed += 1;
            assert_eq!(sent.payload[2..], question[2..], "opaque");
            // The answer is garbage, too: what has its number goes on as it is.
            let mut answer = circles(&mut random);
            answer[2] |= 0x80;
            if sent.payload[..2] != answer[..2] {
                let unasked = [&answer[..], b"!"].concat();
                rig.net.deliver(sent.socket, sent.to, &unasked);
            }
            rig.net
                .deliver(sent.socket, sent.to, &answer[..random.below(12)]);
            answer[..2].copy_from_slice(&sent.payload[..2]);
            rig.net.deliver(sent.socket, sent.to, &answer);
            rig.turn();
            answer[..2].copy_from_slice(&question[..2]);
            assert_eq!(got(&mut rig), [answer]);
        } else {
            // Dropped, or told that it can't be read.
            assert!(got(&mut rig).len() <= 1);
        }
    }
    assert!(passed > 1000 && rig.dropped(DropReason::DnsMalformed) > 100);
    rig.recovers(0);
}

#[test]
fn row_32_spoofed_answers() {
    let total = count(2_000, 100_000);
    let mut rig = rig();
    let mut random = Random::new(32);
    let mut identifiers = HashSet::new();
    let questions = 200;
    for nth in 0..questions {
        ask(&mut rig, 5000, &query(nth));
        let sent = asked(&rig);
        identifiers.insert(sent.payload[..2].to_vec());
        let answer = |id: [u8; 2], mark: u8| {
            let mut answer = sent.payload.clone();
            answer[..2].copy_from_slice(&id);
            answer[2] |= 0x80;
            answer.push(mark);
            answer
        };
        let right = [sent.payload[0], sent.payload[1]];
        for _ in 0..total / usize::from(questions) {
            // From another address or port with the right number; from the right one with another.
            let other = format!(
                "192.0.2.{}:{}",
                54 + random.below(100),
                1 + random.word() % 65_535
            );
            rig.net
                .deliver(sent.socket, addr(&other), &answer(right, 1));
            rig.net
                .deliver(sent.socket, addr("192.0.2.53:54"), &answer(right, 1));
            let wrong = random.word().to_be_bytes();
            if wrong != right {
                rig.net.deliver(sent.socket, sent.to, &answer(wrong, 1));
            }
            // A query is no answer.
            rig.net.deliver(sent.socket, sent.to, &sent.payload);
        }
        rig.turn();
        assert_eq!(got(&mut rig), Vec::<Vec<u8>>::new());
        rig.net.deliver(sent.socket, sent.to, &answer(right, 2));
        rig.turn();
        let came = got(&mut rig);
        assert_eq!(came.len(), 1);
        assert_eq!(
            (came[0][..2].to_vec(), came[0].last()),
            (nth.to_be_bytes().to_vec(), Some(&2))
        );
    }
    // Numbers that repeat could be guessed: of 200 in 65,536 one pair is no surprise, more are.
    assert!(
        identifiers.len() + 3 >= usize::from(questions),
        "{}",
        identifiers.len()
    );
    // A forged SYN|ACK opens nothing.
    let stranger = Peer::new(5003, SocketAddr::new(RESOLVER.into(), 53));
    rig.frame(&stranger.with(SYN | 0x10, &[], |_| ()));
    assert!(rig.net.connections().is_empty());
    rig.recovers(0);
}

#[test]
fn row_31_queries_that_nobody_answers_leave_room() {
    /// That may wait at once.
    const MOST: usize = 4096;
    let mut rig = rig();
    for nth in 0..2 * MOST {
        let id = u16::try_from(nth).unwrap();
        ask(&mut rig, 4000, &query(id));
    }
    // The oldest hear that it failed.
    let failed = got(&mut rig);
    assert_eq!(failed.len(), MOST);
    assert!(failed.iter().all(|answer| answer[3] & 0xf == 2));
    assert_eq!(rig.net.open_datagram_sockets().len(), MOST);
    let sent = rig.net.take_sent();
    let last = sent.last().unwrap();
    let mut answer = last.payload.clone();
    answer[2] |= 0x80;
    rig.net.deliver(last.socket, addr(NAMES), &answer);
    rig.turn();
    assert_eq!(got(&mut rig).len(), 1);
    rig.secs(60);
    rig.recovers(0);
}

#[test]
fn row_31_queries_that_nobody_answers_make_way_for_others() {
    const MOST: usize = 800;
    let config = Config {
        max_flows: u32::try_from(MOST).unwrap(),
        ..Config::default()
    };
    for descriptors in [None, Some(MOST / 2)] {
        let mut rig = Rig::with(config.clone());
        rig.net.set_resolvers(&[addr(NAMES)]);
        rig.net.limit_open(descriptors);
        // All that may be had.
        let most = descriptors.unwrap_or(MOST * 7 / 8);
        for nth in 0..most {
            ask(&mut rig, 4000, &query(u16::try_from(nth).unwrap()));
        }
        assert_eq!(rig.net.take_sent().len(), most);
        let hello = packets::udp_frame(5000, addr("192.0.2.1:7"), b"hello");
        // They have had no time to be answered.
        rig.frame(&hello);
        assert!(rig.net.take_sent().is_empty());
        assert!(got(&mut rig).is_empty());
        rig.millis(1100);
        rig.frame(&hello);
        let sent = rig.net.take_sent();
        assert_eq!(sent.iter().filter(|it| it.payload == b"hello").count(), 1);
        // The oldest hears that it failed.
        let failed = got(&mut rig);
        assert_eq!(failed.len(), 1);
        assert_eq!((&failed[0][..2], failed[0][3] & 0xf), (&[0, 0][..], 2));
        rig.net.limit_open(None);
        rig.secs(60);
        rig.recovers(0);
    }
}

#[test]
fn row_31_queries_of_one_frame_cost_no_more_than_their_part() {
    /// That are taken of a frame.
    const AT_ONCE: usize = 8;
    let mut rig = rig();
    for count in [1, 2, AT_ONCE, AT_ONCE + 1, 40] {
        let queries: Vec<u8> = (0..count)
            .flat_map(|id| query(u16::try_from(id).unwrap()))
            .collect();
        let ip = Ipv4::new(RESOLVER, UDP);
        let size = u16::try_from(query(0).len()).unwrap();
        let before = rig.dropped(DropReason::NoRoom);
        rig.segmented(&ip.frame(&ip.udp(4000, 53, &queries)), size);
        let sent = rig.net.take_sent();
        assert_eq!(sent.len(), count.min(AT_ONCE));
        let dropped = rig.dropped(DropReason::NoRoom) - before;
        assert_eq!(dropped, count.saturating_sub(AT_ONCE) as u64);
        for (nth, query) in sent.iter().enumerate() {
            let mut answer = query.payload.clone();
            answer[2] |= 0x80;
            rig.net.deliver(query.socket, query.to, &answer);
            rig.turn();
            let answers = got(&mut rig);
            assert_eq!(answers.len(), 1);
            assert_eq!(usize::from(answers[0][1]), nth, "each its own");
        }
    }
    rig.recovers(0);
}
