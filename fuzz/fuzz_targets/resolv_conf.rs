//! The parser of `resolv.conf`; see `oracles/resolv_conf.rs`.
#![no_main]

#[path = "../oracles/resolv_conf.rs"]
mod oracle;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| oracle::run(bytes));
