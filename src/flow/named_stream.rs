//! A guest's stream to a resolver (RFC 7766), some of whose queries are answered right here.
//!
//! Comes in: the bytes of both directions, and a [`Judge`] that knows the names. Goes out: the same
//! bytes, less the queries that the judge answers and with its answers between those of the
//! resolver. Messages are never looked into here, nor kept but for the start of a query that is not
//! judged yet. Everything is bounded: who doesn't read its answers is not listened to.
//!
//! What it takes with [`NamedStream::send`] is either sent on or part of a query that is not judged
//! yet. The byte that a judgement hangs on is never taken before what was kept is sent on, so the
//! caller always has a byte left to come back with, and nothing waits here for a socket to be
//! writable. What becomes possible without any event at the socket [`TcpSocket::woken`] tells.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read};
use std::sync::Arc;

use crate::config::Config;
use crate::host::{QueuedError, TcpSocket, Woken};

/// Bytes of the length before each message (RFC 1035 4.2.2).
const PREFIX: usize = 2;
/// What is kept of a query at most; a judge decides before.
const MAX_HELD: usize = 4096 + PREFIX;
/// Bytes of answers that wait for the guest before no more queries are taken.
const MAX_ANSWERS: usize = 4096;

/// What becomes of a query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Judgement {
    /// More of it must be seen.
    More,
    /// The resolver gets it.
    Pass,
    /// This is the answer; the resolver doesn't see the query.
    Answer(Vec<u8>),
}

/// Judges a query of a given length by its start. Never asks for more of a whole one, nor of more
/// than 4,096 bytes.
pub type Judge = fn(&Config, start: &[u8], len: usize) -> Judgement;

/// Where the guest's direction stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// At the start of a query, or behind what is held of it.
    Judging,
    /// So many bytes go to the resolver, those that are held first.
    Passing(usize),
    /// So many bytes of a query that has its answer are left.
    Skipping(usize),
}

/// A resolver's connection with a judge before it.
pub struct NamedStream<S> {
    inner: S,
    config: Arc<Config>,
    judge: Judge,
    stage: Stage,
    /// The start of a query, its length included, that was taken from the guest.
    held: Vec<u8>,
    /// Answers, with their lengths, that the guest is to get.
    answers: VecDeque<u8>,
    /// Queries were refused for want of room in `answers`.
    refused: bool,
    replies: Framing,
    /// The socket may have more to receive than was asked of it.
    unread: bool,
    /// The resolver has ended its direction: nothing can follow.
    ended: bool,
}

impl<S: TcpSocket> NamedStream<S> {
    /// Puts `judge` before a connection to a resolver.
    pub const fn new(inner: S, config: Arc<Config>, judge: Judge) -> Self {
        Self {
            inner,
            config,
            judge,
            stage: Stage::Judging,
            held: Vec::new(),
            answers: VecDeque::new(),
            refused: false,
            replies: Framing {
                left: 0,
                high: None,
            },
            unread: false,
            ended: false,
        }
    }

    /// Takes some of the guest's bytes; 0 when only the stage has changed.
    fn step(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.stage {
            Stage::Judging => self.judge(bytes),
            Stage::Passing(left) => self.pass(left, bytes),
            Stage::Skipping(left) => {
                let skipped = bytes.len().min(left);
                self.stage = match left - skipped {
                    0 => Stage::Judging,
                    left => Stage::Skipping(left),
                };
                Ok(skipped)
            }
        }
    }

    fn judge(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.answers.len() >= MAX_ANSWERS {
            self.refused = true;
            return Err(ErrorKind::WouldBlock.into());
        }
        let before = self.held.len();
        let room = MAX_HELD.saturating_sub(before);
        self.held.extend(bytes.iter().take(room));
        let whole = message_end(&self.held);
        match self.judgement(&self.held) {
            Judgement::More if self.held.len() < MAX_HELD => Ok(self.held.len() - before),
            Judgement::More | Judgement::Pass => {
                self.held.truncate(before);
                let behind = bytes.get(whole.saturating_sub(before)..);
                let run = behind.map_or(0, |behind| self.passing_run(behind));
                self.stage = Stage::Passing(whole.max(before) + run);
                Ok(0)
            }
            Judgement::Answer(answer) => {
                let seen = self.held.len().min(whole);
                self.held.clear();
                self.queue(&answer);
                if whole > seen {
                    self.stage = Stage::Skipping(whole - seen);
                }
                Ok(seen.saturating_sub(before))
            }
        }
    }

    /// How many bytes are queries for the resolver as well: they are sent in one piece.
    fn passing_run(&self, bytes: &[u8]) -> usize {
        let mut run = 0;
        while let Some(rest) = bytes.get(run..)
            && self.judgement(rest) == Judgement::Pass
        {
            run += message_end(rest);
        }
        run
    }

    fn judgement(&self, bytes: &[u8]) -> Judgement {
        let Some((_, rest)) = bytes.split_first_chunk::<PREFIX>() else {
            return Judgement::More;
        };
        let len = message_end(bytes) - PREFIX;
        let start = &rest[..rest.len().min(len)];
        (self.judge)(&self.config, start, len)
    }

    fn queue(&mut self, answer: &[u8]) {
        if let Ok(len) = u16::try_from(answer.len())
            && !self.ended
        {
            self.answers.extend(len.to_be_bytes());
            self.answers.extend(answer);
        }
    }

