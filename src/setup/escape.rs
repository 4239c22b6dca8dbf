//! Attempts to get out of the sandbox, for tests; not in release builds.
//!
//! Comes in: `TAPGATE_ESCAPE=NAME` from the environment. Goes out: nothing when the sandbox holds, since
//! the attempt ends the process; with `TAPGATE_ESCAPE_UNFILTERED` set too, so that the other walls are
//! seen without the filter of system calls, a line with what the system said. Nobody outside a debug
//! build can ask for either.

use std::env;
use std::fs::File;
use std::io;

use nix::mount::{MsFlags, mount};
use nix::sys::ptrace;
use nix::sys::signal::kill;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::unistd::{execv, getppid};

/// The other walls are to be seen without the filter.
pub(super) fn is_unfiltered() -> bool {
    env::var_os("TAPGATE_ESCAPE_UNFILTERED").is_some()
}

/// Makes the attempt that was asked for, if one was.
///
/// # Panics
/// Where that was asked for; a name that is not known is reported as such.
#[expect(clippy::panic, reason = "what a panic leads to is what is asked for")]
pub fn attempt() {
    let Ok(name) = env::var("TAPGATE_ESCAPE") else {
        return;
    };
    let done = match name.as_str() {
        "open" => File::open("/etc/passwd").map(drop),
        "create" => File::create("/etc/passwd").map(drop),
        "execve" => execv(c"/bin/sh", &[c"/bin/sh"])
            .map(drop)
            .map_err(Into::into),
        "ptrace" => ptrace::attach(getppid()).map_err(Into::into),
        "kill" => kill(getppid(), None).map_err(Into::into),
        "mount" => mount(
            None::<&str>,
            "/run",
            Some("tmpfs"),
            MsFlags::empty(),
            None::<&str>,
        )
        .map_err(Into::into),
        "netlink" => open_socket(AddressFamily::Netlink, SockType::Raw),
        "packet" => open_socket(AddressFamily::Packet, SockType::Raw),
        "unix" => open_socket(AddressFamily::Unix, SockType::Stream),
        "fork" => crate::sys::process::fork().map(|child| {
            if child.is_none() {
                std::process::exit(0);
            }
        }),
        "panic" => panic!("as it was asked for"),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    };
    match done {
        Ok(()) => eprintln!("escape {name}: succeeded"),
        Err(error) => eprintln!("escape {name}: {error}"),
    }
}

fn open_socket(family: AddressFamily, kind: SockType) -> io::Result<()> {
    let opened = socket(family, kind, SockFlag::empty(), None);
    opened.map(drop).map_err(Into::into)
}
