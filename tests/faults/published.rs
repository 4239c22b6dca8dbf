//! Rows 42 and 52: published ports whose guest, or whose client, does not behave, and one on UDP whose
//! client is on the host's loopback though that is switched off.
//!
//! In: clients of the host, a guest that refuses, is silent, ends early or resets. Out: what the other end
//! saw of it, and when.

use std::net::SocketAddr;

use tapgate::config::{Config, Protocol, Publish, Splice};
use tapgate::host::simulated::{ConnectAnswer, SocketId};
use tapgate::net::Duration;

use crate::count;
use crate::packets;
use crate::peer::{ACK, FIN, Peer, RST, SYN, Seen};
use crate::rig::{Rig, addr};

pub(crate) const TCP_PORT: &str = "0.0.0.0:8080";

/// Clients that may wait for the guest at once.
const HALF_OPEN: usize = 4096;

pub(crate) fn publish(rig: &mut Rig, protocol: Protocol, host: &str) {
    let rule = Publish {
        protocol,
        host: addr(host),
        guest: addr("10.0.2.100:80"),
        splice: Splice::default(),
    };
    rig.with_stack(|stack, turn| stack.publish(turn.host, rule).unwrap());
}

/// A client connects; gives its connection, the guest's end, and the request that came to the guest.
pub(crate) fn called(rig: &mut Rig, nth: usize) -> (SocketId, Peer, Seen) {
    let port = u16::try_from(1000 + nth % 60_000).unwrap();
    let client = SocketAddr::new(addr("192.0.2.9:0").ip(), port);
    rig.take();
    let id = rig.net.client_connect(addr(TCP_PORT), client).unwrap();
    rig.turn();
    let mut peer = Peer::new(80, client);
    let syn = peer.read(&rig.received()).pop().unwrap();
    assert_eq!((syn.flags, syn.data.len()), (SYN, 0));
    peer.take(&syn);
    (id, peer, syn)
}

/// The guest takes the connection.
fn accepted(rig: &mut Rig, peer: &mut Peer) -> Vec<Seen> {
    rig.frame(&peer.with(SYN | ACK, &[], |_| ()));
    peer.next.seq = peer.next.seq.wrapping_add(1);
    let came = peer.read(&rig.received());
    peer.take_all(&came);
    came
}

#[test]
fn row_42_ends_that_do_not_behave() {
    let total = count(200, 10_000);
    let mut rig = Rig::new();
    publish(&mut rig, Protocol::Tcp, TCP_PORT);
    for nth in 0..total {
        // Refused by the guest.
        let (id, peer, _) = called(&mut rig, nth);
        rig.frame(&peer.with(RST | ACK, &[], |it| it.seq = 0));
        assert!(rig.net.server_sees_reset(id));
        // Taken, and ended at once.
        let (id, mut peer, _) = called(&mut rig, nth);
        accepted(&mut rig, &mut peer);
        rig.frame(&peer.fin());
        assert!(rig.net.server_sees_end(id) && !rig.net.is_closed(id));
        rig.net.server_shutdown(id);
        rig.turn();
        let came = peer.read(&rig.received());
        assert!(came.iter().any(|it| it.flags & FIN != 0), "{came:?}");
        peer.take_all(&came);
        rig.frame(&peer.ack());
        assert!(rig.net.is_closed(id) && !rig.net.server_sees_reset(id));
        // Taken, and reset.
        let (id, mut peer, _) = called(&mut rig, nth);
        accepted(&mut rig, &mut peer);
        rig.frame(&peer.rst());
        assert!(rig.net.server_sees_reset(id));
        // The client has ended before the guest answers: bytes and end are passed on.
        let (id, mut peer, _) = called(&mut rig, nth);
        assert_eq!(rig.net.server_write(id, b"hello"), 5);
        rig.net.server_shutdown(id);
        rig.turn();
        let mut came = accepted(&mut rig, &mut peer);
        rig.millis(2);
        came.extend(peer.read(&rig.received()));
        peer.take_all(&came);
        let data: Vec<u8> = came.iter().flat_map(|it| it.data.clone()).collect();
        assert_eq!(data, b"hello");
        assert!(came.iter().any(|it| it.flags & FIN != 0), "{came:?}");
        rig.frame(&peer.fin());
        assert!(rig.net.server_sees_end(id));
        // The client has reset: the guest hears of it.
        let (id, mut peer, _) = called(&mut rig, nth);
        accepted(&mut rig, &mut peer);
        rig.net.server_reset(id);
        rig.turn();
        let came = peer.read(&rig.received());
        assert!(came.iter().any(|it| it.flags & RST != 0), "{came:?}");
        // Those that are remembered have had their time: the next round uses the ports again.
        rig.secs(11);
        assert_eq!((rig.stack.flows(), rig.net.open_sockets()), (0, 1));
    }
    for lot in (0..total).step_by(HALF_OPEN) {
        silent(&mut rig, HALF_OPEN.min(total - lot));
    }
    rig.with_stack(|stack, _| assert!(stack.unpublish(1, None)));
    rig.recovers(0);
}