    fn pass(&mut self, mut left: usize, bytes: &[u8]) -> io::Result<usize> {
        while !self.held.is_empty() {
            let sent = send_some(&mut self.inner, &self.held)?;
            self.held.drain(..sent);
            left = left.saturating_sub(sent);
            self.stage = Stage::Passing(left);
        }
        let sent = match &bytes[..bytes.len().min(left)] {
            [] => 0,
            part => send_some(&mut self.inner, part)?,
        };
        if sent == left {
            self.stage = Stage::Judging;
        } else {
            self.stage = Stage::Passing(left - sent);
        }
        Ok(sent)
    }
}

impl<S: TcpSocket> TcpSocket for NamedStream<S> {
    fn is_connected_already(&self) -> bool {
        self.inner.is_connected_already()
    }

    fn connect_outcome(&mut self) -> io::Result<()> {
        self.inner.connect_outcome()
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.refused = false;
        if self.ended {
            // No answer can follow, ours neither: a query is not worth a look.
            return Ok(bytes.len());
        }
        let mut taken = 0;
        while let Some(rest) = bytes.get(taken..)
            && !rest.is_empty()
        {
            match self.step(rest) {
                Ok(len) => taken += len,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // A part was taken, and the caller comes back with the rest.
                Err(error) if error.kind() == ErrorKind::WouldBlock && taken > 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(taken)
    }

    fn recv(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let answers_wait = !self.answers.is_empty();
        if answers_wait && self.replies.at_boundary() {
            // The socket was not asked: there may be more.
            self.unread = true;
            return self.answers.read(bytes);
        }
        // No further than to where an answer can go in between.
        let most = if answers_wait {
            bytes.len().min(self.replies.to_boundary())
        } else {
            bytes.len()
        };
        self.unread = false;
        let received = self.inner.recv(&mut bytes[..most])?;
        self.replies.advance(&bytes[..received]);
        if received == 0 && most > 0 {
            self.ended = true;
            self.answers.clear();
        }
        self.unread = received > 0 && received == most;
        Ok(received)
    }

    /// A query that the guest never finished is nobody's any more.
    fn shutdown_write(&mut self) -> io::Result<()> {
        self.inner.shutdown_write()
    }

    fn reset(self) {
        self.inner.reset();
    }

    fn connect_error(&mut self) -> Option<QueuedError> {
        self.inner.connect_error()
    }

    fn set_tos(&mut self, tos: u8) {
        self.inner.set_tos(tos);
    }

    fn woken(&self) -> Woken {
        let deliverable = !self.answers.is_empty() && self.replies.at_boundary();
        Woken {
            readable: self.unread || deliverable,
            writable: self.refused && self.answers.len() < MAX_ANSWERS,
        }
    }
}

/// The host's side of a TCP flow.
pub enum Stream<S> {
    /// Any connection.
    Plain(S),
    /// One to a resolver.
    Named(Box<NamedStream<S>>),
}

/// Calls a method of whichever it is.
macro_rules! either {
    ($stream:expr, $inner:ident => $call:expr) => {
        match $stream {
            Stream::Plain($inner) => $call,
            Stream::Named($inner) => $call,
        }
    };
}

impl<S: TcpSocket> TcpSocket for Stream<S> {
    fn is_connected_already(&self) -> bool {
        either!(self, inner => inner.is_connected_already())
    }

    fn connect_outcome(&mut self) -> io::Result<()> {
        either!(self, inner => inner.connect_outcome())
    }

    fn connect_error(&mut self) -> Option<QueuedError> {
        either!(self, inner => inner.connect_error())
    }

    fn set_tos(&mut self, tos: u8) {
        either!(self, inner => inner.set_tos(tos));
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        either!(self, inner => inner.send(bytes))
    }

    fn recv(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        either!(self, inner => inner.recv(bytes))
    }

    fn begin_peeking(&mut self) -> io::Result<()> {
        either!(self, inner => inner.begin_peeking())
    }

    fn peek(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        either!(self, inner => inner.peek(bytes))
    }

    fn discard(&mut self, len: usize) -> io::Result<()> {
        either!(self, inner => inner.discard(len))
    }

    fn shutdown_write(&mut self) -> io::Result<()> {
        either!(self, inner => inner.shutdown_write())
    }

    fn reset(self) {
        either!(self, inner => inner.reset());
    }

    fn woken(&self) -> Woken {
        either!(self, inner => inner.woken())
    }
}

/// Sends at least one byte.
fn send_some<S: TcpSocket>(inner: &mut S, bytes: &[u8]) -> io::Result<usize> {
    match inner.send(bytes)? {
        0 => Err(ErrorKind::WouldBlock.into()),
        sent => Ok(sent.min(bytes.len())),
    }
}

/// Bytes of the message that begins here, its length included; what is known of it at least.
fn message_end(bytes: &[u8]) -> usize {
    bytes
        .first_chunk::<PREFIX>()
        .map_or(PREFIX, |len| PREFIX + usize::from(u16::from_be_bytes(*len)))
}

/// Where in the resolver's messages its direction stands.
struct Framing {
    /// Bytes left of the message.
    left: usize,
    /// The first byte of the next one's length.
    high: Option<u8>,
}

impl Framing {
    const fn at_boundary(&self) -> bool {
        self.left == 0 && self.high.is_none()
    }

    /// Bytes to the end of the message, or of its length.
    const fn to_boundary(&self) -> usize {
        match self.high {
            Some(_) => 1,
            None if self.left == 0 => PREFIX,
            None => self.left,
        }
    }

    fn advance(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while let Some((&byte, behind)) = rest.split_first() {
            if self.left > 0 {
                let passed = self.left.min(rest.len());
                self.left -= passed;
                rest = &rest[passed..];
                continue;
            }
            match self.high.take() {
                None => self.high = Some(byte),
                Some(high) => self.left = usize::from(u16::from_be_bytes([high, byte])),
            }
            rest = behind;
        }
    }
}

#[cfg(test)]
mod tests;
