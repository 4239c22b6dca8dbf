//! Clients that mean no good: random and mutated requests, a thousand that say nothing, one that takes
//! its time. The process lives, keeps no descriptor, serves the others, and packets flow meanwhile.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::support::bulk::{self, Way};
use crate::support::nonsense::Nonsense;
use crate::support::process::fail;
use crate::support::slirp4netns::{Api, Served, descriptors};
use crate::support::sockets::Sockets;
use crate::support::sys::raise_descriptor_limit;
use crate::support::{GATEWAY, LOOPBACK, SOON, at, env_number, timed, wait_until};

/// A good client may wait this long.
const PATIENCE: Duration = Duration::from_secs(1);

/// Clients that are let in at once.
const CLIENTS: usize = 64;

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
            let mut nonsense = Nonsense::new(0x7461_7067_6174_6500);
            for _ in 0..env_number("TAPGATE_TEST_REQUESTS", 2000) {
                nonsense.ask(&net.api);
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
