//! Published ports past the link, in virtual time: which clients take the short cut, that every byte, end and
//! reset crosses it, and that the link carries a client whenever there is no way inside.
//!
//! Both ends are connections of the simulated host: the client's, and the one inside, of which the test
//! plays the server. The guest's own stack, over the link, is smoltcp as everywhere.
#![allow(
    clippy::unwrap_used,
    reason = "a scenario that can not go on has failed"
)]

mod sim;

use std::net::SocketAddr;

use proptest::prelude::*;
use sim::{Faults, Sim, seconds};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::State;
use tapgate::config::{Config, Protocol, Publish, Splice};
use tapgate::host::simulated::{ConnectAnswer, Inside, SocketId};
use tapgate::net::Duration;

const PUBLISHED: &str = "0.0.0.0:8080";
const SERVICE: &str = "10.0.2.100:80";
const LOCAL_SERVICE: &str = "127.0.0.1:80";
const LOCAL: &str = "127.0.0.1:5000";
const STRANGER: &str = "192.0.2.9:5000";

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// A host with a way inside, where a server listens at `service`.
fn published(splice: Splice, service: &str) -> Sim {
    let mut sim = Sim::new(3);
    sim.net.set_inside(Inside::Ready);
    sim.net.answer(addr(service), ConnectAnswer::Accept);
    publish(&mut sim, splice);
    sim
}

/// The same for clients of the loopback, where sockets hold so many bytes.
fn published_with(buffer: usize) -> Sim {
    let mut sim = Sim::new(3);
    sim.net.set_socket_buffer(buffer);
    sim.net.set_inside(Inside::Ready);
    sim.net.answer(addr(SERVICE), ConnectAnswer::Accept);
    publish(&mut sim, Splice::Auto);
    sim
}

fn publish(sim: &mut Sim, splice: Splice) {
    sim.publish(Publish {
        protocol: Protocol::Tcp,
        host: addr(PUBLISHED),
        guest: addr(SERVICE),
        splice,
    });
}

fn client(sim: &Sim, from: &str) -> SocketId {
    sim.net.client_connect(addr(PUBLISHED), addr(from)).unwrap()
}

/// The connection that was opened last.
fn last(sim: &Sim) -> SocketId {
    *sim.net.connections().last().unwrap()
}

/// A client on the host's loopback, and the server inside that it is joined to.
fn joined(sim: &mut Sim) -> (SocketId, SocketId) {
    let client = client(sim, LOCAL);
    let before = sim.stack.counters().flows_spliced;
    assert!(sim.run(seconds(1), |sim| sim.stack.counters().flows_spliced
        > before));
    (client, last(sim))
}

/// Nothing is left but the listener.
fn at_rest(sim: &mut Sim) {
    assert!(sim.run(seconds(1), |sim| sim.stack.flows() == 0));
    assert_eq!(sim.net.open_sockets(), 1);
}

/// What arrives at `to` until there are `expected` bytes.
fn arrives(sim: &mut Sim, to: SocketId, expected: usize) -> Vec<u8> {
    let mut got = Vec::new();
    sim.run(seconds(1), |sim| {
        got.extend(sim.net.server_read(to, usize::MAX));
        got.len() >= expected
    });
    got
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from((at * 7 + seed) % 251).unwrap())
        .collect()
}

#[test]
fn bytes_and_ends_cross_both_ways() {
    for service in [SERVICE, LOCAL_SERVICE] {
        let mut sim = published(Splice::Auto, service);
        let (outside, inside) = joined(&mut sim);
        assert_eq!(sim.net.remote(inside), Some(addr(service)));
        for (from, to) in [(outside, inside), (inside, outside)] {
            let sent = pattern(50_000, from.0);
            assert_eq!(sim.net.server_write(from, &sent), sent.len());
            assert!(arrives(&mut sim, to, sent.len()) == sent);
            sim.net.server_shutdown(from);
            assert!(sim.run(seconds(1), |sim| sim.net.server_sees_end(to)));
        }
        assert!(!sim.net.server_sees_reset(outside) && !sim.net.server_sees_reset(inside));
        at_rest(&mut sim);
        let counters = sim.stack.counters();
        assert_eq!((counters.flows_opened, counters.flows_spliced), (1, 1));
    }
}

