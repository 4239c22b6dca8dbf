//! An open TCP flow: both ends have a connection, or the guest is being connected to, and bytes move in
//! between.
//!
//! Comes in: segments of the guest, what became possible at the host's socket, the time. Goes out: frames
//! to the guest, calls on the host's socket. Ends of stream and resets cross over one by one; the flow is
//! over when both directions are, and not before all data that was acknowledged to the guest has reached
//! the host's socket.

mod ahead;
mod breaking;
mod carrying;
mod failing;
mod saving;

use std::io::{self, ErrorKind};

use breaking::Failure;
use smoltcp::socket::tcp::State;

use super::Fate;
use super::tcp::{Progress, TIME_WAIT};
use super::tcp_ahead::Way;
use super::tcp_engine::{Engine, LastSent, Path};
use super::tcp_pool::{EnginePool, NoEngine};
use super::tcp_rest::{Rest, Streams};
use crate::buf::TxBatch;
use crate::config::Timeouts;
use crate::host::{Event, TcpSocket};
use crate::net::emit::Ends;
use crate::net::parse::{TcpSegment, tcp_flags};
use crate::net::{Instant, Wire};

/// Turns of both directions in one pump: the budget of a flow.
const ROUNDS: usize = 8;

/// Bytes taken from the host's socket before they are sent on: little enough to be still in the
/// nearest cache when they are copied out again.
const CHUNK: usize = 128 * 1024;

/// Two connections and what is known of each. The guest's has an engine while it moves, and only a
/// line about it while it rests.
pub(super) struct Open<S, E = Box<Engine>> {
    engine: E,
    socket: S,
    readable: bool,
    writable: bool,
    /// The host's stream has ended: a short read does not mean that nothing is left.
    hangup: bool,
    /// There may be urgent data in it: a short read does not mean that nothing is left either, since reading stops before
    /// them (tcp(7)).
    urgent: bool,
    /// The host's socket has told of an error.
    error: bool,
    /// It may have been reset, which its stream tells behind all that it had received, and not at all after its end.
    look_for_error: bool,
    /// The guest has reset its side.
    guest_reset: bool,
    /// The end of both streams has been acknowledged to the guest: nothing more is sent.
    silent: bool,
    /// One side failed: the host's socket is reset, not closed.
    failed: bool,
    /// The host's socket has told that it failed: nothing goes there any more. What it has received before goes to the
    /// guest, as it would to whoever had that socket, and the RST behind it.
    host_failed: bool,
    /// The host has sent its end of stream.
    host_ended: bool,
    /// The guest is still to be told of that.
    owes_end: bool,
    /// The guest has sent its end of stream, and it was passed on.
    guest_ended: bool,
    /// Until when the guest must have answered, or taken what a failed host has left.
    guest_deadline: Option<Instant>,
    /// When it last had something to do.
    active_at: Instant,
    /// It moves, and was said to.
    moving: bool,
    /// Type of service of the guest's latest segment.
    tos: u8,
}

/// The connection is over. Anything else that a socket has kept is a complaint of a router's, which
/// an open connection outlives (RFC 1122 4.2.3.9).
pub(super) fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::TimedOut
    )
}

impl<S, E> Open<S, E> {
    /// The host's socket became ready.
    pub(super) fn ready(&mut self, event: Event) {
        self.readable |= event.readable;
        self.writable |= event.writable;
        self.hangup |= event.hangup;
        self.urgent |= event.urgent;
        self.error |= event.error;
        self.look_for_error |= event.error;
    }

    /// The same with another engine; gives the one that it had.
    fn with<F>(self, engine: F) -> (E, Open<S, F>) {
        let open = Open {
            engine,
            socket: self.socket,
            readable: self.readable,
            writable: self.writable,
            hangup: self.hangup,
            urgent: self.urgent,
            error: self.error,
            look_for_error: self.look_for_error,
            guest_reset: self.guest_reset,
            silent: self.silent,
            failed: self.failed,
            host_failed: self.host_failed,
            host_ended: self.host_ended,
            owes_end: self.owes_end,
            guest_ended: self.guest_ended,
            guest_deadline: self.guest_deadline,
            active_at: self.active_at,
            moving: self.moving,
            tos: self.tos,
        };
        (self.engine, open)
    }
}

