//! Row 9, and whose turn it is among published ports: one that can't be served, or is flooded, is no other's trouble.
//!
//! In: clients of several ports, while descriptors lack, a socket fails, or some are busy. Out: when each is served, and its part.

use std::net::SocketAddr;

use tapgate::config::{Protocol, Publish, Splice};
use tapgate::host::simulated::{Call, Fault, SocketId};

use crate::count;
use crate::packets;
use crate::peer::{ACK, Peer, RST, SYN};
use crate::published::{TCP_PORT, called, publish};
use crate::rig::{Rig, addr};

/// The guest refuses a client whose request has come.
fn refuse(rig: &mut Rig, syn: &packets::Received) {
    let mut peer = Peer::new(80, SocketAddr::new(syn.src, syn.word(0)));
    let number = u32::from(syn.word(4)) << 16 | u32::from(syn.word(6));
    peer.next.ack = number.wrapping_add(1);
    rig.frame(&peer.with(RST | ACK, &[], |it| it.seq = 0));
}

#[test]
fn row_09_no_descriptors_for_a_published_port() {
    let total = count(500, 5_000);
    let mut rig = Rig::new();
    publish(&mut rig, Protocol::Tcp, TCP_PORT);
    let (witness, id) = rig.open(999, crate::rig::echo());
    let mut witness = witness;
    rig.net.limit_open(Some(2));
    let mut clients = Vec::new();
    let before = rig.woken();
    for nth in 0..total {
        let port = u16::try_from(1000 + nth).unwrap();
        let client = SocketAddr::new(addr("192.0.2.9:0").ip(), port);
        clients.push(rig.net.client_connect(addr(TCP_PORT), client).unwrap());
        rig.millis(1);
    }
    rig.secs(10);
    // Ten looks a second at most, and no more lines than that (`recovers` looks at them, too).
    assert!(
        rig.woken() - before <= 10 * (11 + total as u64 / 1000),
        "it spins"
    );
    rig.log_is_quiet();
    // The connection that was there is served meanwhile.
    rig.frame(&witness.data(b"still"));
    assert_eq!(rig.net.server_read(id, 100), b"still");
    // Descriptors return: within a moment every client reaches the guest, which refuses here.
    rig.net.limit_open(None);
    rig.secs(1);
    for segment in rig.received() {
        if segment.protocol == packets::TCP && segment.payload[13] == SYN {
            refuse(&mut rig, &segment);
        }
    }
    assert!(clients.iter().all(|id| rig.net.server_sees_reset(*id)));
    rig.frame(&witness.rst());
    rig.with_stack(|stack, _| assert!(stack.unpublish(1, None)));
    rig.recovers(0);
}

#[test]
fn row_09_ports_are_served_in_turn_and_those_of_datagrams_always() {
    let mut rig = Rig::new();
    publish(&mut rig, Protocol::Tcp, TCP_PORT);
    publish(&mut rig, Protocol::Tcp, "0.0.0.0:8081");
    publish(&mut rig, Protocol::Udp, "0.0.0.0:5353");
    let datagrams = SocketId(0);
    rig.net.limit_open(Some(3));
    let client = |port: u16| SocketAddr::new(addr("192.0.2.9:0").ip(), port);
    let mut waiting = Vec::new();
    for nth in 0..10 {
        waiting.extend(rig.net.client_connect(addr(TCP_PORT), client(1000 + nth)));
    }
    rig.turn();
    // At another time than the looks at the first.
    rig.millis(50);
    waiting.extend(rig.net.client_connect(addr("0.0.0.0:8081"), client(2000)));
    rig.turn();
    for nth in 0..100 {
        rig.net.deliver(datagrams, client(3000 + nth), b"question");
        rig.turn();
        let came = rig.received();
        assert_eq!(came[0].udp().unwrap().2, b"question", "{nth}");
        rig.millis(5);
    }
    // One descriptor: who has it gives it back, and the other port is next.
    rig.net.limit_open(Some(4));
    let mut order = Vec::new();
    for _ in 0..waiting.len() {
        rig.millis(200);
        let came = rig.received();
        let syn = came.iter().find(|it| it.protocol == packets::TCP).unwrap();
        order.push(syn.word(0));
        refuse(&mut rig, syn);
    }
    assert!(order[..2].contains(&2000), "{order:?}");
    assert!(waiting.iter().all(|id| rig.net.server_sees_reset(*id)));
    rig.net.limit_open(None);
    for id in 1..=3 {
        rig.with_stack(|stack, _| assert!(stack.unpublish(id, None)));
    }
    rig.recovers(0);
}

