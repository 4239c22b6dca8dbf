//! Rows 18 to 20: segments that a stranger makes up for somebody else's connection (RFC 5961).
//!
//! In: a connection, and segments with any number but the right one. Out: that it lives on with every byte
//! in its place, and how much was said about them; then that who is really there gets what is asked for.

use tapgate::config::Config;
use tapgate::flow::tcp_engine::RING;
use tapgate::host::simulated::SocketId;
use tapgate::net::DropReason;

use crate::peer::{ACK, FIN, Peer, RST, SYN};
use crate::rig::{Rig, echo, pattern};
use crate::{Random, count};

/// What has become of the connection before the stranger speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    /// Bytes have just gone both ways.
    Moving,
    /// Nothing has moved for a while.
    Resting,
    /// The guest has ended its stream.
    GuestEnded,
    /// The host has ended its.
    HostEnded,
}

const LIVES: [Life; 4] = [
    Life::Moving,
    Life::Resting,
    Life::GuestEnded,
    Life::HostEnded,
];

/// The challenges of one connection in a second (RFC 5961 section 7).
const CHALLENGES: usize = 100;
/// Segments that come in ten milliseconds.
const BURST: usize = 100;

fn connection(life: Life) -> (Rig, Peer, SocketId) {
    let mut rig = Rig::new();
    let (mut peer, id) = rig.open(4000, echo());
    rig.frame(&peer.data(b"question"));
    assert_eq!(rig.net.server_read(id, 100), b"question");
    assert_eq!(rig.net.server_write(id, b"answer"), 6);
    rig.turn();
    match life {
        Life::Moving => {}
        Life::Resting => rig.secs(5),
        Life::GuestEnded => rig.frame(&peer.fin()),
        Life::HostEnded => rig.net.server_shutdown(id),
    }
    rig.turn();
    let came = peer.read(&rig.received());
    peer.take_all(&came);
    rig.frame(&peer.ack());
    if life != Life::Moving {
        rig.secs(2);
    }
    rig.take();
    (rig, peer, id)
}

/// Bytes still go each way that has not ended.
fn lives_on(rig: &mut Rig, peer: &mut Peer, (id, life): (SocketId, Life)) {
    rig.take();
    if life != Life::GuestEnded {
        rig.frame(&peer.data(b"more"));
        assert_eq!(rig.net.server_read(id, 100), b"more", "{life:?}");
    }
    if life != Life::HostEnded {
        assert_eq!(rig.net.server_write(id, b"more"), 4);
        rig.turn();
    }
    rig.millis(5);
    let came = peer.read(&rig.received());
    assert!(came.iter().all(|it| it.flags & RST == 0), "{came:?}");
    let data: Vec<u8> = came.iter().flat_map(|it| it.data.clone()).collect();
    let expected = if life == Life::HostEnded {
        &b""[..]
    } else {
        b"more"
    };
    assert_eq!(data, expected, "{life:?}");
    peer.take_all(&came);
    rig.frame(&peer.ack());
    assert!(!rig.net.server_sees_reset(id), "{life:?}");
}

/// Sends what `make` makes, in bursts; gives the segments that came back and the seconds that passed.
fn storm(
    rig: &mut Rig,
    peer: &Peer,
    total: usize,
    mut make: impl FnMut() -> Vec<u8>,
) -> (Vec<crate::peer::Seen>, usize) {
    let mut came = Vec::new();
    for _ in 0..total.div_ceil(BURST) {
        let burst: Vec<Vec<u8>> = (0..BURST).map(|_| make()).collect();
        rig.batch(burst.iter().map(Vec::as_slice));
        rig.millis(10);
        came.extend(peer.read(&rig.received()));
    }
    (came, 1 + total.div_ceil(BURST) / 100)
}

/// A RST counts also where there is no memory for the connection that it ends: nobody sends it again.
#[test]
fn row_18_reset_without_memory() {
    // One engine, which a connection has that waits for an acknowledgement.
    let mut rig = Rig::with(Config {
        ring_space: 2 * RING,
        ..Config::default()
    });
    let (peer, id) = rig.open(4000, echo());
    let (mut busy, held) = rig.open(4001, echo());
    assert_eq!(rig.net.server_write(held, b"unacknowledged"), 14);
    rig.turn();
    rig.take();
    for beside in [1, u32::MAX, 1000] {
        rig.frame(&peer.with(RST, &[], |it| it.seq = it.seq.wrapping_add(beside)));
    }
    rig.frame(&peer.with(ACK, b"data", |_| ()));
    assert_eq!(rig.net.server_read(id, 100), b"");
    assert!(!rig.net.server_sees_reset(id));
    rig.frame(&peer.rst());
    assert!(rig.net.server_sees_reset(id) && rig.net.is_closed(id));
    busy.next.ack = busy.next.ack.wrapping_add(14);
    rig.frame(&busy.rst());
    assert!(rig.net.server_sees_reset(held));
    rig.recovers(0);
}