impl<S: TcpSocket> Open<S, Rest> {
    /// Something waits to be done that takes an engine.
    pub(super) fn is_called(&self) -> bool {
        (self.readable && !self.host_ended) || self.look_for_error
    }

    /// When the guest is to be asked whether it is still there.
    pub(super) fn deadline(&self, timeouts: Timeouts) -> Instant {
        self.streams().keepalive_at(timeouts)
    }

    const fn streams(&self) -> Streams {
        Streams {
            guest_ended: self.guest_ended,
            host_ended: self.host_ended,
            silent_since: self.active_at,
        }
    }

    /// A RST at this sequence number ends it (RFC 5961 3.2).
    pub(super) fn is_reset_at(&self, seq: u32) -> bool {
        seq == self.engine.expected(self.guest_ended)
    }

    /// The guest has reset its side.
    pub(super) fn reset(self) {
        self.socket.reset();
    }

    /// Takes an engine again. Stays as it is where there is no memory for one; where none goes on from there it is over,
    /// and the host's socket is reset.
    pub(super) fn wake(
        self,
        now: Instant,
        (path, ends): (Path, Ends),
        pool: &mut EnginePool,
    ) -> Result<Open<S>, Option<Self>> {
        match pool.resume(now, (path, ends), &self.engine, self.streams()) {
            Ok(engine) => {
                let (_, open) = self.with(engine);
                Ok(Open {
                    active_at: now,
                    moving: false,
                    ..open
                })
            }
            Err(NoEngine::Memory) => Err(Some(self)),
            Err(NoEngine::Elsewhere) => {
                self.reset();
                Err(None)
            }
        }
    }
}

impl<S: TcpSocket> Open<S> {
    /// A connection that the guest must have answered by a certain time.
    pub(super) const fn new(engine: Box<Engine>, socket: S, guest_deadline: Instant) -> Self {
        // A fresh socket is taken to be ready: a call finds out for less than an event costs.
        Self {
            engine,
            socket,
            readable: true,
            writable: true,
            hangup: false,
            urgent: false,
            error: false,
            look_for_error: false,
            guest_reset: false,
            silent: false,
            failed: false,
            host_failed: false,
            host_ended: false,
            owes_end: false,
            guest_ended: false,
            guest_deadline: Some(guest_deadline),
            active_at: Instant::ZERO,
            moving: false,
            tos: 0,
        }
    }

    /// When it last had something to do.
    pub(super) const fn active_at(&self) -> Instant {
        self.active_at
    }

    /// It has another engine than before, of which nobody need be told.
    pub(super) const fn goes_on_moving(&mut self, moving: bool) {
        self.moving = moving;
    }

    /// It was not said yet that it moves.
    pub(super) const fn begins_to_move(&mut self) -> bool {
        !std::mem::replace(&mut self.moving, true)
    }

    /// Nothing is under way in either direction, nor waits for a time: all that would be lost with the
    /// engine is in its [`Rest`].
    pub(super) fn is_drained(&mut self, now: Instant) -> bool {
        self.moving = false;
        let woken = self.socket.woken();
        let pending = (self.readable && !self.host_ended) || self.look_for_error;
        !pending && !woken.readable && !woken.writable && self.is_even(now)
    }

    /// Both rings are empty, and nothing waits for a time.
    fn is_even(&mut self, now: Instant) -> bool {
        let failed = self.failed || self.host_failed;
        let ending = self.guest_reset || self.silent || failed || self.guest_deadline.is_some();
        let socket = self.engine.socket();
        let state = match (self.guest_ended, self.host_ended) {
            (false, false) => State::Established,
            (true, false) => State::CloseWait,
            (false, true) => State::FinWait2,
            (true, true) => return false,
        };
        !ending
            && socket.state() == state
            && socket.send_queue() == 0
            && socket.recv_queue() == 0
            && self.engine.owed.is_none()
            && !self.engine.owes_window
            && self.engine.ahead.is_settled()
            && self.engine.has_sent_all(self.host_ended)
            && self.engine.has_no_gap()
            && self.engine.is_known_already() == 0
            && self.engine.is_settled(now)
    }

