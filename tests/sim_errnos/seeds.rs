//! Random lives, in which calls of all kinds fail at random.

use std::env;

use crate::Named;
use crate::life::Life;
use crate::plan::Plan;
use crate::sim::Random;

/// How many lives there are, unless the environment says otherwise.
const LIVES: u64 = 1000;

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
    let of_thousand = Random::new(seed ^ 0xfa17).of(&[20, 100, 500]);
    let (_, sim) = Life::whole(Plan::new(seed), (seed, Random::new(seed)), of_thousand);
    u64::try_from(sim.net.faults_struck()).unwrap()
}
