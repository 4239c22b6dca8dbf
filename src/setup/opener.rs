//! The process that stays inside the guest's namespaces to open TCP sockets there, and does nothing else.
//!
//! A socket belongs for ever to the network namespace that it was opened in, so whoever carries packets binds,
//! connects and uses these from outside. The opener never sees an address or a byte of theirs. Comes in: the
//! name of an address family, by one of the lines that it was given, of which each worker has one. Goes out: some
//! sockets. It holds nothing but its ends of the lines, has no powers and a handful of system calls, and ends when
//! its last line does, or its parent.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{Pid, chdir, getppid, setpgid};
use socket2::{Domain, Socket, Type};

use super::system_calls::{self, Filter};
use super::{SetupError, Step};
use crate::host::kernel::inside::{BATCH, request};
use crate::sys::{fd, memory, privileges, process};

/// Both ends of a line; the first one is for who asks.
///
/// # Errors
/// When no descriptors are left.
pub(super) fn line() -> Result<(UnixStream, UnixStream), SetupError> {
    fd::message_pair().step(|| "making a socket pair".into())
}

/// Lives as the opener, at the far ends of these lines. For a child that is in the guest's namespaces already; `parent`
/// is whose end is ours.
pub(super) fn live(lines: Vec<UnixStream>, parent: Pid) -> ! {
    // Nobody is left to tell of an error; without an opener published ports lead over the tap.
    let _ = confine(lines, parent).and_then(open_sockets);
    process::leave()
}

/// Answers who asks, until the last line is closed.
fn open_sockets(mut lines: Vec<UnixStream>) -> Result<(), SetupError> {
    let mut bytes = Vec::new();
    while !lines.is_empty() {
        // A line that is closed has something to hear, too.
        let watched = lines
            .iter()
            .map(|line| PollFd::new(line.as_fd(), PollFlags::POLLIN));
        let mut watched: Vec<_> = watched.collect();
        poll(&mut watched, PollTimeout::NONE).step(|| "waiting".into())?;
        // Events without a name are heard as errors.
        let has_something = |line: PollFd<'_>| line.any().unwrap_or(true);
        let asking: Vec<bool> = watched.into_iter().map(has_something).collect();
        let mut kept = Vec::with_capacity(lines.len());
        for (line, asks) in lines.into_iter().zip(asking) {
            // An error of a line is its end.
            if !asks || serve(&line, &mut bytes).unwrap_or(false) {
                kept.push(line);
            }
        }
        lines = kept;
    }
    Ok(())
}

/// Answers a request; false where the line is closed: its worker is gone, or asks no more.
fn serve(line: &UnixStream, bytes: &mut Vec<u8>) -> Result<bool, SetupError> {
    fd::receive(line, bytes).step(|| "hearing".into())?;
    let Some(&family) = bytes.first() else {
        return Ok(false);
    };
    answer(line, family)?;
    Ok(true)
}

/// Opens some sockets for who asked. None at all says that there are none to be had.
fn answer(line: &UnixStream, family: u8) -> Result<(), SetupError> {
    let domain = if family == request(true) {
        Domain::IPV6
    } else {
        Domain::IPV4
    };
    let mut sockets: [Option<OwnedFd>; BATCH] = [const { None }; BATCH];
    let kind = Type::STREAM.nonblocking().cloexec();
    for place in &mut sockets {
        *place = Socket::new_raw(domain, kind, None).ok().map(Into::into);
    }
    let sockets: Vec<OwnedFd> = sockets.into_iter().flatten().collect();
    // The system may refuse to send any: somebody else of this user's has too many under way (unix(7), ETOOMANYREFS).
    fd::send_all(line, &[family], &sockets)
        .or_else(|_| fd::send_all(line, &[family], &[]))
        .step(|| "answering".into())
}

/// Gives everything up but the lines.
fn confine(lines: Vec<UnixStream>, parent: Pid) -> Result<Vec<UnixStream>, SetupError> {
    let _ = prctl::set_name(c"tapgate-opener");
    // Neither the terminal's signals nor anybody's polite ones; it ends with its lines.
    SigSet::all()
        .thread_block()
        .step(|| "blocking signals".into())?;
    // In a process group of its own the kernel wakes it should it be stopped when its parent ends (POSIX,
    // orphaned process groups): it then finds its lines closed.
    setpgid(Pid::from_raw(0), Pid::from_raw(0)).step(|| "leaving the process group".into())?;
    chdir("/").step(|| "leaving the working directory".into())?;
    let lines = fd::keep_only(lines).step(|| "closing descriptors".into())?;
    privileges::keep_nothing().step(|| "giving up capabilities".into())?;
    prctl::set_no_new_privs().step(|| "giving up new privileges".into())?;
    prctl::set_dumpable(false).step(|| "forbidding dumps".into())?;
    // After the changes of user and capabilities, which clear it.
    prctl::set_pdeathsig(Signal::SIGKILL).step(|| "dying with the parent".into())?;
    if getppid() != parent {
        return Err(SetupError::ChildGone);
    }
    let filter = Filter::of(system_calls::OPENER)?;
    // It is to be small, and needs hardly anything of what it has been through.
    let _ = memory::release_text();
    filter.enter()?;
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn the_lines_of_other_workers_are_answered_when_one_is_closed() {
        let (one, other) = (line().unwrap(), line().unwrap());
        #[expect(clippy::disallowed_methods, reason = "stands for another process")]
        let lives = thread::spawn(|| open_sockets(vec![one.1, other.1]));
        let asks = |line: &UnixStream, ipv6| {
            fd::send_all(line, &[request(ipv6)], &[]).unwrap();
            let mut bytes = Vec::new();
            let sockets = fd::receive_all(line, &mut bytes).unwrap();
            assert_eq!((sockets.len(), bytes), (BATCH, vec![request(ipv6)]));
        };
        asks(&one.0, false);
        // It asks and does not wait.
        fd::send_all(&one.0, &[request(false)], &[]).unwrap();
        drop(one.0);
        asks(&other.0, true);
        asks(&other.0, false);
        drop(other.0);
        lives.join().unwrap().unwrap();
    }
}
