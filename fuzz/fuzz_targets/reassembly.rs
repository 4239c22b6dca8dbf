//! Fragments against a naive model; see `oracles/reassembly.rs`.
#![no_main]

#[path = "../oracles/reassembly.rs"]
mod oracle;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| oracle::run(bytes));
