//! Rows 17 and 21 to 23: a guest's TCP that is within its rights, or just beyond, in odd ways.
//!
//! In: segment sizes, windows, orders, urgent pointers and options that nobody in his right mind would
//! choose. Out: that every byte arrives once and in its place, that no segment is larger than it may be,
//! and what is held meanwhile.

use std::net::SocketAddr;

use tapgate::config::{Config, Timeouts};
use tapgate::host::simulated::{ConnectAnswer, SocketId};

use crate::frames::resum;
use crate::packets::{Ipv4, UDP};
use crate::peer::{ACK, FIN, Peer, RST, SYN, length};
use crate::rig::{OUTSIDE, Rig, addr, pattern};
use crate::{Random, count};

/// The least segment that anybody must take (the floor of the stack), and the largest of the link.
const FLOOR: usize = 48;
const CEILING: usize = 1460;
const URG: u8 = 0x20;

/// A connection whose SYN has these options; none where that was not answered.
fn open_with(rig: &mut Rig, from: u16, options: &[u8]) -> Option<(Peer, SocketId)> {
    let mut peer = Peer::new(from, SocketAddr::new(OUTSIDE.into(), 80));
    peer.options = options.to_vec();
    let id = SocketId(rig.net.connections().len());
    rig.frame(&peer.syn());
    let answer = peer.read(&rig.received()).pop()?;
    assert_eq!(answer.flags, SYN | ACK);
    peer.take(&answer);
    rig.frame(&peer.ack());
    Some((peer, id))
}

fn accepting() -> Rig {
    let rig = Rig::new();
    rig.net.answer_all(ConnectAnswer::Accept);
    rig
}

/// Takes what comes in order and within the window, with the windows of `next_window` in turn.
fn download(rig: &mut Rig, peer: &mut Peer, len: usize, next_window: &mut dyn FnMut() -> u16) {
    let mut got: Vec<u8> = Vec::new();
    for _ in 0..20 * len {
        let mut came = peer.read(&rig.received());
        came.retain(|it| it.seq == peer.next.ack);
        for segment in came {
            let room = usize::from(peer.next.window);
            let taken = segment.data.len().min(room);
            // The byte that probes a closed window is not taken.
            got.extend(&segment.data[..taken]);
            peer.next.ack = peer.next.ack.wrapping_add(length(&segment.data[..taken]));
        }
        if got.len() >= len {
            break;
        }
        peer.next.window = next_window();
        rig.frame(&peer.ack());
        rig.millis(50);
    }
    assert!(got == pattern(len), "{} of {len} bytes", got.len());
    peer.next.window = 65_535;
}

#[test]
fn row_17_windows_and_segment_sizes() {
    let mut rig = accepting();
    let sizes = [
        None,
        Some(0),
        Some(1),
        Some(47),
        Some(48),
        Some(536),
        Some(65_535),
    ];
    for (from, mss) in (3000..).zip(sizes) {
        let option = mss.map_or_else(Vec::new, |mss: u16| {
            [&[2, 4][..], &mss.to_be_bytes()].concat()
        });
        let (mut peer, id) = open_with(&mut rig, from, &option).unwrap();
        let data = pattern(20_000);
        assert_eq!(rig.net.server_write(id, &data), data.len());
        // Who says nothing, or zero, takes 536 (RFC 9293 3.7.1).
        let announced = usize::from(mss.filter(|mss| *mss > 0).unwrap_or(536));
        let most = announced.clamp(FLOOR, CEILING);
        rig.turn();
        let mut longest = 0;
        let mut got: Vec<u8> = Vec::new();
        while got.len() < data.len() {
            let came = peer.read(&rig.received());
            assert!(!came.is_empty(), "it stands still");
            longest = came
                .iter()
                .map(|it| it.data.len())
                .fold(longest, usize::max);
            got.extend(came.iter().flat_map(|it| &it.data));
            peer.take_all(&came);
            rig.frame(&peer.ack());
        }
        assert!(got == data && longest == most, "MSS {mss:?}: {longest}");
        rig.frame(&peer.rst());
    }
    let mut random = Random::new(17);
    let rounds = u16::try_from(count(4, 60)).unwrap();
    for round in 0..rounds {
        let silly = [0, 1, 2, 3, 47, 48, 49, 535, 1459, 1460, 65_535];
        let fixed = silly[usize::from(round) % silly.len()].max(1);
        let (mut peer, id) = open_with(&mut rig, 3100 + round, &[2, 4, 5, 0xb4]).unwrap();
        assert_eq!(rig.net.server_write(id, &pattern(600)), 600);
        rig.turn();
        download(&mut rig, &mut peer, 600, &mut || fixed);
        assert_eq!(rig.net.server_write(id, &pattern(3000)), 3000);
        rig.turn();
        download(&mut rig, &mut peer, 3000, &mut || {
            silly[random.below(silly.len())]
        });
        rig.frame(&peer.rst());
        rig.take();
    }
    rig.recovers(0);
}

