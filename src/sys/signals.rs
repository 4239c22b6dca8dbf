//! Signals as readable events, with who sent them.
//!
//! A signalfd(2), because a handler could not tell a signal typed at the terminal (which the kernel
//! sends to the whole foreground group by itself) from one that somebody sent to this process alone.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// `SI_KERNEL` of siginfo(7): sent by the kernel, such as for Ctrl-C.
const SENT_BY_KERNEL: i32 = 0x80;

/// Signals that end or are passed on; job control's stay with their default actions.
pub const PASSED_ON: [Signal; 6] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

/// Who starts a program in the background of a script or by nohup(1) has it ignore these.
const IGNORABLE: [Signal; 3] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT];

/// A signal that arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrived {
    /// Which.
    pub signal: Signal,
    /// The kernel sent it to the whole foreground group of the terminal, so everybody has it. Not
    /// so a hang-up, which only the leader of the session gets.
    pub by_terminal: bool,
}

/// The set of signals that are taken as events.
#[must_use]
pub fn watched() -> SigSet {
    let mut set: SigSet = PASSED_ON.into_iter().collect();
    set.add(Signal::SIGCHLD);
    set
}

/// A signalfd as an ordinary value, for use with or without a runtime.
#[derive(Debug)]
pub struct SignalSource(SignalFd);

impl SignalSource {
    /// Blocks the watched signals and opens a descriptor for them.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn new() -> io::Result<Self> {
        Self::of(&watched())
    }

    /// The same, but for what the caller has this process ignore: once blocked it would arrive all the same.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn but_ignored() -> io::Result<Self> {
        let mut set = watched();
        for signal in IGNORABLE {
            if is_ignored(signal) {
                set.remove(signal);
            }
        }
        Self::of(&set)
    }

    fn of(set: &SigSet) -> io::Result<Self> {
        set.thread_block()?;
        Ok(Self(SignalFd::with_flags(
            set,
            SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC,
        )?))
    }

    /// The next signal that has arrived.
    ///
    /// # Errors
    /// `WouldBlock` when there is none.
    pub fn try_next(&self) -> io::Result<Arrived> {
        let info = self.0.read_signal()?.ok_or(io::ErrorKind::WouldBlock)?;
        let number = i32::try_from(info.ssi_signo).map_err(io::Error::other)?;
        let signal = Signal::try_from(number)?;
        Ok(Arrived {
            signal,
            by_terminal: info.ssi_code == SENT_BY_KERNEL && signal != Signal::SIGHUP,
        })
    }
}

/// A signal does nothing to this process.
fn is_ignored(signal: Signal) -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: without a new action the call changes nothing and only writes the present one (sigaction(2)).
    let asked = unsafe { libc::sigaction(signal as i32, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: the call has written it where it says so.
    asked == 0 && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}

impl AsFd for SignalSource {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for SignalSource {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
