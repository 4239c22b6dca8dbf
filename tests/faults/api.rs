//! Rows 40, 41 and 51 with the real program: clients of the API that make no sense, or ask for what can't be.
//!
//! In: an instance that serves a guest, and its API socket. Out: that each client was answered as the contract
//! wants, that packets flowed meanwhile, and that nothing is left of any of it.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use serde_json::{Value, json};

use crate::count;
use crate::support::bulk::{self, Way};
use crate::support::nonsense::Nonsense;
use crate::support::process::fail;
use crate::support::slirp4netns::{Api, Served, descriptors};
use crate::support::sockets::Sockets;
use crate::support::sys::raise_descriptor_limit;
use crate::support::world::World;
use crate::support::{GATEWAY, LOOPBACK, SOON, at, wait_until};

/// An instance under slirp4netns's name, which its own user may look at, and what it had open at first.
struct Watched {
    served: Served,
    before: usize,
}

impl Watched {
    fn start() -> Self {
        Self::start_in(World::new())
    }

    fn start_in(world: World) -> Self {
        raise_descriptor_limit().unwrap();
        let served = Served::in_world(world, &["--enable-sandbox", "--enable-seccomp"]);
        served.api.list();
        let before = descriptors(served.slirp4netns.pid()).len();
        Self { served, before }
    }

    fn api(&self) -> &Api {
        &self.served.api
    }

    /// The same process serves, holds nothing more than at first, and had no complaint.
    fn assert_as_before(mut self) {
        for entry in self.api().list() {
            self.api().remove(entry["id"].as_u64().unwrap());
        }
        let pid = self.served.slirp4netns.pid();
        wait_until("descriptors to come back", SOON, || {
            (descriptors(pid).len() <= self.before).then_some(())
        });
        assert_eq!(self.served.slirp4netns.try_status(), None);
        assert_eq!(self.served.slirp4netns.said().1, "");
        assert!(self.api().publish("tcp", 8080, 80) > 0);
    }
}

/// Moves bytes through the guest as long as `work` takes; every byte is looked at.
fn while_packets_flow(net: &Served, work: impl FnOnce() + Send) {
    let server = bulk::server(net.world.listen(at(LOOPBACK, 0)).unwrap());
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let working = scope.spawn(|| {
            work();
            done.store(true, Ordering::Relaxed);
        });
        let mut rounds = 0;
        while !working.is_finished() || rounds == 0 {
            for way in [Way::Up, Way::Down] {
                bulk::transfer(&net.guest, at(GATEWAY, server.port()), way, (1, 1 << 20));
            }
            rounds += 1;
        }
    });
    assert!(done.load(Ordering::Relaxed));
}

/// Sends a request as it is, and gives the whole answer. What is not read of a request that is too long resets the
/// connection behind the answer.
fn answer(api: &Api, request: &[u8]) -> String {
    let mut client = api.connect().unwrap();
    let _ = client.write_all(request);
    let _ = client.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    match client.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Err(error) => fail(&format!("no answer: {error}")),
    }
    String::from_utf8(answer).unwrap()
}

/// Offers as many bytes as asked, in as many connections as it takes: each is refused early.
fn offer(api: &Api, bytes: usize) {
    let chunk = vec![b'['; 64 << 10];
    let mut left = bytes;
    while left > 0 {
        let mut client = api.connect().unwrap();
        while left > 0 {
            match client.write(&chunk) {
                Ok(taken) => left = left.saturating_sub(taken),
                Err(_) => break,
            }
        }
        let mut answer = String::new();
        let _ = client.read_to_string(&mut answer);
        assert!(answer.contains("error") || answer.is_empty(), "{answer}");
    }
}

