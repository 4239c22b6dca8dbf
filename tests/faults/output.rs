//! Row 45: what becomes of a network whose log can't be written, with the real program.
//!
//! In: places to log to that fail with every write (a full disk, a pipe that was closed, a terminal that
//! is gone) or take nothing more, and a guest that gives much to log. Out: whether the command ran, with its
//! network, to its own exit status, and whether the log tells what it leaves out.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek};
use std::os::fd::OwnedFd;
use std::os::unix::fs::fchown;
use std::os::unix::net::UnixStream;
use std::process::Stdio;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::openpty;

use crate::count;
use crate::support::process::exit_code;
use crate::support::user;
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
            output.rewind().unwrap();
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

/// Who holds the other end of a log and does not read.
#[derive(Debug, Clone, Copy)]
enum Deaf {
    /// Of a pipe that tapgate may open anew.
    OwnPipe,
    /// Of a pipe that belongs to somebody else, where the tests run as root.
    ForeignPipe,
    Socket,
}

impl Deaf {
    /// Its end, and a full log.
    fn full(self) -> (File, OwnedFd) {
        let (reader, writer): (OwnedFd, OwnedFd) = match self {
            Self::OwnPipe | Self::ForeignPipe => {
                let (reader, writer) = std::io::pipe().unwrap();
                (reader.into(), writer.into())
            }
            Self::Socket => {
                let (reader, writer) = UnixStream::pair().unwrap();
                (reader.into(), writer.into())
            }
        };
        if matches!(self, Self::OwnPipe) {
            let (uid, gid) = user::ids();
            fchown(&writer, Some(uid.as_raw()), Some(gid.as_raw())).unwrap();
        }
        let blocking = |flags| fcntl(&writer, FcntlArg::F_SETFL(flags)).unwrap();
        blocking(OFlag::O_NONBLOCK);
        while nix::unistd::write(&writer, &[b'\n'; 512]).is_ok() {}
        blocking(OFlag::empty());
        fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        (reader.into(), writer)
    }
}

/// Everything that waits to be read.
fn unread(mut reader: &File) -> String {
    let mut bytes = Vec::new();
    // Until there is nothing more, or nobody who could write.
    let _ = reader.read_to_end(&mut bytes);
    String::from_utf8(bytes).unwrap()
}

/// The sum of a field over all lines, in either format.
fn sum(log: &str, field: &str) -> usize {
    let keys = [format!(" {field}="), format!("\"{field}\":")];
    let numbers = |line: &str| {
        let after = keys.iter().find_map(|key| line.split(key.as_str()).nth(1));
        let digits = |text: &str| {
            text.split(|c: char| !c.is_ascii_digit())
                .next()?
                .parse()
                .ok()
        };
        after.and_then(digits).unwrap_or(0)
    };
    log.lines().map(numbers).sum::<usize>()
}

/// A shell's loop of connections that are refused.
fn refused(count: usize) -> String {
    format!("for i in $(seq {count}); do (: </dev/tcp/10.0.2.2/1) 2>/dev/null; done")
}

#[test]
fn row_45_log_that_nobody_reads() {
    let world = World::new();
    let page = serve::page(world.listen(at(LOOPBACK, 0)).unwrap(), "a page\n");
    let url = format!("http://10.0.2.2:{}/", page.port());
    let (flood, one) = (refused(20), refused(1));
    let script = format!("{flood}; curl -s --max-time 15 {url}; read word; {one}; exit 7");
    for _ in 0..count(1, 10) {
        for deaf in [Deaf::OwnPipe, Deaf::ForeignPipe, Deaf::Socket] {
            for format in ["text", "json"] {
                let (reader, log) = deaf.full();
                let mut output = tempfile::tempfile().unwrap();
                let (wait, go) = std::io::pipe().unwrap();
                let words = [
                    "run",
                    "-vv",
                    "--log-format",
                    format,
                    "--",
                    "bash",
                    "-c",
                    &script,
                ];
                let mut child = world
                    .tapgate(&words)
                    .stdin(wait)
                    .stdout(output.try_clone().unwrap())
                    .stderr(log)
                    .spawn()
                    .unwrap();
                wait_until("the page", SOON, || {
                    output.rewind().unwrap();
                    let mut said = String::new();
                    output.read_to_string(&mut said).unwrap();
                    (said == "a page\n").then_some(())
                });
                assert_eq!(unread(&reader).trim(), "", "{deaf:?}: it was full");
                drop(go);
                let status = wait_until("the command", SOON, || child.try_wait().unwrap());
                assert_eq!(exit_code(status), 7, "{deaf:?} {format}");
                let log = unread(&reader);
                assert!(sum(&log, "lost") >= 10, "{deaf:?} {format}: {log}");
                if format == "json" {
                    for line in log.lines() {
                        let read: Result<serde_json::Value, _> = serde_json::from_str(line);
                        assert!(read.is_ok(), "{line}");
                    }
                }
            }
        }
    }
}

#[test]
fn row_45_lines_of_a_kind_are_counted_and_few() {
    let world = World::new();
    for format in ["text", "json"] {
        let total = count(200, 5_000);
        let options = ["-vv", "--log-format", format];
        let script = format!("exec bash -c '{}'", refused(total));
        let log = world
            .start_inside(&options, &script)
            .finish(10 * SOON)
            .stderr;
        let said = log.lines().filter(|line| line.contains("connect failed"));
        let said = said.count();
        assert_eq!(said + sum(&log, "left_out"), total, "{log}");
        assert!(said < total / 2, "{said} of {total}");
    }
}