#[test]
fn row_21_out_of_order_hoard() {
    const STEP: usize = 1400;
    let flows = count(50, 1000);
    let memory = flows << 14;
    let mut rig = Rig::with(Config {
        max_buffer_memory: memory,
        ..Config::default()
    });
    rig.net.answer_all(ConnectAnswer::Accept);
    let data = pattern(64_000);
    let from = |nth: usize| 2000 + u16::try_from(nth).unwrap();
    let opened: Vec<_> = (0..flows)
        .map(|nth| open_with(&mut rig, from(nth), &[2, 4, 5, 0xb4]).unwrap())
        .collect();
    let segments: Vec<(usize, &[u8])> = data
        .chunks(STEP)
        .enumerate()
        .map(|(nth, piece)| (nth * STEP, piece))
        .collect();
    let send = |rig: &mut Rig, peer: &Peer, at: usize, piece: &[u8]| {
        let at = u32::try_from(at).unwrap();
        rig.frame(&peer.with(ACK, piece, |it| it.seq = it.seq.wrapping_add(at)));
    };
    // Every second segment of a window, from its end: nothing can be handed on.
    rig.only_count();
    for (peer, id) in &opened {
        for (at, piece) in segments.iter().rev().filter(|(at, _)| at / STEP % 2 == 1) {
            send(&mut rig, peer, *at, piece);
        }
        assert_eq!(rig.net.server_unread(*id), 0);
    }
    let (held, _) = rig.stack.buffers();
    // Beyond the limit each has room for a segment.
    assert!(
        held <= memory + flows * 2 * STEP,
        "{held} bytes for {flows}"
    );
    rig.is_alive();
    rig.only_count();
    // The rest, and what was too much to be kept, again and again as a sender does.
    for (peer, id) in opened {
        let mut got: Vec<u8> = Vec::new();
        for _ in 0..100 {
            for (at, piece) in &segments {
                if at + piece.len() > got.len() {
                    send(&mut rig, &peer, *at, piece);
                }
                got.extend(rig.net.server_read(id, usize::MAX));
            }
            if got.len() == data.len() {
                break;
            }
            rig.millis(10);
        }
        assert!(got == data, "{} bytes", got.len());
        let end = length(&data);
        rig.frame(&peer.with(RST, &[], |it| it.seq = it.seq.wrapping_add(end)));
        assert!(rig.net.server_sees_reset(id));
    }
    rig.recovers(0);
}

#[test]
fn row_22_urgent_pointers() {
    let mut rig = accepting();
    let (mut peer, id) = open_with(&mut rig, 3000, &[2, 4, 5, 0xb4]).unwrap();
    let step = count(61, 1);
    let mut expected: Vec<u8> = Vec::new();
    let mut got: Vec<u8> = Vec::new();
    for pointer in (0..=u16::MAX).step_by(step) {
        let data = pointer.to_be_bytes();
        // With data and without, at the end of the stream it would point beyond.
        for data in [&data[..], &[]] {
            let mut frame = peer.with(URG | ACK, data, |_| ());
            let urgent = 14 + 20 + 18;
            frame[urgent..urgent + 2].copy_from_slice(&pointer.to_be_bytes());
            resum(&mut frame);
            rig.frame(&frame);
            peer.next.seq = peer.next.seq.wrapping_add(length(data));
            expected.extend(data);
        }
        got.extend(rig.net.server_read(id, usize::MAX));
    }
    assert!(got == expected, "none lost, none made up");
    rig.frame(&peer.rst());
    assert!(rig.net.server_sees_reset(id));
    rig.recovers(0);
}

