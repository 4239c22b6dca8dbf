//! Memory follows use, in virtual time: idle flows hold none, and the limit on all of them holds, whatever
//! thousands of flows send at once, while nobody starves and every byte arrives.
#![allow(
    clippy::unwrap_used,
    reason = "a scenario that can not go on has failed"
)]

mod sim;

use sim::{Faults, Sim, seconds};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::State;
use tapgate::config::Config;
use tapgate::flow::tcp_engine::RING;
use tapgate::host::simulated::{ConnectAnswer, SocketId};
use tapgate::net::Duration;

const SERVER: &str = "192.0.2.1:80";

/// A segment each way, at an MTU of 1500, and what is not exchanged for less (`flow/tcp_open/saving.rs`).
const FLOOR: usize = 2 * 1460 + 8 * 1024;

fn accepting(limit: usize) -> Sim {
    let config = Config {
        max_buffer_memory: limit,
        ..Config::default()
    };
    let sim = Sim::with(11, config, Faults::default());
    sim.net.answer_all(ConnectAnswer::Accept);
    sim
}

/// So many connections of the guest's, open, with the host's end of each.
fn connected(sim: &mut Sim, count: usize) -> Vec<(SocketHandle, SocketId)> {
    let handles: Vec<_> = (0..count)
        .map(|_| {
            let handle = sim.connect_with(SERVER, 32 * 1024);
            // One after the other, so that the two ends can be told apart by their order.
            sim.step();
            handle
        })
        .collect();
    let open = |sim: &mut Sim| {
        let mut handles = handles.iter();
        handles.all(|&handle| sim.socket(handle).state() == State::Established)
    };
    assert!(sim.run(seconds(60), open), "all are open");
    let ids = sim.net.connections();
    assert_eq!(ids.len(), count);
    handles.into_iter().zip(ids).collect()
}

/// Byte `at` of flow `nth`.
fn pattern(nth: usize, at: usize) -> u8 {
    u8::try_from((at + nth * 31) % 251).unwrap()
}

fn stretch(nth: usize, from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(|at| pattern(nth, at)).collect()
}

/// How far each direction of a flow is.
#[derive(Default, Clone)]
struct Way {
    up_sent: usize,
    up_got: usize,
    down_sent: usize,
    down_got: usize,
}

/// Lets both ends of a flow write what goes, and read at most `most` bytes each.
fn step(
    sim: &mut Sim,
    nth: usize,
    ends: (SocketHandle, SocketId),
    way: &mut Way,
    ([up, down], most): ([usize; 2], usize),
) {
    let (handle, id) = ends;
    let len = (up - way.up_sent).min(4096);
    way.up_sent += sim
        .socket(handle)
        .send_slice(&stretch(nth, way.up_sent, len))
        .unwrap();
    let len = (down - way.down_sent).min(4096);
    way.down_sent += sim.net.server_write(id, &stretch(nth, way.down_sent, len));
    let came = sim.net.server_read(id, most);
    assert_eq!(came, stretch(nth, way.up_got, came.len()), "flow {nth} up");
    way.up_got += came.len();
    let mut buffer = vec![0; most];
    let len = sim.socket(handle).recv_slice(&mut buffer).unwrap_or(0);
    assert_eq!(
        buffer[..len],
        stretch(nth, way.down_got, len),
        "flow {nth} down"
    );
    way.down_got += len;
}

/// All flows carry so many bytes up and down at once under `limit`; gives the most that buffers held, and
/// how far the slowest was when the first had finished.
fn crowd(count: usize, [up, down]: [usize; 2], limit: usize, faults: Faults) -> (usize, usize) {
    let mut sim = accepting(limit);
    let ends = connected(&mut sim, count);
    sim.faults = faults;
    let mut ways = vec![Way::default(); count];
    let (mut most, mut slowest) = (0, None);
    let done = |way: &Way| way.up_got == up && way.down_got == down;
    let finished = sim.run(seconds(600), |sim| {
        for (nth, (way, ends)) in ways.iter_mut().zip(&ends).enumerate() {
            if !done(way) {
                step(sim, nth, *ends, way, ([up, down], 700));
            }
        }
        most = most.max(sim.stack.buffers().0);
        if ways.iter().any(done) {
            slowest.get_or_insert(ways.iter().map(|way| way.up_got + way.down_got).min());
        }
        sim.wake = Some(sim.clock.now() + Duration::from_millis(1));
        ways.iter().all(done)
    });
    let behind: Vec<_> = ways.iter().filter(|way| !done(way)).collect();
    assert!(finished, "{} flows are stuck", behind.len());
    (most, slowest.flatten().unwrap())
}