#[test]
fn row_18_rst_storm() {
    let total = count(2_000, 100_000) / LIVES.len();
    let sent = ((total / 2).div_ceil(BURST) * BURST) as u64;
    for life in LIVES {
        let mut random = Random::new(18);
        let (mut rig, mut peer, id) = connection(life);
        // Outside the window, behind and before it: nothing is said.
        let dropped = rig.dropped(DropReason::TcpUnacceptable);
        let (came, _) = storm(&mut rig, &peer, total / 2, || {
            let far = 0x0010_0000 + random.long() % 0x7fff_0000;
            let behind = 1 + random.long() % 0x7fff_0000;
            let ahead = if random.below(2) == 0 {
                far
            } else {
                behind.wrapping_neg()
            };
            let ack = if random.below(2) == 0 { ACK } else { 0 };
            peer.with(RST | ack, &[], |it| it.seq = it.seq.wrapping_add(ahead))
        });
        assert_eq!(came, [], "{life:?}");
        let fewer = rig.dropped(DropReason::TcpUnacceptable) - dropped;
        assert_eq!(fewer, sent, "each is counted as dropped");
        lives_on(&mut rig, &mut peer, (id, life));
        // Inside, but not the one that is expected: who is there is asked, now and then.
        let dropped = rig.dropped(DropReason::TcpUnacceptable);
        let (came, seconds) = storm(&mut rig, &peer, total / 2, || {
            let ahead = 1 + random.long() % 16_000;
            peer.with(RST, &[], |it| it.seq = it.seq.wrapping_add(ahead))
        });
        let right = |it: &crate::peer::Seen| it.flags == ACK && it.ack == peer.next.seq;
        assert!(came.iter().all(right), "{life:?}: {came:?}");
        assert!(
            !came.is_empty() && came.len() <= CHALLENGES * seconds,
            "{}",
            came.len()
        );
        let fewer = rig.dropped(DropReason::TcpUnacceptable) - dropped;
        assert_eq!(fewer + came.len() as u64, sent, "or as answered");
        lives_on(&mut rig, &mut peer, (id, life));
        // Who is there has an answer.
        rig.frame(&peer.rst());
        assert!(rig.net.server_sees_reset(id), "{life:?}");
        assert_eq!(rig.received(), []);
        rig.recovers(0);
    }
    nobody_s_rst(total);
    rst_in_time_wait();
    rst_behind_a_window_that_was_filled();
}

/// What filled the window may be lost: its sender's RST stands at the window's right edge, and is asked about.
fn rst_behind_a_window_that_was_filled() {
    let (mut rig, mut peer, id) = connection(Life::Moving);
    rig.frame(&peer.data(b"x"));
    rig.millis(5);
    let said = peer.read(&rig.received()).pop().unwrap();
    let edge = said.ack.wrapping_add(u32::from(said.window));
    rig.frame(&peer.with(RST, &[], |it| it.seq = edge.wrapping_add(1)));
    assert_eq!(rig.received(), [], "beyond it nothing is said");
    rig.frame(&peer.with(RST, &[], |it| it.seq = edge));
    let asked = peer.read(&rig.received()).pop().unwrap();
    assert_eq!((asked.flags, asked.ack), (ACK, peer.next.seq));
    rig.frame(&peer.rst());
    assert!(rig.net.server_sees_reset(id));
    rig.recovers(0);
}

/// A RST of no connection is not answered, by a RST least of all.
fn nobody_s_rst(total: usize) {
    let mut rig = Rig::new();
    let mut random = Random::new(81);
    let peer = Peer::new(4000, echo());
    let before = rig.dropped(DropReason::TcpNoFlow);
    for _ in 0..total {
        let with_ack = if random.below(2) == 0 { ACK } else { 0 };
        let seq = random.long();
        rig.frame(&peer.with(RST | with_ack, &[], |it| it.seq = seq));
    }
    assert_eq!(rig.dropped(DropReason::TcpNoFlow) - before, total as u64);
    assert_eq!(rig.take(), Vec::<Vec<u8>>::new());
    rig.recovers(0);
}

/// The end of a connection is remembered for ten seconds, whatever a stranger says (RFC 1337).
fn rst_in_time_wait() {
    let (mut rig, mut peer, id) = connection(Life::HostEnded);
    rig.frame(&peer.fin());
    assert!(rig.net.server_sees_end(id));
    assert_eq!(rig.stack.flows(), 1, "TIME-WAIT");
    rig.take();
    rig.frame(&peer.with(FIN | ACK, &[], |it| it.seq = it.seq.wrapping_sub(1)));
    let again = peer.read(&rig.received()).pop().unwrap();
    let numbers = (again.flags, again.seq, again.ack);
    assert_eq!(numbers, (ACK, peer.next.ack, peer.next.seq));
    for ahead in 1..1000 {
        rig.frame(&peer.with(RST, &[], |it| it.seq = it.seq.wrapping_add(ahead)));
    }
    assert_eq!(rig.stack.flows(), 1, "a stranger's RST");
    rig.secs(9);
    rig.frame(&peer.with(RST, &[], |it| it.seq = it.seq.wrapping_add(1)));
    assert_eq!(rig.stack.flows(), 1);
    rig.secs(2);
    assert_eq!(rig.stack.flows(), 0, "and it did not last longer for that");
}

