//! What tells the loop what to do: the API, signals, the end of the target, descriptors that hang up.
//!
//! Ordinary async code beside the data path. It owns its descriptors, never the stack, and talks to
//! the loop by [`Command`]s only; nothing here waits but for its own descriptors and the loop's answers, so no client
//! and no signal delays a packet.

pub mod api;
pub mod lifecycle;
pub mod signals;

use std::io;

use tokio::sync::oneshot;

use crate::config::Publish;

/// What the loop can be told.
#[derive(Debug)]
pub enum Command {
    /// Stop after this turn.
    Stop,
    /// Publish a port; its number comes back.
    Publish {
        /// The port.
        rule: Publish,
        /// Who wants to know how it went.
        reply: oneshot::Sender<io::Result<usize>>,
    },
    /// Take a published port back.
    Unpublish {
        /// Its number.
        id: usize,
        /// Who wants to know when it is free; forgotten where there is none.
        reply: oneshot::Sender<()>,
    },
    /// Tell the published ports.
    ListPublished {
        /// Who wants to know.
        reply: oneshot::Sender<Vec<(usize, Publish)>>,
    },
}