#[test]
fn many_flows_share_little_memory_and_none_starves() {
    let (count, total, limit) = (200, 30_000, 1 << 20);
    for way in [[total, 0], [0, total]] {
        let (most, slowest) = crowd(count, way, limit, Faults::default());
        println!("{way:?}: held {most} of {limit}, the slowest at {slowest} of {total}");
        assert!(most <= limit + count * FLOOR, "{most} held");
        assert!(slowest > total / 3, "{slowest} of {total} bytes");
    }
}

#[test]
fn many_flows_that_are_busy_both_ways_share_little_memory() {
    let (count, total, limit) = (100, 30_000, 512 << 10);
    let (most, slowest) = crowd(count, [total; 2], limit, Faults::default());
    println!(
        "held {most} of {limit}, the slowest at {slowest} of {}",
        2 * total
    );
    assert!(most <= limit + count * FLOOR, "{most} held");
    assert!(slowest > total, "{slowest} of {} bytes", 2 * total);
}

#[test]
fn without_any_memory_beyond_a_segment_everything_arrives() {
    let faults = Faults {
        loss: 2,
        duplicate: 2,
        reorder: 2,
    };
    for way in [[30_000, 0], [0, 30_000]] {
        let (most, _) = crowd(20, way, 0, faults);
        assert!(most <= 20 * FLOOR, "{most} held");
    }
}

/// Such a flow's send ring is never empty, and its receive ring goes on to its end, a few bytes at a time.
#[test]
fn who_reads_nothing_and_sends_much_holds_little() {
    let (count, up, down) = (20, RING + 200_000, 50_000);
    let lossy = Faults {
        loss: 1,
        duplicate: 1,
        reorder: 2,
    };
    // What was promised before there were so many is dropped where memory has run out: beside losses there is some.
    for (limit, faults) in [(256 << 10, Faults::default()), (2 << 20, lossy)] {
        let mut sim = accepting(limit);
        let ends = connected(&mut sim, count);
        sim.faults = faults;
        let mut ways = vec![Way::default(); count];
        let mut most = 0;
        let finished = sim.run(seconds(600), |sim| {
            for (nth, (way, ends)) in ways.iter_mut().zip(&ends).enumerate() {
                pour(sim, nth, *ends, way, [up, down]);
            }
            most = most.max(sim.stack.buffers().0);
            sim.wake = Some(sim.clock.now() + Duration::from_millis(1));
            ways.iter().all(|way| way.up_got == up)
        });
        println!("held {most} of {limit}");
        let behind: Vec<_> = ways.iter().map(|way| way.up_got).collect();
        assert!(finished, "{behind:?} of {up}");
        assert!(most <= limit + count * FLOOR, "{most} held");
        let finished = sim.run(seconds(600), |sim| {
            for (nth, (way, ends)) in ways.iter_mut().zip(&ends).enumerate() {
                step(sim, nth, *ends, way, ([up, down], 10_000));
            }
            sim.wake = Some(sim.clock.now() + Duration::from_millis(1));
            ways.iter().all(|way| way.down_got == down)
        });
        assert!(finished, "what they had not read comes");
    }
}

