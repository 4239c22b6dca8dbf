//! The contract with the container engines at run time: the numbered behaviours of 3.1, every argv of
//! table 3.2 as its caller builds it, and what 3.11 adds to them.
//!
//! [`callers`] has one test for each row of the argv table.

#![allow(
    clippy::disallowed_methods,
    reason = "the bans on clocks and threads are for the core; tests measure time and serve from threads"
)]

mod callers;
mod edges;
mod end;
mod network;
#[path = "../sim/packets.rs"]
mod packets;
mod start;
#[path = "../support/mod.rs"]
mod support;
