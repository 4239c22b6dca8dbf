//! What tells the loop to stop: signals, the end of the target, descriptors that hang up.
//!
//! Ordinary async code beside the data path. It owns its descriptors, never the stack, and talks to
//! the loop by [`Command`]s only, so nothing here can delay a packet.

pub mod lifecycle;
pub mod signals;

/// What the loop can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Stop after this turn.
    Stop,
}
