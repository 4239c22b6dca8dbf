//! Rows 17, 19 and 20: sequence numbers that nobody in his right mind would use, where they could mean something.
//!
//! In: segments far from the window, behind the end of a stream, and before a connection has come to be. Out: that
//! nothing of it is taken, and that what is in order still is.

use std::net::SocketAddr;

use tapgate::config::Protocol;
use tapgate::host::simulated::{ConnectAnswer, SocketId};

use crate::peer::{ACK, FIN, Peer, RST, SYN, Seen, length};
use crate::published::{TCP_PORT, publish};
use crate::rig::{OUTSIDE, Rig, addr, echo, pattern};
use crate::{Random, count};

/// Most payload of a frame.
const PART: usize = 1400;

/// A guest whose request was answered, and the number of its connection; nothing else has been said. Without `options`
/// windows are not scaled.
fn answered(rig: &mut Rig, from: u16, options: &[u8]) -> (Peer, SocketId, usize) {
    rig.net.answer_all(ConnectAnswer::Accept);
    let mut peer = Peer::new(from, SocketAddr::new(OUTSIDE.into(), 80));
    peer.options = options.to_vec();
    let id = SocketId(rig.net.connections().len());
    rig.frame(&peer.syn());
    let answer = peer.read(&rig.received()).pop().unwrap();
    assert_eq!(answer.flags, SYN | ACK);
    peer.take(&answer);
    (peer, id, usize::from(answer.window))
}

/// In one turn: all that the window holds, the end behind it, and then what only a window that has turned inside out would
/// take.
#[test]
fn row_20_nothing_is_taken_far_behind_the_end() {
    for far in [0x4000_0000, 0x7fff_ffff, 0x8000_0000, 0xffff_0000_u32] {
        let mut rig = Rig::new();
        let (mut peer, id, window) = answered(&mut rig, 4000, &[2, 4, 5, 0xb4, 1, 1, 4, 2]);
        let sent = pattern(window);
        let mut frames: Vec<_> = sent.chunks(PART).map(|part| peer.data(part)).collect();
        frames.push(peer.fin());
        let beyond = peer.next.seq.wrapping_add(far);
        frames.push(peer.with(ACK, b"!", |fields| fields.seq = beyond));
        rig.batch(frames.iter().map(Vec::as_slice));
        assert!(rig.net.server_read(id, usize::MAX) == sent, "{far:x}");
        assert!(rig.net.server_sees_end(id));
        assert_eq!(rig.net.server_write(id, b"answer"), 6);
        rig.turn();
        let came = peer.read(&rig.received());
        assert!(came.iter().any(|it| it.data == b"answer"), "{came:?}");
        rig.is_alive();
    }
}

/// In one turn: the guest takes its request back, and makes another with a number far from it.
#[test]
fn row_19_request_that_was_taken_back_is_not_followed_by_another() {
    for far in [1, 0x2000_0000, 0x4000_0000, 0xc000_0000_u32] {
        let mut rig = Rig::new();
        let (peer, id, _) = answered(&mut rig, 4000, &[2, 4, 5, 0xb4, 3, 3, 7, 0]);
        let reset = peer.with(RST, &[], |_| ());
        let mut again = peer.clone();
        again.next.seq = again.next.seq.wrapping_add(far);
        let request = again.syn();
        rig.batch([reset.as_slice(), &request]);
        assert!(rig.net.server_sees_reset(id), "{far:x}");
        assert!(peer.read(&rig.received()).is_empty(), "{far:x}");
        assert_eq!(rig.stack.flows(), 0);
        rig.frame(&request);
        let answer = again.read(&rig.received()).pop().unwrap();
        assert_eq!(
            (answer.flags, answer.ack),
            (SYN | ACK, again.next.seq),
            "{far:x}"
        );
    }
}

/// The guest has guessed whom a request will come from, and its link was down meanwhile.
#[test]
fn row_19_request_that_meets_one_that_has_not_left() {
    let mut rig = Rig::new();
    publish(&mut rig, Protocol::Tcp, TCP_PORT);
    let client = addr("192.0.2.9:1000");
    let id = rig.net.client_connect(addr(TCP_PORT), client).unwrap();
    rig.crowded_turn();
    rig.with_stack(|stack, turn| stack.handle_link_back(turn.now));
    let mut peer = Peer::new(80, client);
    let request = peer.syn();
    rig.frame(&request);
    let came = peer.read(&rig.received());
    assert_eq!(came.len(), 1, "{came:?}");
    assert_eq!(came[0].flags, SYN);
    // Now both have asked (RFC 9293 3.5, figure 7).
    rig.frame(&request);
    let came = peer.read(&rig.received());
    assert!(came.iter().any(|it| it.flags == SYN | ACK), "{came:?}");
    peer.take_all(&came);
    rig.frame(&peer.with(SYN | ACK, &[], |it| it.seq = it.seq.wrapping_sub(1)));
    rig.frame(&peer.data(b"hello"));
    assert_eq!(rig.net.server_read(id, 10), b"hello");
}

