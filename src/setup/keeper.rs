//! The process between the broker and a command: starts it, passes signals on, and clears up after both.
//!
//! Broker, keeper and command form a line in which each end of life is noticed by a neighbour that can
//! still act: the keeper adopts what the command leaves behind (`PR_SET_CHILD_SUBREAPER`) and ends it
//! when the broker dies, even by SIGKILL; the broker does the same when the keeper dies, or the process
//! that carries the packets. No process is left.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, execvp, getpid, getppid};

use super::{SetupError, Step};
use crate::sys::process::{self, reap};
use crate::sys::signals::SignalSource;

/// Exit statuses of a shell for a command that can't be run, and one that does not exist.
const CANNOT_RUN: i32 = 126;
const NOT_FOUND: i32 = 127;

/// Starts the command and stays until it has ended or our parent, at the other end of `parent`, is
/// gone. Gives the exit status.
///
/// # Errors
/// When the command can't be started at all.
pub fn keep(parent: &UnixStream, command: &[CString]) -> Result<u8, SetupError> {
    prctl::set_child_subreaper(true).step(|| "adopting orphans".into())?;
    let signals = SignalSource::new().step(|| "watching signals".into())?;
    let us = getpid();
    let Some(child) = process::fork().step(|| "starting the command".into())? else {
        become_command(us, command);
    };
    let status = watch(parent, &signals, child);
    end_descendants();
    status.step(|| "waiting for the command".into())
}

fn watch(parent: &UnixStream, signals: &SignalSource, child: Pid) -> io::Result<u8> {
    loop {
        let mut sources = [
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(parent.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut sources, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        // The parent says nothing more, so whatever is readable there is its end.
        let orphaned = sources[1].any().unwrap_or(true);
        while let Ok(arrived) = signals.try_next() {
            if arrived.signal == Signal::SIGCHLD {
                if let Some(status) = reap(child)? {
                    return Ok(status);
                }
            } else if !arrived.by_terminal {
                let _ = kill(child, arrived.signal);
            }
        }
        if orphaned {
            let _ = kill(child, Signal::SIGKILL);
            return Ok(u8::MAX);
        }
    }
}

/// Ends everything that descends from this process and waits for it.
pub fn end_descendants() {
    loop {
        let children = children();
        for child in &children {
            let _ = kill(*child, Signal::SIGKILL);
        }
        // What those leave behind becomes ours, so look again until there is none.
        let waited = waitpid(None, None);
        if children.is_empty() && !matches!(waited, Ok(_) | Err(Errno::EINTR)) {
            return;
        }
    }
}

/// The processes whose parent we are, by proc_pid_stat(5).
fn children() -> Vec<Pid> {
    let us = getpid();
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.map(Pid::from_raw)
        .filter(|&pid| parent_of(pid) == Some(us))
        .collect()
}

fn parent_of(pid: Pid) -> Option<Pid> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name is in parentheses and may hold anything; behind it: state, parent.
    let (_, fields) = stat.rsplit_once(')')?;
    fields
        .split_ascii_whitespace()
        .nth(1)?
        .parse()
        .ok()
        .map(Pid::from_raw)
}

/// In the child: runs the command in place of this process.
fn become_command(keeper: Pid, command: &[CString]) -> ! {
    // The command dies with the keeper. Set before the check, or the keeper could go in between.
    let _ = prctl::set_pdeathsig(Signal::SIGKILL);
    if getppid() != keeper {
        std::process::exit(CANNOT_RUN);
    }
    process::restore_sigpipe();
    let _ = SigSet::all().thread_unblock();
    let Some(program) = command.first() else {
        std::process::exit(NOT_FOUND)
    };
    let Err(error) = execvp(program, command);
    let name = String::from_utf8_lossy(std::ffi::OsStr::from_bytes(program.to_bytes()).as_bytes())
        .into_owned();
    eprintln!("tapgate: cannot run '{name}': {}", error.desc());
    std::process::exit(if error == Errno::ENOENT {
        NOT_FOUND
    } else {
        CANNOT_RUN
    });
}
