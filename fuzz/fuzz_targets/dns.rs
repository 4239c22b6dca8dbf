//! The DNS forwarder; see `oracles/dns.rs`.
#![no_main]

#[path = "../../tests/sim/lab.rs"]
mod lab;
#[path = "../oracles/dns.rs"]
mod oracle;
#[path = "../../tests/sim/packets.rs"]
mod packets;
#[path = "../../tests/sim/mod.rs"]
mod sim;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| oracle::run(bytes));
