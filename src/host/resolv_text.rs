//! Where the text of `/etc/resolv.conf` comes from, and how it is noticed that it changed.
//!
//! [`TextFile`] looks at the file itself, through every symlink, by `stat(2)`. A process in a sandbox
//! sees no files: there [`Asked`] asks the process outside, which answers by [`answer`]. Comes in: a
//! path or a socket. Goes out: text, when it is another than last time.

use std::fmt::Debug;
use std::fs::{File, Metadata};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv};

/// More than this of a file is not read; it also fits one message.
const MAX_BYTES: usize = 64 * 1024;

/// How long the process outside may take. It answers in microseconds; the loop waits for it, because
/// the very next query after a change must use the new resolvers.
const PATIENCE: Duration = Duration::from_millis(250);

/// Bytes of a question: its number. An answer repeats them.
const NUMBER: usize = 4;

/// A text that may change.
pub trait Origin: Debug + Send {
    /// The text, if it is another than at the last call; empty when the file is gone. `None` also
    /// when it can't be told for the moment.
    fn changed(&mut self) -> Option<Vec<u8>>;
}

/// What tells one state of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fingerprint {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Fingerprint {
    fn of(meta: &Metadata) -> Self {
        Self {
            device: meta.dev(),
            inode: meta.ino(),
            size: meta.size(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        }
    }
}

/// A file, by its path.
#[derive(Debug)]
pub struct TextFile {
    path: PathBuf,
    seen: Option<Fingerprint>,
}

impl TextFile {
    /// The file at `path`, which need not exist yet.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            seen: None,
        }
    }
}

impl Origin for TextFile {
    fn changed(&mut self) -> Option<Vec<u8>> {
        let found = std::fs::metadata(&self.path)
            .ok()
            .map(|meta| Fingerprint::of(&meta));
        if found == self.seen {
            return None;
        }
        let mut text = Vec::new();
        let read = File::open(&self.path)
            .and_then(|file| file.take(MAX_BYTES as u64).read_to_end(&mut text));
        match read {
            Ok(_) => {
                self.seen = found;
                Some(text)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                self.seen = None;
                Some(Vec::new())
            }
            Err(error) => {
                tracing::debug!(path = %self.path.display(), %error, "resolv.conf unreadable");
                None
            }
        }
    }
}

/// The text as the process outside knows it.
#[derive(Debug)]
pub struct Asked {
    socket: UnixStream,
    number: u32,
    /// The last question has no answer yet.
    waiting: bool,
    buffer: Box<[u8]>,
}

impl Asked {
    /// Asks over `socket`, which keeps messages apart.
    ///
    /// # Errors
    /// When the socket takes no time limit.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            socket,
            number: 0,
            waiting: false,
            buffer: vec![0; NUMBER + 1 + MAX_BYTES].into_boxed_slice(),
        })
    }

    /// Takes the answer to the last question.
    fn hear(&mut self, flags: MsgFlags) -> io::Result<Option<Vec<u8>>> {
        loop {
            let len = recv(self.socket.as_raw_fd(), &mut self.buffer, flags)?;
            let Some((number, answer)) = self.buffer[..len].split_first_chunk() else {
                return Err(ErrorKind::UnexpectedEof.into());
            };
            // An answer to an earlier question that came too late then.
            if *number != self.number.to_ne_bytes() {
                continue;
            }
            self.waiting = false;
            return Ok(answer.split_first().map(|(_, text)| text.to_vec()));
        }
    }

    fn ask(&mut self) -> io::Result<Option<Vec<u8>>> {
        if self.waiting {
            // It was waited for once; whoever is stuck must not hold up every query.
            return self.hear(MsgFlags::MSG_DONTWAIT);
        }
        self.number = self.number.wrapping_add(1);
        (&self.socket).write_all(&self.number.to_ne_bytes())?;
        self.waiting = true;
        self.hear(MsgFlags::empty())
    }
}

impl Origin for Asked {
    fn changed(&mut self) -> Option<Vec<u8>> {
        self.ask().unwrap_or_else(|error| {
            tracing::debug!(%error, "the process outside does not answer");
            None
        })
    }
}

/// Answers one question of an [`Asked`] at the other end of `socket`: the question's number, then
/// nothing when the text is the same as last time, else a byte and the text.
///
/// # Errors
/// `UnexpectedEof` when nobody will ask any more.
pub fn answer(mut socket: &UnixStream, origin: &mut impl Origin) -> io::Result<()> {
    let mut number = [0; NUMBER];
    if socket.read(&mut number)? < NUMBER {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    let mut message = number.to_vec();
    if let Some(text) = origin.changed() {
        message.push(b't');
        message.extend(text);
    }
    socket.write_all(&message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::fd::message_pair;

    /// A text that a test replaces.
    #[derive(Debug)]
    struct Told(Option<&'static str>);

    impl Origin for Told {
        fn changed(&mut self) -> Option<Vec<u8>> {
            self.0.take().map(Into::into)
        }
    }

    #[test]
    fn the_process_outside_tells_changes_once() {
        let (inside, outside) = message_pair().unwrap();
        #[expect(clippy::disallowed_methods, reason = "stands for another process")]
        let answers = std::thread::spawn(move || {
            let mut told = Told(Some("nameserver 192.0.2.1"));
            while answer(&outside, &mut told).is_ok() {}
        });
        let mut asked = Asked::new(inside).unwrap();
        assert_eq!(
            asked.changed().as_deref(),
            Some(&b"nameserver 192.0.2.1"[..])
        );
        assert_eq!(asked.changed(), None);
        drop(asked);
        answers.join().unwrap();
    }

    #[test]
    fn a_late_answer_is_taken_at_the_next_question() {
        let (inside, outside) = message_pair().unwrap();
        let mut asked = Asked::new(inside).unwrap();
        assert_eq!(asked.changed(), None, "nobody answers in time");
        assert_eq!(asked.changed(), None, "and nobody waits again");
        answer(&outside, &mut Told(Some("late"))).unwrap();
        assert_eq!(asked.changed().as_deref(), Some(&b"late"[..]));
        drop(outside);
        assert_eq!(asked.changed(), None, "nobody is left to ask");
    }
}
