//! Rows 14 to 16: ends that do not read, and one that would be told of a larger window than there is.
//!
//! In: a thousand connections whose guest, or whose host, takes nothing for ten minutes or for ever. Out:
//! what each of them holds meanwhile, that the other end is held back, and that nothing was lost or invented.

use std::net::SocketAddr;

use tapgate::config::Config;
use tapgate::host::simulated::{ConnectAnswer, SocketId};

use crate::count;
use crate::peer::{ACK, Peer, RST, SYN, length};
use crate::rig::{OUTSIDE, Rig, pattern};

/// What a host's socket holds in these tests.
const SOCKET: usize = 8 * 1024;
/// A segment each way has room whatever the limit is; a scaled window is counted in units of 128 bytes.
const SEGMENTS: usize = 2 * 1536;

/// What a ring may hold that is not worth an exchange for an empty one (doc/architecture.md), beside that.
const LITTLE: usize = SEGMENTS + 8 * 1024;

fn rig(memory: usize) -> Rig {
    let rig = Rig::with(Config {
        max_buffer_memory: memory,
        ..Config::default()
    });
    rig.net.answer_all(ConnectAnswer::Accept);
    rig.net.set_socket_buffer(SOCKET);
    rig
}

/// Connections of the guest with this window and these options.
fn opened(rig: &mut Rig, total: usize, window: u16, options: &[u8]) -> Vec<(Peer, SocketId)> {
    let mut all = Vec::new();
    for nth in 0..total {
        let port = u16::try_from(1000 + nth % 50_000).unwrap();
        let host = u16::try_from(80 + nth / 50_000).unwrap();
        let mut peer = Peer::new(port, SocketAddr::new(OUTSIDE.into(), host));
        peer.options = options.to_vec();
        peer.next.window = window;
        let id = SocketId(rig.net.connections().len());
        rig.frame(&peer.syn());
        let answer = peer.read(&rig.received()).pop().unwrap();
        peer.take(&answer);
        rig.frame(&peer.ack());
        all.push((peer, id));
    }
    all
}

/// The host sends as long as its socket takes anything; gives the bytes that it got rid of.
fn pour(rig: &mut Rig, id: SocketId, written: usize, data: &[u8]) -> usize {
    let mut sent = written;
    loop {
        let took = rig.net.server_write(id, &data[sent..]);
        sent += took;
        rig.turn();
        if took == 0 {
            return sent;
        }
    }
}

#[test]
fn row_14_slow_reader_in_the_guest() {
    let total = count(50, 1000);
    let memory = total << 16;
    let mut rig = rig(memory);
    // More than a ring and a socket hold.
    let data = pattern(1_100_000);
    let mut all = opened(&mut rig, total, 0, &[2, 4, 5, 0xb4]);
    rig.only_count();
    let mut written: Vec<usize> = all
        .iter()
        .map(|(_, id)| pour(&mut rig, *id, 0, &data))
        .collect();
    let (held, _) = rig.stack.buffers();
    assert!(
        held <= memory + total * SEGMENTS,
        "{held} bytes for {total}"
    );
    assert!(written.iter().all(|len| *len < data.len()), "held back");
    // Ten minutes: the closed window is asked about now and then (RFC 9293 3.8.6.1), and nothing more.
    let before = rig.sent;
    for _ in 0..60 {
        rig.secs(10);
        for (peer, _) in &all {
            rig.frame(&peer.with(ACK, &[], |it| it.window = 0));
        }
    }
    let asked = usize::try_from(rig.sent - before).unwrap() / total;
    assert!((5..=1200).contains(&asked), "asked {asked} times");
    assert_eq!(rig.stack.flows(), total, "none is given up");
    rig.is_alive();
    // Then it reads, and gets every byte.
    for ((peer, id), written) in all.iter_mut().zip(&mut written) {
        peer.next.window = 65_535;
        rig.keep();
        rig.take();
        let mut got: Vec<u8> = Vec::new();
        for _ in 0..10_000 {
            *written = pour(&mut rig, *id, *written, &data);
            rig.frame(&peer.ack());
            rig.millis(2);
            for segment in peer.read(&rig.received()) {
                if segment.seq == peer.next.ack {
                    got.extend(&segment.data);
                    peer.take(&segment);
                }
            }
            if got.len() == data.len() {
                break;
            }
        }
        assert!(got == data, "{} of {} bytes", got.len(), data.len());
        rig.frame(&peer.ack());
        rig.frame(&peer.rst());
    }
    rig.recovers(0);
}

