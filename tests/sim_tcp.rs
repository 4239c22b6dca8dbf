//! TCP dialogues between a simulated guest and a simulated host: one for each way a connection goes.
//!
//! Virtual time, a link without faults. Each test looks at both ends.
#![allow(
    clippy::unwrap_used,
    reason = "a scenario that can not go on has failed"
)]

mod sim;

use sim::{Faults, Sim, read_icmp, seconds};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::State;
use tapgate::config::{Config, Protocol, Publish, Splice};
use tapgate::host::simulated::{ConnectAnswer, SocketId};
use tapgate::net::{DropReason, Duration, Instant};

const SERVER: &str = "192.0.2.1:80";
const FIRST: SocketId = SocketId(0);

fn accepting(seed: u64) -> Sim {
    let sim = Sim::new(seed);
    sim.net.answer_all(ConnectAnswer::Accept);
    sim
}

/// A guest's connection that is established at both ends.
fn established() -> (Sim, SocketHandle) {
    let mut sim = accepting(1);
    let handle = sim.connect(SERVER);
    assert!(sim.run(seconds(1), |sim| sim.socket(handle).state()
        == State::Established));
    (sim, handle)
}

#[test]
fn bytes_go_both_ways_and_both_ends_close() {
    let (mut sim, handle) = established();
    sim.socket(handle).send_slice(b"question").unwrap();
    let mut asked: Vec<u8> = Vec::new();
    assert!(sim.run(seconds(1), |sim| {
        asked.extend(sim.net.server_read(FIRST, 100));
        asked == b"question"
    }));
    assert_eq!(sim.net.server_write(FIRST, b"answer"), 6);
    sim.net.server_shutdown(FIRST);
    assert!(sim.run(seconds(1), |sim| sim.socket(handle).recv_queue() == 6));
    let mut answer = [0; 6];
    sim.socket(handle).recv_slice(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
    sim.socket(handle).close();
    assert!(sim.run(seconds(1), |sim| sim.net.server_sees_end(FIRST)));
    sim.settle(seconds(60));
    assert_eq!((sim.stack.flows(), sim.net.open_sockets()), (0, 0));
}

/// The guest asks, and the host hears it; gives the time.
fn ask(sim: &mut Sim, handle: SocketHandle) -> Instant {
    sim.socket(handle).send_slice(b"question").unwrap();
    let asked = sim.clock.now();
    let mut heard = Vec::new();
    assert!(sim.run(seconds(1), |sim| {
        heard.extend(sim.net.server_read(FIRST, 100));
        heard == b"question"
    }));
    asked
}

fn is_acknowledged(sim: &mut Sim, handle: SocketHandle) -> bool {
    sim.socket(handle).send_queue() == 0
}

/// How long it takes until a question without an answer is acknowledged.
fn acknowledged_after(sim: &mut Sim, handle: SocketHandle) -> Duration {
    let asked = ask(sim, handle);
    assert!(sim.run(seconds(1), |sim| is_acknowledged(sim, handle)));
    sim.clock.now() - asked
}

fn answer(sim: &mut Sim, handle: SocketHandle) {
    assert_eq!(sim.net.server_write(FIRST, b"answer"), 6);
    assert!(
        sim.run(seconds(1), |sim| sim.socket(handle).recv_queue() == 6
            && sim.socket(handle).send_queue() == 0)
    );
    let mut answer = [0; 6];
    sim.socket(handle).recv_slice(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");
}

/// An acknowledgement of its own for every request costs more than the answer that it could go with.
#[test]
fn who_takes_turns_with_the_host_is_acknowledged_by_the_answers() {
    let (mut sim, handle) = established();
    let millis = Duration::from_millis;
    for _ in 0..17 {
        let after = acknowledged_after(&mut sim, handle);
        assert!((millis(1)..millis(2)).contains(&after), "{after}");
        answer(&mut sim, handle);
    }
    for _ in 0..3 {
        let think = ask(&mut sim, handle) + millis(8);
        sim.wake = Some(think);
        assert!(sim.run(seconds(1), |sim| sim.clock.now() >= think));
        sim.wake = None;
        assert!(!is_acknowledged(&mut sim, handle), "too early");
        answer(&mut sim, handle);
    }
    let after = acknowledged_after(&mut sim, handle);
    assert!((millis(10)..millis(11)).contains(&after), "{after}");
    answer(&mut sim, handle);
    // That was no answer in time: the guest may wait for acknowledgements.
    let after = acknowledged_after(&mut sim, handle);
    assert!((millis(1)..millis(2)).contains(&after), "{after}");
    sim.net.server_shutdown(FIRST);
    sim.socket(handle).close();
    sim.settle(seconds(60));
    assert_eq!((sim.stack.flows(), sim.net.open_sockets()), (0, 0));
}

/// Where a window is hardly larger than a segment, a short request fills neither.
#[test]
fn a_request_may_have_its_answer_first_whatever_the_mtu() {
    for mtu in [576, 1500, 9000, 65_520] {
        let config = Config {
            mtu,
            ..Config::default()
        };
        let mut sim = Sim::with(1, config, Faults::default());
        sim.net.answer_all(ConnectAnswer::Accept);
        let handle = sim.connect(SERVER);
        assert!(sim.run(seconds(1), |sim| sim.socket(handle).may_send()));
        sim.socket(handle).send_slice(&[b'q'; 300]).unwrap();
        let asked = sim.clock.now();
        assert!(sim.run(seconds(1), |sim| is_acknowledged(sim, handle)));
        let after = sim.clock.now() - asked;
        assert!(after >= Duration::from_millis(1), "{after} at {mtu}");
    }
}

/// A segment that is full has no room for its options beside the largest payload.
#[test]
fn a_guest_that_fills_the_window_does_not_wait_for_its_acknowledgement() {
    for (mtu, timestamps) in [(1500, false), (1500, true), (65_520, false), (65_520, true)] {
        let config = Config {
            mtu,
            ..Config::default()
        };
        let mut sim = Sim::with(1, config, Faults::default());
        sim.net.answer_all(ConnectAnswer::Accept);
        let handle = sim.connect_with(SERVER, 1 << 20);
        if timestamps {
            sim.socket(handle).set_tsval_generator(Some(|| 1));
        }
        let total = 16 << 20;
        let (mut sent, mut seen) = (0, 0);
        let bytes = vec![7; 1 << 20];
        assert!(
            // Twenty round trips of 100 us, the window being small in the first ones, and not one wait of a millisecond.
            sim.run(Duration::from_micros(2_500), |sim| {
                if sim.socket(handle).may_send() {
                    let more = &bytes[..bytes.len().min(total - sent)];
                    sent += sim.socket(handle).send_slice(more).unwrap();
                }
                if !sim.net.connections().is_empty() {
                    seen += sim.net.server_read(FIRST, usize::MAX).len();
                }
                seen == total
            }),
            "{seen} of {total} with {mtu} {timestamps}"
        );
    }
}

#[test]
fn the_guest_closes_first() {
    let (mut sim, handle) = established();
    sim.socket(handle).close();
    assert!(sim.run(seconds(1), |sim| sim.net.server_sees_end(FIRST)));
    // A half-closed connection carries data the other way for as long as the ends want.
    sim.settle(seconds(60));
    assert_eq!(sim.stack.flows(), 1);
    assert_eq!(sim.net.server_write(FIRST, b"late"), 4);
    assert!(sim.run(seconds(1), |sim| sim.socket(handle).recv_queue() == 4));
    sim.net.server_shutdown(FIRST);
    sim.settle(seconds(60));
    assert_eq!((sim.stack.flows(), sim.net.open_sockets()), (0, 0));
}

#[test]
fn the_host_closes_first() {
    let (mut sim, handle) = established();
    sim.net.server_shutdown(FIRST);
    assert!(sim.run(seconds(1), |sim| sim.socket(handle).state()
        == State::CloseWait));
    sim.settle(seconds(60));
    sim.socket(handle).send_slice(b"late").unwrap();
    let mut late: Vec<u8> = Vec::new();
    assert!(sim.run(seconds(1), |sim| {
        late.extend(sim.net.server_read(FIRST, 100));
        late == b"late"
    }));
    sim.socket(handle).close();
    assert!(sim.run(seconds(1), |sim| sim.net.server_sees_end(FIRST)));
    assert_eq!(
        sim.net.open_sockets(),
        0,
        "the socket goes when both directions have ended"
    );
    sim.settle(seconds(60));
    assert_eq!(sim.stack.flows(), 0, "TIME-WAIT is over");
}

#[test]
fn data_and_end_that_come_with_the_connection_are_not_lost() {
    let mut sim = accepting(11);
    let handle = sim.connect(SERVER);
    // The server has sent and closed before the stack hears that it is connected.
    assert!(sim.run(seconds(1), |sim| !sim.net.connections().is_empty()));
    assert_eq!(sim.net.server_write(FIRST, b"banner"), 6);
    sim.net.server_shutdown(FIRST);
    assert!(sim.run(seconds(1), |sim| sim.socket(handle).state()
        == State::CloseWait));
    assert_eq!(sim.socket(handle).recv_queue(), 6);
}

#[test]
fn what_was_acknowledged_reaches_a_slow_host_after_both_ends() {
    for host_first in [true, false] {
        let (mut sim, handle) = established();
        sim.net.server_pause(FIRST, true);
        sim.socket(handle).send_slice(&[7; 50_000]).unwrap();
        sim.settle(seconds(1));
        if host_first {
            sim.net.server_shutdown(FIRST);
            sim.settle(seconds(1));
        }
        sim.socket(handle).close();
        sim.settle(seconds(1));
        sim.net.server_shutdown(FIRST);
        // Longer than any TIME-WAIT.
        sim.settle(seconds(120));
        sim.net.server_pause(FIRST, false);
        let mut seen = 0;
        assert!(sim.run(seconds(60), |sim| {
            seen += sim.net.server_read(FIRST, usize::MAX).len();
            sim.net.server_sees_end(FIRST)
        }));
        assert_eq!(seen, 50_000, "host first: {host_first}");
        sim.settle(seconds(60));
        assert_eq!((sim.stack.flows(), sim.net.open_sockets()), (0, 0));
    }
}

#[test]
fn a_reset_after_the_host_s_end_reaches_the_guest() {
    let (mut sim, handle) = established();
    sim.net.server_shutdown(FIRST);
    assert!(sim.run(seconds(1), |sim| sim.socket(handle).state()
        == State::CloseWait));
    sim.net.server_reset(FIRST);
    assert!(sim.run(seconds(1), |sim| sim.socket(handle).state()
        == State::Closed));
    assert_eq!((sim.stack.flows(), sim.net.open_sockets()), (0, 0));
}

#[test]
fn a_query_over_tcp_goes_to_the_next_resolver() {
    for dead in [
        ConnectAnswer::Silent,
        ConnectAnswer::FailLater(111),
        ConnectAnswer::Fail(101),
    ] {
        let mut sim = Sim::new(12);
        let resolvers: Vec<_> = ["192.0.2.8:53", "192.0.2.9:53"]
            .map(|r| r.parse().unwrap())
            .into();
        sim.net.set_resolvers(&resolvers);
        sim.net.answer(resolvers[0], dead);
        sim.net.answer(resolvers[1], ConnectAnswer::Accept);
        let handle = sim.connect("10.0.2.3:53");
        assert!(sim.run(seconds(2), |sim| sim.socket(handle).state()
            == State::Established));
    }
}

#[test]
fn the_only_resolver_may_take_its_time() {
    let mut sim = Sim::new(13);
    sim.net.set_resolvers(&["192.0.2.8:53".parse().unwrap()]);
    sim.net.answer_all(ConnectAnswer::Silent);
    sim.connect("10.0.2.3:53");
    sim.settle(seconds(10));
    assert_eq!(sim.stack.flows(), 1, "no other to ask: it is waited for");
}

#[test]
fn a_refused_connection_is_refused() {
    let mut sim = Sim::new(2);
    let handle = sim.connect(SERVER);
    assert!(sim.run(seconds(1), |sim| sim.socket(handle).state()
        == State::Closed));
    assert!(sim.clock.now() < tapgate::net::Instant::from_millis(50));
    assert!(sim.received.is_empty(), "a RST, no ICMP");
    assert_eq!((sim.stack.flows(), sim.net.open_sockets()), (0, 0));
}

#[test]
fn unreachable_hosts_are_told_as_a_router_would() {
    // ENETUNREACH at once, EHOSTUNREACH and ETIMEDOUT later, EPERM of a firewall.
    let cases = [
        (ConnectAnswer::Fail(101), (3, 0)),
        (ConnectAnswer::FailLater(113), (3, 1)),
        (ConnectAnswer::FailLater(110), (3, 1)),
        (ConnectAnswer::Fail(1), (3, 13)),
    ];
    for (answer, icmp) in cases {
        let mut sim = Sim::new(3);
        sim.net.answer_all(answer);
        sim.connect(SERVER);
        assert!(
            sim.run(seconds(1), |sim| !sim.received.is_empty()),
            "{answer:?}"
        );
        assert_eq!(read_icmp(&sim.received[0]), Some(icmp), "{answer:?}");
        assert_eq!((sim.stack.flows(), sim.net.open_sockets()), (0, 0));
    }
}

#[test]
fn a_request_that_finds_no_port_in_time_is_left_to_be_repeated() {
    let mut sim = Sim::new(3);
    // EAGAIN.
    sim.net.answer_all(ConnectAnswer::Fail(11));
    let handle = sim.connect(SERVER);
    sim.settle(Duration::from_millis(300));
    assert_eq!(sim.socket(handle).state(), State::SynSent);
    assert!(sim.received.is_empty(), "nobody is told");
    assert_eq!((sim.stack.flows(), sim.net.open_sockets()), (0, 0));
    assert!(sim.stack.counters().dropped(DropReason::TcpNoPort) > 0);
    sim.net.answer_all(ConnectAnswer::Accept);
    assert!(sim.run(seconds(4), |sim| sim.socket(handle).state()
        == State::Established));
}

#[test]
fn a_silent_host_is_given_up() {
    let mut sim = Sim::new(4);
    sim.net.answer_all(ConnectAnswer::Silent);
    sim.connect(SERVER);
    sim.settle(seconds(20));
    assert_eq!(sim.stack.flows(), 1, "repeated SYNs are one flow");
    sim.settle(seconds(200));
    assert!(
        sim.received
            .iter()
            .any(|frame| read_icmp(frame) == Some((3, 1)))
    );
}

#[test]
fn without_descriptors_the_newcomer_is_refused_and_others_live() {
    let (mut sim, first) = established();
    sim.net.fail_open(Some(24));
    let second = sim.connect(SERVER);
    assert!(sim.run(seconds(1), |sim| sim.socket(second).state()
        == State::Closed));
    sim.net.fail_open(None);
    let third = sim.connect(SERVER);
    assert!(sim.run(seconds(1), |sim| sim.socket(third).state()
        == State::Established));
    assert_eq!(sim.socket(first).state(), State::Established);
}

#[test]
fn a_reset_by_the_host_is_a_reset_for_the_guest() {
    let (mut sim, handle) = established();
    sim.net.server_reset(FIRST);
    assert!(sim.run(seconds(1), |sim| sim.socket(handle).state()
        == State::Closed));
    assert_eq!((sim.stack.flows(), sim.net.open_sockets()), (0, 0));
}

/// A server that answers before it has heard all, and closes: the kernel has the answer in front of the RST, for whoever
/// still sends as for whoever listens.
#[test]
fn what_the_host_said_before_it_failed_reaches_the_guest() {
    for sends in [false, true] {
        let (mut sim, handle) = established();
        sim.settle(seconds(1));
        let said: Vec<u8> = (0..60_000_u32).map(|it| it.to_le_bytes()[0]).collect();
        assert_eq!(sim.net.server_write(FIRST, &said), said.len());
        sim.net.server_reset(FIRST);
        if sends {
            sim.socket(handle).send_slice(&[7; 20_000]).unwrap();
        }
        let mut heard = Vec::new();
        let ended = sim.run(seconds(20), |sim| {
            let socket = sim.socket(handle);
            while socket.can_recv() {
                let taken = socket.recv(|bytes| (bytes.len(), bytes.to_vec()));
                heard.extend(taken.unwrap());
            }
            socket.state() == State::Closed
        });
        assert!(ended && heard == said, "sends: {sends}: {}", heard.len());
        assert_eq!((sim.stack.flows(), sim.net.open_sockets()), (0, 0));
    }
}

/// A guest that takes none of it has half a minute.
#[test]
fn what_the_host_said_before_it_failed_does_not_wait_for_ever() {
    let (mut sim, handle) = established();
    while sim.net.server_write(FIRST, &[7; 10_000]) > 0 {
        sim.settle(seconds(1));
    }
    sim.net.server_reset(FIRST);
    sim.settle(seconds(20));
    assert_eq!(sim.stack.flows(), 1);
    assert!(sim.run(seconds(15), |sim| sim.socket(handle).state()
        == State::Closed));
    assert_eq!((sim.stack.flows(), sim.net.open_sockets()), (0, 0));
}

#[test]
fn a_reset_by_the_guest_is_a_reset_for_the_host() {
    let (mut sim, handle) = established();
    sim.socket(handle).abort();
    assert!(sim.run(seconds(1), |sim| sim.net.server_sees_reset(FIRST)));
    assert_eq!((sim.stack.flows(), sim.net.open_sockets()), (0, 0));
}

#[test]
fn a_slow_host_holds_the_guest_back_and_loses_nothing() {
    let (mut sim, handle) = established();
    sim.net.server_pause(FIRST, true);
    let total = 4 << 20;
    let (mut sent, mut seen) = (0_usize, 0_usize);
    let feed = move |sim: &mut Sim, sent: &mut usize| {
        let room: Vec<u8> = (*sent..total).map(pattern).take(64 * 1024).collect();
        *sent += sim.socket(handle).send_slice(&room).unwrap_or(0);
    };
    sim.run(seconds(30), |sim| {
        feed(sim, &mut sent);
        false
    });
    assert!(sent < total, "the window closed after {sent} bytes");
    sim.net.server_pause(FIRST, false);
    assert!(sim.run(seconds(600), |sim| {
        feed(sim, &mut sent);
        let bytes = sim.net.server_read(FIRST, usize::MAX);
        assert!(
            bytes
                .iter()
                .enumerate()
                .all(|(i, &byte)| byte == pattern(seen + i))
        );
        seen += bytes.len();
        seen == total
    }));
}

#[test]
fn a_guest_with_a_closed_window_gets_everything_once_it_opens() {
    let (mut sim, handle) = established();
    let data: Vec<u8> = (0..200_000).map(pattern).collect();
    let written = sim.net.server_write(FIRST, &data);
    sim.settle(seconds(30));
    assert_eq!(
        sim.socket(handle).recv_queue(),
        64 * 1024,
        "the guest's buffer is full"
    );
    let mut got: Vec<u8> = Vec::new();
    assert!(sim.run(seconds(120), |sim| {
        let mut some = [0; 5000];
        let len = sim.socket(handle).recv_slice(&mut some).unwrap_or(0);
        got.extend(&some[..len]);
        got.len() == written
    }));
    assert_eq!(got, data[..written]);
}

/// smoltcp 0.14 does not hear in LAST-ACK that a window opens.
#[test]
fn a_slow_guest_that_has_ended_gets_everything_as_soon_as_it_reads() {
    const TOTAL: usize = 200_000;
    let (mut sim, handle) = established();
    sim.socket(handle).close();
    assert!(sim.run(seconds(1), |sim| sim.net.server_sees_end(FIRST)));
    let sent: Vec<u8> = (0..TOTAL).map(pattern).collect();
    assert_eq!(sim.net.server_write(FIRST, &sent), TOTAL);
    sim.net.server_shutdown(FIRST);
    // Its window is closed by now, and most of the stream is still here.
    sim.settle(Duration::from_millis(100));
    let (start, mut got) = (sim.clock.now(), Vec::<u8>::new());
    assert!(sim.run(seconds(60), |sim| {
        let _ = sim.socket(handle).recv(|bytes| {
            got.extend(bytes.iter());
            (bytes.len(), ())
        });
        got.len() == TOTAL
    }));
    assert!(got == sent);
    let took = sim.clock.now() - start;
    assert!(took < Duration::from_millis(100), "it waited for {took}");
    assert!(sim.run(seconds(1), |sim| sim.socket(handle).state()
        == State::TimeWait));
}

#[test]
fn over_the_limit_flows_are_refused() {
    let config = Config {
        max_flows: 2,
        ..Config::default()
    };
    let mut sim = Sim::with(5, config, sim::Faults::default());
    sim.net.answer_all(ConnectAnswer::Accept);
    let handles = [(); 3].map(|()| sim.connect(SERVER));
    sim.settle(seconds(1));
    let states = handles.map(|handle| sim.socket(handle).state());
    assert_eq!(
        states,
        [State::Established, State::Established, State::Closed]
    );
    assert_eq!(sim.stack.counters().flows_refused, 1);
}

#[test]
fn a_published_port_shows_the_client_s_address() {
    let mut sim = Sim::new(6);
    let rule = |host: &str| Publish {
        protocol: Protocol::Tcp,
        host: host.parse().unwrap(),
        guest: "10.0.2.100:80".parse().unwrap(),
        splice: Splice::default(),
    };
    sim.publish(rule("0.0.0.0:8080"));
    for (client, seen) in [
        ("192.0.2.9:5000", "192.0.2.9:5000"),
        ("127.0.0.1:5001", "10.0.2.2:5001"),
    ] {
        let listener = sim.listen(80);
        let id = sim
            .net
            .client_connect("0.0.0.0:8080".parse().unwrap(), client.parse().unwrap())
            .unwrap();
        assert!(sim.run(seconds(1), |sim| sim.socket(listener).state()
            == State::Established));
        assert_eq!(
            sim.socket(listener).remote_endpoint().unwrap().to_string(),
            seen
        );
        assert_eq!(sim.net.server_write(id, b"hi"), 2);
        assert!(sim.run(seconds(1), |sim| sim.socket(listener).recv_queue() == 2));
        sim.socket(listener).abort();
        assert!(sim.run(seconds(1), |sim| sim.net.server_sees_reset(id)));
    }
    let refused = sim
        .net
        .client_connect(
            "0.0.0.0:8080".parse().unwrap(),
            "192.0.2.9:5002".parse().unwrap(),
        )
        .unwrap();
    assert!(
        sim.run(seconds(1), |sim| sim.net.server_sees_reset(refused)),
        "the guest refuses: so do we"
    );
    assert_eq!(sim.stack.flows(), 0);
}

#[test]
fn two_loopback_clients_with_one_port_are_kept_apart() {
    let mut sim = Sim::new(7);
    sim.publish(Publish {
        protocol: Protocol::Tcp,
        host: "0.0.0.0:8080".parse().unwrap(),
        guest: "10.0.2.100:80".parse().unwrap(),
        splice: Splice::default(),
    });
    let listeners = [sim.listen(80), sim.listen(80)];
    for client in ["127.0.0.1:5000", "127.0.0.2:5000"] {
        let _ = sim
            .net
            .client_connect("0.0.0.0:8080".parse().unwrap(), client.parse().unwrap())
            .unwrap();
    }
    assert!(sim.run(seconds(1), |sim| {
        listeners
            .iter()
            .all(|&listener| sim.socket(listener).state() == State::Established)
    }));
    let ports = listeners.map(|listener| sim.socket(listener).remote_endpoint().unwrap().port);
    assert_ne!(ports[0], ports[1]);
}

#[test]
fn a_new_connection_may_follow_in_time_wait() {
    let (mut sim, handle) = established();
    sim.net.server_shutdown(FIRST);
    assert!(sim.run(seconds(1), |sim| sim.socket(handle).state()
        == State::CloseWait));
    sim.socket(handle).close();
    assert!(sim.run(seconds(1), |sim| sim.net.open_sockets() == 0));
    assert_eq!(sim.stack.flows(), 1, "TIME-WAIT");
    sim.reuse_port();
    let second = sim.connect(SERVER);
    assert!(sim.run(seconds(20), |sim| sim.socket(second).state()
        == State::Established));
}

/// So many connections at once that the guest ends first; gives where each of them leaves it.
fn left_by_a_crowd(sim: &mut Sim, count: usize) -> Vec<State> {
    let handles: Vec<_> = (0..count).map(|_| sim.connect(SERVER)).collect();
    assert!(sim.run(seconds(1), |sim| {
        handles
            .iter()
            .all(|&it| sim.socket(it).state() == State::Established)
    }));
    let ids = sim
        .net
        .connections()
        .split_off(sim.net.connections().len() - count);
    for &handle in &handles {
        sim.socket(handle).close();
    }
    assert!(sim.run(seconds(1), |sim| {
        ids.iter().all(|&id| sim.net.server_sees_end(id))
    }));
    for &id in &ids {
        // An answer behind the guest's end.
        assert_eq!(sim.net.server_write(id, b"answer"), 6);
        sim.net.server_shutdown(id);
    }
    let mut answers: Vec<Vec<u8>> = vec![Vec::new(); count];
    assert!(sim.run(seconds(1), |sim| {
        for (&handle, answer) in handles.iter().zip(&mut answers) {
            let mut bytes = [0; 6];
            let len = sim.socket(handle).recv_slice(&mut bytes).unwrap_or(0);
            answer.extend(&bytes[..len]);
        }
        ids.iter().all(|&id| sim.net.is_closed(id))
    }));
    assert!(answers.iter().all(|answer| answer == b"answer"));
    sim.settle(Duration::from_millis(1));
    let left = |handle| {
        let state = sim.socket(handle).state();
        sim.forget(handle);
        state
    };
    handles.into_iter().map(left).collect()
}

#[test]
fn a_guest_remembers_a_thousand_connections_a_minute_and_no_more() {
    let mut sim = accepting(12);
    let began = sim.clock.now();
    let left: Vec<State> = (0..20)
        .flat_map(|_| left_by_a_crowd(&mut sim, 100))
        .collect();
    let passed = (sim.clock.now() - began).total_millis();
    let (first, others) = left.split_at(1024);
    assert!(first.iter().all(|&state| state == State::TimeWait));
    let waiting = others
        .iter()
        .filter(|&&state| state == State::TimeWait)
        .count();
    let granted = usize::try_from(passed).unwrap() * 1024 / 60_000;
    assert!(
        (granted / 2..=granted + 1).contains(&waiting),
        "{waiting} of {granted}"
    );
    let closed = others
        .iter()
        .filter(|&&state| state == State::Closed)
        .count();
    assert_eq!(closed + waiting, others.len());
    assert_eq!(sim.stack.flows(), 0, "nothing is remembered here");
    sim.settle(seconds(60));
    assert_eq!(left_by_a_crowd(&mut sim, 10), [State::TimeWait; 10]);
}

#[test]
fn a_thousand_connections_live_side_by_side() {
    let mut sim = accepting(9);
    let handles: Vec<_> = (0..1000).map(|_| sim.connect_with(SERVER, 2048)).collect();
    assert!(sim.run(seconds(5), |sim| {
        handles
            .iter()
            .all(|&h| sim.socket(h).state() == State::Established)
    }));
    for &handle in &handles {
        sim.socket(handle).send_slice(b"x").unwrap();
    }
    assert!(sim.run(Duration::from_secs(5), |sim| {
        sim.net.connections().iter().all(|&id| {
            let bytes = sim.net.server_read(id, 1);
            if !bytes.is_empty() {
                assert_eq!(sim.net.server_write(id, b"y"), 1);
            }
            true
        }) && handles
            .iter()
            .all(|&handle| sim.socket(handle).recv_queue() == 1)
    }));
    for handle in handles {
        sim.socket(handle).abort();
    }
    sim.settle(seconds(60));
    assert_eq!((sim.stack.flows(), sim.net.open_sockets()), (0, 0));
}

fn pattern(at: usize) -> u8 {
    u8::try_from(at % 251).unwrap()
}