#[test]
fn row_23_tcp_options() {
    let kinds: Vec<u8> = (0..=u8::MAX).step_by(count(5, 1)).collect();
    let lengths: Vec<u8> = (0..=44).chain([127, 128, 255]).collect();
    let mut rig = accepting();
    let (mut peer, id) = open_with(&mut rig, 2999, &[2, 4, 5, 0xb4]).unwrap();
    let mut from = 3000;
    for kind in kinds.into_iter().chain(0..11) {
        for &len in &lengths {
            // One option, with the longest header there is behind it, full of the same byte.
            for room in [4, 12, 40] {
                let mut options = vec![0xff; room];
                options[..2].copy_from_slice(&[kind, len]);
                from = if from == 60_000 { 3000 } else { from + 1 };
                if let Some((other, _)) = open_with(&mut rig, from, &options) {
                    rig.frame(&other.rst());
                }
                in_the_stream(&mut rig, &mut peer, id, &options);
            }
        }
    }
    // Forty that are nothing, or the end.
    for fill in [0, 1] {
        in_the_stream(&mut rig, &mut peer, id, &[fill; 40]);
    }
    rig.frame(&peer.rst());
    assert!(rig.net.server_sees_reset(id));
    rig.recovers(0);
}

/// Data behind these options arrive, or do not; repeated without them they have arrived, once.
fn in_the_stream(rig: &mut Rig, peer: &mut Peer, id: SocketId, options: &[u8]) {
    let data = b"data";
    rig.frame(&peer.with_options(ACK, options, data));
    let early = rig.net.server_read(id, 100);
    assert!(early.is_empty() || early == data, "{options:?}: {early:?}");
    rig.frame(&peer.data(data));
    let late = rig.net.server_read(id, 100);
    assert_eq!([early, late].concat(), data, "{options:?}");
    rig.take();
}

#[test]
fn row_24_half_closed_connections() {
    let total = count(200, 10_000);
    let from = |nth: usize| 2000 + u16::try_from(nth).unwrap();
    for host_first in [true, false] {
        let mut rig = accepting();
        let opened: Vec<_> = (0..total)
            .map(|nth| open_with(&mut rig, from(nth), &[2, 4, 5, 0xb4]).unwrap())
            .collect();
        let mut half = Vec::new();
        for (mut peer, id) in opened {
            rig.take();
            if host_first {
                rig.net.server_shutdown(id);
                rig.turn();
            } else {
                rig.frame(&peer.fin());
            }
            rig.millis(2);
            let came = peer.read(&rig.received());
            peer.take_all(&came);
            let ended = came.iter().any(|it| it.flags & FIN != 0);
            assert_eq!(ended, host_first, "{came:?}");
            rig.frame(&peer.ack());
            assert!(host_first || rig.net.server_sees_end(id));
            half.push((peer, id));
        }
        assert_eq!(rig.stack.flows(), total);
        // The other way is open for as long as both are there; a quarter of an hour, here.
        answer_probes(&mut rig, &mut half, 900);
        for (peer, id) in &mut half {
            if host_first {
                rig.frame(&peer.data(b"late"));
                assert_eq!(rig.net.server_read(*id, 100), b"late");
            } else {
                assert_eq!(rig.net.server_write(*id, b"late"), 4);
                rig.turn();
                let came = peer.read(&rig.received());
                assert!(came.iter().any(|it| it.data == b"late"), "{came:?}");
                peer.take_all(&came);
                rig.frame(&peer.ack());
            }
        }
        // Then the guest has nobody any more who owns its end, and says so when it is asked.
        rig.take();
        gone_when_asked(&mut rig, &half);
        assert_eq!((rig.stack.flows(), rig.net.open_sockets()), (0, 0));
        assert!(half.iter().all(|(_, id)| rig.net.server_sees_reset(*id)));
        rig.recovers(0);
    }
}