#[test]
fn row_19_syn_in_an_open_connection() {
    let total = count(2_000, 10_000) / LIVES.len();
    for life in LIVES {
        let mut random = Random::new(19);
        let (mut rig, mut peer, id) = connection(life);
        // Anywhere, with and without an acknowledgement, data, or the end of a stream.
        let (came, seconds) = storm(&mut rig, &peer, total, || {
            let (seq, ack) = (random.long(), random.long());
            let flags = SYN | random.byte() & (ACK | FIN);
            let data = pattern(random.below(3) * 100);
            peer.with(flags, &data, |it| (it.seq, it.ack) = (seq, ack))
        });
        let right = |it: &crate::peer::Seen| {
            it.flags == ACK && it.ack == peer.next.seq && it.seq == peer.next.ack
        };
        assert!(came.iter().all(right), "{life:?}: {came:?}");
        assert!(
            !came.is_empty() && came.len() <= CHALLENGES * seconds,
            "{}",
            came.len()
        );
        lives_on(&mut rig, &mut peer, (id, life));
        // A guest that has lost its memory and begins anew finds out in three segments.
        let mut reborn = Peer::new(4000, echo());
        reborn.next.seq = random.long();
        rig.frame(&reborn.syn());
        let challenge = peer.read(&rig.received()).pop().unwrap();
        rig.frame(&reborn.with(RST, &[], |it| it.seq = challenge.ack));
        assert!(rig.net.server_sees_reset(id), "{life:?}");
        rig.frame(&reborn.with(SYN, &[], |it| it.seq = it.seq.wrapping_sub(1)));
        let answer = reborn.read(&rig.received()).pop().unwrap();
        assert_eq!(
            (answer.flags, answer.ack),
            (SYN | ACK, reborn.next.seq),
            "{life:?}"
        );
        rig.frame(&reborn.rst());
        rig.recovers(0);
    }
}

#[test]
fn row_20_blind_data_and_acknowledgements() {
    let total = count(2_000, 100_000) / LIVES.len();
    for life in LIVES {
        let mut random = Random::new(20);
        let (mut rig, mut peer, id) = connection(life);
        // Data and acknowledgements with a number that is wrong: of the sequence, or of what is acknowledged.
        let mut sent = 0;
        let (came, _) = storm(&mut rig, &peer, total, || {
            sent += 1;
            let data = pattern(random.below(2) * (1 + random.below(1000)));
            let flags = ACK | (random.byte() & FIN);
            // Beyond a window of 64 KiB, or so far behind that it ends before what is expected.
            let off = if random.below(2) == 0 {
                0x0010_0000 + random.long() % 0x7000_0000
            } else {
                (2_000 + random.long() % 0x7000_0000).wrapping_neg()
            };
            let unsent = 1 + random.long() % 0x7000_0000;
            let wrong_sequence = random.below(2) == 0;
            peer.with(flags, &data, |it| {
                if wrong_sequence {
                    it.seq = it.seq.wrapping_add(off);
                } else {
                    it.ack = it.ack.wrapping_add(unsent);
                }
            })
        });
        assert!(
            came.len() <= sent,
            "one answer each at most: {}",
            came.len()
        );
        let right = |it: &crate::peer::Seen| it.flags == ACK && it.ack == peer.next.seq;
        assert!(came.iter().all(right), "{life:?}");
        assert_eq!(rig.net.server_read(id, 100), b"", "nothing was taken");
        lives_on(&mut rig, &mut peer, (id, life));
        rig.frame(&peer.rst());
        rig.recovers(0);
    }
    acknowledged_before_it_was_sent();
}

/// What waits for a closed window is not acknowledged by who has not seen it.
fn acknowledged_before_it_was_sent() {
    let mut rig = Rig::new();
    let (mut peer, id) = rig.open(4000, echo());
    rig.frame(&peer.with(ACK, &[], |it| it.window = 0));
    peer.next.window = 0;
    let data = pattern(50_000);
    assert_eq!(rig.net.server_write(id, &data), data.len());
    rig.millis(10);
    rig.take();
    for ahead in 1..2000 {
        let lie = peer.with(ACK, &[], |it| {
            it.ack = it.ack.wrapping_add(ahead * 25);
            it.window = 0;
        });
        rig.frame(&lie);
    }
    rig.take();
    peer.next.window = 65_535;
    let mut got: Vec<u8> = Vec::new();
    for _ in 0..100 {
        rig.frame(&peer.ack());
        rig.millis(5);
        for segment in peer.read(&rig.received()) {
            if segment.seq == peer.next.ack {
                got.extend(&segment.data);
                peer.take(&segment);
            }
        }
    }
    assert!(got == data, "{} bytes of {}", got.len(), data.len());
    rig.frame(&peer.rst());
    rig.recovers(0);
}