/// Guests that say nothing: they are asked at 0, 1, 3 and 7 seconds (RFC 6298), and given 75.
fn silent(rig: &mut Rig, total: usize) {
    let start = rig.now;
    let waiting: Vec<_> = (0..total).map(|nth| called(rig, nth)).collect();
    let mut asked: Vec<Vec<u64>> = vec![vec![0]; total];
    for _ in 0..800 {
        rig.millis(100);
        let at = (rig.now - start).total_millis();
        let packets = rig.received();
        for packet in &packets {
            if packet.protocol == packets::TCP && packet.payload[13] == SYN {
                // The client's port.
                asked[usize::from(packet.word(0)) - 1000].push(at);
            }
        }
        let given_up = waiting
            .iter()
            .all(|(id, ..)| rig.net.server_sees_reset(*id));
        assert_eq!(given_up, at >= 75_000, "after {at} ms");
    }
    for times in asked {
        let near = |at: u64| times.iter().any(|it| it.abs_diff(at) <= 200);
        assert!([0, 1000, 3000, 7000].into_iter().all(near), "{times:?}");
    }
    assert_eq!(rig.stack.flows(), 0);
    rig.pass(Duration::from_secs(1));
}

#[test]
fn row_42_clients_of_a_silent_guest_keep_nobody_out() {
    let more = count(300, 6_000);
    let mut rig = Rig::new();
    publish(&mut rig, Protocol::Tcp, TCP_PORT);
    rig.net.answer(addr("192.0.2.1:81"), ConnectAnswer::Silent);
    // The guest's own, which waits as well, is older than all of them.
    let own = Peer::new(998, addr("192.0.2.1:81")).syn();
    rig.frame(&own);
    let waits = *rig.net.connections().last().unwrap();
    rig.secs(1);
    let clients: Vec<SocketId> = (0..HALF_OPEN + more)
        .map(|nth| {
            let (id, ..) = called(&mut rig, nth);
            assert!(rig.net.open_sockets() <= HALF_OPEN + 2);
            id
        })
        .collect();
    let (oldest, others) = clients.split_at(more);
    assert!(oldest.iter().all(|id| rig.net.server_sees_reset(*id)));
    assert!(!others.iter().any(|id| rig.net.server_sees_reset(*id)));
    assert!(!rig.net.is_closed(waits), "it is none of theirs");
    rig.is_alive();
    rig.only_count();
    rig.secs(140);
    rig.with_stack(|stack, _| assert!(stack.unpublish(1, None)));
    rig.recovers(0);
}

#[test]
fn row_42_clients_that_the_guest_does_not_answer_give_way_first() {
    const MOST: usize = 800;
    let mut rig = Rig::with(Config {
        max_flows: u32::try_from(MOST).unwrap(),
        ..Config::default()
    });
    publish(&mut rig, Protocol::Udp, "0.0.0.0:5353");
    let from =
        |nth: usize| SocketAddr::new([192, 0, 2, 9].into(), u16::try_from(1000 + nth).unwrap());
    // One is answered.
    rig.net.deliver(SocketId(0), from(0), b"question");
    rig.turn();
    rig.frame(&packets::udp_frame(80, from(0), b"answer"));
    rig.secs(2);
    for nth in 1..3 * MOST {
        rig.net.deliver(SocketId(0), from(nth), b"question");
        rig.turn();
        rig.millis(5);
    }
    let _ = rig.net.take_sent();
    // A port of the guest's finds a place all the same, and so does the answered one's next.
    rig.frame(&packets::udp_frame(5000, addr("192.0.2.1:7"), b"hello"));
    rig.frame(&packets::udp_frame(80, from(0), b"more"));
    let sent = rig.net.take_sent();
    let payloads: Vec<&[u8]> = sent.iter().map(|it| it.payload.as_slice()).collect();
    assert_eq!(payloads, [&b"hello"[..], b"more"]);
    rig.with_stack(|stack, _| assert!(stack.unpublish(1, None)));
    rig.recovers(0);
}

#[test]
fn row_42_clients_that_are_idle_give_way_to_newer_ones() {
    const MOST: usize = 800;
    let mut rig = Rig::with(Config {
        max_flows: u32::try_from(MOST).unwrap(),
        ..Config::default()
    });
    publish(&mut rig, Protocol::Udp, "0.0.0.0:5353");
    let ask = |rig: &mut Rig, nth: usize| {
        let port = u16::try_from(1000 + nth).unwrap();
        let client = SocketAddr::new([192, 0, 2, 9].into(), port);
        rig.net.deliver(SocketId(0), client, b"question");
        rig.turn();
        let came = !rig.received().is_empty();
        rig.frame(&packets::udp_frame(80, client, b"answer"));
        let sent = rig.net.take_sent().pop();
        let answered = sent.is_some_and(|it| (it.socket, it.to) == (SocketId(0), client));
        // By the published port, or not at all.
        assert_eq!(came, answered, "{nth}");
        came
    };
    // A quarter of the table; whoever comes then has to wait until somebody is idle.
    for nth in 0..MOST / 4 {
        assert!(ask(&mut rig, nth), "{nth}");
    }
    assert!(!ask(&mut rig, MOST));
    // The guest's own ports have room all the same.
    rig.frame(&packets::udp_frame(5000, addr("192.0.2.1:7"), b"hello"));
    assert_eq!(rig.net.take_sent().len(), 1);
    rig.secs(6);
    for nth in 0..100 {
        assert!(ask(&mut rig, MOST + nth), "{nth}");
    }
    rig.with_stack(|stack, _| assert!(stack.unpublish(1, None)));
    rig.recovers(0);
}

