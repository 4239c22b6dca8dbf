//! TCP connections by structure; see `oracles/tcp_sessions.rs`.
#![no_main]

#[path = "../../tests/sim/actor.rs"]
mod actor;
#[path = "../../tests/sim/life.rs"]
mod life;
#[path = "../oracles/tcp_sessions.rs"]
mod oracle;
#[path = "../../tests/sim/plan.rs"]
mod plan;
#[path = "../../tests/sim/mod.rs"]
mod sim;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| oracle::run(bytes));
