//! Processes: run to the end within a limit, find by command line, signal, wait until gone.
//!
//! What a test starts is found again by a *mark*, a number in its command line that nothing else on
//! the machine has: command lines can be read of every process, also of those that hide the rest.

use std::fmt;
use std::fs::{self, File};
use std::io::Read;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{self, Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{SOON, wait_until};

/// How a program ended and what it said.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Finished {
    /// The exit status as a shell counts it: 128 + n for a signal.
    pub(crate) fn code(&self) -> i32 {
        exit_code(self.status)
    }

    /// Standard output of a program that must have succeeded.
    pub(crate) fn output(self) -> String {
        assert!(self.status.success(), "failed: {self:?}");
        self.stdout
    }

    /// Asserts what every failed start-up looks like: status 1, one line, which contains `needle`.
    pub(crate) fn assert_runtime_error(&self, needle: &str) {
        assert_eq!(self.code(), 1, "{self:?}");
        assert_eq!(
            self.stderr.trim_end().lines().count(),
            1,
            "one line: {self:?}"
        );
        assert!(self.stderr.contains(needle), "names {needle}: {self:?}");
    }
}

/// See [`Finished::code`].
pub(crate) fn exit_code(status: ExitStatus) -> i32 {
    status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(-1)
}

/// Runs `command` to its end; fails the test if it takes longer than [`SOON`].
pub(crate) fn run(command: &mut Command) -> Finished {
    Running::start(command).finish(SOON)
}

/// A started program whose output goes to files, so that nobody has to read along. Killed on drop.
pub(crate) struct Running {
    child: Child,
    stdout: File,
    stderr: File,
}

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
        let file = || tempfile::tempfile().expect("a nameless temporary file");
        let (stdout, stderr) = (file(), file());
        let copy = |file: &File| Stdio::from(file.try_clone().expect("a free descriptor"));
        let child = command
            .stdin(Stdio::null())
            .stdout(copy(&stdout))
            .stderr(copy(&stderr))
            .spawn()
            .unwrap_or_else(|error| fail(&format!("{command:?}: {error}")));
        Self {
            child,
            stdout,
            stderr,
        }
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("pids are small")
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).expect("our own child, not yet reaped");
    }

    /// What the program has said so far.
    pub(crate) fn said(&self) -> (String, String) {
        (read_all(&self.stdout), read_all(&self.stderr))
    }

    /// Waits until the program has printed `text` on standard output.
    pub(crate) fn wait_for_output(&mut self, text: &str) {
        wait_until(&format!("output {text:?}"), SOON, || {
            let (stdout, stderr) = self.said();
            let ended = self.child.try_wait().expect("our own child");
            if !stdout.contains(text) && ended.is_some() {
                fail(&format!(
                    "ended ({ended:?}) before saying {text:?}: {stdout} {stderr}"
                ));
            }
            stdout.contains(text).then_some(())
        });
    }

    /// The exit status, if the program has ended.
    pub(crate) fn try_status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("our own child")
    }

    /// Waits for the end of the program.
    pub(crate) fn finish(mut self, limit: Duration) -> Finished {
        let status = wait_until("the end of a program", limit, || self.try_status());
        let (stdout, stderr) = self.said();
        Finished {
            status,
            stdout,
            stderr,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let ended = matches!(self.child.try_wait(), Ok(Some(_)));
        if !ended {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            let (stdout, stderr) = self.said();
            eprintln!("process {} said: {stdout}{stderr}", self.child.id());
        }
    }
}

fn read_all(file: &File) -> String {
    // A description of its own: the program's has the place where it writes next.
    let mut text = Vec::new();
    let reopened = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let mut reopened = reopened.expect("our own descriptor");
    reopened.read_to_end(&mut text).expect("a plain file");
    String::from_utf8_lossy(&text).into_owned()
}

/// A number that no other process on the machine has in its command line. It also serves as a
/// number of seconds to sleep. On drop every process that still has it is killed, so that a failed
/// test leaves none.
pub(crate) struct Mark(String);

impl Mark {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        Self(format!("9{:07}{count:03}", process::id()))
    }
}

impl Deref for Mark {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        for (pid, _) in marked(self) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// The processes whose command line contains `mark`: pid and arguments.
pub(crate) fn marked(mark: &str) -> Vec<(i32, Vec<String>)> {
    let entries = fs::read_dir("/proc").expect("/proc is there").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid: i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).into_owned();
        let words = line
            .trim_end_matches('\0')
            .split('\0')
            .map(str::to_owned)
            .collect();
        line.contains(mark).then_some((pid, words))
    })
    .collect()
}

/// Waits for the process `sleep MARK` and gives its pid on the host.
pub(crate) fn wait_for_sleep(mark: &str) -> i32 {
    wait_until(&format!("sleep {mark} to run"), SOON, || {
        marked(mark)
            .into_iter()
            .find(|(_, words)| words.as_slice() == ["sleep", mark])
            .map(|it| it.0)
    })
}

/// Waits until no process with `mark` is left.
pub(crate) fn wait_until_gone(mark: &str) {
    wait_until(
        &format!("every process marked {mark} to be gone"),
        SOON,
        || marked(mark).is_empty().then_some(()),
    );
}

/// The letter of a process's state, as in proc(5): `S` sleeping, `T` stopped.
pub(crate) fn state_of(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.trim_start().chars().next()
}

/// Fails the test: `panic!` for helpers.
#[track_caller]
#[expect(
    clippy::panic,
    reason = "a test fails by panicking, also inside a helper"
)]
pub(crate) fn fail(why: &str) -> ! {
    panic!("{why}")
}
