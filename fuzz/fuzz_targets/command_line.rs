//! Command lines of all dialects; see `oracles/command_line.rs`.
#![no_main]

#[path = "../oracles/command_line.rs"]
mod oracle;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| oracle::run(bytes));
