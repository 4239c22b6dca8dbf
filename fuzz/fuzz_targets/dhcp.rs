//! The DHCP server; see `oracles/dhcp.rs`.
#![no_main]

#[path = "../oracles/dhcp.rs"]
mod oracle;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| oracle::run(bytes));
