//! Row 45: what becomes of a network whose log can't be written, with the real program.
//!
//! In: places to log to that fail with every write: a full disk, a pipe that nobody reads, a terminal that
//! is gone. Out: whether the command ran, with its network, to its own exit status.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::process::Stdio;

use nix::pty::openpty;

use crate::count;
use crate::support::process::exit_code;
use crate::support::world::World;
use crate::support::{LOOPBACK, SOON, at, serve, sockets::Sockets, wait_until};

/// What makes every write to a log fail.
#[derive(Debug, Clone, Copy)]
enum Log {
    /// `ENOSPC`.
    FullDisk,
    /// `EPIPE`.
    ClosedPipe,
    /// `EIO`.
    LostTerminal,
}

impl Log {
    fn open(self) -> OwnedFd {
        match self {
            Self::FullDisk => {
                let full = OpenOptions::new().write(true).open("/dev/full");
                full.unwrap().into()
            }
            Self::ClosedPipe => {
                let (_, writer) = std::io::pipe().unwrap();
                writer.into()
            }
            Self::LostTerminal => openpty(None, None).unwrap().slave,
        }
    }
}

#[test]
fn row_45_log_that_can_not_be_written() {
    let world = World::new();
    let page = serve::page(world.listen(at(LOOPBACK, 0)).unwrap(), "a page\n");
    let url = format!("http://10.0.2.2:{}/", page.port());
    // A connection that is refused and a name that is not there, too, are things to log.
    let script = format!("curl -s --max-time 15 {url}; curl -s http://10.0.2.2:1/; exit 7");
    for _ in 0..count(1, 10) {
        for log in [Log::FullDisk, Log::ClosedPipe, Log::LostTerminal] {
            let mut output = tempfile::tempfile().unwrap();
            let mut child = world
                .tapgate(&["run", "-vvv", "--", "sh", "-c", &script])
                .stdin(Stdio::null())
                .stdout(output.try_clone().unwrap())
                .stderr(log.open())
                .spawn()
                .unwrap();
            let status = wait_until("the command", SOON, || child.try_wait().unwrap());
            std::io::Seek::rewind(&mut output).unwrap();
            let mut said = String::new();
            output.read_to_string(&mut said).unwrap();
            assert_eq!(
                (exit_code(status), said.as_str()),
                (7, "a page\n"),
                "{log:?}"
            );
        }
    }
}