#[test]
fn row_09_socket_that_fails_without_end_is_no_other_ports_trouble() {
    let mut rig = Rig::new();
    publish(&mut rig, Protocol::Udp, "0.0.0.0:5353");
    publish(&mut rig, Protocol::Tcp, TCP_PORT);
    rig.net.fail_call(Fault {
        call: Call::ReceiveDatagrams,
        errno: libc::EIO,
        nth: 0,
        lasts: true,
    });
    rig.net
        .deliver(SocketId(0), addr("192.0.2.9:1"), b"question");
    for nth in 0..100 {
        // Served at once.
        let (id, peer, _) = called(&mut rig, nth);
        rig.frame(&peer.with(RST | ACK, &[], |it| it.seq = 0));
        assert!(rig.net.server_sees_reset(id));
        rig.millis(100);
    }
    // Ten looks a second, each of one budget.
    let calls = rig.net.calls(Call::ReceiveDatagrams);
    assert!((90 * 4..=110 * 4).contains(&calls), "{calls} calls");
    rig.log_is_quiet();
    rig.net.heal();
    rig.millis(100);
    assert_eq!(rig.received()[0].udp().unwrap().2, b"question");
    for id in 1..=2 {
        rig.with_stack(|stack, _| assert!(stack.unpublish(id, None)));
    }
    rig.recovers(0);
}

/// Three ports and two flows, of whom some are busy and the others have a small datagram now and then: how much came of each
/// who is busy. Fails where somebody with a small one waits for long.
fn shares(busy: [bool; 5], every: usize) -> [usize; 5] {
    /// Datagrams of a turn: as many as may be taken, and more than a batch has room for.
    const FLOOD: usize = 128;
    /// Turns until a datagram has come, at most.
    const SOON: usize = 8;
    let stranger = addr("192.0.2.1:7");
    let mut rig = Rig::new();
    for port in 1..=3 {
        let rule = Publish {
            protocol: Protocol::Udp,
            host: SocketAddr::new(addr("0.0.0.0:0").ip(), 5350 + port),
            guest: SocketAddr::new(addr("10.0.2.100:0").ip(), port),
            splice: Splice::default(),
        };
        rig.with_stack(|stack, turn| stack.publish(turn.host, rule).unwrap());
    }
    for port in [4, 5] {
        rig.frame(&packets::udp_frame(port, stranger, b"hello"));
    }
    let flows = rig.net.take_sent().into_iter().map(|sent| sent.socket);
    let sockets: Vec<SocketId> = (0..3).map(SocketId).chain(flows).collect();
    let mut came = [0; 5];
    let mut waits = [0; 5];
    for nth in 0..100 {
        for at in 0..5 {
            if busy[at] {
                for _ in 0..FLOOD {
                    rig.net.deliver(sockets[at], stranger, &[0; 1400]);
                }
            } else if waits[at] == 0 && nth % every == 0 {
                rig.net.deliver(sockets[at], stranger, b"question");
                waits[at] = 1;
            }
        }
        rig.one_turn();
        for packet in rig.received() {
            let Some((_, port, bytes)) = packet.udp() else {
                continue;
            };
            let at = usize::from(port) - 1;
            if bytes == b"question" {
                waits[at] = 0;
            } else {
                came[at] += 1;
            }
        }
        for wait in waits.iter_mut().filter(|wait| **wait > 0) {
            *wait += 1;
        }
        assert!(waits.iter().all(|it| *it < SOON), "{busy:?}: {waits:?}");
    }
    came
}

#[test]
fn flooded_ports_and_busy_flows_leave_others_their_turn() {
    for busy in 0..32 {
        let busy = [0, 1, 2, 3, 4].map(|at| busy >> at & 1 == 1);
        // Their datagrams come in turns of every kind.
        for every in [1, 2, 3] {
            let came = shares(busy, every);
            let of = |places: std::ops::Range<usize>| -> Vec<usize> {
                places.filter(|at| busy[*at]).map(|at| came[at]).collect()
            };
            // None of a kind has the better part, nor has a kind.
            let (ports, flows) = (of(0..3), of(3..5));
            for kind in [&ports, &flows] {
                let (least, most) = (kind.iter().min(), kind.iter().max());
                assert!(
                    least.unwrap_or(&1) * 2 > *most.unwrap_or(&1),
                    "{busy:?}: {came:?}"
                );
            }
            let (ports, flows): (usize, usize) = (ports.iter().sum(), flows.iter().sum());
            let even = ports * 3 > flows && flows * 3 > ports;
            assert!(even || ports == 0 || flows == 0, "{busy:?}: {came:?}");
        }
    }
}

#[test]
fn clients_of_many_ports_have_no_turn_to_themselves() {
    const MOST: usize = 256;
    let mut rig = Rig::new();
    let ports: Vec<String> = (8001..8011).map(|port| format!("0.0.0.0:{port}")).collect();
    for port in &ports {
        publish(&mut rig, Protocol::Tcp, port);
    }
    let crowd = 64;
    for port in &ports {
        for nth in 0..crowd {
            let client = SocketAddr::new(addr("192.0.2.9:0").ip(), 1000 + nth);
            rig.net.client_connect(addr(port), client).unwrap();
        }
    }
    let all = ports.len() * usize::from(crowd);
    for turn in 1..=3 {
        let more = rig.one_turn();
        assert_eq!(rig.stack.flows(), all.min(turn * MOST), "turn {turn}");
        assert!(more || turn == 3, "the rest wait for nobody");
    }
}
