//! How a connection ends that the guest ended first: of more than it is left to remember, and of a host that is slow.
//!
//! In: a crowd of connections, each ended in order or by a RST; one whose host has not taken all, and a new one on its
//! endpoints. Out: the RST that ends the guest's TIME-WAIT, by its exact number, and nothing where the guest is in no
//! TIME-WAIT; every byte of the old connection, and then the new one's answer.

use tapgate::host::simulated::SocketId;

use crate::peer::{ACK, FIN, Peer, RST, SYN};
use crate::rig::{Rig, echo, pattern};
use crate::windows::fill;

/// More than a guest is left to remember at once.
const CROWD: u16 = 1100;

/// A connection whose guest has ended its stream, and whose host then says something and ends its own.
fn both_ended(rig: &mut Rig, port: u16) -> (Peer, SocketId) {
    let (mut peer, id) = rig.open(port, echo());
    rig.frame(&peer.fin());
    assert_eq!(rig.net.server_write(id, b"answer"), 6);
    rig.net.server_shutdown(id);
    rig.turn();
    let came = peer.read(&rig.received());
    peer.take_all(&came);
    let ended = came.last().unwrap();
    assert_eq!(ended.flags & FIN, FIN);
    (peer, id)
}

/// A guest that remembers as many as it is left already.
fn crowded() -> Rig {
    let mut rig = Rig::new();
    for port in 0..CROWD {
        let (peer, id) = both_ended(&mut rig, 4000 + port);
        rig.frame(&peer.ack());
        assert!(rig.net.is_closed(id));
    }
    rig.take();
    rig
}

#[test]
fn the_guest_is_told_to_forget_by_the_exact_number() {
    let mut rig = crowded();
    let (peer, id) = both_ended(&mut rig, 4000 + CROWD);
    rig.frame(&peer.ack());
    let came = peer.read(&rig.received());
    let [told] = came.as_slice() else {
        panic!("{came:?}");
    };
    let numbers = (told.flags, told.seq, told.ack);
    assert_eq!(numbers, (RST | ACK, peer.next.ack, peer.next.seq));
    assert!(rig.net.is_closed(id) && !rig.net.server_sees_reset(id));
    assert_eq!(rig.stack.flows(), 0);
    rig.recovers(0);
}

#[test]
fn a_guest_that_resets_is_told_nothing() {
    let mut rig = crowded();
    let (peer, id) = both_ended(&mut rig, 4000 + CROWD);
    rig.frame(&peer.rst());
    assert_eq!(rig.take(), Vec::<Vec<u8>>::new());
    assert!(rig.net.is_closed(id));
    assert_eq!(rig.stack.flows(), 0);
    rig.recovers(0);
}

/// A guest's stream that its host has not taken when both sides have ended theirs and know it; gives its length.
fn kept_for_a_slow_host(rig: &mut Rig) -> (Peer, SocketId, usize) {
    let (mut peer, id) = rig.open(4000, echo());
    rig.net.server_pause(id, true);
    let sent = fill(rig, &mut peer, &pattern(1400), 0);
    rig.frame(&peer.fin());
    rig.net.server_shutdown(id);
    rig.turn();
    let came = peer.read(&rig.received());
    peer.take_all(&came);
    assert_eq!(came.last().unwrap().flags & FIN, FIN);
    rig.frame(&peer.ack());
    rig.millis(2);
    rig.take();
    assert!(!rig.net.is_closed(id) && !rig.net.server_sees_end(id));
    (peer, id, sent)
}

#[test]
fn who_connects_anew_waits_for_what_the_last_connection_has_left() {
    let mut rig = Rig::new();
    let (old, id, sent) = kept_for_a_slow_host(&mut rig);
    // Beyond what the guest's kernel remembers of it.
    rig.secs(61);
    let mut peer = Peer::new(4000, echo());
    peer.next.seq = old.next.seq.wrapping_add(100_000);
    let syn = peer.syn();
    for _ in 0..3 {
        rig.secs(1);
        rig.take();
        rig.frame(&syn);
        assert_eq!(rig.take(), Vec::<Vec<u8>>::new(), "not refused");
    }
    rig.net.server_pause(id, false);
    let mut got = 0;
    while !rig.net.is_closed(id) {
        rig.turn();
        let piece = rig.net.server_read(id, usize::MAX);
        assert!(
            !piece.is_empty() || rig.net.server_sees_end(id),
            "{got} of {sent} bytes"
        );
        got += piece.len();
    }
    assert_eq!(got, sent);
    assert!(rig.net.server_sees_end(id) && !rig.net.server_sees_reset(id));
    rig.take();
    rig.frame(&syn);
    let answer = peer.read(&rig.received()).pop().expect("it is asked again");
    assert_eq!((answer.flags, answer.ack), (SYN | ACK, peer.next.seq));
    peer.take(&answer);
    rig.frame(&peer.rst());
    rig.recovers(0);
}
