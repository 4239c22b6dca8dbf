//! The faults and bad inputs that a network must outlive, one test for each: `row_NN_...` is row NN of the
//! table in `doc/faults.md`, which says what is asked for and on what ground.
//!
//! Here stands what a simulated host and virtual time can show. Each test does its worst, then asks whether
//! the stack is alive ([`rig::Rig::is_alive`]) and whether anything is left ([`rig::Rig::recovers`]). By
//! default the counts are such that each takes a second or two; `TAPGATE_TEST_FAULTS=full` takes those of the
//! table.
#![allow(
    clippy::unwrap_used,
    reason = "a scenario that can not go on has failed"
)]

mod heap;
mod log;
#[path = "../sim/packets.rs"]
mod packets;
mod peer;
mod rig;
#[path = "../support/mod.rs"]
mod support;

mod api;
mod datagrams;
mod deaf;
mod dhcp;
mod exhaustion;
mod fragments;
mod frames;
mod guesses;
mod host;
mod ipv6;
mod killed;
mod lives;
mod memory;
mod names;
mod output;
mod policy;
mod program;
mod published;
mod tcp_any;
mod tcp_blind;
mod tcp_end;
mod tcp_numbers;
mod tcp_odd;
mod turns;
mod windows;

use std::env;

/// How often something is done: `short`, or `full` where the table's counts are asked for.
fn count(short: usize, full: usize) -> usize {
    match env::var("TAPGATE_TEST_FAULTS") {
        Ok(asked) if asked == "full" => full,
        Ok(_) | Err(_) => short,
    }
}

/// A small generator (xorshift64*): the same numbers for the same seed.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`.
    fn below(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit).unwrap();
        usize::try_from(self.next() % limit).unwrap()
    }

    fn byte(&mut self) -> u8 {
        self.next().to_be_bytes()[0]
    }

    fn word(&mut self) -> u16 {
        let [a, b, ..] = self.next().to_be_bytes();
        u16::from_be_bytes([a, b])
    }

    fn long(&mut self) -> u32 {
        let [a, b, c, d, ..] = self.next().to_be_bytes();
        u32::from_be_bytes([a, b, c, d])
    }
}
