//! Several workers on a real kernel, as an unprivileged user: bytes, datagrams, names and published ports are
//! carried as by one, and each thread has given up what one gives up. Which worker does what is simulated in
//! `sim_workers.rs`; the whole suite runs with several by `TAPGATE_TEST_WORKERS=2 .ci/test`.

#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking, also inside a helper"
)]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::thread;

use support::attached::Net;
use support::bulk::{Way, server, transfer};
use support::dns::Resolver;
use support::process::{Running, run};
use support::serve;
use support::slirp4netns::Api;
use support::sockets::{Sockets, closed_port};
use support::world::World;
use support::{
    ANY, GATEWAY, GATEWAY6, GUEST, LOOPBACK, LOOPBACK6, RESOLVER, SOON, WORLD_A, at, wait_until,
};

const MIB: u64 = 1 << 20;
/// Bytes of a call.
const PIECE: usize = 128 * 1024;
/// `CAP_NET_BIND_SERVICE` (capabilities(7)), which a test's world leaves.
const LOW_PORTS: u64 = 1 << 10;

fn net(workers: &str) -> Net {
    Net::up(&["--workers", workers])
}

#[test]
fn every_byte_of_many_streams_arrives_both_ways() {
    for workers in ["2", "4"] {
        let net = net(workers);
        let server = server(net.world.listen(at(LOOPBACK, 0)).unwrap());
        for way in [Way::Up, Way::Down] {
            transfer(&net.guest, at(GATEWAY, server.port()), way, (16, 64 * MIB));
        }
    }
}

/// How often a thread of tapgate's has gone to sleep (proc(5)).
fn naps(net: &Net, thread: &str) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{}/task", net.tapgate.pid())).unwrap();
    let status = tasks
        .map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap())
        .find(|status| status.starts_with(&format!("Name:\t{thread}\n")));
    let status = status.unwrap();
    let naps = status
        .lines()
        .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    naps.unwrap().trim().parse().unwrap()
}

#[test]
fn one_thread_does_while_there_is_time_and_several_where_there_is_none() {
    let net = net("2");
    let listener = net.world.listen(at(LOOPBACK, 0)).unwrap();
    let echo = listener.local_addr().unwrap();
    let _echo = serve::tcp_echo(listener);
    // The kernel deals them to both queues.
    let wait_for_calm = || {
        wait_until("the second thread to have nothing to do", SOON, || {
            let before = naps(&net, "tapgate-1");
            for _ in 0..20 {
                net.guest.connect(at(GATEWAY, echo.port())).unwrap();
            }
            (naps(&net, "tapgate-1") == before).then_some(before)
        })
    };
    let calm = wait_for_calm();
    let sink = serve::tcp(net.world.listen(at(LOOPBACK, 0)).unwrap(), |mut stream| {
        let mut bytes = vec![0; PIECE];
        while stream.read(&mut bytes).is_ok_and(|len| len > 0) {}
    });
    let to = at(GATEWAY, sink.port());
    wait_until("the first thread to have no time", SOON, || {
        pour(&net, to);
        (naps(&net, "tapgate-1") > calm).then_some(())
    });
    wait_for_calm();
}

/// As much as tapgate carries on many connections for a moment. Nobody looks at the bytes, so that it is tapgate which has
/// most to do with them.
fn pour(net: &Net, to: SocketAddr) {
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                let mut stream = net.guest.connect(to).unwrap();
                for _ in 0..256 {
                    stream.write_all(&[0; PIECE]).unwrap();
                }
            });
        }
    });
}

#[test]
fn every_thread_gives_up_what_one_gives_up() {
    let net = net("3");
    let pid = net.tapgate.pid();
    let mut names = BTreeSet::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap().trim().to_owned()
        };
        names.insert(field("Name:"));
        assert_eq!(field("Seccomp:"), "2", "a filter");
        assert_eq!(field("NoNewPrivs:"), "1");
        for powers in ["CapEff:", "CapPrm:", "CapInh:", "CapAmb:"] {
            let held = u64::from_str_radix(&field(powers), 16).unwrap();
            assert_eq!(held & !LOW_PORTS, 0, "{powers}");
        }
    }
    let expected = ["tapgate", "tapgate-1", "tapgate-2"].map(String::from);
    assert_eq!(names, BTreeSet::from(expected));
}

#[test]
fn datagrams_names_and_pings_are_answered_at_every_port() {
    let world = World::new();
    let _resolver = Resolver::start(&world, at(LOOPBACK, 53), [198, 18, 0, 1].into());
    let net = Net::up_in(world, &["--workers", "2"]);
    let echo = serve::udp_echo(net.world.udp(at(LOOPBACK, 0)).unwrap());
    let mut buffer = [0; 8000];
    for length in [1, 1400, 6000].repeat(8) {
        let socket = net.guest.udp_to(at(GATEWAY, echo.port())).unwrap();
        for _ in 0..4 {
            socket.send(&vec![7; length]).unwrap();
            assert_eq!(socket.recv(&mut buffer).unwrap(), length);
        }
    }
    // In fragments, which one worker puts together for another.
    let echo = serve::udp_echo(net.world.udp(at(LOOPBACK6, 0)).unwrap());
    let mut buffer = vec![0; 65_000];
    for _ in 0..8 {
        let socket = net.guest.udp_to(at(GATEWAY6, echo.port())).unwrap();
        socket.send(&vec![7; 60_000]).unwrap();
        assert_eq!(socket.recv(&mut buffer).unwrap(), 60_000);
    }
    let server = format!("@{RESOLVER}");
    for how in ["+notcp", "+tcp"].repeat(4) {
        let asked = net
            .guest
            .run("dig", &["+short", how, &server, "name.example"]);
        assert_eq!(asked.output().trim(), "198.18.0.1", "{how}");
    }
    let gateway = GATEWAY.to_string();
    net.guest
        .run("ping", &["-c3", "-i0.2", "-W5", &gateway])
        .output();
}

