//! Whole scenarios from random bytes: whatever guest, host and clock do, the invariants hold.
//!
//! The decoder is `sim/scenario.rs`, which the fuzz target `whole_stack` runs too. Here it gets some
//! thousand seeded byte strings and every input in `fuzz/seeds/whole_stack/`.

#[path = "sim/scenario.rs"]
mod scenario;

use std::fs;
use std::path::Path;

const SEEDS: u64 = 4000;

/// The bytes of a seed (xorshift64*): 20 to 1,000 of them.
fn bytes(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_be_bytes()
    };
    let len = 20 + usize::from(next()[0]) * 4;
    std::iter::repeat_with(next)
        .flat_map(|word| word.into_iter().take(4))
        .take(len)
        .collect()
}

#[test]
fn random_scenarios_hold_and_leave_nothing() {
    let mut deepest = scenario::Seen::default();
    for seed in 0..SEEDS {
        let seen =
            scenario::run(&bytes(seed)).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        deepest.steps += seen.steps;
        deepest.flows_opened += seen.flows_opened;
        deepest.most_flows = deepest.most_flows.max(seen.most_flows);
        deepest.forwarded += seen.forwarded;
        deepest.answered += seen.answered;
        deepest.to_guest += seen.to_guest;
        deepest.to_host += seen.to_host;
        deepest.connections += seen.connections;
        deepest.read += seen.read;
        deepest.ipv6.to_guest += seen.ipv6.to_guest;
        deepest.ipv6.to_host += seen.ipv6.to_host;
        deepest.ipv6.connections += seen.ipv6.connections;
    }
    let deep = deepest.flows_opened > SEEDS && deepest.read > 0 && deepest.to_host > 1000;
    assert!(deep, "the decoder reaches the depths: {deepest:?}");
    let six = deepest.ipv6;
    let deep = six.to_guest > 1000 && six.to_host > 300 && six.connections > 1000;
    assert!(deep, "over IPv6, too: {deepest:?}");
}

#[test]
fn inputs_worth_keeping_hold() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/whole_stack");
    let mut count = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let input = fs::read(&path).unwrap();
        scenario::run(&input).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        count += 1;
    }
    assert!(count > 0, "the seeds are there");
}
