//! The process between the broker and a command: starts it, passes signals on, and clears up after both.
//!
//! Broker, keeper and command form a line in which each end of life is noticed by a neighbour that can
//! still act: the keeper adopts what the command leaves behind (`PR_SET_CHILD_SUBREAPER`) and ends it
//! when the broker dies, even by SIGKILL; the broker does the same when the keeper dies, or the process
//! that carries the packets. No process is left.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::stat::Mode;
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
    let descendants = Descendants::watch();
    let us = getpid();
    let Some(child) = process::fork().step(|| "starting the command".into())? else {
        become_command(us, command);
    };
    let status = watch(parent, &signals, child);
    end(descendants);
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

/// Who descends from this process. Opened before there is anybody who could lay something over what tells it.
#[derive(Debug)]
pub struct Descendants {
    /// The children of this thread, the only one, by proc_pid_children(5), where the kernel has it: being open it can't be covered.
    list: Option<File>,
    /// Else all processes' parents are looked at.
    proc: OwnedFd,
}

impl Descendants {
    /// Those that there will be.
    ///
    /// # Errors
    /// When `/proc` can't be opened, or is that of another pid namespace: its numbers are not ours then.
    pub fn watch() -> io::Result<Self> {
        let us = fs::read_link("/proc/self")?;
        if us.to_str() != Some(&getpid().to_string()) {
            return Err(ErrorKind::Unsupported.into());
        }
        let how = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self {
            list: File::open("/proc/thread-self/children").ok(),
            proc: open("/proc", how, Mode::empty())?,
        })
    }

    /// Ends everything that descends from this process and waits for it.
    pub fn end(&self) {
        // What those leave behind becomes ours, so look again until there is none. Who is not to be found or not ours to
        // end is left to our parent, once we are gone.
        while self.end_children() {}
    }

    /// Ends the children that there are now; false where none was.
    fn end_children(&self) -> bool {
        let mut killed = self.children();
        killed.retain(|child| kill(*child, Signal::SIGKILL).is_ok());
        let waited = killed.into_iter().map(process::wait_for);
        waited.filter(Result::is_ok).count() > 0
    }

    fn children(&self) -> Vec<Pid> {
        let listed = self.list.as_ref().and_then(|list| listed(list).ok());
        listed.unwrap_or_else(|| self.found())
    }

    /// The processes whose parent we are, by proc_pid_stat(5).
    fn found(&self) -> Vec<Pid> {
        let us = getpid();
        let how = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let Ok(mut entries) = Dir::openat(&self.proc, ".", how, Mode::empty()) else {
            return Vec::new();
        };
        let pids = entries
            .iter()
            .flatten()
            .filter_map(|entry| entry.file_name().to_str().ok()?.parse().ok());
        pids.map(Pid::from_raw)
            .filter(|&pid| self.parent_of(pid) == Some(us))
            .collect()
    }

    fn parent_of(&self, pid: Pid) -> Option<Pid> {
        // Longer than any, and than what somebody has laid over it needs to be read.
        const LONGEST: u64 = 4096;
        let path = format!("{pid}/stat");
        let how = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let file = openat(&self.proc, path.as_str(), how, Mode::empty()).ok()?;
        let mut stat = Vec::new();
        File::from(file).take(LONGEST).read_to_end(&mut stat).ok()?;
        // The command's name is in parentheses and may hold anything; behind it: state, parent.
        let behind = stat.iter().rposition(|&byte| byte == b')')? + 1;
        let begins = stat.starts_with(format!("{pid} (").as_bytes());
        let fields = str::from_utf8(&stat[behind..]).ok()?;
        let parent = fields.split_ascii_whitespace().nth(1)?.parse().ok()?;
        begins.then(|| Pid::from_raw(parent))
    }
}

/// What the list of a thread's children tells now. That none are there it tells only where there are none.
fn listed(mut list: &File) -> io::Result<Vec<Pid>> {
    let mut text = String::new();
    list.rewind()?;
    list.read_to_string(&mut text)?;
    let pids = text.split_ascii_whitespace().map(str::parse);
    Ok(pids.flatten().map(Pid::from_raw).collect())
}

/// Ends everything that descends from a process that nobody could take `/proc` from.
pub fn end_descendants() {
    end(Descendants::watch());
}

fn end(watched: io::Result<Descendants>) {
    match watched {
        Ok(descendants) => descendants.end(),
        Err(error) => tracing::debug!(%error, "descendants can't be found"),
    }
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

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn children_are_found_by_either_way() {
        let watched = Descendants::watch().unwrap();
        assert!(watched.list.is_some(), "CONFIG_PROC_CHILDREN");
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        // Other tests may have some of their own, by other threads.
        assert_eq!(watched.children(), [pid]);
        assert!(watched.found().contains(&pid));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(watched.children(), []);
        assert!(!watched.found().contains(&pid));
    }

    #[test]
    fn what_lies_over_an_entry_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let us = getpid();
        let stat = |pid: i32| {
            let folder = dir.path().join(pid.to_string());
            fs::create_dir(&folder).unwrap();
            folder.join("stat")
        };
        // What is true, another's, what never ends, and what nobody writes to.
        fs::write(stat(10), format!("10 (sh (1) 2) S {us} 1 1")).unwrap();
        fs::write(stat(11), format!("10 (sh) S {us} 1 1")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", stat(12)).unwrap();
        nix::unistd::mkfifo(&stat(13), Mode::S_IRWXU).unwrap();
        fs::write(stat(14), "14 (sh) S 1 1 1").unwrap();
        let covered = Descendants {
            list: None,
            proc: File::open(dir.path()).unwrap().into(),
        };
        assert_eq!(covered.children(), [Pid::from_raw(10)]);
    }
}