#[test]
fn half_closed_connection_still_carries_the_other_way() {
    for swapped in [false, true] {
        let mut sim = published(Splice::Auto, SERVICE);
        let (outside, inside) = joined(&mut sim);
        let (ended, other) = if swapped {
            (inside, outside)
        } else {
            (outside, inside)
        };
        sim.net.server_shutdown(ended);
        assert!(sim.run(seconds(1), |sim| sim.net.server_sees_end(other)));
        sim.settle(seconds(60));
        let sent = pattern(100_000, 1);
        assert_eq!(sim.net.server_write(other, &sent), sent.len());
        assert!(arrives(&mut sim, ended, sent.len()) == sent);
        sim.net.server_shutdown(other);
        at_rest(&mut sim);
    }
}

#[test]
fn guest_that_is_silent_is_asked_whether_it_is_there() {
    let mut sim = published(Splice::Auto, SERVICE);
    let (outside, inside) = joined(&mut sim);
    sim.settle(seconds(7_100));
    assert_eq!(sim.net.asked_after(inside), None);
    sim.settle(seconds(200));
    assert_eq!(sim.net.asked_after(inside), Some((7_200, 600)));
    sim.net.server_shutdown(outside);
    sim.settle(seconds(70));
    assert_eq!(sim.net.asked_after(inside), Some((7_200, 600)));
    sim.settle(seconds(10));
    assert_eq!(sim.net.asked_after(inside), Some((75, 600)));
    assert_eq!(sim.net.asked_after(outside), None);
    sim.net.server_shutdown(inside);
    at_rest(&mut sim);
}

#[test]
fn reset_crosses_both_ways_also_behind_an_end() {
    for (swapped, ends_before) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut sim = published(Splice::Auto, SERVICE);
        let (outside, inside) = joined(&mut sim);
        let (resetting, other) = if swapped {
            (inside, outside)
        } else {
            (outside, inside)
        };
        if ends_before {
            sim.net.server_shutdown(resetting);
            assert!(sim.run(seconds(1), |sim| sim.net.server_sees_end(other)));
        }
        sim.net.server_reset(resetting);
        assert!(sim.run(seconds(1), |sim| sim.net.server_sees_reset(other)));
        at_rest(&mut sim);
    }
}

/// What it had sent fills all on the way, so nobody reads up to its end.
#[test]
fn client_that_resets_is_noticed_though_the_guest_reads_nothing() {
    let mut sim = published_with(10_000);
    let (outside, inside) = joined(&mut sim);
    sim.net.server_pause(inside, true);
    for _ in 0..100 {
        let _ = sim.net.server_write(outside, &pattern(10_000, 1));
        sim.settle(Duration::from_millis(1));
    }
    sim.net.server_reset(outside);
    assert!(sim.run(seconds(1), |sim| sim.net.server_sees_reset(inside)));
    at_rest(&mut sim);
}

#[test]
fn slow_reader_holds_the_sender_back_and_loses_nothing() {
    let mut sim = published_with(10_000);
    let (outside, inside) = joined(&mut sim);
    sim.net.server_pause(inside, true);
    let sent = pattern(40_000, 5);
    let mut taken = 0;
    while taken < sent.len() {
        let took = sim.net.server_write(outside, &sent[taken..]);
        sim.settle(seconds(1));
        if took == 0 {
            break;
        }
        taken += took;
    }
    assert!(taken < sent.len(), "there is an end to what is kept");
    sim.net.server_shutdown(outside);
    sim.settle(seconds(1));
    assert!(!sim.net.server_sees_end(inside), "not before the data");
    sim.net.server_pause(inside, false);
    assert!(arrives(&mut sim, inside, taken) == sent[..taken]);
    sim.net.server_shutdown(inside);
    at_rest(&mut sim);
}

