//! Where lines go: standard error, whatever it is, without ever waiting for whoever reads it.
//!
//! Comes in: a line. Goes out: the line, whole or not at all; what is lost is counted, and told by a field of the
//! next line that gets through. Standard error's blocking mode is left alone: it belongs to all who share it, a
//! command among them.

use std::borrow::Cow;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::{isatty, write};

use super::LogFormat;

/// What a pipe takes whole where it has room for anything (pipe(7), `PIPE_BUF`), bytes. Our lines are shorter.
const LONGEST: usize = 4096;

/// How to write without waiting.
#[derive(Debug)]
enum Way {
    /// A call can say so itself (send(2), `MSG_DONTWAIT`).
    Socket,
    /// A description of our own, which does not block.
    Own(File),
    /// Only after asking whether there is room. Somebody else who writes to the same pipe may take it in between.
    Shared,
}

/// Standard error.
#[derive(Debug)]
pub(super) struct Sink<D> {
    standard: D,
    way: Way,
    /// Lines since the last that was written.
    lost: u64,
    /// The last line has no end.
    torn: bool,
}

impl<D: AsFd> Sink<D> {
    pub(super) fn new(standard: D) -> Self {
        let way = match kind(&standard) {
            Some(SFlag::S_IFSOCK) => Way::Socket,
            Some(_) | None => Way::Shared,
        };
        Self {
            standard,
            way,
            lost: 0,
            torn: false,
        }
    }

    /// Opens a pipe or terminal again, for ourselves. Where that is refused, as for a pipe of another user's,
    /// it is asked for room as before.
    pub(super) fn detach(&mut self) {
        let waits =
            kind(&self.standard) == Some(SFlag::S_IFIFO) || isatty(&self.standard) == Ok(true);
        if !waits {
            return;
        }
        let path = format!("/proc/self/fd/{}", self.standard.as_fd().as_raw_fd());
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let opened = OpenOptions::new()
            .write(true)
            .custom_flags(flags)
            .open(path);
        if let Ok(own) = opened {
            self.way = Way::Own(own);
        }
    }

    /// Lines that were lost and not yet told.
    pub(super) const fn lost(&self) -> u64 {
        self.lost
    }

    /// Writes a line that ends with its newline, or counts it as lost.
    pub(super) fn write(&mut self, line: &[u8], format: LogFormat) {
        let told = if self.lost == 0 && !self.torn {
            Cow::Borrowed(line)
        } else {
            let mut told = String::from_utf8_lossy(line).into_owned();
            if self.lost > 0 {
                format.add_field(&mut told, "lost", self.lost);
            }
            if self.torn {
                told.insert(0, '\n');
            }
            Cow::Owned(told.into_bytes())
        };
        match self.try_write(&told) {
            Ok(written) => {
                self.torn = written < told.len();
                self.lost = u64::from(self.torn);
            }
            Err(_) => self.lost += 1,
        }
    }

    fn try_write(&self, line: &[u8]) -> Result<usize, Errno> {
        if line.len() > LONGEST {
            return Err(Errno::EMSGSIZE);
        }
        match &self.way {
            Way::Socket => {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                send(self.standard.as_fd().as_raw_fd(), line, flags)
            }
            Way::Own(own) => write(own, line),
            Way::Shared => {
                let mut room = [PollFd::new(self.standard.as_fd(), PollFlags::POLLOUT)];
                match poll(&mut room, PollTimeout::ZERO)? {
                    0 => Err(Errno::EAGAIN),
                    _ => write(&self.standard, line),
                }
            }
        }
    }
}

/// What kind of file a descriptor stands for.
fn kind(descriptor: &impl AsFd) -> Option<SFlag> {
    let stat = fstat(descriptor).ok()?;
    Some(SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{PipeReader, Read, pipe};
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use nix::fcntl::{FcntlArg, OFlag, fcntl};

    /// What has not been read yet.
    fn unread(reader: impl AsFd + Read) -> String {
        let mut reader = reader;
        fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let mut bytes = Vec::new();
        let _ = reader.read_to_end(&mut bytes);
        String::from_utf8(bytes).unwrap()
    }

    fn says(sink: &mut Sink<OwnedFd>, number: usize) {
        sink.write(format!("line {number}\n").as_bytes(), LogFormat::Text);
    }

    /// Says lines until one is lost, and so many more.
    fn fill(sink: &mut Sink<OwnedFd>, more: u64) -> usize {
        let mut said = 0;
        while sink.lost() < more {
            assert!(said < 1_000_000, "nothing is ever lost");
            says(sink, said);
            said += 1;
        }
        said - usize::try_from(more).unwrap()
    }

    /// Nobody reads; then somebody does, and hears all that was written and how much was not.
    fn loses_and_tells(mut sink: Sink<OwnedFd>, reader: impl AsFd + Read) {
        let written = fill(&mut sink, 7);
        let before = unread(
            reader
                .as_fd()
                .try_clone_to_owned()
                .map(std::fs::File::from)
                .unwrap(),
        );
        assert_eq!(before.lines().count(), written);
        assert!(before.ends_with(&format!("line {}\n", written - 1)));
        says(&mut sink, 8);
        says(&mut sink, 9);
        assert_eq!(unread(reader), "line 8 lost=7\nline 9\n");
        assert_eq!(sink.lost(), 0);
    }

    fn piped() -> (PipeReader, Sink<OwnedFd>) {
        let (reader, writer) = pipe().unwrap();
        (reader, Sink::new(writer.into()))
    }

    #[test]
    fn a_full_pipe_loses_lines_and_does_not_block() {
        let (reader, sink) = piped();
        loses_and_tells(sink, reader);
    }

    #[test]
    fn a_pipe_of_our_own_loses_lines_and_others_stay_blocking() {
        let (reader, mut sink) = piped();
        sink.detach();
        assert!(matches!(sink.way, Way::Own(_)));
        let flags = fcntl(&sink.standard, FcntlArg::F_GETFL).unwrap();
        assert_eq!(flags & libc::O_NONBLOCK, 0);
        loses_and_tells(sink, reader);
    }

    #[test]
    fn a_full_socket_loses_lines_and_does_not_block() {
        let (reader, writer) = UnixStream::pair().unwrap();
        let sink = Sink::new(writer.into());
        assert!(matches!(sink.way, Way::Socket));
        let file = std::fs::File::from(OwnedFd::from(reader));
        loses_and_tells(sink, file);
    }

    #[test]
    fn a_line_longer_than_a_pipe_takes_at_once_is_lost() {
        let (reader, mut sink) = piped();
        sink.write(&[b'a'; LONGEST + 1], LogFormat::Text);
        says(&mut sink, 1);
        assert_eq!(unread(reader), "line 1 lost=1\n");
    }

    #[test]
    fn a_file_that_can_not_be_written_is_no_reason_to_end() {
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut sink = Sink::new(full.into());
        says(&mut sink, 1);
        sink.detach();
        says(&mut sink, 2);
        assert_eq!(sink.lost(), 2);
    }

    #[test]
    fn a_torn_line_is_ended_before_the_next() {
        let (mut reader, mut sink) = piped();
        sink.torn = true;
        sink.lost = 1;
        says(&mut sink, 1);
        drop(sink);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "\nline 1 lost=1\n");
    }
}
