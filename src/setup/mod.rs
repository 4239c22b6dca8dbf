//! What happens once, before the first packet: namespaces, the tap, addresses, resolvers.
//!
//! Runs single-threaded, may block, then is over. The stages, in the only order that works:
//!
//! 1. descriptors of the caller ([`crate::sys::fd::adopt`]), so that a wrong one ends it all before
//!    anything was made;
//! 2. a child enters or makes the namespaces ([`attach`], [`run`]): the parent must stay in the
//!    host's, where its sockets are to be;
//! 3. the child makes the tap and configures it ([`guest`]), which needs capabilities over the
//!    guest's network namespace that only the child has;
//! 4. the tap's descriptor comes back over a socket; a child that attached ends, one that runs a
//!    command becomes its [`keeper`].

pub mod attach;
pub mod guest;
pub mod idmap;
pub mod keeper;
pub mod resolv_conf;
pub mod run;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use crate::sys::fd;

/// Why a network could not be set up: the step, the object, the reason.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// A step of the parent failed.
    #[error("{step}: {source}")]
    Step {
        /// What was tried.
        step: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A step of the child failed; it said this.
    #[error("{0}")]
    Child(String),
    /// The child ended without a word.
    #[error("the process that sets up the namespace ended early")]
    ChildGone,
}

/// Names the step in an error.
pub(crate) trait Step<T> {
    /// Adds what was tried.
    fn step(self, what: impl FnOnce() -> String) -> Result<T, SetupError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, what: impl FnOnce() -> String) -> Result<T, SetupError> {
        self.map_err(|error| SetupError::Step {
            step: what(),
            source: error.into(),
        })
    }
}

/// Messages between the parent and the child that enters the namespaces, one byte each; an error is
/// followed by its text.
mod message {
    /// To the parent: in a new user namespace, to be given its identities.
    pub(super) const UNMAPPED: u8 = b'u';
    /// To the child: identities are there.
    pub(super) const MAPPED: u8 = b'm';
    /// To the parent, with the descriptor: the tap.
    pub(super) const TAP: u8 = b't';
    /// To the child: the network works, begin.
    pub(super) const GO: u8 = b'g';
    /// To the parent: it failed.
    pub(super) const ERROR: u8 = b'e';
}

/// Tells the parent how a child fared with its tap.
fn report_tap(socket: &UnixStream, made: Result<OwnedFd, SetupError>) -> bool {
    match made {
        Ok(tap) => fd::send(socket, &[message::TAP], Some(&tap)).is_ok(),
        Err(error) => {
            let mut text = vec![message::ERROR];
            text.extend(error.to_string().bytes());
            let _ = fd::send(socket, &text, None);
            false
        }
    }
}

/// Waits for one message of the child.
fn hear(socket: &UnixStream, expected: u8) -> Result<Option<OwnedFd>, SetupError> {
    let mut bytes = Vec::new();
    let descriptor = fd::receive(socket, &mut bytes).step(|| "hearing from the child".into())?;
    match bytes.split_first() {
        Some((&kind, _)) if kind == expected => Ok(descriptor),
        Some((&message::ERROR, text)) => Err(SetupError::Child(
            String::from_utf8_lossy(text).into_owned(),
        )),
        Some(_) | None => Err(SetupError::ChildGone),
    }
}