    /// Gives the engine back, and keeps a line about the connection.
    pub(super) fn rest(self, pool: &mut EnginePool) -> Open<S, Rest> {
        let rest = self.engine.rest();
        let (engine, resting) = self.with(rest);
        pool.put(engine);
        resting
    }

    /// The same, its host socket having that type of service already.
    pub(super) fn marked(self, tos: u8) -> Self {
        Self { tos, ..self }
    }

    /// What is sent from now on goes by this way.
    pub(super) const fn follow(&mut self, wire: Wire) {
        self.engine.path.wire = wire;
    }

    /// Our next sequence number, and what the guest was told last.
    pub(super) const fn last_sent(&self) -> (u32, LastSent) {
        self.engine.last_sent()
    }

    /// Gives back what it held. The host's socket is closed, or reset where one side failed.
    pub(super) fn end(self, pool: &mut EnginePool) {
        pool.put(self.engine);
        if self.failed {
            self.socket.reset();
        }
    }

    /// Moves bytes both ways and sends what is due.
    pub(super) fn pump(&mut self, now: Instant, tx: &mut TxBatch) -> Progress {
        if let Some(over) = self.end_broken(now, tx) {
            return over;
        }
        let progress = self.carry(now, tx);
        self.end_broken(now, tx).unwrap_or(progress)
    }

    fn carry(&mut self, now: Instant, tx: &mut TxBatch) -> Progress {
        self.active_at = now;
        if self.guest_deadline.is_some_and(|deadline| now >= deadline) {
            return self.fail(&Failure::Guest, now, tx);
        }
        for _ in 0..ROUNDS {
            let [to_host, to_guest] = match self.transfer(now, tx) {
                Ok(moved) => moved,
                Err(failure) => return self.fail(&failure, now, tx),
            };
            self.engine.owes_window |= to_host > 0;
            if !self.silent && self.engine.egress(now, tx, true) {
                return Progress::More;
            }
            if !self.silent {
                self.engine.acknowledge(now, tx);
            }
            self.engine.owes_window &= !self.guest_ended && !self.silent;
            self.engine.open_window(now, tx);
            // In TIME-WAIT smoltcp would forget what the host has not taken yet.
            self.silent = self.engine.socket().state() == State::TimeWait;
            if self.silent {
                self.engine.acknowledge_end(now, tx);
            }
            if let Some(over) = self.over() {
                return over;
            }
            if to_host + to_guest == 0 {
                if !self.silent {
                    self.engine.unstick(now, tx);
                }
                return if self.engine.owes_window {
                    Progress::More
                } else {
                    Progress::Idle
                };
            }
        }
        Progress::More
    }

    /// Bytes that went each way.
    fn transfer(&mut self, now: Instant, tx: &mut TxBatch) -> Result<[usize; 2], Failure> {
        if self.is_half_open() {
            match self.engine.socket().state() {
                State::SynSent | State::SynReceived => return Ok([0; 2]),
                // A RST for our SYN|ACK takes smoltcp back to listening (RFC 9293 3.10.7.4).
                State::Closed | State::Listen => return Err(Failure::Guest),
                State::Established
                | State::FinWait1
                | State::FinWait2
                | State::CloseWait
                | State::Closing
                | State::LastAck
                | State::TimeWait => self.guest_deadline = None,
            }
        }
        // Before: there may be room again. Between: what was sent may have its answer at once.
        self.wake();
        let to_host = self.carry_to_host();
        self.wake();
        self.settle_ahead(now)?;
        self.look_for_error();
        let reads_on = !self.host_ended && !self.host_failed;
        let to_guest = match self.engine.way() {
            Way::Ahead if reads_on => self.carry_ahead(now, tx),
            Way::Wait if reads_on => 0,
            Way::Ring | Way::Ahead | Way::Wait => self.carry_to_guest(),
        };
        let moved = [to_host, to_guest];
        if self.guest_reset || self.ended_too_soon() {
            return Err(Failure::Guest);
        }
        // Its end may have come with an error.
        self.look_for_error();
        if self.host_failed && self.has_said_all(now) {
            return Err(Failure::Host);
        }
        Ok(moved)
    }

