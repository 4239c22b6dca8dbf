//! Two open connections past the link, joined by pipes.
//!
//! Comes in: what became possible at either socket. Goes out: calls on both, and whether there is more to do. Ends of stream
//! and resets cross over one by one, as in `tcp_open.rs`; where the inner side has failed, behind all that it had said. A
//! pipe is held only for as long as there is something in it.

use std::io::{self, ErrorKind};

use crate::config::Timeouts;
use crate::flow::tcp::Progress;
use crate::flow::tcp_open::is_end;
use crate::host::{Event, Host, Pipe, TcpSocket};

/// Bytes that one direction may carry in one turn, about: the budget of a flow.
const BUDGET: usize = 1 << 20;

/// Two open connections, the client's first, and what is under way from each to the other.
#[derive(Debug)]
pub(super) struct Joint<S, P> {
    pub(super) sides: [Side<S>; 2],
    /// What came from the side of the same place.
    pipes: [Option<P>; 2],
    pub(super) starved: bool,
    /// Why the inner side takes nothing any more: what came from it goes to the client before both end.
    pub(super) failed: Option<io::Error>,
    /// Bytes that went on when it was last looked after.
    pub(super) moved: usize,
    /// Somebody was told that one of the streams has ended.
    half_closed: bool,
    /// Seconds after which the inner side is asked whether it is still there; the kernel's own before.
    asked_after: Option<u32>,
}

/// One connection and what is known of it.
#[derive(Debug)]
pub(super) struct Side<S> {
    pub(super) socket: S,
    readable: bool,
    writable: bool,
    urgent: bool,
    error: bool,
    /// It spoke up after its end of stream: it may have been reset.
    look_for_error: bool,
    /// It has told of an error, which it does once: afterwards its stream looks as if it had ended in order.
    failed: bool,
    /// What it has failed by, where nobody has been told.
    lost: Option<io::Error>,
    /// It has sent its end of stream, and that was passed on.
    ended: bool,
}

impl<S> Side<S> {
    const fn new(socket: S) -> Self {
        // Taken to be ready: a call finds out for less than an event costs.
        Self {
            socket,
            readable: true,
            writable: true,
            urgent: false,
            error: false,
            look_for_error: false,
            failed: false,
            lost: None,
            ended: false,
        }
    }

    /// Something became possible there.
    pub(super) fn ready(&mut self, event: Event) {
        self.readable |= event.readable;
        self.writable |= event.writable;
        self.urgent |= event.urgent;
        self.error |= event.error;
        self.look_for_error |= event.error && self.ended;
    }
}

impl<S: TcpSocket> Side<S> {
    /// An error that reading has met, or a reset that came after the end of stream.
    fn check(&mut self) -> io::Result<()> {
        if let Some(error) = self.lost.take() {
            return Err(error);
        }
        if !std::mem::take(&mut self.look_for_error) {
            return Ok(());
        }
        match self.socket.connect_outcome() {
            Err(error) if is_end(&error) => Err(error),
            Err(_) | Ok(()) => Ok(()),
        }
    }
}

/// What is left of one direction in this turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    Nothing,
    More,
    /// No pipe is to be had.
    Starved,
}

impl<S: TcpSocket, P: Pipe<S>> Joint<S, P> {
    pub(super) const fn new(client: S, inside: S) -> Self {
        Self {
            sides: [Side::new(client), Side::new(inside)],
            pipes: [None, None],
            starved: false,
            failed: None,
            moved: 0,
            half_closed: false,
            asked_after: None,
        }
    }

    fn is_half_closed(&self) -> bool {
        self.sides.iter().any(|side| side.ended)
    }

    /// Seconds that the inner side may be silent before it is asked whether it is still there.
    pub(super) fn ask_after(&self, timeouts: Timeouts) -> u32 {
        if self.is_half_closed() {
            timeouts.tcp_half_closed
        } else {
            timeouts.ask_after()
        }
    }

    /// Has the inner side asked after that time. Where the kernel refuses, its own times hold.
    pub(super) fn have_asked(&mut self, timeouts: Timeouts) {
        let after = self.ask_after(timeouts);
        if self.asked_after.replace(after) != Some(after)
            && let Err(error) = self.sides[1].socket.ask_after(after, timeouts.answer())
        {
            tracing::debug!(%error, "the kernel's own times for keep-alives hold");
        }
    }

