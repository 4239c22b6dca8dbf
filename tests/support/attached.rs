//! A running `tapgate attach`, and the usual three: a world, a guest in it, and tapgate between them.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::unistd::pipe2;

use super::guest::Guest;
use super::process::{Finished, Running, fail};
use super::sys::Plan;
use super::world::{TAPGATE, World, workers};

/// tapgate serving a namespace.
pub(crate) struct Attached {
    running: Running,
}

impl Attached {
    /// Starts `tapgate attach ARGUMENTS` and waits until it says on its `--ready-fd` that the
    /// network is there.
    pub(crate) fn start(world: &World, arguments: &[&str]) -> Self {
        Self::start_with(world, arguments, Vec::new())
    }

    /// [`Attached::start`] with descriptors that tapgate inherits.
    pub(crate) fn start_with(
        world: &World,
        arguments: &[&str],
        mut inherit: Vec<Arc<OwnedFd>>,
    ) -> Self {
        let (ready, write_end) = pipe();
        let number = write_end.as_raw_fd().to_string();
        inherit.push(write_end);
        let mut command = world.tapgate_with(&["attach", "--ready-fd", &number], inherit);
        command.args(workers(arguments)).args(arguments);
        Self::when_ready(command, ready, Said::All)
    }

    /// [`Attached::start`] by way of another program, which must become tapgate under its own pid.
    pub(crate) fn start_by(world: &World, wrapper: &[&str], arguments: &[&str]) -> Self {
        let (ready, write_end) = pipe();
        let number = write_end.as_raw_fd().to_string();
        let plan = Plan {
            inherit: vec![write_end],
            ..world.plan().clone()
        };
        let mut command = world.command_with(wrapper[0], plan);
        command.args(&wrapper[1..]);
        command.args([TAPGATE, "attach", "--ready-fd", &number]);
        command.args(workers(arguments)).args(arguments);
        Self::when_ready(command, ready, Said::First)
    }

    fn when_ready(mut command: Command, ready: OwnedFd, wanted: Said) -> Self {
        let mut attached = Self {
            running: Running::start(&mut command),
        };
        // The command holds the harness's end of the pipe open.
        drop(command);
        attached.wait_until_ready(ready, wanted);
        attached
    }

    fn wait_until_ready(&mut self, ready: OwnedFd, wanted: Said) {
        let mut events = [PollFd::new(ready.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(super::SOON).expect("a short time");
        let woken = poll(&mut events, limit).expect("poll on a pipe");
        let mut said = String::new();
        if woken > 0 {
            let limit = match wanted {
                Said::All => 16,
                Said::First => 1,
            };
            File::from(ready)
                .take(limit)
                .read_to_string(&mut said)
                .expect("a pipe of ours");
        }
        if said != "1" {
            let status = self.running.try_status();
            let (_, stderr) = self.running.said();
            fail(&format!(
                "not ready: wrote {said:?}, status {status:?}, said: {stderr}"
            ));
        }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.running.pid()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self.running.signal(signal);
    }

    /// The exit status, if it has ended.
    pub(crate) fn try_status(&mut self) -> Option<ExitStatus> {
        self.running.try_status()
    }

    /// What tapgate has logged so far.
    pub(crate) fn log(&self) -> String {
        self.running.said().1
    }

    /// Waits for tapgate's own end.
    pub(crate) fn finish(self, limit: Duration) -> Finished {
        self.running.finish(limit)
    }
}

/// What is read of the ready descriptor.
#[derive(Clone, Copy)]
enum Said {
    /// Everything: whoever holds it must have closed it.
    All,
    /// The first byte: a tracer may hold on to it.
    First,
}

/// A world, a guest, and tapgate between them. The fields end in this order.
pub(crate) struct Net {
    pub(crate) tapgate: Attached,
    pub(crate) guest: Guest,
    pub(crate) world: World,
}

impl Net {
    /// Everything up, tapgate started with `options`.
    pub(crate) fn up(options: &[&str]) -> Self {
        Self::up_in(World::new(), options)
    }

    /// [`Net::up`] in a world that the test has prepared.
    pub(crate) fn up_in(world: World, options: &[&str]) -> Self {
        let guest = Guest::new(&world);
        let pid = guest.pid().to_string();
        let tapgate = Attached::start(&world, &[options, &[&pid, "tap0"]].concat());
        Self {
            tapgate,
            guest,
            world,
        }
    }
}

/// A pipe of which no child inherits an end unless told to: read end, write end.
pub(crate) fn pipe() -> (OwnedFd, Arc<OwnedFd>) {
    let (read, write) = pipe2(OFlag::O_CLOEXEC)
        .map_err(io::Error::from)
        .expect("two free descriptors");
    (read, Arc::new(write))
}
