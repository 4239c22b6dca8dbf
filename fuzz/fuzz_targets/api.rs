//! Requests of the API; see `oracles/api.rs`.
#![no_main]

#[path = "../oracles/api.rs"]
mod oracle;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| oracle::run(bytes));