/// A server that answers and ends before it has read all that the client sends, to a client that takes its time.
#[test]
fn early_answer_reaches_a_slow_client_before_the_reset() {
    for reads in [true, false] {
        let mut sim = published_with(10_000);
        let (outside, inside) = joined(&mut sim);
        sim.net.server_pause(outside, true);
        let answer = pattern(14_000, 5);
        let mut written = sim.net.server_write(inside, &answer);
        sim.settle(seconds(1));
        written += sim.net.server_write(inside, &answer[written..]);
        assert_eq!(written, answer.len());
        sim.settle(seconds(1));
        sim.net.server_reset(inside);
        assert_eq!(sim.net.server_write(outside, b"more"), 4);
        let later = sim.clock.now() + seconds(20);
        sim.wake = Some(later);
        assert!(sim.run(seconds(20), |sim| sim.clock.now() == later));
        assert_eq!(sim.stack.flows(), 1, "it has its time");
        if reads {
            sim.net.server_pause(outside, false);
            assert!(arrives(&mut sim, outside, answer.len()) == answer);
            assert!(sim.run(seconds(1), |sim| sim.net.server_sees_reset(outside)));
        } else {
            let gone = |sim: &mut Sim| sim.stack.flows() == 0;
            assert!(sim.run(seconds(15), gone));
        }
        at_rest(&mut sim);
    }
}

#[test]
fn crowd_in_bulk_leaves_each_turn_short() {
    const EACH: usize = 1 << 20;
    const CROWD: usize = 16;
    /// What is spliced in a turn, and what one connection may add to it.
    const MOST: u64 = (4 << 20) + (2 << 20);
    let mut sim = published_with(2 * EACH);
    let crowd: Vec<_> = (0..CROWD).map(|_| joined(&mut sim)).collect();
    let sent = pattern(EACH, 1);
    for (outside, _) in &crowd {
        assert_eq!(sim.net.server_write(*outside, &sent), EACH);
    }
    let net = sim.net.clone();
    let (longest, total) = sim.with_stack(|stack, turn| {
        let begin = stack.counters().bytes_spliced;
        let mut longest = 0;
        loop {
            let before = stack.counters().bytes_spliced;
            for event in net.take_events() {
                stack.handle_host(turn, event);
            }
            let more = stack.poll_transmit(turn);
            longest = longest.max(stack.counters().bytes_spliced - before);
            if !more && !net.has_events() {
                return (longest, stack.counters().bytes_spliced - begin);
            }
        }
    });
    assert_eq!(total, (CROWD * EACH) as u64);
    assert!(longest <= MOST, "{longest} bytes in one turn");
    for (_, inside) in crowd {
        assert!(sim.net.server_read(inside, usize::MAX) == sent);
    }
}

#[test]
fn urgent_data_stay_in_the_stream() {
    let mut sim = published(Splice::Auto, SERVICE);
    let (outside, inside) = joined(&mut sim);
    for (from, to) in [(outside, inside), (inside, outside)] {
        assert_eq!(sim.net.server_write(from, b"urgent"), 6);
        sim.net.server_urges(from);
        assert_eq!(arrives(&mut sim, to, 6), b"urgent");
        assert_eq!(sim.net.server_write(from, b"after"), 5);
        assert_eq!(arrives(&mut sim, to, 5), b"after");
    }
}

/// Whether the guest itself sees the client, over the link.
fn over_link(sim: &mut Sim, listener: SocketHandle, limit: Duration) -> bool {
    sim.run(limit, |sim| {
        sim.socket(listener).state() == State::Established
    })
}

#[test]
fn rule_decides_whom_the_guest_sees() {
    for (splice, from, joins) in [
        (Splice::Auto, LOCAL, true),
        (Splice::Auto, "127.9.9.9:1", true),
        (Splice::Auto, STRANGER, false),
        (Splice::Always, LOCAL, true),
        (Splice::Always, STRANGER, true),
        (Splice::Never, LOCAL, false),
        (Splice::Never, STRANGER, false),
    ] {
        let mut sim = published(splice, SERVICE);
        let listener = sim.listen(80);
        client(&sim, from);
        sim.settle(seconds(1));
        let spliced = sim.stack.counters().flows_spliced == 1;
        assert_eq!(spliced, joins, "{splice}, {from}");
        assert_eq!(
            over_link(&mut sim, listener, seconds(1)),
            !joins,
            "{splice}, {from}"
        );
    }
}

#[test]
fn strangers_do_not_reach_the_namespaces_loopback() {
    let mut sim = published(Splice::Always, LOCAL_SERVICE);
    let stranger = client(&sim, STRANGER);
    assert!(sim.run(seconds(1), |sim| sim.net.server_sees_reset(stranger)));
    let asked: Vec<_> = sim.net.connections();
    let asked = asked.into_iter().filter_map(|id| sim.net.remote(id));
    assert!(asked.into_iter().all(|to| to != addr(LOCAL_SERVICE)));
    at_rest(&mut sim);
    joined(&mut sim);
}