    /// The guest's side is closed though not both streams have ended: the guest fell silent. What it
    /// had sent before an orderly end may still wait for a slow host.
    fn ended_too_soon(&mut self) -> bool {
        let ended = self.guest_ended && self.host_ended;
        let drains = self.host_ended && self.engine.socket().recv_queue() > 0;
        self.engine.socket().state() == State::Closed && !ended && !drains
    }

    /// A segment of the guest.
    pub(super) fn segment(
        &mut self,
        now: Instant,
        tx: &mut TxBatch,
        segment: &TcpSegment,
        packet: &[u8],
    ) -> Fate {
        if segment.tos != self.tos {
            self.tos = segment.tos;
            self.socket.set_tos(segment.tos);
        }
        // RFC 9293 3.10.7.4: after both ends of stream a RST is the end, not a failure. A guest that
        // has forgotten the connection sends one for our FIN, if its last acknowledgement was lost.
        let ending = matches!(
            self.engine.socket().state(),
            State::Closing | State::LastAck | State::TimeWait | State::Closed
        );
        let fate = match self.pass_directly(segment, packet) {
            0 => self.engine.segment(now, tx, segment, packet),
            taken => {
                let whole = (segment, packet);
                self.engine.segment_behind(now, tx, whole, taken);
                Fate::Forwarded
            }
        };
        let closed = matches!(self.engine.socket().state(), State::Closed | State::Listen);
        self.guest_reset |= closed && !ending && segment.has(tcp_flags::RST);
        fate
    }

    fn wake(&mut self) {
        let woken = self.socket.woken();
        self.readable |= woken.readable;
        self.writable |= woken.writable;
    }

    /// Sends what is outstanding again, whatever the time.
    pub(super) const fn repeat(&mut self) {
        self.engine.repeat();
    }

    /// The guest has not answered yet.
    pub(super) const fn is_half_open(&self) -> bool {
        self.guest_deadline.is_some() && !self.host_failed
    }

    /// The guest does not want it, while it is being connected to. True when it is to be pumped.
    pub(super) fn refuse(&mut self) -> bool {
        let opening = self.engine.socket().state() == State::SynSent;
        if opening {
            self.engine.socket().abort();
        }
        opening
    }

    /// Both directions have ended and everything has arrived.
    fn over(&mut self) -> Option<Progress> {
        if !self.guest_ended || !self.host_ended {
            return None;
        }
        match self.engine.socket().state() {
            State::TimeWait => Some(Progress::Closed),
            State::Closed if self.engine.has_all_acknowledged() => Some(Progress::Left),
            // By a RST of the guest's, or of ours when it fell silent.
            State::Closed => Some(Progress::Gone),
            State::Listen
            | State::SynSent
            | State::SynReceived
            | State::Established
            | State::FinWait1
            | State::FinWait2
            | State::CloseWait
            | State::Closing
            | State::LastAck => None,
        }
    }

    /// When it must be looked at next.
    pub(super) fn deadline(&mut self, now: Instant) -> Instant {
        // The keep-alive timer runs in every open state, so there is always a time; the fallback
        // only covers states that end within this turn.
        let due = if self.silent {
            None
        } else {
            self.engine.poll_at(now)
        };
        let at = due.unwrap_or(now + TIME_WAIT).max(now);
        let owed = self.engine.owed.filter(|_| !self.silent).map(|it| it.at);
        let others = [self.guest_deadline, self.engine.ahead.due(), owed];
        others.into_iter().flatten().fold(at, Instant::min)
    }
}
