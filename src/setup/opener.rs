//! The process that stays inside the guest's namespaces to open TCP sockets there, and does nothing else.
//!
//! A socket belongs for ever to the network namespace that it was opened in, so whoever carries packets binds,
//! connects and uses these from outside. The opener never sees an address or a byte of theirs. Comes in: the
//! name of an address family. Goes out: some sockets. It holds nothing but its end of the line, has no
//! powers and a handful of system calls, and ends when the line does, or its parent.

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{Pid, chdir, getppid, setpgid};
use socket2::{Domain, Socket, Type};

use super::system_calls::{self, Filter};
use super::{SetupError, Step};
use crate::host::kernel::inside::{BATCH, request};
use crate::sys::{fd, memory, privileges, process};

/// Both ends of a line; the first one is ours.
///
/// # Errors
/// When no descriptors are left.
pub(super) fn line() -> Result<(UnixStream, UnixStream), SetupError> {
    fd::message_pair().step(|| "making a socket pair".into())
}

/// Lives as the opener. For a child that is in the guest's namespaces already; `parent` is whose end is ours.
pub(super) fn live(line: UnixStream, parent: Pid) -> ! {
    // Nobody is left to tell of an error; without an opener published ports lead over the tap.
    let _ = open_sockets(line, parent);
    process::leave()
}

fn open_sockets(line: UnixStream, parent: Pid) -> Result<Infallible, SetupError> {
    let line = confine(line, parent)?;
    let mut bytes = Vec::new();
    loop {
        fd::receive(&line, &mut bytes).step(|| "hearing".into())?;
        let Some(&family) = bytes.first() else {
            process::leave()
        };
        let domain = if family == request(true) {
            Domain::IPV6
        } else {
            Domain::IPV4
        };
        // None at all says that there are none to be had.
        let mut sockets: [Option<OwnedFd>; BATCH] = [const { None }; BATCH];
        let kind = Type::STREAM.nonblocking().cloexec();
        for place in &mut sockets {
            *place = Socket::new_raw(domain, kind, None).ok().map(Into::into);
        }
        let sockets: Vec<OwnedFd> = sockets.into_iter().flatten().collect();
        fd::send_all(&line, &[family], &sockets).step(|| "answering".into())?;
    }
}

/// Gives everything up but the line.
fn confine(line: UnixStream, parent: Pid) -> Result<UnixStream, SetupError> {
    let _ = prctl::set_name(c"tapgate-opener");
    // Neither the terminal's signals nor anybody's polite ones; it ends with the line.
    SigSet::all()
        .thread_block()
        .step(|| "blocking signals".into())?;
    // In a process group of its own the kernel wakes it should it be stopped when its parent ends (POSIX,
    // orphaned process groups): it then finds the line closed.
    setpgid(Pid::from_raw(0), Pid::from_raw(0)).step(|| "leaving the process group".into())?;
    chdir("/").step(|| "leaving the working directory".into())?;
    let line = fd::keep_only(line).step(|| "closing descriptors".into())?;
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
    Ok(line)
}