    /// One of the streams has ended, and this was not asked before.
    pub(super) fn begins_half_close(&mut self) -> bool {
        let begins = self.is_half_closed() && !self.half_closed;
        self.half_closed |= begins;
        begins
    }

    /// Moves bytes both ways. An error ends both connections, once the client has what was said before.
    pub(super) fn pump<H>(&mut self, host: &mut H) -> io::Result<Progress>
    where
        H: Host<Tcp = S, Pipe = P>,
    {
        let [client, inside] = &mut self.sides;
        let [inwards, outwards] = &mut self.pipes;
        self.moved = 0;
        let mut left_in = Left::Nothing;
        if self.failed.is_none() {
            match carry(host, client, inside, inwards, &mut self.moved) {
                Ok(left) => left_in = left,
                Err(error) => {
                    // What takes nothing any more may have answered before.
                    (inside.failed, inside.readable) = (true, true);
                    self.failed = Some(error);
                }
            }
            client.check()?;
            // Behind what the inner side does not take a reset is not read.
            let waits = inwards.as_ref().is_some_and(|pipe| pipe.held() > 0);
            if waits
                && std::mem::take(&mut client.error)
                && let Err(error) = client.socket.connect_outcome()
                && is_end(&error)
            {
                return Err(error);
            }
        }
        let left_out = carry(host, inside, client, outwards, &mut self.moved)?;
        if let Err(error) = inside.check() {
            self.failed.get_or_insert(error);
        }
        let held = outwards.as_ref().is_some_and(|pipe| pipe.held() > 0);
        let said_all = left_out == Left::Nothing && !held;
        if let Some(error) = self
            .failed
            .take_if(|_| said_all && client.socket.has_delivered())
        {
            return Err(error);
        }
        let left = [left_in, left_out];
        self.starved = left.contains(&Left::Starved);
        Ok(if client.ended && inside.ended {
            Progress::Gone
        } else if left.contains(&Left::More) {
            Progress::More
        } else {
            Progress::Idle
        })
    }
}

/// Carries one direction: an empty pipe is filled, and drained again at once. Gives what is left to do, and adds the bytes
/// that went on to `sum`. An error is the other side's: one that reading has met stays with the side that is read.
fn carry<H: Host>(
    host: &mut H,
    from: &mut Side<H::Tcp>,
    to: &mut Side<H::Tcp>,
    held: &mut Option<H::Pipe>,
    sum: &mut usize,
) -> io::Result<Left> {
    let before = *sum;
    let left = loop {
        if let Some(pipe) = held {
            drain(pipe, to, sum)?;
            if pipe.held() > 0 {
                return Ok(Left::Nothing);
            }
        }
        if !from.readable || from.ended {
            break Left::Nothing;
        }
        if *sum - before >= BUDGET {
            break Left::More;
        }
        let pipe = match held {
            Some(pipe) => pipe,
            None => match host.pipe() {
                Ok(pipe) => held.insert(pipe),
                Err(error) => {
                    tracing::debug!(%error, "no pipe");
                    return Ok(Left::Starved);
                }
            },
        };
        match pipe.fill(&mut from.socket, from.urgent) {
            Ok(0) if from.failed => from.readable = false,
            Ok(0) => {
                from.ended = true;
                // A RST may have come with the end, in one event: the kernel tells the end first.
                from.look_for_error |= from.error;
                to.socket.shutdown_write()?;
            }
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                from.readable = false;
                from.urgent = false;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => {
                (from.failed, from.readable) = (true, false);
                from.lost = Some(error);
                break Left::Nothing;
            }
        }
    };
    if let Some(pipe) = held.take() {
        host.return_pipe(pipe);
    }
    Ok(left)
}

/// Gives on what a pipe holds, as far as it is taken, and adds that to `sum`.
fn drain<S, P: Pipe<S>>(pipe: &mut P, to: &mut Side<S>, sum: &mut usize) -> io::Result<()> {
    while to.writable && pipe.held() > 0 {
        match pipe.drain(&mut to.socket) {
            Ok(len) => *sum += len,
            Err(error) if error.kind() == ErrorKind::WouldBlock => to.writable = false,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