#[test]
fn client_is_reset_when_both_refuse() {
    for later in [false, true] {
        let mut sim = published(Splice::Auto, "10.0.2.100:81");
        let answer = if later {
            ConnectAnswer::FailLater(libc::ECONNREFUSED)
        } else {
            ConnectAnswer::Fail(libc::ECONNREFUSED)
        };
        sim.net.answer_all(answer);
        // The guest's own listener would take it, over the link.
        sim.listen(80);
        let client = client(&sim, LOCAL);
        assert!(sim.run(seconds(1), |sim| sim.net.server_sees_reset(client)));
        at_rest(&mut sim);
    }
}

#[test]
fn link_carries_whom_nothing_inside_answers() {
    for (answer, limit) in [
        (ConnectAnswer::Fail(libc::EADDRNOTAVAIL), 1),
        (ConnectAnswer::Fail(libc::ENETUNREACH), 1),
        (ConnectAnswer::FailLater(libc::EHOSTUNREACH), 1),
        (ConnectAnswer::Silent, 5),
    ] {
        let mut sim = published(Splice::Auto, SERVICE);
        sim.net.answer(addr(SERVICE), answer);
        let listener = sim.listen(80);
        let outside = client(&sim, LOCAL);
        assert!(over_link(&mut sim, listener, seconds(limit)), "{answer:?}");
        assert_eq!(sim.net.server_write(outside, b"hello"), 5);
        assert!(sim.run(seconds(1), |sim| sim.socket(listener).recv_queue() == 5));
        assert_eq!(sim.stack.counters().flows_spliced, 0);
        sim.socket(listener).abort();
        at_rest(&mut sim);
    }
}

#[test]
fn silent_loopback_is_waited_for_and_ends_with_a_reset() {
    let mut sim = published(Splice::Auto, "10.0.2.100:81");
    sim.net.answer(addr(LOCAL_SERVICE), ConnectAnswer::Silent);
    let first = client(&sim, LOCAL);
    sim.settle(seconds(30));
    assert!(!sim.net.server_sees_reset(first));
    sim.net.server_answers(last(&sim), None);
    assert!(sim.run(seconds(1), |sim| sim.stack.counters().flows_spliced == 1));
    let second = client(&sim, LOCAL);
    assert!(sim.run(seconds(80), |sim| sim.net.server_sees_reset(second)));
}

#[test]
fn silent_loopback_is_waited_for_as_long_as_was_asked_for() {
    let mut config = Config::default();
    config.timeouts.tcp_connect = 5;
    let mut sim = Sim::with(3, config, Faults::default());
    sim.net.set_inside(Inside::Ready);
    publish(&mut sim, Splice::Auto);
    sim.net
        .answer(addr(SERVICE), ConnectAnswer::FailLater(libc::ECONNREFUSED));
    sim.net.answer(addr(LOCAL_SERVICE), ConnectAnswer::Silent);
    let client = client(&sim, LOCAL);
    sim.settle(seconds(4));
    assert!(!sim.net.server_sees_reset(client));
    assert!(sim.run(seconds(2), |sim| sim.net.server_sees_reset(client)));
}

/// That one has no time like what waits for an answer: nobody was asked yet.
#[test]
fn socket_for_the_loopback_that_never_comes_is_not_waited_for() {
    let mut sim = published(Splice::Auto, LOCAL_SERVICE);
    sim.net
        .answer(addr(SERVICE), ConnectAnswer::FailLater(libc::ECONNREFUSED));
    let client = client(&sim, LOCAL);
    assert!(sim.run(seconds(1), |sim| sim.net.connections().len() > 1));
    sim.net.set_inside(Inside::Silent);
    assert!(sim.run(seconds(5), |sim| sim.net.server_sees_reset(client)));
    at_rest(&mut sim);
}