/// A host that was slow takes all at once, in a turn for which there is no room.
#[test]
fn row_17_window_that_opens_while_there_is_no_room_is_told_later() {
    for crowded in [false, true] {
        let mut rig = Rig::new();
        let (mut peer, id, window) = answered(&mut rig, 4000, &[2, 4, 5, 0xb4, 3, 3, 7, 0]);
        rig.frame(&peer.ack());
        rig.net.server_pause(id, true);
        let mut right = peer.next.seq.wrapping_add(u32::try_from(window).unwrap());
        while right != peer.next.seq {
            let left = usize::try_from(right.wrapping_sub(peer.next.seq)).unwrap();
            rig.frame(&peer.data(&vec![7; left.min(PART)]));
            rig.millis(20);
            let last = peer.read(&rig.received()).pop();
            right = last.map_or(right, |it| edge(&it));
        }
        rig.net.server_pause(id, false);
        for _ in 0..100 {
            drop(rig.net.server_read(id, usize::MAX));
            if crowded {
                rig.crowded_turn();
            } else {
                rig.turn();
            }
        }
        rig.turn();
        let came = peer.read(&rig.received());
        let told = came.last().map(|it| edge(it).wrapping_sub(right));
        assert!(told > Some(16_384), "{crowded}: {came:?}");
    }
}

/// Up to where a guest may send whose windows are scaled.
fn edge(seen: &Seen) -> u32 {
    seen.ack.wrapping_add(u32::from(seen.window) << 5)
}

/// Such a number is behind what was sent as much as ahead of it (RFC 5961 5.2).
#[test]
fn row_20_acknowledgement_from_half_of_all_away_is_challenged() {
    let (mut rig, mut peer, id) = open_and_heard();
    for by in [
        0x4000_0000,
        0x7fff_ffff,
        0x8000_0000,
        0x8000_0100,
        0xbfff_ffff_u32,
    ] {
        rig.frame(&peer.with(ACK, &[], |it| it.ack = it.ack.wrapping_add(by)));
        let asked = peer.read(&rig.received()).pop();
        let asked = asked.map(|it| (it.flags, it.ack));
        assert_eq!(asked, Some((ACK, peer.next.seq)), "{by:x}");
        rig.millis(10);
    }
    // An old one is only late.
    rig.frame(&peer.with(ACK, &[], |it| it.ack = it.ack.wrapping_sub(6)));
    assert_eq!(rig.received(), []);
    rig.frame(&peer.data(b"more"));
    assert_eq!(rig.net.server_read(id, 10), b"more");
}

/// A connection on which the guest has heard something.
fn open_and_heard() -> (Rig, Peer, SocketId) {
    let mut rig = Rig::new();
    let (mut peer, id) = rig.open(4000, echo());
    assert_eq!(rig.net.server_write(id, b"answer"), 6);
    rig.turn();
    let came = peer.read(&rig.received());
    peer.take_all(&came);
    rig.frame(&peer.ack());
    rig.millis(20);
    rig.take();
    (rig, peer, id)
}

/// Whatever stands behind the end of the guest's stream is no part of it.
#[test]
fn row_20_the_end_is_the_end() {
    let mut random = Random::new(22);
    for round in 0..count(50, 500) {
        let mut rig = Rig::new();
        let (mut peer, id) = rig.open(4000, echo());
        rig.net.server_pause(id, random.below(2) == 0);
        let sent = pattern(1 + random.below(30_000));
        // The end comes by itself, or with the last of the data.
        let last = if random.below(2) == 0 {
            0
        } else {
            sent.len().min(PART)
        };
        let (first, last) = sent.split_at(sent.len() - last);
        let mut frames: Vec<_> = first.chunks(PART).map(|part| peer.data(part)).collect();
        frames.push(peer.with(FIN | ACK, last, |_| ()));
        peer.next.seq = peer.next.seq.wrapping_add(length(last) + 1);
        let behind = random.below(3 * PART);
        let from = peer.next.seq.wrapping_add(u32::try_from(behind).unwrap());
        for flags in [ACK, ACK | FIN] {
            let seq = if random.below(2) == 0 {
                from
            } else {
                peer.next.seq
            };
            frames.push(peer.with(flags, &[b'!'; 100], |fields| fields.seq = seq));
        }
        if random.below(2) == 0 {
            rig.batch(frames.iter().map(Vec::as_slice));
        } else {
            for frame in &frames {
                rig.frame(frame);
            }
        }
        rig.net.server_pause(id, false);
        rig.turn();
        let mut got = rig.net.server_read(id, usize::MAX);
        rig.turn();
        got.extend(rig.net.server_read(id, usize::MAX));
        assert!(
            got == sent,
            "round {round}: {} of {}",
            got.len(),
            sent.len()
        );
        assert!(
            rig.net.server_sees_end(id),
            "round {round}, behind {behind}, of {}",
            sent.len()
        );
        let came = peer.read(&rig.received());
        assert_eq!(
            came.last().map(|it| it.ack),
            Some(peer.next.seq),
            "round {round}: {came:?}"
        );
    }
}
