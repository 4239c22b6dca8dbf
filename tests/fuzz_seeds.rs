//! The fuzz targets' seeds, tried by the same oracles without libFuzzer.
//!
//! In: every file in `fuzz/seeds/TARGET/`; those of `whole_stack` are `tests/sim_whole.rs`'s. Out: a failure that names
//! the file. What fuzzing finds becomes a seed, and so stays mended.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a scenario that can not go on has failed"
)]
#![allow(unreachable_pub, reason = "the fuzz crate shares these files")]

#[path = "sim/actor.rs"]
mod actor;
#[path = "sim/lab.rs"]
mod lab;
#[path = "sim/life.rs"]
mod life;
#[path = "sim/packets.rs"]
mod packets;
#[path = "sim/plan.rs"]
mod plan;
mod sim;

#[path = "../fuzz/oracles/api.rs"]
mod api;
#[path = "../fuzz/oracles/command_line.rs"]
mod command_line;
#[path = "../fuzz/oracles/dhcp.rs"]
mod dhcp;
#[path = "../fuzz/oracles/dhcp6.rs"]
mod dhcp6;
#[path = "../fuzz/oracles/discovery.rs"]
mod discovery;
#[path = "../fuzz/oracles/dns.rs"]
mod dns;
#[path = "../fuzz/oracles/names.rs"]
mod names;
#[path = "../fuzz/oracles/parse.rs"]
mod parse;
#[path = "../fuzz/oracles/reassembly.rs"]
mod reassembly;
#[path = "../fuzz/oracles/resolv_conf.rs"]
mod resolv_conf;
#[path = "../fuzz/oracles/tcp_sessions.rs"]
mod tcp_sessions;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

/// Names the input that a failure is about.
struct Named(PathBuf);

impl Drop for Named {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("the input is {}", self.0.display());
        }
    }
}

/// Tries every seed of a target.
fn holds(target: &str, oracle: fn(&[u8])) {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/seeds")
        .join(target);
    let mut count = 0;
    for entry in fs::read_dir(seeds).unwrap() {
        let named = Named(entry.unwrap().path());
        oracle(&fs::read(&named.0).unwrap());
        count += 1;
    }
    assert!(count > 0, "the seeds of {target} are there");
}

macro_rules! targets {
    ($($name:ident),+) => {
        $(
            #[test]
            fn $name() {
                holds(stringify!($name), $name::run);
            }
        )+
    };
}

targets!(
    api,
    command_line,
    dhcp,
    dhcp6,
    discovery,
    dns,
    names,
    parse,
    reassembly,
    resolv_conf,
    tcp_sessions
);