#[test]
fn crowd_that_waits_for_a_silent_loopback_gives_way_to_itself_and_others() {
    const MOST: usize = 4096;
    let mut sim = published(Splice::Auto, "10.0.2.100:81");
    sim.net.answer(addr(LOCAL_SERVICE), ConnectAnswer::Silent);
    let crowd = MOST + 100;
    for nth in 0..crowd {
        let port = 1024 + u16::try_from(nth).unwrap();
        let from = SocketAddr::new(addr(LOCAL).ip(), port);
        sim.net.client_connect(addr(PUBLISHED), from).unwrap();
        // Not a moment longer: none is to have had its time.
        let begun = |sim: &mut Sim| sim.stack.counters().flows_opened > nth as u64;
        assert!(sim.run(seconds(1), begun));
    }
    // The last one's request has yet to be refused at the guest's own address.
    let gave_way = (crowd - MOST) as u64;
    let done = |sim: &mut Sim| sim.stack.counters().flows_abandoned == gave_way;
    assert!(sim.run(seconds(1), done));
    assert_eq!(sim.stack.flows(), MOST);
}

#[test]
fn crowd_that_waits_for_sockets_inside_goes_over_the_link() {
    let mut sim = published(Splice::Auto, SERVICE);
    sim.net.set_inside(Inside::Silent);
    for port in 1024..1024 + 4200 {
        let from = SocketAddr::new(addr(LOCAL).ip(), port);
        let _ = sim.net.client_connect(addr(PUBLISHED), from).unwrap();
    }
    let begun = |sim: &mut Sim| sim.stack.counters().flows_opened == 4200;
    assert!(sim.run(seconds(1), begun));
    assert_eq!(sim.stack.counters().flows_abandoned, 0);
    let listener = sim.listen(80);
    assert!(
        over_link(&mut sim, listener, seconds(5)),
        "nobody was reset"
    );
}

#[test]
fn socket_inside_is_waited_for() {
    let mut sim = published(Splice::Auto, SERVICE);
    sim.net.set_inside(Inside::Slow);
    joined(&mut sim);
    // Some wait, and hear that there will be none: the link carries them.
    sim.net.set_inside(Inside::Silent);
    let listeners = [sim.listen(80), sim.listen(80)];
    for from in ["127.0.0.1:5001", "127.0.0.1:5002"] {
        client(&sim, from);
    }
    sim.settle(seconds(1));
    sim.net.set_inside(Inside::Nowhere);
    for listener in listeners {
        assert!(over_link(&mut sim, listener, seconds(1)));
    }
}

#[test]
fn who_opens_no_sockets_is_given_up_once() {
    let mut sim = published(Splice::Auto, SERVICE);
    sim.net.set_inside(Inside::Silent);
    let listeners = [sim.listen(80), sim.listen(80)];
    client(&sim, "127.0.0.1:5001");
    assert!(over_link(&mut sim, listeners[0], seconds(5)), "late");
    client(&sim, "127.0.0.1:5002");
    assert!(over_link(&mut sim, listeners[1], seconds(1)), "at once");
}

#[test]
fn lack_of_descriptors_costs_the_short_cut_alone() {
    let mut sim = published(Splice::Auto, SERVICE);
    let (outside, inside) = joined(&mut sim);
    sim.net.fail_pipe(Some(libc::EMFILE));
    let sent = pattern(9000, 2);
    assert_eq!(sim.net.server_write(outside, &sent), sent.len());
    sim.settle(seconds(1));
    assert_eq!(sim.net.server_unread(inside), 0, "no pipe");
    let listener = sim.listen(80);
    client(&sim, "127.0.0.1:5001");
    assert!(over_link(&mut sim, listener, seconds(1)));
    sim.net.fail_pipe(None);
    assert!(arrives(&mut sim, inside, sent.len()) == sent);
}

#[test]
fn published_port_taken_back_leaves_connections_alone() {
    let mut sim = published(Splice::Auto, SERVICE);
    let (outside, inside) = joined(&mut sim);
    assert!(sim.stack.unpublish(1, None));
    assert_eq!(sim.net.server_write(outside, b"still"), 5);
    assert_eq!(arrives(&mut sim, inside, 5), b"still");
    sim.net.server_shutdown(outside);
    sim.net.server_shutdown(inside);
    assert!(sim.run(seconds(1), |sim| sim.stack.flows() == 0));
    assert_eq!(sim.net.open_sockets(), 0);
}

