//! Processes: fork, their ends, descriptors of processes, namespaces by descriptor, how threads are scheduled.
//!
//! Follows fork(2), wait4(2), pidfd_open(2), ioctl_ns(2), sched_setscheduler(2). Fork is only for the time before threads exist.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{ForkResult, Pid};
use rustix::process::{WaitOptions, wait, waitpid};

/// Splits the process; `None` in the child.
///
/// # Errors
/// `EAGAIN` at the limit on processes; `WouldBlock` where threads exist already.
pub fn fork() -> io::Result<Option<Pid>> {
    if std::fs::read_dir("/proc/self/task").is_ok_and(|tasks| tasks.count() > 1) {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    // SAFETY: there is a single thread, so the child finds every lock free and may go on as the
    // parent would.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(Some(child)),
        ForkResult::Child => Ok(None),
    }
}

/// A descriptor that becomes readable when the process ends.
///
/// # Errors
/// `ESRCH` when there is no such process, `ENOSYS` before Linux 5.3.
pub fn pidfd(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that only we know.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The user namespace that owns a network namespace (`NS_GET_USERNS`).
///
/// # Errors
/// `EPERM` when it is an ancestor of ours, `ENOTTY` when `namespace` is none.
pub fn owning_user_namespace(namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    /// `_IO(0xb7, 0x1)` of linux/nsfs.h.
    const NS_GET_USERNS: libc::Ioctl = 0xb701;
    // SAFETY: this ioctl takes no argument and returns a descriptor or -1.
    let fd = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_USERNS) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a fresh descriptor that only we know.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// How many descriptors this process may have, and how far it may raise that. Only for ourselves: a command
/// that we run keeps the limit it would have had.
///
/// # Errors
/// When the limits can't be read.
pub fn descriptor_limits() -> io::Result<(u64, u64)> {
    Ok(getrlimit(Resource::RLIMIT_NOFILE)?)
}

/// Limits the descriptors of this process for now; it may raise the limit again up to `most`.
///
/// # Errors
/// When `most` is more than it may have.
pub fn limit_descriptors(now: u64, most: u64) -> io::Result<()> {
    Ok(setrlimit(Resource::RLIMIT_NOFILE, now, most)?)
}

/// Gives `SIGPIPE` back its default action, which Rust's runtime takes away: a command that we run
/// expects it.
pub fn restore_sigpipe() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: no handler of ours is installed or replaced; the default action runs no code here.
    let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
}

/// Gives `SIGCHLD` back its default action, which a caller may have taken away: children whose end is
/// ignored are never heard of.
pub fn restore_sigchld() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: as above.
    let _ = unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) };
}

/// Lets this process write its own entry in `/proc`, which belongs to root when exec raised its powers
/// (prctl(2), `PR_SET_DUMPABLE`); identity maps are written there. The sandbox takes this back.
pub fn show_own_proc() {
    let _ = nix::sys::prctl::set_dumpable(true);
}

/// The calling thread is scheduled as any that asked for nothing else: `SCHED_OTHER` (sched(7)).
#[must_use]
pub fn is_scheduled_as_any() -> bool {
    // SAFETY: the call takes an integer.
    let policy = unsafe { libc::syscall(libc::SYS_sched_getscheduler, 0) };
    policy == i64::from(libc::SCHED_OTHER)
}

/// Schedules the calling thread as one that works in batches (`SCHED_BATCH`), or as any other again; its niceness stays.
///
/// # Errors
/// What sched_setscheduler(2) reports; `EPERM` where a filter of somebody's forbids it.
pub fn schedule_as_batch(batch: bool) -> io::Result<()> {
    let policy = if batch {
        libc::SCHED_BATCH
    } else {
        libc::SCHED_OTHER
    };
    // The kernel's `struct sched_param` is this one number, and musl's function refuses everything.
    let priority: libc::c_int = 0;
    // SAFETY: the kernel reads the one number and keeps nothing.
    let done =
        unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, policy, &raw const priority) };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Ends this process at once, without tidying up (_exit(2)).
pub fn leave() -> ! {
    // SAFETY: takes an integer and does not return.
    unsafe { libc::_exit(0) }
}

/// Reaps what has ended; the exit status of `child`, as a shell would report it, once it has.
///
/// # Errors
/// `ECHILD` when there is no child at all.
pub fn reap(child: Pid) -> io::Result<Option<u8>> {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(None) => return Ok(None),
            Ok(Some((pid, status))) if pid.as_raw_pid() == child.as_raw() => {
                if let Some(code) = exit_code(status.terminating_signal(), status.exit_status()) {
                    return Ok(Some(code));
                }
            }
            Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits for the end of a child.
///
/// # Errors
/// `ECHILD` when it is none.
pub fn wait_for(child: Pid) -> io::Result<()> {
    let child = rustix::process::Pid::from_raw(child.as_raw());
    loop {
        match waitpid(child, WaitOptions::empty()) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The status that a shell would report: 128 and the number for a signal, be it one that has no name.
fn exit_code(signal: Option<i32>, status: Option<i32>) -> Option<u8> {
    let code = signal.map(|signal| 128 + signal).or(status)?;
    Some(u8::try_from(code).unwrap_or(u8::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_a_shell_s() {
        assert_eq!(exit_code(None, Some(7)), Some(7));
        assert_eq!(exit_code(Some(libc::SIGKILL), None), Some(137));
        assert_eq!(exit_code(Some(40), None), Some(168));
        assert_eq!(exit_code(None, None), None);
    }
}