#[test]
fn row_15_slow_reader_on_the_host() {
    // A guest without scaled windows, and one that has not sent much yet, is held back before it has sent
    // 128 KiB. To one that has, more is promised, and the limit on all of them decides.
    poured(&[2, 4, 5, 0xb4], 0, 0);
    poured(&[2, 4, 5, 0xb4, 3, 3, 7, 1], 5, 600_000);
}

/// A segment of the guest's; they are all alike.
const STEP: usize = 1400;

/// Guests with these options pour; our windows have this scale. The hosts stop to read after so many bytes.
fn poured(options: &[u8], scale: u32, read: usize) {
    let total = count(40, 1000);
    let memory = total << 17;
    let mut rig = rig(memory);
    let data = pattern(STEP);
    let mut all = opened(&mut rig, total, 65_535, options);
    let sent: Vec<(usize, usize)> = all
        .iter_mut()
        .map(|(peer, id)| {
            let mut before = 0;
            while before < read {
                rig.frame(&peer.data(&data));
                rig.millis(2);
                before += rig.net.server_read(*id, usize::MAX).len();
                rig.turn();
                rig.take();
            }
            rig.net.server_pause(*id, true);
            (before, before + fill(&mut rig, peer, &data, scale))
        })
        .collect();
    let (held, _) = rig.stack.buffers();
    assert!(held <= memory + total * LITTLE, "{held} bytes for {total}");
    assert!(read > 0 || sent.iter().all(|(_, sent)| *sent < 128 * 1024));
    rig.is_alive();
    rig.secs(600);
    rig.take();
    // The hosts read again: all that was acknowledged comes, in order.
    for ((peer, id), (before, sent)) in all.iter_mut().zip(sent) {
        rig.net.server_pause(*id, false);
        let mut got = before;
        while got < sent {
            rig.turn();
            let piece = rig.net.server_read(*id, usize::MAX);
            assert!(!piece.is_empty(), "{got} of {sent} bytes");
            let right = |(at, byte): (usize, &u8)| *byte == data[(got + at) % STEP];
            assert!(piece.iter().enumerate().all(right));
            got += piece.len();
        }
        assert_eq!(got, sent);
        rig.frame(&peer.rst());
    }
    rig.recovers(0);
}

/// The guest sends as long as its window lets it; gives the bytes that were acknowledged.
pub(crate) fn fill(rig: &mut Rig, peer: &mut Peer, data: &[u8], scale: u32) -> usize {
    let mut sent = 0;
    loop {
        rig.frame(&peer.data(data));
        rig.millis(2);
        let said = peer.read(&rig.received()).pop();
        let Some(said) = said.filter(|said| said.ack == peer.next.seq) else {
            // Not taken: it would be repeated.
            peer.next.seq = peer.next.seq.wrapping_sub(length(data));
            return sent;
        };
        sent += data.len();
        if usize::from(said.window) << scale < data.len() {
            return sent;
        }
    }
}

#[test]
fn row_15_answers_of_a_byte_keep_the_window_open() {
    let mut rig = Rig::new();
    let (mut peer, id) = rig.open(999, crate::rig::echo());
    for nth in 0..200 {
        rig.frame(&peer.data(&[7; 1000]));
        assert_eq!(rig.net.server_read(id, 2000).len(), 1000);
        assert_eq!(rig.net.server_write(id, b"k"), 1);
        rig.turn();
        let came = peer.read(&rig.received());
        peer.take_all(&came);
        let last = came.last().unwrap();
        assert_eq!(last.ack, peer.next.seq);
        assert!(last.window >= 16_000, "{} after {nth}", last.window);
    }
    rig.frame(&peer.rst());
    rig.recovers(0);
}

#[test]
fn row_16_window_that_closes_with_the_last_acknowledgement() {
    let mut rig = Rig::new();
    let (mut peer, id) = rig.open(999, crate::rig::echo());
    assert_eq!(rig.net.server_write(id, &[7; 200]), 200);
    rig.net.server_shutdown(id);
    rig.turn();
    let first = peer.next.ack;
    peer.take_all(&peer.read(&rig.received()));
    assert_eq!(peer.next.ack, first.wrapping_add(201), "data and their end");
    for acked in [100, 201] {
        let ack = first.wrapping_add(acked);
        rig.frame(&peer.with(ACK, &[], |it| (it.ack, it.window) = (ack, 0)));
    }
    rig.take();
    // There is nothing to send, and so no window to ask about.
    let before = rig.woken();
    rig.secs(60);
    let (woken, sent) = (rig.woken() - before, rig.received().len());
    assert!(
        woken < 20 && sent < 10,
        "{woken} times awake, {sent} frames"
    );
    // The guest's own stream goes on.
    rig.frame(&peer.data(b"still"));
    assert_eq!(rig.net.server_read(id, 100), b"still");
    rig.frame(&peer.fin());
    rig.recovers(0);
}

