//! How a connection ends that the guest ended first, of more than it is left to remember.
//!
//! In: a crowd of connections, each ended in order or by a RST. Out: the RST that ends the guest's TIME-WAIT, by its exact
//! number, and nothing where the guest is in no TIME-WAIT.

use tapgate::host::simulated::SocketId;

use crate::peer::{ACK, FIN, Peer, RST};
use crate::rig::{Rig, echo};

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
