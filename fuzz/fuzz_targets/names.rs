//! The gateway's own names; see `oracles/names.rs`.
#![no_main]

#[path = "../oracles/names.rs"]
mod oracle;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| oracle::run(bytes));
