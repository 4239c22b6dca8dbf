//! Clients that mean no good: random and mutated requests, a thousand that say nothing, one that takes
//! its time. The process lives, keeps no descriptor, serves the others, and packets flow meanwhile.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::support::bulk::{self, Way};
use crate::support::process::fail;
use crate::support::slirp4netns::{Api, Served, descriptors};
use crate::support::sockets::Sockets;
use crate::support::sys::raise_descriptor_limit;
use crate::support::{GATEWAY, LOOPBACK, SOON, at, env_number, timed, wait_until};

/// What random requests are made of.
const SEEDS: [&str; 6] = [
    r#"{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_addr":"127.0.0.1","host_port":8080,"guest_addr":"10.0.2.100","guest_port":80}}"#,
    r#"{"execute":"add_hostfwd","arguments":{"proto":"udp6","host_addr":"::1","host_port":8080,"guest_addr":"","guest_port":80}}"#,
    r#"{"execute":"list_hostfwd"}"#,
    r#"{"execute":"remove_hostfwd","arguments":{"id":1}}"#,
    r#"{"return":{"entries":[{"id":1,"x":[1,2.5e3,true,null,"\u00e9\\"]}]}}"#,
    r#"[[[[[[[[{"execute":["#,
];

/// A good client may wait this long.
const PATIENCE: Duration = Duration::from_secs(1);

/// Clients that are let in at once.
const CLIENTS: usize = 64;

/// xorshift64*: the same numbers on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit.max(1)).expect("small");
        usize::try_from((self.next() >> 16) % limit).expect("small")
    }

    fn byte(&mut self) -> u8 {
        self.next().to_be_bytes()[0]
    }

    /// Bytes without sense, or a seed with some places changed.
    fn request(&mut self) -> Vec<u8> {
        if self.below(8) == 0 {
            let length = [8, 100, 5000][self.below(3)];
            return (0..self.below(length)).map(|_| self.byte()).collect();
        }
        let mut request = SEEDS[self.below(SEEDS.len())].as_bytes().to_vec();
        for _ in 0..self.below(6) {
            let place = self.below(request.len());
            let end = (place + self.below(9)).min(request.len());
            match self.below(6) {
                0 if place < request.len() => request[place] = self.byte(),
                1 => request.truncate(place),
                2 => drop(request.drain(place..end)),
                3 => {
                    let piece = request[place..end].to_vec();
                    request.splice(place..place, piece.repeat(self.below(300)));
                }
                4 => {
                    let number = self.next().to_string();
                    request.splice(place..place, number.into_bytes());
                }
                _ => {
                    let other = SEEDS[self.below(SEEDS.len())].as_bytes();
                    let from = self.below(other.len());
                    request.splice(place..end, other[from..].iter().copied());
                }
            }
        }
        request
    }

    /// Sends a request as one kind of client or another. A client that waits for its answer gets one,
    /// which is JSON with either a `return` or an `error`.
    fn ask(&mut self, api: &Api) {
        let request = self.request();
        let mut client = api.connect().expect("it listens");
        let middle = self.below(request.len());
        let leaves = self.below(10) == 0;
        // A request that is too long may be answered before it is written.
        let _ = client.write_all(&request[..middle]);
        let _ = client.write_all(&request[middle..]);
        if leaves {
            return;
        }
        let _ = client.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        match client.read_to_end(&mut answer) {
            Ok(_) => {}
            // What it didn't read of the request is lost, which resets the connection.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            Err(error) => fail(&format!("{error} after {request:?}")),
        }
        let text = String::from_utf8_lossy(&answer);
        let value: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&answer)
            .unwrap_or_else(|error| fail(&format!("{error}: {text:?} to {request:?}")));
        assert!(
            value.contains_key("return") != value.contains_key("error"),
            "{text} to {request:?}"
        );
    }
}

/// Takes every published port back.
fn remove_all(api: &Api) {
    for entry in api.list() {
        api.remove(entry["id"].as_u64().expect("a number"));
    }
}

/// Waits until the process has at most `limit` descriptors.
fn wait_for_descriptors(net: &Served, limit: usize) {
    let pid = net.slirp4netns.pid();
    wait_until(&format!("{limit} descriptors at most"), SOON, || {
        (descriptors(pid).len() <= limit).then_some(())
    });
}

/// Tells the other threads of a test to end, also when the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Moves bytes through the guest until it is told to end; gives how often it moved the lot. Every byte
/// is looked at.
fn keep_moving(net: &Served, stop: &AtomicBool) -> u32 {
    let server = bulk::server(net.world.listen(at(LOOPBACK, 0)).expect("a free port"));
    let mut rounds = 0;
    while !stop.load(Ordering::Relaxed) {
        for way in [Way::Up, Way::Down] {
            bulk::transfer(&net.guest, at(GATEWAY, server.port()), way, (1, 1 << 20));
        }
        rounds += 1;
    }
    rounds
}

