//! What a network is attached to, opened as far as that comes first: the descriptors that the caller names, the
//! namespace, its tap.
//!
//! Comes in: what a command line names. Goes out: descriptors that are ours alone.

use std::fs::File;
use std::io::Write;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::cli::job::{Attachment, Edge};
use crate::setup::attach::{self, Owner, Target};
use crate::sys::{fd, process};

/// Each descriptor is taken over once.
pub(super) fn refuse_twice(named: &[RawFd]) -> Result<()> {
    let mut sorted = named.to_vec();
    sorted.sort_unstable();
    match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => anyhow::bail!("descriptor {} is named twice: pass different ones", pair[0]),
        None => Ok(()),
    }
}

pub(super) fn adopt(option: &str, number: Option<RawFd>) -> Result<Option<OwnedFd>> {
    number
        .map(|number| {
            fd::adopt(number).with_context(|| format!("{option} {number}: pass an open descriptor"))
        })
        .transpose()
}

/// Where frames are to be exchanged, opened as far as that comes first.
#[derive(Default)]
pub(super) struct Served {
    /// The queues of the tap.
    pub(super) taps: Vec<OwnedFd>,
    /// Lines to whoever opens sockets inside.
    pub(super) openers: Vec<UnixStream>,
    /// A socket file to make.
    pub(super) socket: Option<PathBuf>,
    /// What tells the end: a process, or the file of a namespace.
    pub(super) process: Option<OwnedFd>,
    pub(super) path: Option<PathBuf>,
}

impl Served {
    pub(super) fn open(job: &Attachment) -> Result<Self> {
        let mut served = Self::default();
        let names = job.names;
        match &job.edge {
            Edge::Namespace {
                target,
                userns,
                tap,
            } => {
                match target {
                    Target::Process(pid) => {
                        let pidfd = process::pidfd(*pid)
                            .with_context(|| format!("{} {pid}: no such process", names.target))?;
                        served.process = Some(pidfd);
                    }
                    Target::Path(path) => served.path = Some(path.clone()),
                }
                let owner = Owner {
                    option: names.userns,
                    path: userns.as_deref(),
                };
                let made = attach::tap(target, owner, tap)?;
                (served.taps, served.openers) = (made.taps, made.opener);
            }
            Edge::Tap(number) => {
                let tap = adopt("FD", Some(*number))?;
                let tap = tap.map(attach::adopt_tap).transpose()?;
                served.taps = tap.into_iter().collect();
            }
            Edge::Socket(path) => served.socket = Some(path.clone()),
        }
        Ok(served)
    }
}

/// Who is told that the network works.
pub(super) struct Ready(pub(super) Option<OwnedFd>);

impl Ready {
    pub(super) fn tell(self) -> Result<()> {
        match self.0 {
            Some(descriptor) => File::from(descriptor)
                .write_all(b"1")
                .context("--ready-fd: telling that the network works"),
            None => Ok(()),
        }
    }
}
