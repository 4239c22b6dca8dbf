//! How long a network lives: until its command ends, its namespace is gone, or somebody says so.
//!
//! Comes in: signals, descriptors, a path. Goes out: the reason for which it is over, and for
//! `run` the exit status of the command.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::signals::Signals;
use crate::sys::process::reap;
use crate::sys::readiness::watch;

/// How often a namespace's path is looked at: its end is to be noticed within a second.
const LOOK: Duration = Duration::from_millis(250);

/// The namespace that is served.
#[derive(Debug)]
pub enum Target {
    /// A process: over when it ends.
    Process(OwnedFd),
    /// A file that stands for a namespace: over when it is gone or another than at first.
    Path(PathBuf, Identity),
}

/// Device and inode of a file.
pub type Identity = (u64, u64);

fn identity(path: &Path) -> io::Result<Identity> {
    std::fs::metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

impl Target {
    /// The namespace that a file stands for now.
    ///
    /// # Errors
    /// When there is no such file.
    pub fn path(path: PathBuf) -> io::Result<Self> {
        let first = identity(&path)?;
        Ok(Self::Path(path, first))
    }
}

/// Everything that can end an attached network.
#[derive(Debug)]
pub struct Attached {
    /// Signals of this process.
    pub signals: Signals,
    /// What is served.
    pub target: Target,
    /// Over when the other end of this is closed.
    pub exit_fd: Option<OwnedFd>,
}

impl Attached {
    /// Waits for the end; says what it was.
    ///
    /// # Errors
    /// When a descriptor can't be watched.
    pub async fn over(self) -> io::Result<&'static str> {
        tokio::select! {
            ended = ended_by_signal(&self.signals) => ended.map(|()| "signal"),
            gone = gone(self.target) => gone.map(|()| "target gone"),
            hung_up = hung_up(self.exit_fd) => hung_up.map(|()| "exit descriptor closed"),
        }
    }
}

async fn ended_by_signal(signals: &Signals) -> io::Result<()> {
    loop {
        if matches!(
            signals.next().await?.signal,
            Signal::SIGTERM | Signal::SIGINT | Signal::SIGHUP | Signal::SIGQUIT
        ) {
            return Ok(());
        }
    }
}

async fn gone(target: Target) -> io::Result<()> {
    match target {
        // A pidfd becomes readable when its process ends (pidfd_open(2)).
        Target::Process(pidfd) => {
            let pidfd = watch(pidfd)?;
            pidfd.readable().await.map(|mut guard| guard.retain_ready())
        }
        Target::Path(path, first) => {
            loop {
                tokio::time::sleep(LOOK).await;
                match identity(&path) {
                    Ok(now) if now == first => {}
                    Ok(_) => return Ok(()),
                    // Only these say that the namespace is gone; to be out of descriptors does not.
                    Err(error)
                        if matches!(
                            error.kind(),
                            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                        ) =>
                    {
                        return Ok(());
                    }
                    Err(_) => {}
                }
            }
        }
    }
}

/// Waits until the other end of a descriptor is closed; forever where there is none.
async fn hung_up(descriptor: Option<OwnedFd>) -> io::Result<()> {
    let Some(descriptor) = descriptor else {
        return std::future::pending().await;
    };
    let descriptor = watch(descriptor)?;
    loop {
        let mut guard = descriptor.readable().await?;
        if guard.ready().is_read_closed() {
            return Ok(());
        }
        guard.clear_ready();
    }
}

/// A command that runs in a network of its own, through the keeper process between us and it.
#[derive(Debug)]
pub struct Running {
    /// Signals of this process.
    pub signals: Signals,
    /// The keeper, our child.
    pub keeper: Pid,
}

impl Running {
    /// Passes signals on until the command has ended; gives its exit status as a shell would.
    ///
    /// # Errors
    /// When signals can't be read or the keeper is not ours.
    pub async fn over(self) -> io::Result<u8> {
        loop {
            let arrived = self.signals.next().await?;
            if arrived.signal == Signal::SIGCHLD {
                if let Some(status) = reap(self.keeper)? {
                    return Ok(status);
                }
            } else if !arrived.by_terminal {
                // The keeper may be gone already; then its end comes next.
                let _ = kill(self.keeper, arrived.signal);
            }
        }
    }
}