/// Asks as a good client does, within [`PATIENCE`].
#[track_caller]
fn assert_served(api: &Api) {
    let (took, answer) = timed(|| api.try_ask(r#"{"execute":"list_hostfwd"}"#));
    let answer = answer.unwrap_or_else(|error| fail(&format!("a good client: {error}")));
    assert!(answer.starts_with(r#"{"return""#), "{answer:?}");
    assert!(took < PATIENCE, "a good client waited {took:?}");
}

/// Issue, must show 6: "100,000 random and mutated API requests"; here `TAPGATE_TEST_REQUESTS` of them.
#[test]
fn random_requests_do_no_harm() {
    let mut net = Served::with(&["--enable-sandbox", "--enable-seccomp"]);
    let pid = net.slirp4netns.pid();
    net.api.list();
    let before = descriptors(pid).len();
    let stop = AtomicBool::new(false);
    let rounds = thread::scope(|scope| {
        let moving = scope.spawn(|| keep_moving(&net, &stop));
        let asked = scope.spawn(|| {
            let mut random = Random(0x7461_7067_6174_6500);
            for _ in 0..env_number("TAPGATE_TEST_REQUESTS", 2000) {
                random.ask(&net.api);
            }
        });
        let asked = asked.join();
        drop(Stop(&stop));
        asked.expect("every client was answered");
        moving.join().expect("the transfers went on")
    });
    assert!(rounds > 0, "packets flowed");
    remove_all(&net.api);
    assert!(net.api.publish("tcp", 8080, 80) > 0, "it works as before");
    remove_all(&net.api);
    wait_for_descriptors(&net, before);
    assert!(net.slirp4netns.try_status().is_none(), "the same process");
    assert_eq!(net.slirp4netns.said().1, "", "and it had no complaint");
}

/// Connects `count` times and says nothing.
fn silent_clients(api: &Api, count: u32) -> Vec<UnixStream> {
    let connect = |_| api.connect().expect("a silent client is let in");
    (0..count).map(connect).collect()
}

/// Issue, must show 6: "1,000 clients that connect and say nothing".
#[test]
fn thousand_silent_clients_keep_nobody_waiting() {
    let limit = raise_descriptor_limit().unwrap();
    assert!(limit > 1200, "a descriptor for each client, of {limit}");
    let net = Served::with(&[]);
    net.api.list();
    let before = descriptors(net.slirp4netns.pid()).len();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let moving = scope.spawn(|| keep_moving(&net, &stop));
        let stopping = Stop(&stop);
        let silent = silent_clients(&net.api, 1000);
        for _ in 0..20 {
            assert_served(&net.api);
        }
        wait_for_descriptors(&net, before + CLIENTS + 16);
        drop(silent);
        drop(stopping);
        assert!(moving.join().expect("the transfers went on") > 0);
    });
    wait_for_descriptors(&net, before);
    assert_served(&net.api);
}

/// Issue, must show 6: the same, while they come: who has sent a request gets its answer.
#[test]
fn good_client_is_answered_amid_a_flood_of_silent_ones() {
    raise_descriptor_limit().unwrap();
    let net = Served::with(&[]);
    thread::scope(|scope| {
        let silent = scope.spawn(|| silent_clients(&net.api, 1000));
        while !silent.is_finished() {
            assert_served(&net.api);
        }
    });
}

/// Issue, must show 6: "one that sends a byte a second"; here ten times as fast, and nobody waits for it.
#[test]
fn slow_client_keeps_nobody_waiting() {
    let net = Served::with(&[]);
    let request = r#"{"execute":"list_hostfwd"}"#;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let slow = scope.spawn(|| {
            let _stopping = Stop(&stop);
            let mut client = net.api.connect().expect("it listens");
            for byte in request.as_bytes() {
                client.write_all(&[*byte]).expect("it is still listened to");
                thread::sleep(Duration::from_millis(100));
            }
            let mut answer = String::new();
            client.read_to_string(&mut answer).map(|_| answer)
        });
        while !stop.load(Ordering::Relaxed) {
            assert_served(&net.api);
            thread::sleep(Duration::from_millis(10));
        }
        let answer = slow.join().expect("its thread").expect("an answer");
        assert!(answer.starts_with(r#"{"return""#), "{answer}");
    });
}

/// Issue, must show 6: a client that never ends its request is let go, so its descriptor is free.
#[test]
fn silent_client_is_let_go() {
    let net = Served::with(&[]);
    let mut client = net.api.connect().unwrap();
    client.write_all(br#"{"execute":"#).unwrap();
    let (took, got) = timed(|| client.read(&mut [0; 64]));
    assert_eq!(got.unwrap(), 0, "closed without an answer");
    assert!(took < Duration::from_secs(15), "after {took:?}");
}
