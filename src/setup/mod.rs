//! What happens once, before the first packet: namespaces, the tap, addresses, resolvers, sandbox.
//!
//! Runs single-threaded, may block, then is over. The stages, in the only order that works:
//!
//! 1. descriptors of the caller ([`crate::sys::fd::adopt`]), so that a wrong one ends it all before
//!    anything was made;
//! 2. a child enters or makes the namespaces ([`attach`], [`run`]): the parent must stay in the
//!    host's, where its sockets are to be;
//! 3. the child makes the tap and configures it ([`guest`]), which needs capabilities over the
//!    guest's network namespace that only the child has;
//! 4. the tap's descriptor comes back over a socket; a child that attached ends, or becomes the
//!    [`opener`] of sockets where a published port may need that; one that runs a command becomes its
//!    [`keeper`], with the opener as a child;
//! 5. the [`sandbox`] takes the rest away, once everything is open that will be needed.
//!
//! The [`broker`] is left outside: started after the tap for a namespace that exists, and before
//! everything for a command, whose keeper is its child.

pub mod attach;
pub mod broker;
#[cfg(debug_assertions)]
pub mod escape;
pub mod guest;
pub mod idmap;
pub mod keeper;
pub mod memory_limit;
pub mod opener;
pub mod resolv_conf;
pub mod run;
pub mod sandbox;
pub mod socket_file;
pub mod system_calls;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::sys::stat::{fstat, stat};

use crate::sys::fd;

/// Directories over which a tmpfs may lie for a moment; one of them is everywhere.
const SCRATCH: [&str; 4] = ["/tmp", "/mnt", "/run", "/var"];

/// The first of them that there is.
fn scratch_directory() -> Result<&'static Path, SetupError> {
    let scratch = SCRATCH.into_iter().map(Path::new).find(|dir| dir.is_dir());
    scratch
        .ok_or(io::ErrorKind::NotFound)
        .step(|| format!("finding a directory for a moment among {SCRATCH:?}"))
}

/// The user namespace is the one that we are in, which can't be entered again.
fn is_ours(user: &OwnedFd) -> bool {
    let (Ok(theirs), Ok(ours)) = (fstat(user), stat("/proc/self/ns/user")) else {
        return false;
    };
    (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)
}

/// Why a network could not be set up: the step, the object, the reason.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// A step of the parent failed.
    #[error("{step}: {reason}")]
    Step {
        /// What was tried.
        step: String,
        /// Why it failed.
        reason: io::Error,
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
            reason: error.into(),
        })
    }
}

/// Messages between the processes of a set-up, one byte each; what follows it, if anything, is said.
mod message {
    /// To the parent: in a new user namespace, to be given its identities.
    pub(super) const UNMAPPED: u8 = b'u';
    /// To the child: identities are there.
    pub(super) const MAPPED: u8 = b'm';
    /// To the parent, with the descriptors: the tap's queues, and the lines to the opener if there is one.
    pub(super) const TAP: u8 = b't';
    /// To the child: the network works, begin.
    pub(super) const GO: u8 = b'g';
    /// To the parent: it failed; the reason.
    pub(super) const ERROR: u8 = b'e';
    /// To the broker: a socket file to remove at the end; its path.
    pub(super) const REMOVE: u8 = b'r';
    /// To the broker: no more of those, we are about to enter the sandbox.
    pub(super) const SEALED: u8 = b'z';
    /// To the broker: a signal for the command; its number.
    pub(super) const SIGNAL: u8 = b's';
    /// From the broker: the command has ended; its status.
    pub(super) const ENDED: u8 = b'x';
    /// From the broker: the namespace that was to be watched is gone.
    pub(super) const NAMESPACE_GONE: u8 = b'n';
}

/// What a child has made in the guest's namespaces.
#[derive(Debug)]
pub struct Made {
    /// The queues of the tap.
    pub taps: Vec<OwnedFd>,
    /// Lines to whoever opens sockets there, one for each queue, where there is somebody.
    pub opener: Vec<UnixStream>,
}

impl Made {
    fn into_descriptors(self) -> Vec<OwnedFd> {
        let opener = self.opener.into_iter().map(OwnedFd::from);
        self.taps.into_iter().chain(opener).collect()
    }
}

/// Tells the parent how a child fared.
fn report_made(socket: &UnixStream, made: Result<Made, SetupError>) -> bool {
    match made {
        Ok(made) => fd::send_all(socket, &[message::TAP], &made.into_descriptors()).is_ok(),
        Err(error) => {
            let mut text = vec![message::ERROR];
            text.extend(error.to_string().bytes());
            let _ = fd::send(socket, &text, None);
            false
        }
    }
}

/// Waits for what a child has made: a tap with so many queues.
fn hear_made(socket: &UnixStream, queues: usize) -> Result<Made, SetupError> {
    let mut taps = hear(socket, message::TAP)?;
    if taps.len() < queues {
        return Err(SetupError::ChildGone);
    }
    let opener = taps.split_off(queues);
    let opener = opener.into_iter().map(Into::into).collect();
    Ok(Made { taps, opener })
}

/// Waits for one message of the child.
fn hear(socket: &UnixStream, expected: u8) -> Result<Vec<OwnedFd>, SetupError> {
    let mut bytes = Vec::new();
    let received = fd::receive_all(socket, &mut bytes).step(|| "hearing from the child".into())?;
    match bytes.split_first() {
        Some((&kind, _)) if kind == expected => Ok(received),
        Some((&message::ERROR, text)) => Err(SetupError::Child(
            String::from_utf8_lossy(text).into_owned(),
        )),
        Some(_) | None => Err(SetupError::ChildGone),
    }
}
