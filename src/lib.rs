//! tapgate: a rootless user-mode network for Linux namespaces.
//!
//! The tour of the house, from the outside in. A frame's way is told in `doc/architecture.md`.
//!
//! - [`cli`] reads a command line and ends in a [`config::Config`];
//! - [`session`] does what was asked for, stage by stage;
//! - [`setup`] makes namespaces, the tap and its addresses, once, and then the sandbox;
//! - [`event_loop`] then moves frames and events, turn by turn, for as long as the network lives, and [`carrier`] is
//!   the thread that it does so in, [`busy_poll`] and [`preemption`] are how that sleeps and wakes; [`workers`] are more threads, [`lending`] says which of them carries which loop,
//!   and [`handover`] is what loops hand to one another;
//! - [`control`] serves the API and listens for signals and the end of the target;
//! - [`stack`] is the gateway that the guest believes in, a pure struct; [`flow`] holds its
//!   conversations, [`net`] the packets, [`buf`] the memory in between;
//! - [`link`] is the guest's edge (frames), [`host`] the host's (sockets);
//! - [`log`] is what all of them say on standard error;
//! - [`sys`] has the only unsafe code.

pub mod buf;
pub mod busy_poll;
pub mod carrier;
pub mod cli;
pub mod config;
pub mod control;
pub mod event_loop;
pub mod flow;
pub mod handover;
pub mod host;
pub mod lending;
pub mod link;
pub mod log;
pub mod net;
pub mod preemption;
pub mod session;
pub mod setup;
pub mod stack;
pub mod sys;
pub mod workers;