#[test]
fn row_42_clients_that_nobody_answers_take_nobodys_place() {
    const MOST: usize = 800;
    let mut rig = Rig::with(Config {
        max_flows: u32::try_from(MOST).unwrap(),
        ..Config::default()
    });
    publish(&mut rig, Protocol::Udp, "0.0.0.0:5353");
    let client = |nth: usize| SocketAddr::new([192, 0, 2, 9].into(), u16::try_from(nth).unwrap());
    for nth in 1..=MOST / 8 {
        rig.net.deliver(SocketId(0), client(nth), b"question");
        rig.turn();
        rig.frame(&packets::udp_frame(80, client(nth), b"answer"));
    }
    let _ = rig.net.take_sent();
    rig.secs(10);
    // Faster than any could be answered.
    for nth in 0..10 * MOST {
        rig.net.deliver(SocketId(0), client(1000 + nth), b"junk");
        rig.turn();
    }
    for nth in 1..=MOST / 8 {
        rig.frame(&packets::udp_frame(80, client(nth), b"more"));
        let sent = rig.net.take_sent();
        let went: Vec<_> = sent.iter().map(|it| (it.socket, it.to)).collect();
        assert_eq!(went, [(SocketId(0), client(nth))]);
    }
    rig.with_stack(|stack, _| assert!(stack.unpublish(1, None)));
    rig.recovers(0);
}

#[test]
fn row_52_udp_client_on_the_loopback() {
    let mut rig = Rig::with(Config {
        host_loopback: false,
        ..Config::default()
    });
    publish(&mut rig, Protocol::Udp, "0.0.0.0:5353");
    let socket = SocketId(0);
    for client in ["127.0.0.1:4001", "127.0.0.1:4002", "192.0.2.9:4001"] {
        rig.net.deliver(socket, addr(client), b"question");
        rig.turn();
        let packets = rig.received();
        let (from, to, bytes) = packets[0].udp().unwrap();
        assert_eq!((to, bytes), (80, &b"question"[..]));
        rig.frame(&packets::udp_frame(80, from, b"answer"));
        let sent = rig.net.take_sent();
        assert_eq!(sent.len(), 1, "{client}");
        assert_eq!((sent[0].socket, sent[0].to), (socket, addr(client)));
        assert_eq!(sent[0].payload, b"answer");
    }
    // To anybody else on the loopback there is still no way.
    rig.frame(&packets::udp_frame(80, addr("10.0.2.2:4003"), b"x"));
    assert!(rig.net.take_sent().is_empty());
    rig.with_stack(|stack, _| assert!(stack.unpublish(1, None)));
    rig.recovers(0);
}

#[test]
fn client_of_a_port_that_is_published_again_looks_the_same() {
    let mut rig = Rig::new();
    let client = addr("192.0.2.9:4001");
    for turn in 0..20 {
        publish(&mut rig, Protocol::Udp, "0.0.0.0:5353");
        rig.net.deliver(SocketId(turn), client, b"question");
        rig.turn();
        let came = rig.received();
        let (from, to, _) = came[0].udp().unwrap();
        assert_eq!((from, to), (client, 80));
        rig.frame(&packets::udp_frame(80, from, b"answer"));
        let sent = rig.net.take_sent();
        assert_eq!((sent[0].socket, sent[0].to), (SocketId(turn), client));
        rig.with_stack(|stack, _| assert!(stack.unpublish(turn + 1, None)));
    }
    rig.recovers(0);
}

#[test]
fn client_of_two_ports_keeps_its_looks_when_one_is_taken_back() {
    let mut rig = Rig::new();
    publish(&mut rig, Protocol::Udp, "0.0.0.0:5353");
    publish(&mut rig, Protocol::Udp, "0.0.0.0:5354");
    let client = addr("192.0.2.9:4001");
    let seen = |rig: &mut Rig, socket| {
        rig.net.deliver(SocketId(socket), client, b"question");
        rig.turn();
        rig.received()[0].udp().unwrap().0
    };
    assert_eq!(seen(&mut rig, 0), client);
    let by_the_other = seen(&mut rig, 1);
    assert_ne!(by_the_other, client);
    rig.with_stack(|stack, _| assert!(stack.unpublish(1, None)));
    assert_eq!(seen(&mut rig, 1), by_the_other);
    rig.with_stack(|stack, _| assert!(stack.unpublish(2, None)));
    rig.recovers(0);
}
