//! The DHCPv6 server; see `oracles/dhcp6.rs`.
#![no_main]

#[path = "../oracles/dhcp6.rs"]
mod oracle;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| oracle::run(bytes));