#[test]
fn row_40_api_nonsense() {
    let net = Watched::start();
    while_packets_flow(&net.served, || {
        let threads = 4;
        thread::scope(|scope| {
            for seed in 1..=threads {
                let api = net.api();
                scope.spawn(move || {
                    let mut nonsense = Nonsense::new(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
                    for _ in 0..count(200, 1_000_000 / 4) {
                        nonsense.ask(api);
                    }
                });
            }
        });
        let list = br#"{"execute":"list_hostfwd"}"#;
        let mut zero = list.to_vec();
        zero.insert(10, 0);
        let mut broken = list.to_vec();
        broken[13] = 0xff;
        let deep = |length: usize| vec![b'['; length];
        for request in [
            &b""[..],
            b"not JSON",
            &zero,
            &broken,
            &deep(100),
            &deep(100_000),
        ] {
            let answer = answer(net.api(), request);
            assert!(answer.contains(r#"{"error""#), "{answer} to {request:?}");
        }
        offer(net.api(), count(64 << 20, 1 << 30));
        for _ in 0..count(2, 20) {
            let mut client = net.api().connect().unwrap();
            for byte in list {
                client.write_all(&[*byte]).unwrap();
            }
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert!(answer.starts_with(r#"{"return""#), "{answer}");
        }
        let mut idle: Vec<UnixStream> = Vec::new();
        for number in 0..count(1_500, 10_000) {
            if idle.len() == 1_000 {
                idle.clear();
                net.api().list();
            }
            let mut client = net.api().connect().unwrap();
            if number % 3 == 0 {
                let _ = client.write_all(&list[..number % list.len()]);
            }
            idle.push(client);
        }
        net.api().list();
    });
    net.assert_as_before();
}

/// `add_hostfwd` to the guest's port 80, with a port that need not be one.
fn add(api: &Api, proto: &str, port: &Value) -> Value {
    let arguments =
        json!({"proto": proto, "host_addr": "127.0.0.1", "host_port": port, "guest_port": 80});
    api.add(&arguments)
}

#[test]
fn row_41_requests_for_what_can_not_be() {
    let net = Watched::start();
    let api = net.api();
    let first = 20_000;
    let ids: Vec<u64> = (0..count(300, 10_000))
        .map(|number| {
            let proto = ["tcp", "udp"][number % 2];
            let added = add(api, proto, &json!(first + number));
            added["return"]["id"]
                .as_u64()
                .unwrap_or_else(|| fail(&added.to_string()))
        })
        .collect();
    let listed = api.list();
    assert_eq!(listed.len(), ids.len());
    for _ in 0..count(5, 100) {
        for (proto, port) in [
            ("tcp", json!(first)),
            ("udp", json!(first + 1)),
            ("tcp", json!(0)),
            ("tcp", json!(65_536)),
            ("udp", json!(-1)),
            ("tcp", json!(1.5)),
            ("tcp", json!("8080")),
            ("tcp", json!(18_446_744_073_709_551_615_u64)),
            ("sctp", json!(8080)),
        ] {
            let refused = add(api, proto, &port);
            assert!(refused["error"].is_object(), "{proto} {port}: {refused}");
        }
        let elsewhere =
            json!({"proto": "tcp", "host_addr": "300.1.1.1", "host_port": 8080, "guest_port": 80});
        assert!(api.add(&elsewhere)["error"].is_object());
    }
    assert_eq!(api.list(), listed, "nothing has changed by it");
    for id in &ids {
        assert!(api.remove(*id).contains("return"));
        assert!(api.remove(*id).contains("error"), "it is gone");
    }
    assert!(api.list().is_empty());
    net.assert_as_before();
}

#[test]
fn row_51_ports_that_can_not_be_had() {
    let world = World::new();
    world.set_up("echo 1024 > /proc/sys/net/ipv4/ip_unprivileged_port_start");
    let taken = world.listen(at(LOOPBACK, 0)).unwrap();
    let datagrams = world.udp(at(LOOPBACK, 0)).unwrap();
    let tcp = taken.local_addr().unwrap().port();
    let udp = datagrams.local_addr().unwrap().port();
    let net = Watched::start_in(world);
    let refused = |arguments: &Value, reason: &str| {
        let answer = net.api().add(arguments).to_string();
        assert!(answer.contains(reason), "{arguments}: {answer}");
    };
    for _ in 0..count(20, 1_000) {
        let guest = |proto: &str, address: &str, port: u16| json!({"proto": proto, "host_addr": address, "host_port": port, "guest_port": 80});
        refused(&guest("tcp", "127.0.0.1", tcp), "in use");
        refused(&guest("udp", "127.0.0.1", udp), "in use");
        refused(&guest("tcp", "127.0.0.1", 80), "denied");
        refused(&guest("tcp", "203.0.113.1", 8080), "assign");
    }
    assert!(net.api().list().is_empty());
    net.assert_as_before();
}
