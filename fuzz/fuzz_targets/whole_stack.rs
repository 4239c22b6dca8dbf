//! The whole stack between a guest, a host and a clock that all do what the input says.
//!
//! The decoder, and what must hold after each step, is `tests/sim/scenario.rs`; `tests/sim_whole.rs`
//! runs it over the seeds of this target.
#![no_main]

#[path = "../../tests/sim/scenario.rs"]
mod scenario;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Err(broken) = scenario::run(bytes) {
        panic!("{broken}");
    }
});
