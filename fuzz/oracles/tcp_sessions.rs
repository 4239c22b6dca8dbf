//! TCP connections by structure: the input decides who opens, what both ends send, how they read and end, how much
//! the link loses, and which calls of the host fail. The streams must arrive intact, and nobody be told a lie
//! about their end; the plan and the verdict are those of `tests/sim_lives.rs`.

use crate::life::Life;
use crate::plan::Plan;
use crate::sim::Random;

/// Tries an input.
pub fn run(bytes: &[u8]) {
    let mut random = Random::of_bytes(bytes);
    let plan = Plan::drawn(&mut random);
    let of_thousand = random.of(&[0, 0, 0, 20, 200]);
    // A link that loses what the input says would lose all; by a seed it loses so many of a hundred.
    let link = Random::new(random.below(1 << 16));
    Life::whole(plan, (1, link), of_thousand);
}
