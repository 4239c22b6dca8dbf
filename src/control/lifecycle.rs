//! How long a network lives: until its command ends, its namespace is gone, or somebody says so.
//!
//! Comes in: signals, descriptors, words of the broker. Goes out: the reason for which it is over, and
//! for `run` the exit status of the command.

use std::io;
use std::os::fd::OwnedFd;

use nix::sys::signal::Signal;
use tokio::io::unix::AsyncFd;

use super::signals::Signals;
use crate::setup::broker::{Broker, Word};
use crate::sys::readiness::watch;

/// The broker, for async code. It ends when this is dropped.
#[derive(Debug)]
pub struct Line {
    readable: AsyncFd<OwnedFd>,
    broker: Broker,
}

impl Line {
    /// Hands a broker to the runtime.
    ///
    /// # Errors
    /// When the runtime has no room.
    pub fn new(broker: Broker) -> io::Result<Self> {
        Ok(Self {
            readable: watch(broker.readable()?)?,
            broker,
        })
    }

    /// Lets the command begin.
    ///
    /// # Errors
    /// When the broker is gone.
    pub fn begin(&self) -> io::Result<()> {
        self.broker.begin()
    }

    /// Waits for the next word.
    async fn hear(&self) -> io::Result<Word> {
        loop {
            let mut guard = self.readable.readable().await?;
            match self.broker.try_hear() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => guard.clear_ready(),
                heard => return heard,
            }
        }
    }
}

/// Everything that can end an attached network.
#[derive(Debug)]
pub struct Attached {
    /// Signals of this process.
    pub signals: Signals,
    /// The process whose namespace is served (a pidfd).
    pub process: Option<OwnedFd>,
    /// Who watches the namespace's path.
    pub line: Option<Line>,
    /// Over when the other end of this is closed.
    pub exit_fd: Option<OwnedFd>,
}

impl Attached {
    /// Waits for the end; says what it was, and gives the broker back, for whom there is time once
    /// packets have stopped.
    ///
    /// # Errors
    /// When a descriptor can't be watched.
    pub async fn over(self) -> io::Result<(&'static str, Option<Line>)> {
        let reason = tokio::select! {
            ended = ended_by_signal(&self.signals) => ended.map(|()| "signal"),
            ended = process_ended(self.process) => ended.map(|()| "target gone"),
            gone = namespace_gone(self.line.as_ref()) => gone,
            hung_up = hung_up(self.exit_fd) => hung_up.map(|()| "exit descriptor closed"),
        };
        Ok((reason?, self.line))
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

async fn process_ended(pidfd: Option<OwnedFd>) -> io::Result<()> {
    let Some(pidfd) = pidfd else {
        return std::future::pending().await;
    };
    // A pidfd becomes readable when its process ends (pidfd_open(2)).
    let pidfd = watch(pidfd)?;
    pidfd.readable().await.map(|mut guard| guard.retain_ready())
}

async fn namespace_gone(line: Option<&Line>) -> io::Result<&'static str> {
    if let Some(line) = line {
        match line.hear().await? {
            Word::NamespaceGone | Word::Ended(_) => return Ok("target gone"),
            Word::Gone if line.broker.watches_namespace() => {
                return Err(io::Error::other(
                    "the broker, which watches the namespace, was killed",
                ));
            }
            Word::Gone => {
                tracing::warn!("the broker is gone: resolvers and socket files stay as they are");
            }
        }
    }
    std::future::pending().await
}

/// Waits until the other end of a descriptor is closed; forever where there is none.
async fn hung_up(descriptor: Option<OwnedFd>) -> io::Result<()> {
    let Some(descriptor) = descriptor else {
        return std::future::pending().await;
    };
    let descriptor = match watch(descriptor) {
        Ok(descriptor) => descriptor,
        // A file or /dev/null (epoll_ctl(2)), which never hangs up.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return std::future::pending().await;
        }
        Err(error) => return Err(error),
    };
    loop {
        let mut guard = descriptor.readable().await?;
        if guard.ready().is_read_closed() {
            return Ok(());
        }
        guard.clear_ready();
    }
}

/// A command that runs in a network of its own, kept by the broker and a keeper between us and it.
#[derive(Debug)]
pub struct Running {
    /// Signals of this process.
    pub signals: Signals,
    /// Who keeps the keeper.
    pub line: Line,
}

impl Running {
    /// Passes signals on until the command has ended; gives its exit status as a shell would, and the
    /// broker back.
    ///
    /// # Errors
    /// When the broker, and with it the command, was killed.
    pub async fn over(self) -> io::Result<(u8, Line)> {
        loop {
            tokio::select! {
                arrived = self.signals.next() => {
                    let arrived = arrived?;
                    if arrived.signal != Signal::SIGCHLD && !arrived.by_terminal {
                        // The broker may be gone already; then that is heard next.
                        let _ = self.line.broker.pass_on(arrived.signal);
                    }
                }
                word = self.line.hear() => match word? {
                    Word::Ended(status) => return Ok((status, self.line)),
                    Word::NamespaceGone => {}
                    Word::Gone => {
                        return Err(io::Error::other("the broker, which keeps the command, was killed"));
                    }
                },
            }
        }
    }
}