#[test]
fn row_15_what_was_acknowledged_arrives_whatever_comes_after_the_end() {
    let mut rig = Rig::new();
    let (mut peer, id) = rig.open(999, crate::rig::echo());
    // The host has ended its stream, and takes nothing for a while.
    rig.net.server_shutdown(id);
    rig.turn();
    peer.take_all(&peer.read(&rig.received()));
    rig.net.server_pause(id, true);
    rig.frame(&peer.data(b"acknowledged"));
    rig.frame(&peer.fin());
    let answers = peer.read(&rig.received());
    assert_eq!(answers.last().unwrap().ack, peer.next.seq);
    rig.secs(15);
    for flags in [ACK, ACK | SYN] {
        rig.frame(&peer.with(flags, &[], |_| ()));
        rig.secs(1);
    }
    rig.net.server_pause(id, false);
    rig.turn();
    assert_eq!(rig.net.server_read(id, 100), b"acknowledged");
    assert!(rig.net.server_sees_end(id), "an orderly end");
    rig.recovers(0);
}

#[test]
fn row_16_peers_that_never_open_their_window() {
    let total = count(300, 10_000);
    let memory = 8 << 20;
    let mut rig = rig(memory);
    let data = pattern(200_000);
    let all = opened(&mut rig, total, 0, &[2, 4, 5, 0xb4]);
    rig.only_count();
    for (_, id) in &all {
        pour(&mut rig, *id, 0, &data);
    }
    for _ in 0..count(5, 20) {
        rig.secs(60);
        for (peer, _) in &all {
            rig.frame(&peer.with(ACK, &[], |it| it.window = 0));
        }
        let (held, _) = rig.stack.buffers();
        assert!(
            held <= memory + total * SEGMENTS,
            "{held} bytes for {total}"
        );
        rig.is_alive();
        rig.only_count();
    }
    // Who is still there is not thrown out (RFC 6429 allows it, and asks for nothing); who has gone is
    // given up like anybody else.
    assert!(rig.stack.flows() >= total);
    rig.recovers(0);
}

#[test]
fn row_16_a_wrong_acknowledgement_opens_no_window() {
    let mut rig = rig(64 << 20);
    let mut peer = Peer::new(1000, SocketAddr::new(OUTSIDE.into(), 80));
    // The window is scaled, and zero is ahead of every number.
    peer.options = vec![3, 3, 7, 1];
    peer.next.seq = 0_u32.wrapping_sub(8 << 20);
    rig.frame(&peer.syn());
    let answer = peer.read(&rig.received()).pop().unwrap();
    peer.take(&answer);
    let edge = peer.next.seq.wrapping_add(answer.window.into());
    let wrong = peer.with(ACK, b"?", |it| {
        it.seq = edge;
        it.ack = answer.seq;
    });
    rig.frame(&wrong);
    let told = peer.read(&rig.received());
    let limit = peer.next.seq.wrapping_add(2 << 20);
    for it in told.iter().filter(|it| it.flags & RST == 0) {
        let end = it.ack.wrapping_add(u32::from(it.window) << 5);
        assert!(end.wrapping_sub(limit).cast_signed() <= 0, "{it:?}");
    }
    // What lies beyond the ring is not taken, nor what makes up for it later invented.
    let data = pattern((1 << 20) + 60_000);
    for (at, piece) in data.chunks(1400).enumerate().skip(700) {
        let frame = peer.with(ACK, piece, |it| {
            it.seq = peer.next.seq.wrapping_add(length(&data[..at * 1400]));
        });
        rig.frame(&frame);
    }
    let (id, start, mut ack) = (SocketId(0), peer.next.seq, peer.next.seq);
    let mut got = Vec::new();
    for _ in 0..4000 {
        if let Some(latest) = peer.read(&rig.received()).last() {
            ack = latest.ack;
        }
        let at = usize::try_from(ack.wrapping_sub(start)).unwrap();
        let end = data.len().min(at + 1400);
        rig.frame(&peer.with(ACK, &data[at..end], |it| it.seq = ack));
        got.extend(rig.net.server_read(id, data.len()));
        rig.millis(2);
        if got.len() >= data.len() {
            break;
        }
    }
    assert!(got == data, "{} of {} bytes", got.len(), data.len());
}