/// Lets so many seconds pass in which the guest answers whatever it is asked.
fn answer_probes(rig: &mut Rig, half: &mut [(Peer, SocketId)], secs: u64) {
    for _ in 0..secs / 5 {
        rig.secs(5);
        for segment in rig.received() {
            let port = segment
                .payload
                .get(2..4)
                .map(|it| u16::from_be_bytes([it[0], it[1]]));
            let nth = port.and_then(|port| usize::from(port).checked_sub(2000));
            if let Some((peer, _)) = nth.and_then(|nth| half.get(nth)) {
                rig.frame(&peer.ack());
            }
        }
    }
    assert_eq!(rig.stack.flows(), half.len(), "who answers lives");
}

/// Every segment is answered by a RST, as by a kernel that has forgotten the connection; within two
/// minutes all have been asked.
fn gone_when_asked(rig: &mut Rig, half: &[(Peer, SocketId)]) {
    for _ in 0..24 {
        rig.secs(5);
        for segment in rig.received() {
            let port = segment
                .payload
                .get(2..4)
                .map(|it| u16::from_be_bytes([it[0], it[1]]));
            let nth = port.and_then(|port| usize::from(port).checked_sub(2000));
            if let Some((peer, _)) = nth.and_then(|nth| half.get(nth)) {
                for asked in peer.read(&[segment]) {
                    rig.frame(&peer.with(RST, &[], |it| it.seq = asked.ack));
                }
            }
        }
    }
}

#[test]
fn row_25_abandoned_connections() {
    let total = count(500, 10_000);
    let mut rig = accepting();
    let opened: Vec<_> = (0..total)
        .map(|nth| {
            let from = 2000 + u16::try_from(nth).unwrap();
            open_with(&mut rig, from, &[2, 4, 5, 0xb4]).unwrap()
        })
        .collect();
    rig.only_count();
    // RFC 5382 REQ-5: none is given up before two hours and four minutes.
    rig.secs(2 * 3600 + 4 * 60);
    assert_eq!((rig.stack.flows(), rig.net.open_sockets()), (total, total));
    // They are asked more than once: an answer may be lost.
    let before = rig.sent;
    rig.secs(10 * 60);
    let asked = usize::try_from(rig.sent - before).unwrap() / total;
    assert!((4..=10).contains(&asked), "asked {asked} times");
    assert_eq!((rig.stack.flows(), rig.net.open_sockets()), (0, 0));
    assert!(opened.iter().all(|(_, id)| rig.net.server_sees_reset(*id)));
    // With bytes of the host's under way: they are repeated, and given up in the same time.
    let (_, id) = rig_open_kept(&mut rig);
    assert_eq!(rig.net.server_write(id, b"to nobody"), 9);
    rig.secs(2 * 3600 + 20 * 60);
    assert!(rig.net.server_sees_reset(id));
    rig.recovers(0);
}

/// What was lost while the tap was down goes out as soon as it is back, not when a timer has it that waits for a
/// minute by then; and afterwards timers are as short as ever.
#[test]
fn row_10_goes_on_once_the_tap_is_back() {
    let mut rig = accepting();
    let (mut peer, id) = rig.open(2000, addr("192.0.2.1:80"));
    let (mut ending, other) = rig.open(2001, addr("192.0.2.1:80"));
    let data = pattern(5_000);
    for _ in 0..3 {
        assert_eq!(rig.net.server_write(id, &data), data.len());
        rig.net.server_shutdown(other);
        rig.turn();
        rig.secs(100);
        rig.take();
        rig.secs(10);
        assert_eq!(peer.read(&rig.received()), [], "its timer is far off");
        rig.with_stack(|stack, turn| stack.handle_link_back(turn.now));
        rig.turn();
        let packets = rig.received();
        let came = peer.read(&packets);
        let got: Vec<u8> = came.iter().flat_map(|it| it.data.clone()).collect();
        assert!(got == data, "{} bytes", got.len());
        peer.take_all(&came);
        rig.frame(&peer.ack());
        let end = ending.read(&packets);
        ending.take_all(&end);
        rig.frame(&ending.ack());
        // A link that comes and goes has nothing sent again but once a second.
        assert_eq!(rig.net.server_write(id, b"new"), 3);
        rig.turn();
        rig.take();
        for _ in 0..100 {
            rig.with_stack(|stack, turn| stack.handle_link_back(turn.now));
            rig.turn();
        }
        assert_eq!(peer.read(&rig.received()), []);
        rig.secs(1);
        let came = peer.read(&rig.received());
        assert!(came.iter().any(|it| it.data == b"new"), "{came:?}");
        peer.take_all(&came);
        rig.frame(&peer.ack());
        // Once something has arrived as it should, what is lost is sent again after a second.
        assert_eq!(rig.net.server_write(id, b"in time"), 7);
        rig.turn();
        let came = peer.read(&rig.received());
        peer.take_all(&came);
        rig.frame(&peer.ack());
        assert_eq!(rig.net.server_write(id, b"lost"), 4);
        rig.turn();
        rig.take();
        rig.millis(1_500);
        let came = peer.read(&rig.received());
        assert!(came.iter().any(|it| it.data == b"lost"), "{came:?}");
        peer.take_all(&came);
        rig.frame(&peer.ack());
    }
    assert_eq!(ending.read(&rig.received()), []);
    rig.frame(&peer.rst());
    rig.frame(&ending.rst());
    rig.recovers(0);
}

