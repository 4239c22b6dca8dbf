//! Random lives, in which calls of all kinds fail at random.

use std::env;

use tapgate::config::Config;
use tapgate::net::Duration;

use crate::Named;
use crate::life::Life;
use crate::plan::Plan;
use crate::sim::{Random, Sim};

/// How many lives there are, unless the environment says otherwise.
const LIVES: u64 = 1000;

const LONGEST: Duration = Duration::from_secs(4 * 3600);

/// A host that fails without end is well again after this time.
const LASTS: Duration = Duration::from_secs(300);

#[test]
fn random_faults_in_random_lives() {
    let number = |name| env::var(name).ok().and_then(|text| text.parse().ok());
    let (first, count) = match number("TAPGATE_TEST_SEED") {
        Some(seed) => (seed, 1),
        None => (0, number("TAPGATE_TEST_LIVES").unwrap_or(LIVES)),
    };
    let mut struck = 0;
    for seed in first..first + count {
        let name = format!("TAPGATE_TEST_SEED={seed}");
        let _named = Named(name.leak(), None);
        struck += live(seed);
    }
    assert!(
        count < 100 || struck > count / 2,
        "{struck} faults in {count}"
    );
}

/// Lives once; gives how many calls failed.
fn live(seed: u64) -> u64 {
    let plan = Plan::new(seed);
    let config = Config {
        mtu: plan.mtu,
        max_buffer_memory: plan.buffer_memory,
        ..Config::default()
    };
    let guest = (plan.kind, plan.addresses.guest.ip());
    let mut sim = Sim::shared(plan.workers, guest, seed, config, plan.faults);
    let mut life = Life::begin(plan, &mut sim);
    let of_thousand = Random::new(seed ^ 0xfa17).of(&[20, 100, 500]);
    sim.net.fail_at_random(seed, of_thousand);
    let ends = sim.run(LONGEST, |sim| {
        if sim.clock.now().total_micros() > i64::try_from(LASTS.total_micros()).unwrap() {
            sim.net.heal();
        }
        life.step(sim)
    });
    let struck = sim.net.faults_struck();
    assert!(
        ends,
        "no end by {}: {} flows, {} sockets, guest {:?}, {life:?}",
        sim.clock.now(),
        sim.flows(),
        sim.net.open_sockets(),
        life.socket.map(|handle| sim.socket(handle).state()),
    );
    if let Some(port) = life.port {
        assert!(sim.stack.unpublish(port));
    }
    assert_eq!(sim.net.open_sockets(), 0, "sockets are left");
    life.disturbed = struck > 0;
    let verdict = life.judge(&sim);
    assert!(
        verdict.is_ok(),
        "{verdict:?} at {}; resets {:?}; {life:?}",
        sim.clock.now(),
        sim.resets
    );
    u64::try_from(struck).unwrap()
}
