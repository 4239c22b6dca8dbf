//! The parser of frames; see `oracles/parse.rs`.
#![no_main]

#[path = "../oracles/parse.rs"]
mod oracle;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| oracle::run(bytes));