/// Each of the times can be asked for: what is idle, half closed, not answered, and a port that is not used.
#[test]
fn row_25_times_that_were_asked_for() {
    let timeouts = Timeouts {
        tcp_idle: 60,
        tcp_half_closed: 20,
        tcp_connect: 5,
        udp_idle: 40,
    };
    let mut rig = Rig::with(Config {
        timeouts,
        ..Config::default()
    });
    rig.net.answer_all(ConnectAnswer::Accept);
    let (peer, id) = rig.open(2000, addr("192.0.2.1:80"));
    let asked = |rig: &mut Rig, peer: &Peer| peer.read(&rig.received()).len();
    // Idle: at rest long before, asked after half of the time, given up at its end.
    rig.secs(29);
    assert_eq!(rig.stack.buffers().1, 0, "it rests");
    assert_eq!(asked(&mut rig, &peer), 0);
    rig.secs(2);
    assert!(asked(&mut rig, &peer) > 0 && !rig.net.is_closed(id));
    // An answer keeps it, as long as before.
    rig.frame(&peer.ack());
    rig.secs(29);
    assert_eq!(asked(&mut rig, &peer), 0);
    rig.secs(30);
    assert!(asked(&mut rig, &peer) > 1 && !rig.net.is_closed(id));
    rig.secs(12);
    assert!(rig.net.server_sees_reset(id));
    // Half closed: asked sooner.
    let (mut peer, id) = rig.open(2001, addr("192.0.2.1:80"));
    rig.frame(&peer.fin());
    rig.take();
    rig.secs(19);
    assert_eq!(asked(&mut rig, &peer), 0);
    rig.secs(2);
    assert!(asked(&mut rig, &peer) > 0 && !rig.net.is_closed(id));
    rig.secs(40);
    assert!(rig.net.is_closed(id));
    // Not answered, by the host's network or by the guest.
    rig.net.answer_all(ConnectAnswer::Silent);
    let mut silent = Peer::new(2002, addr("192.0.2.1:80"));
    rig.frame(&silent.syn());
    rig.net.answer_all(ConnectAnswer::Accept);
    let mut early = Peer::new(2003, addr("192.0.2.1:80"));
    rig.frame(&early.syn());
    rig.secs(4);
    assert_eq!(rig.stack.flows(), 2);
    rig.secs(2);
    assert_eq!(rig.stack.flows(), 0);
    // A port: unanswered, and answered.
    let ip = Ipv4::new(OUTSIDE, UDP);
    let socket = SocketId(rig.net.datagram_sockets());
    rig.frame(&ip.frame(&ip.udp(5000, 7, b"x")));
    rig.frame(&ip.frame(&ip.udp(5001, 7, b"x")));
    rig.net.deliver(socket, addr("192.0.2.1:7"), b"y");
    rig.turn();
    rig.secs(29);
    assert_eq!(rig.stack.flows(), 2);
    rig.secs(2);
    assert_eq!(rig.stack.flows(), 1);
    rig.secs(10);
    assert_eq!(rig.stack.flows(), 0);
    rig.recovers(0);
}

fn rig_open_kept(rig: &mut Rig) -> (Peer, SocketId) {
    rig.keep();
    let opened = rig.open(1999, addr("192.0.2.1:80"));
    rig.only_count();
    opened
}
