//! The contract with the container engines, table 3.2 of API requests and replies, and what clients
//! that mean no good can't do.
//!
//! `TAPGATE_TEST_REQUESTS` says how many random requests there are to be.

#![allow(
    clippy::disallowed_methods,
    reason = "the bans on clocks and threads are for the core; tests measure time and serve from threads"
)]

mod load;
mod replies;
#[path = "../support/mod.rs"]
mod support;
