//! Ten thousand random TCP lives: whatever becomes of a connection, neither end is told a lie about it.
//!
//! In: seeds, from which `sim/plan.rs` makes a plan each; `TAPGATE_TEST_LIVES` says how many, and
//! `TAPGATE_TEST_SEED` picks a single one. Out: a failure that names its seed, when after a life
//!
//! - a byte came that was not sent, or not in its place;
//! - an end saw an orderly end of stream though not everything that was sent before it had come;
//! - an orderly life did not end in order at both ends, with everything delivered;
//! - a reset or a loss at one end was not seen as a reset at the other;
//! - a flow or a socket was left.
#![allow(
    clippy::unwrap_used,
    reason = "a scenario that can not go on has failed"
)]

#[path = "sim/actor.rs"]
mod actor;
#[path = "sim/life.rs"]
mod life;
#[path = "sim/plan.rs"]
mod plan;
mod sim;

use std::env;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use actor::Actor;
use life::Life;
use plan::Plan;
use sim::{Random, Sim};

/// How many lives there are, unless the environment says otherwise.
const LIVES: u64 = 10_000;

#[test]
fn neither_end_of_a_connection_is_ever_deceived() {
    let number = |name| env::var(name).ok().and_then(|text| text.parse().ok());
    let (first, count) = match number("TAPGATE_TEST_SEED") {
        Some(seed) => (seed, 1),
        None => (0, number("TAPGATE_TEST_LIVES").unwrap_or(LIVES)),
    };
    let (next, failed) = (AtomicU64::new(first), AtomicBool::new(false));
    let seen = Mutex::new(Seen::default());
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while !failed.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        break;
                    }
                    let _named = Named {
                        seed,
                        failed: &failed,
                    };
                    let ended = live(seed);
                    seen.lock().unwrap().add(&ended);
                }
            });
        }
    });
    let seen = seen.into_inner().unwrap();
    println!("{seen:?}");
    assert!(
        count < 1000 || seen.is_varied(),
        "lives are alike: {seen:?}"
    );
}

/// Says how to repeat a life that failed, and stops the others.
struct Named<'a> {
    seed: u64,
    failed: &'a AtomicBool,
}

impl Drop for Named<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.failed.store(true, Ordering::Relaxed);
            let seed = self.seed;
            eprintln!(
                "seed {seed} failed; repeat it: TAPGATE_TEST_SEED={seed} cargo test --test sim_lives"
            );
        }
    }
}

/// How many lives came to what.
#[derive(Debug, Default)]
struct Seen {
    lives: u64,
    established: u64,
    orderly: u64,
    guest_gone: u64,
    host_gone: u64,
    guest_saw_reset: u64,
    host_saw_reset: u64,
    unreachable: u64,
    reconnected: u64,
    most_steps: usize,
    to_host: u64,
    to_guest: u64,
}

impl Seen {
    fn add(&mut self, other: &Self) {
        self.lives += other.lives;
        self.established += other.established;
        self.orderly += other.orderly;
        self.guest_gone += other.guest_gone;
        self.host_gone += other.host_gone;
        self.guest_saw_reset += other.guest_saw_reset;
        self.host_saw_reset += other.host_saw_reset;
        self.unreachable += other.unreachable;
        self.reconnected += other.reconnected;
        self.most_steps = self.most_steps.max(other.most_steps);
        self.to_host += other.to_host;
        self.to_guest += other.to_guest;
    }

    /// Each way to live was taken often enough for the test to mean something.
    fn is_varied(&self) -> bool {
        let each = [
            self.orderly / 8,
            self.guest_gone,
            self.host_gone,
            self.guest_saw_reset,
            self.host_saw_reset,
            self.unreachable * 4,
            self.to_host / 10_000,
            self.to_guest / 10_000,
        ];
        // A connection that was refused and tried again is judged less strictly: few may be.
        each.iter().all(|count| *count > self.lives / 25) && self.reconnected < self.lives / 25
    }
}

/// Lives one life to its end.
fn live(seed: u64) -> Seen {
    let (life, sim) = Life::whole(Plan::new(seed), (seed, Random::new(seed)), 0);
    seen(&life, &sim)
}

/// What has become of a life.
fn seen(life: &Life, sim: &Sim) -> Seen {
    let host = |is: fn(&Actor) -> bool| life.peers.iter().any(|(_, peer)| is(peer));
    let guest = |is: fn(&Actor) -> bool| life.guest.as_ref().is_some_and(is);
    let gone = guest(|guest| guest.gone) || host(|host| host.gone);
    let bytes = |received: usize| u64::try_from(received).unwrap();
    Seen {
        lives: 1,
        established: u64::from(life.guest.is_some()),
        orderly: u64::from(life.guest.is_some() && !gone),
        guest_gone: u64::from(guest(|guest| guest.gone)),
        host_gone: u64::from(host(|host| host.gone)),
        guest_saw_reset: u64::from(!sim.resets.is_empty()),
        host_saw_reset: u64::from(host(|host| host.saw_reset)),
        unreachable: u64::from(!sim.received.is_empty()),
        reconnected: u64::from(life.peers.len() > 1),
        most_steps: life.steps,
        to_host: life
            .peers
            .iter()
            .map(|(_, peer)| bytes(peer.received))
            .sum(),
        to_guest: life.guest.as_ref().map_or(0, |guest| bytes(guest.received)),
    }
}