#[test]
fn published_ports_are_listed_served_and_taken_back() {
    let world = World::new();
    let api = ["-p", "8081:81", "--api-socket", "/mnt/api.sock"];
    let net = Net::up_in(world, &[&["--workers", "2"], &api[..]].concat());
    let api = Api::new(&net.world, "api.sock");
    let _tcp = serve::tcp_echo(net.guest.listen(at(GUEST, 80)).unwrap());
    let _udp = serve::udp_echo(net.guest.udp(at(GUEST, 80)).unwrap());
    let _joined = serve::tcp_echo(net.guest.listen(at(ANY, 81)).unwrap());
    let ports: Vec<u16> = (0..4).map(|_| closed_port(&net.world)).collect();
    let mut ids = Vec::new();
    for port in &ports {
        for proto in ["tcp", "udp"] {
            ids.push(api.publish(proto, *port, 80));
        }
    }
    assert_eq!(api.list().len(), 1 + ids.len());
    let mut answer = [0; 4];
    for to in ports
        .iter()
        .map(|port| at(WORLD_A, *port))
        .chain([at(LOOPBACK, 8081)])
    {
        for _ in 0..6 {
            let mut stream = net.world.connect(to).unwrap();
            stream.write_all(b"ping").unwrap();
            stream.read_exact(&mut answer).unwrap();
        }
    }
    for port in &ports {
        let client = net.world.udp_to(at(WORLD_A, *port)).unwrap();
        client.send(b"ping").unwrap();
        assert_eq!(client.recv(&mut answer).unwrap(), 4);
    }
    for id in ids {
        api.remove(id);
    }
    assert_eq!(api.list().len(), 1);
    for port in ports {
        net.world.udp(at(WORLD_A, port)).unwrap();
    }
}

/// By whatever queue it comes, and whatever queue the connection has.
#[test]
fn flood_is_thinned_and_what_comes_after_it_is_not() {
    /// Frames of a protocol that nobody speaks (IEEE 802, local experimental), as fast as it goes.
    const FLOOD: &str = "
import socket
link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
link.bind(('tap0', 0))
frame = bytes.fromhex('020000000001' + '020000000002' + '88b5') + bytes(46)
while True:
    try: link.send(frame)
    except OSError: pass
";
    let flooded = "the guest floods its network";
    let over = "the flood is over";
    for workers in ["1", "2"] {
        let net = Net::up(&["-v", "--workers", workers]);
        let listener = net.world.listen(at(LOOPBACK, 0)).unwrap();
        let echo = listener.local_addr().unwrap();
        let _echo = serve::tcp_echo(listener);
        let mut stream = net.guest.connect(at(GATEWAY, echo.port())).unwrap();
        let mut answer = [0; 4];
        let mut flood = net.guest.command("/usr/bin/python3");
        let flood = Running::start(flood.args(["-c", FLOOD]));
        wait_until(flooded, SOON, || {
            stream.write_all(b"ping").unwrap();
            stream.read_exact(&mut answer).unwrap();
            net.tapgate.log().contains(flooded).then_some(())
        });
        drop(flood);
        wait_until(over, SOON, || {
            let log = net.tapgate.log();
            let [begun, ended] = [flooded, over].map(|line| log.matches(line).count());
            (begun == ended).then_some(())
        });
        // ARP is of the flood's kind.
        net.guest
            .run("ip", &["neighbour", "flush", "dev", "tap0"])
            .output();
        net.guest.connect(at(GATEWAY, echo.port())).unwrap();
    }
}

#[test]
fn tap_that_was_made_with_one_queue_is_refused_with_the_fix() {
    let world = World::new();
    let script = "ip tuntap add dev one0 mode tap; ip tuntap add dev many0 mode tap multi_queue";
    let guest = support::guest::Guest::new(&world);
    guest.run("sh", &["-ec", script]).output();
    let pid = guest.pid().to_string();
    let refused = run(&mut world.tapgate(&["attach", "--workers", "2", &pid, "one0"]));
    refused.assert_runtime_error("multi_queue");
    let _serves = support::attached::Attached::start(&world, &["--workers", "2", &pid, "many0"]);
    // As many as there are processors for, but no more than it has queues.
    let mut unasked = world.tapgate(&["attach", &pid, "one0"]);
    let _serves = Running::start(&mut unasked);
    wait_until("the tap of one queue to be served", SOON, || {
        let shown = guest.run("ip", &["-4", "address", "show", "one0"]).output();
        shown.contains("10.0.2.100/24").then_some(())
    });
}

#[test]
fn each_worker_tells_its_numbers() {
    let net = Net::up(&["--workers", "2", "-vv"]);
    for worker in 0..2 {
        let said = format!("sizes worker={worker} ");
        wait_until(&said, SOON, || {
            net.tapgate.log().contains(&said).then_some(())
        });
    }
}

#[test]
fn number_of_workers_is_checked() {
    let world = World::new();
    for wrong in ["0", "9", "x"] {
        let refused = run(&mut world.tapgate(&["run", "--workers", wrong, "--", "true"]));
        assert_eq!(refused.code(), 2);
        assert!(refused.stderr.contains("--workers"), "{}", refused.stderr);
    }
}