/// Lets both ends of a flow write what goes, the guest a little at a time; only the host reads.
fn pour(
    sim: &mut Sim,
    nth: usize,
    (handle, id): (SocketHandle, SocketId),
    way: &mut Way,
    [up, down]: [usize; 2],
) {
    let piece = stretch(nth, way.up_sent, (up - way.up_sent).min(900));
    way.up_sent += sim.socket(handle).send_slice(&piece).unwrap();
    let piece = stretch(nth, way.down_sent, down - way.down_sent);
    way.down_sent += sim.net.server_write(id, &piece);
    let came = sim.net.server_read(id, 3000);
    assert_eq!(came, stretch(nth, way.up_got, came.len()), "flow {nth} up");
    way.up_got += came.len();
}

#[test]
fn one_flow_alone_fills_what_its_limit_allows_and_no_more() {
    let limit = 256 * 1024;
    let mut sim = accepting(limit);
    let ends = connected(&mut sim, 1)[0];
    // Neither end reads: both rings fill.
    let mut way = Way::default();
    sim.run(seconds(10), |sim| {
        step(sim, 0, ends, &mut way, ([1 << 20; 2], 0));
        sim.wake = Some(sim.clock.now() + Duration::from_millis(1));
        false
    });
    let (held, _) = sim.stack.buffers();
    assert!(held > limit / 8, "{held} of {limit} bytes");
    assert!(held <= limit + FLOOR, "{held} of {limit} bytes");
    // Once both read, everything comes.
    let all = sim.run(seconds(600), |sim| {
        step(sim, 0, ends, &mut way, ([1 << 20; 2], 10_000));
        sim.wake = Some(sim.clock.now() + Duration::from_millis(1));
        way.up_got == 1 << 20 && way.down_got == 1 << 20
    });
    assert!(all, "{} up, {} down", way.up_got, way.down_got);
}

#[test]
fn idle_flows_hold_nothing_and_go_on() {
    let mut sim = accepting(256 << 20);
    let ends = connected(&mut sim, 300);
    let mut ways = vec![Way::default(); ends.len()];
    for total in [1000, 1001, 9000] {
        assert!(sim.run(seconds(60), |sim| {
            for (nth, (way, ends)) in ways.iter_mut().zip(&ends).enumerate() {
                step(sim, nth, *ends, way, ([total; 2], 10_000));
            }
            sim.wake = Some(sim.clock.now() + Duration::from_millis(1));
            let mut ways = ways.iter();
            ways.all(|way| way.up_got == total && way.down_got == total)
        }));
        assert!(sim.stack.buffers().1 > 0, "something has moved");
        sim.wake = None;
        sim.run(seconds(10), |_| false);
        assert_eq!(sim.stack.buffers(), (0, 0), "after {total} bytes");
        assert_eq!(sim.stack.flows(), ends.len());
    }
    for (handle, id) in ends {
        sim.socket(handle).close();
        sim.net.server_shutdown(id);
    }
    sim.settle(seconds(60));
    assert_eq!((sim.stack.flows(), sim.net.open_sockets()), (0, 0));
}

#[test]
fn half_closed_flows_rest_as_well() {
    for guest_first in [true, false] {
        let mut sim = accepting(256 << 20);
        let (handle, id) = connected(&mut sim, 1)[0];
        if guest_first {
            sim.socket(handle).close();
        } else {
            sim.net.server_shutdown(id);
        }
        sim.run(seconds(10), |_| false);
        assert_eq!(sim.stack.buffers(), (0, 0), "guest first: {guest_first}");
        let word = b"still here";
        if guest_first {
            assert!(sim.net.server_sees_end(id));
            assert_eq!(sim.net.server_write(id, word), word.len());
            sim.run(seconds(1), |_| false);
            let mut heard = [0; 10];
            assert_eq!(sim.socket(handle).recv_slice(&mut heard), Ok(10));
            assert_eq!(&heard, word);
            sim.net.server_shutdown(id);
        } else {
            sim.socket(handle).send_slice(word).unwrap();
            sim.run(seconds(1), |_| false);
            assert_eq!(sim.net.server_read(id, 100), word);
            sim.socket(handle).close();
        }
        sim.settle(seconds(60));
        assert_eq!((sim.stack.flows(), sim.net.open_sockets()), (0, 0));
    }
}
