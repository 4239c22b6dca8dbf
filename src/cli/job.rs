//! What a command line asks for, whatever its dialect.
//!
//! Comes in: options that were right in themselves. Goes out: everything that [`crate::session`] needs
//! to give a network to something that exists. Nothing here opens or changes anything.

use std::os::fd::RawFd;
use std::path::PathBuf;

use crate::config::Config;
use crate::setup::attach::Target;
use crate::setup::guest::TapPlan;
use crate::setup::sandbox::Sandbox;

/// How a dialect calls what errors have to name.
#[derive(Debug, Clone, Copy)]
pub struct Names {
    /// What is served.
    pub target: &'static str,
    /// The option for the user namespace.
    pub userns: &'static str,
    /// The option for what outgoing connections are bound to.
    pub outbound: &'static str,
    /// What to do about a sandbox that can't be had.
    pub no_sandbox: &'static str,
}

/// The names of our own command lines.
pub const TAPGATE: Names = Names {
    target: "TARGET",
    userns: "--userns",
    outbound: "--outbound",
    no_sandbox: "sandbox (leave it out by --sandbox off)",
};

/// Where frames are exchanged.
#[derive(Debug, Clone)]
pub enum Edge {
    /// By a tap in a namespace, which is made if it is not there.
    Namespace {
        /// The namespace.
        target: Target,
        /// The user namespace that owns it, where it was named.
        userns: Option<PathBuf>,
        /// The tap.
        tap: TapPlan,
    },
    /// By a tap that the caller has opened.
    Tap(RawFd),
    /// By a socket that keeps frames apart (`SOCK_SEQPACKET`), as User Mode Linux's "bess" has it.
    Socket(PathBuf),
}

/// A network for something that exists.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// The network. Its search list comes later, from the host.
    pub config: Config,
    /// Where frames are exchanged.
    pub edge: Edge,
    /// Told once the network works.
    pub ready_fd: Option<RawFd>,
    /// Over when the other end of this is closed.
    pub exit_fd: Option<RawFd>,
    /// Where the API socket is to be.
    pub api_socket: Option<PathBuf>,
    /// How much is given up before the first packet.
    pub sandbox: Sandbox,
    /// How errors call things.
    pub names: Names,
}

impl Attachment {
    /// The descriptors of the caller that were named.
    #[must_use]
    pub fn descriptors(&self) -> Vec<RawFd> {
        let tap = match self.edge {
            Edge::Tap(number) => Some(number),
            Edge::Namespace { .. } | Edge::Socket(_) => None,
        };
        [self.ready_fd, self.exit_fd, tap]
            .into_iter()
            .flatten()
            .collect()
    }
}