#[test]
fn limit_on_flows_holds_for_them_too() {
    let config = Config {
        max_flows: 2,
        ..Config::default()
    };
    let mut sim = Sim::with(3, config, sim::Faults::default());
    sim.net.set_inside(Inside::Ready);
    sim.net.answer(addr(SERVICE), ConnectAnswer::Accept);
    publish(&mut sim, Splice::Auto);
    let clients = ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"].map(|from| client(&sim, from));
    sim.settle(seconds(1));
    let refused = clients.map(|client| sim.net.server_sees_reset(client));
    assert_eq!(refused, [false, false, true]);
    assert_eq!(sim.stack.counters().flows_refused, 1);
}

#[derive(Debug, Clone)]
enum Step {
    Write(bool, usize),
    Read(bool, usize),
    Urge(bool),
    Pause(bool, bool),
    Shutdown(bool),
    Reset(bool),
    Starve(bool),
    Wait,
}

fn step() -> impl Strategy<Value = Step> {
    let side = any::<bool>;
    prop_oneof![
        6 => (side(), 1_usize..30_000).prop_map(|(side, len)| Step::Write(side, len)),
        6 => (side(), 1_usize..30_000).prop_map(|(side, len)| Step::Read(side, len)),
        1 => side().prop_map(Step::Urge),
        2 => (side(), any::<bool>()).prop_map(|(side, paused)| Step::Pause(side, paused)),
        1 => side().prop_map(Step::Shutdown),
        1 => side().prop_map(Step::Reset),
        1 => any::<bool>().prop_map(Step::Starve),
        3 => Just(Step::Wait),
    ]
}

proptest! {
    /// Whatever both ends do, what one reads is the beginning of what the other wrote, all of it where
    /// there was no reset, and nothing is left.
    #[test]
    fn random_lives_keep_every_byte(steps in proptest::collection::vec(step(), 0..60)) {
        let mut sim = Sim::new(3);
        sim.net.set_socket_buffer(20_000);
        sim.net.set_inside(Inside::Slow);
        sim.net.answer(addr(SERVICE), ConnectAnswer::Accept);
        publish(&mut sim, Splice::Auto);
        let (outside, inside) = joined(&mut sim);
        let sides = [outside, inside];
        let (mut wrote, mut read) = ([vec![], vec![]], [vec![], vec![]]);
        let (mut shut, mut reset) = ([false, false], false);
        for step in steps {
            match step {
                Step::Write(side, len) if !shut[usize::from(side)] && !reset => {
                    let side = usize::from(side);
                    let bytes = pattern(len, wrote[side].len());
                    let took = sim.net.server_write(sides[side], &bytes);
                    wrote[side].extend(&bytes[..took]);
                }
                Step::Read(side, len) => {
                    let side = usize::from(side);
                    read[side].extend(sim.net.server_read(sides[side], len));
                }
                Step::Urge(side) if !reset => sim.net.server_urges(sides[usize::from(side)]),
                Step::Pause(side, paused) => {
                    sim.net.server_pause(sides[usize::from(side)], paused);
                }
                Step::Shutdown(side) if !shut[usize::from(side)] => {
                    shut[usize::from(side)] = true;
                    sim.net.server_shutdown(sides[usize::from(side)]);
                }
                Step::Reset(side) if !reset => {
                    reset = true;
                    sim.net.server_reset(sides[usize::from(side)]);
                }
                Step::Starve(starve) => sim.net.fail_pipe(starve.then_some(libc::EMFILE)),
                Step::Wait => {
                    sim.run(Duration::from_millis(200), |_| false);
                }
                Step::Write(..) | Step::Urge(_) | Step::Shutdown(_) | Step::Reset(_) => {}
            }
            sim.step();
        }
        sim.net.fail_pipe(None);
        for side in [0, 1] {
            sim.net.server_pause(sides[side], false);
            if !shut[side] {
                sim.net.server_shutdown(sides[side]);
            }
        }
        for _ in 0..30 {
            sim.run(Duration::from_millis(200), |_| false);
            for side in [0, 1] {
                read[side].extend(sim.net.server_read(sides[side], usize::MAX));
            }
        }
        for side in [0, 1] {
            prop_assert!(wrote[1 - side].starts_with(&read[side]));
            prop_assert!(reset || wrote[1 - side].len() == read[side].len());
        }
        prop_assert_eq!((sim.stack.flows(), sim.net.open_sockets()), (0, 1));
    }
}
