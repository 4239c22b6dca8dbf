//! Memory follows use on a real kernel, as an unprivileged user: what an idle connection costs, and that
//! memory comes back after a crowd and after bulk. Sizes are judged, never times.
//!
//! `TAPGATE_TEST_CONNECTIONS` is how many connections are opened; the default keeps the suite short,
//! 50000 is what the issue promises. Each takes two descriptors of the test's and one of tapgate's: where
//! the hard limit on them is lower (`ulimit -Hn`), raise it first, or see `python3 benches/report vm`. Every
//! 10,000 connections have a server's port of their own, since a guest has some 28,000 ports for each.

#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking, also inside a helper"
)]
#![allow(
    clippy::disallowed_methods,
    reason = "the bans on clocks are for the core; the rate of opening is printed for the reader"
)]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use support::attached::Net;
use support::bulk::{Way, server, transfer};
use support::sockets::Sockets;
use support::sys::raise_descriptor_limit;
use support::{GATEWAY, LOOPBACK, SOON, at, env_number, wait_until};

/// Connections to one port of the server.
const EACH: u64 = 10_000;

/// Resident memory that is not of a file, kilobytes.
fn anonymous(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.unwrap().trim().split(' ').next();
    number.unwrap().parse().unwrap()
}

/// Waits until no more than so many kilobytes are resident.
fn wait_for_memory(what: &str, pid: i32, most: u64) {
    wait_until(what, SOON, || (anonymous(pid) <= most).then_some(()));
}

/// One byte there and back.
fn echo(guest: &mut TcpStream, host: &mut TcpStream) {
    let mut byte = [7];
    guest.write_all(&byte).unwrap();
    host.read_exact(&mut byte).unwrap();
    host.write_all(&byte).unwrap();
    guest.read_exact(&mut byte).unwrap();
}

fn open(net: &Net, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let port = listener.local_addr().unwrap().port();
    let mut guest = net.guest.connect(at(GATEWAY, port)).unwrap();
    let (mut host, _) = support::serve::accept(listener);
    echo(&mut guest, &mut host);
    (guest, host)
}

#[test]
fn an_idle_connection_costs_little_and_a_crowd_leaves_nothing() {
    crowd(&[]);
}

#[test]
fn a_crowd_of_two_workers_leaves_nothing() {
    crowd(&["--workers", "2"]);
}

/// Opens connections that do nothing, asks all of them, and ends them.
fn crowd(options: &[&str]) {
    let count = env_number("TAPGATE_TEST_CONNECTIONS", 2000);
    let net = Net::up(&[&["--max-flows", "100000"], options].concat());
    let pid = net.tapgate.pid();
    let open_files = raise_descriptor_limit().unwrap();
    assert!(
        2 * count + 100 < open_files,
        "{open_files} descriptors: raise ulimit -Hn"
    );
    let listeners: Vec<_> = (0..count.div_ceil(EACH))
        .map(|_| net.world.listen(at(LOOPBACK, 0)).unwrap())
        .collect();
    let before = anonymous(pid);
    let mut times = Vec::new();
    let mut connections = Vec::new();
    for number in 0..count {
        if number % 1000 == 0 {
            times.push(Instant::now());
        }
        let listener = &listeners[usize::try_from(number / EACH).unwrap()];
        connections.push(open(&net, listener));
    }
    times.push(Instant::now());
    let thousand = |pair: &[Instant]| pair[1] - pair[0];
    let (first, last) = (thousand(&times[..2]), thousand(&times[times.len() - 2..]));
    wait_for_memory("idle connections to rest", pid, before + 2 * count + 1024);
    let all = anonymous(pid) - before;
    println!(
        "{count} connections: {} bytes each; the first thousand took {first:?}, the last {last:?}",
        all * 1024 / count
    );
    if count >= 50_000 {
        std::thread::sleep(Duration::from_secs(60));
    }
    for (guest, host) in &mut connections {
        echo(guest, host);
    }
    wait_for_memory("connections to rest again", pid, before + 2 * count + 1024);
    drop(connections);
    wait_for_memory(
        "a crowd's memory to come back",
        pid,
        before + count / 4 + 2048,
    );
    println!("{before} kB before, {} kB after", anonymous(pid));
}

#[test]
fn bulk_leaves_nothing_though_its_connections_live() {
    let net = Net::up(&[]);
    let pid = net.tapgate.pid();
    let listener = net.world.listen(at(LOOPBACK, 0)).unwrap();
    let before = anonymous(pid);
    let _idle: Vec<_> = (0..50).map(|_| open(&net, &listener)).collect();
    let server = server(net.world.listen(at(LOOPBACK, 0)).unwrap());
    for way in [Way::Up, Way::Down] {
        transfer(&net.guest, at(GATEWAY, server.port()), way, (16, 64 << 20));
    }
    wait_for_memory("the rings of bulk to be freed", pid, before + 2048);
}
