//! Connections of a guest's own TCP over IPv6, to the host and to resolvers.

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::State;
use tapgate::config::Config;
use tapgate::host::simulated::{ConnectAnswer, SocketId};

use crate::lab::{FIRST, addr, filled, secs};
use crate::sim::{Faults, GUEST, GUEST6, Sim, read_icmp};

fn sim(seed: u64) -> Sim {
    let sim = Sim::of(GUEST6, seed, Config::default(), Faults::default());
    sim.net.answer_all(ConnectAnswer::Accept);
    sim
}

fn established(sim: &mut Sim, to: &str) -> SocketHandle {
    let handle = sim.connect(to);
    assert!(
        sim.run(secs(1), |sim| sim.socket(handle).state()
            == State::Established),
        "{to}"
    );
    handle
}

#[test]
fn streams_lead_where_their_address_says() {
    let mut sim = sim(1);
    for (nth, (to, remote)) in [
        ("[2001:db8::1]:80", "[2001:db8::1]:80"),
        ("[fd00::2]:80", "[::1]:80"),
        ("[2606:4700::1]:443", "[2606:4700::1]:443"),
    ]
    .into_iter()
    .enumerate()
    {
        let id = SocketId(nth);
        let handle = established(&mut sim, to);
        assert_eq!(sim.net.remote(id), Some(addr(remote)));
        sim.socket(handle).send_slice(b"question").unwrap();
        assert_eq!(sim.net.server_write(id, &filled(50_000)), 50_000);
        sim.net.server_shutdown(id);
        let (mut asked, mut answer) = (Vec::new(), Vec::<u8>::new());
        assert!(sim.run(secs(5), |sim| {
            asked.extend(sim.net.server_read(id, 100));
            let mut room = [0; 4096];
            while let Ok(len @ 1..) = sim.socket(handle).recv_slice(&mut room) {
                answer.extend(&room[..len]);
            }
            asked == b"question" && answer.len() == 50_000
        }));
        assert!(answer == filled(50_000));
        sim.socket(handle).close();
        assert!(sim.run(secs(1), |sim| sim.net.server_sees_end(id)));
    }
    sim.settle(secs(60));
    assert_eq!((sim.stack.flows(), sim.net.open_sockets()), (0, 0));
}

#[test]
fn resets_go_both_ways() {
    let mut sim = sim(2);
    let handle = established(&mut sim, "[2001:db8::1]:80");
    sim.net.server_reset(FIRST);
    assert!(sim.run(secs(1), |sim| sim.socket(handle).state() == State::Closed));
    let handle = established(&mut sim, "[2001:db8::1]:80");
    sim.socket(handle).abort();
    assert!(sim.run(secs(1), |sim| sim.net.server_sees_reset(SocketId(1))));
    sim.net.answer_all(ConnectAnswer::FailLater(111));
    let handle = sim.connect("[2001:db8::1]:80");
    assert!(sim.run(secs(1), |sim| sim.socket(handle).state() == State::Closed));
    assert_eq!(sim.received, Vec::<Vec<u8>>::new(), "a RST, no ICMPv6");
    assert_eq!((sim.stack.flows(), sim.net.open_sockets()), (0, 0));
}

#[test]
fn what_leads_nowhere_is_told() {
    for (to, said) in [
        ("[fd00::77]:80", Some((1, 3))),
        ("[fe80::77]:80", Some((1, 3))),
        ("[fd00::3]:80", None),
        ("[fe80::2]:80", None),
    ] {
        let mut sim = sim(3);
        let handle = sim.connect(to);
        sim.run(secs(1), |sim| {
            sim.socket(handle).state() == State::Closed || !sim.received.is_empty()
        });
        assert_eq!(
            sim.received.first().and_then(|frame| read_icmp(frame)),
            said,
            "{to}"
        );
        assert_eq!(
            sim.socket(handle).state() == State::Closed,
            said.is_none(),
            "{to}"
        );
        assert!(sim.net.connections().is_empty());
    }
}

#[test]
fn a_slow_guest_and_a_slow_host_lose_nothing() {
    let mut sim = sim(4);
    let handle = established(&mut sim, "[2001:db8::1]:80");
    sim.net.server_pause(FIRST, true);
    let data = filled(600_000);
    let (mut sent, mut got) = (0, Vec::<u8>::new());
    sim.run(secs(30), |sim| {
        sent += sim.socket(handle).send_slice(&data[sent..]).unwrap_or(0);
        false
    });
    assert_eq!(sim.net.server_read(FIRST, usize::MAX).len(), 0);
    sim.net.server_pause(FIRST, false);
    assert!(sim.run(secs(600), |sim| {
        sent += sim.socket(handle).send_slice(&data[sent..]).unwrap_or(0);
        got.extend(sim.net.server_read(FIRST, usize::MAX));
        got.len() == data.len()
    }));
    assert!(got == data);
    // Nor the other way, with a window that closes.
    let written = sim.net.server_write(FIRST, &data);
    sim.settle(secs(30));
    assert_eq!(
        sim.socket(handle).recv_queue(),
        64 * 1024,
        "the guest's buffer is full"
    );
    let mut got: Vec<u8> = Vec::new();
    assert!(sim.run(secs(120), |sim| {
        let mut some = [0; 5000];
        let len = sim.socket(handle).recv_slice(&mut some).unwrap_or(0);
        got.extend(&some[..len]);
        got.len() == written
    }));
    assert!(got == data[..written]);
}

#[test]
fn queries_over_tcp_go_to_the_resolvers_from_either_family() {
    for guest in [GUEST6, GUEST] {
        let mut sim = Sim::of(guest, 5, Config::default(), Faults::default());
        let resolvers = ["192.0.2.8:53", "[2001:db8::53]:53"].map(addr);
        sim.net.set_resolvers(&resolvers);
        sim.net.answer(resolvers[0], ConnectAnswer::FailLater(111));
        sim.net.answer(resolvers[1], ConnectAnswer::Accept);
        let names = if guest.is_ipv6() {
            "[fd00::3]:53"
        } else {
            "10.0.2.3:53"
        };
        let handle = established(&mut sim, names);
        let id = SocketId(1);
        assert_eq!(sim.net.remote(id), Some(resolvers[1]));
        let mut query = vec![0, 33, 0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        query.extend(b"\x07example\x03org\x00\x00\x1c\x00\x01");
        query[1] = u8::try_from(query.len() - 2).unwrap();
        sim.socket(handle).send_slice(&query).unwrap();
        let mut asked = Vec::new();
        assert!(sim.run(secs(1), |sim| {
            asked.extend(sim.net.server_read(id, 1000));
            asked.len() == query.len()
        }));
        assert_eq!(asked, query);
        query[4] |= 0x80;
        assert_eq!(sim.net.server_write(id, &query), query.len());
        assert!(sim.run(secs(1), |sim| sim.socket(handle).recv_queue()
            == query.len()));
        assert!(sim.received.is_empty());
    }
}
