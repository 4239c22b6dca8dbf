//! A TCP flow: the guest's connection on one side, the host's on the other, bytes in between.
//!
//! Comes in: segments of this flow, readiness of its host socket, the time. Goes out: frames to the
//! guest, calls on the host socket, and a [`Progress`] that tells the stack what to do next. The
//! guest's SYN is kept until the host has connected; ends of stream and resets cross over one by
//! one; the flow is over when both directions are, and not before all data that was acknowledged
//! to the guest has reached the host's socket.

use std::io::{self, ErrorKind};

use smoltcp::socket::tcp::{RecvError, State};

use super::tcp_engine::{Engine, EnginePool, LastSent, Path, Syn};
use crate::buf::TxBatch;
use crate::host::{Event, QueuedError, TcpSocket};
use crate::net::emit::{self, BareSegment, Ends};
use crate::net::parse::{self, TcpSegment, tcp_flags};
use crate::net::{Duration, Instant, Wire};

/// How long a host may take to accept or refuse; the kernel gives up after about this time.
const CONNECT_PATIENCE: Duration = Duration::from_secs(130);

/// How long a guest may take to answer the SYN of a published port's client.
const GUEST_PATIENCE: Duration = Duration::from_secs(75);

/// How long the end of a connection is remembered, to answer a repeated FIN.
const TIME_WAIT: Duration = Duration::from_secs(10);

/// Turns of both directions in one pump: the budget of a flow.
const ROUNDS: usize = 8;

/// Bytes taken from the host's socket before they are sent on: little enough to be still in the
/// nearest cache when they are copied out again.
const CHUNK: usize = 128 * 1024;

/// What a step of a flow led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Nothing more until something happens or the deadline comes.
    Idle,
    /// More to do, now: the batch was full or the budget used up.
    More,
    /// Over; the end is remembered for a while.
    Closed,
    /// Over, with nothing to remember.
    Gone,
}

/// How the host's connect ended for the guest.
#[derive(Debug)]
pub enum Connected {
    /// The SYN|ACK is on its way.
    Yes,
    /// Not yet decided.
    Pending,
    /// Failed; the guest is to be told.
    Failed(io::Error),
}

/// A TCP flow.
pub struct TcpFlow<S> {
    /// The guest's endpoint, and the other as the guest sees it.
    pub ends: Ends,
    /// Other addresses that were tried before, where there is a choice.
    pub tried: usize,
    path: Path,
    state: Phase<S>,
}

enum Phase<S> {
    /// The guest's SYN waits for the host to connect.
    Connecting { socket: S, syn: Syn },
    /// Both sides have a connection, or the guest is being connected to.
    Open(Box<Open<S>>),
    /// Over, but a repeated FIN is answered.
    TimeWait(LastSent),
    /// Over.
    Gone,
}

struct Open<S> {
    engine: Engine,
    socket: S,
    readable: bool,
    writable: bool,
    /// The host's stream has ended: a short read does not mean that nothing is left.
    hangup: bool,
    /// The host's side spoke up after its end of stream: it may have been reset.
    look_for_error: bool,
    /// The guest has reset its side.
    guest_reset: bool,
    /// The end of both streams has been acknowledged to the guest: nothing more is sent.
    silent: bool,
    /// One side failed: the host's socket is reset, not closed.
    failed: bool,
    /// The host has sent its end of stream, and it was passed on.
    host_ended: bool,
    /// The guest has sent its end of stream, and it was passed on.
    guest_ended: bool,
    /// Until when the guest must have answered.
    guest_deadline: Option<Instant>,
    /// Type of service of the guest's latest segment.
    tos: u8,
}

/// What ended one direction early.
enum Failure {
    /// The host's side failed: the guest gets a RST.
    Host,
    /// The guest's side failed: the host gets a RST.
    Guest,
}

impl<S: TcpSocket> TcpFlow<S> {
    /// A flow for a guest's SYN whose host socket is connecting. `ends.src` is the guest.
    #[must_use]
    pub const fn connecting(ends: Ends, path: Path, socket: S, syn: Syn) -> Self {
        Self {
            ends,
            tried: 0,
            path,
            state: Phase::Connecting { socket, syn },
        }
    }

    /// A flow for a client of a published port: begins a connection to the guest, `ends.src`, from
    /// the client, `ends.dst`. `None` when the endpoints can't have a connection.
    #[must_use]
    pub fn published(
        ends: Ends,
        path: Path,
        socket: S,
        mut engine: Engine,
        now: Instant,
    ) -> Option<Self> {
        engine.connect(ends.reversed()).ok()?;
        let guest_deadline = Some(now + GUEST_PATIENCE);
        Some(Self {
            ends,
            tried: 0,
            path,
            state: Phase::Open(Box::new(Open::new(engine, socket, guest_deadline))),
        })
    }

    /// The way to the guest.
    #[must_use]
    pub const fn wire(&self) -> Wire {
        self.path.wire
    }

    /// The first deadline of a flow whose host socket is connecting.
    #[must_use]
    pub fn connect_deadline(now: Instant) -> Instant {
        now + CONNECT_PATIENCE
    }

    /// Tries another address while the guest's SYN waits.
    pub fn connect_instead(&mut self, other: S, tried: usize) {
        if let Phase::Connecting { socket, .. } = &mut self.state {
            *socket = other;
            self.tried = tried;
        }
    }

    /// What the network said about a connect that failed, where it was the network.
    pub fn connect_error(&mut self) -> Option<QueuedError> {
        match &mut self.state {
            Phase::Connecting { socket, .. } => socket.connect_error(),
            Phase::Open(_) | Phase::TimeWait(_) | Phase::Gone => None,
        }
    }

    /// The guest's SYN, while it waits.
    #[must_use]
    pub const fn waiting_syn(&self) -> Option<Syn> {
        match &self.state {
            Phase::Connecting { syn, .. } => Some(*syn),
            Phase::Open(_) | Phase::TimeWait(_) | Phase::Gone => None,
        }
    }

    /// The host socket became ready.
    pub fn ready(&mut self, event: Event) {
        if let Phase::Open(open) = &mut self.state {
            open.readable |= event.readable;
            open.writable |= event.writable;
            open.hangup |= event.hangup;
            open.look_for_error |= event.hangup && open.host_ended;
        }
    }

    /// The host's connect ended one way or the other: on success the guest's SYN is answered.
    pub fn finish_connect(
        &mut self,
        now: Instant,
        tx: &mut TxBatch,
        engine: impl FnOnce(Path, std::net::IpAddr) -> Engine,
    ) -> Connected {
        let Phase::Connecting { socket, syn } = &mut self.state else {
            return Connected::Pending;
        };
        if let Err(error) = socket.connect_outcome() {
            return Connected::Failed(error);
        }
        let syn = *syn;
        let mut engine = engine(self.path, self.ends.dst.ip());
        if engine.accept(now, tx, self.ends, syn).is_err() {
            return Connected::Failed(ErrorKind::InvalidInput.into());
        }
        if let Phase::Connecting { socket, .. } = std::mem::replace(&mut self.state, Phase::Gone) {
            let mut open = Open::new(engine, socket, Some(now + GUEST_PATIENCE));
            open.tos = syn.tos;
            self.state = Phase::Open(Box::new(open));
        }
        Connected::Yes
    }

    /// A segment of this flow came from the guest; `packet` is its whole IP packet. True when the
    /// flow wants to be pumped, false when nothing changed.
    pub fn segment(
        &mut self,
        now: Instant,
        tx: &mut TxBatch,
        segment: &TcpSegment,
        packet: &[u8],
    ) -> bool {
        match &mut self.state {
            Phase::Open(open) => {
                open.segment(now, tx, segment, packet);
                true
            }
            // The guest gave up or started over while the host connects.
            Phase::Connecting { syn, .. } => {
                if segment.has(tcp_flags::RST) && segment.seq == syn.seq.wrapping_add(1) {
                    self.state = Phase::Gone;
                    return true;
                }
                if segment.is_connect() && segment.seq != syn.seq {
                    *syn = Syn {
                        seq: segment.seq,
                        window: segment.window,
                        tos: segment.tos,
                        options: parse::syn_options(segment.bytes(packet)),
                    };
                }
                false
            }
            Phase::TimeWait(last) => {
                if segment.has(tcp_flags::RST) {
                    self.state = Phase::Gone;
                    return true;
                }
                if segment.payload_len > 0 || segment.has(tcp_flags::FIN | tcp_flags::SYN) {
                    let last = *last;
                    self.acknowledge(tx, last);
                }
                false
            }
            Phase::Gone => true,
        }
    }

    /// The guest does not want the connection that is being opened to it; one that is open lives on
    /// (RFC 1122 4.2.3.9). True when the flow wants to be pumped.
    pub fn refuse(&mut self) -> bool {
        match &mut self.state {
            Phase::Open(open) => open.refuse(),
            Phase::Connecting { .. } | Phase::TimeWait(_) | Phase::Gone => false,
        }
    }

    /// A SYN may begin a new connection on this flow's endpoints (RFC 9293 3.6.1: from TIME-WAIT,
    /// with a sequence number beyond the old connection's).
    #[must_use]
    pub fn gives_way_to(&self, segment: &TcpSegment) -> bool {
        match &self.state {
            Phase::TimeWait(last) => {
                segment.is_connect() && segment.seq.wrapping_sub(last.ack).cast_signed() >= 0
            }
            Phase::Gone => true,
            Phase::Connecting { .. } | Phase::Open(_) => false,
        }
    }

    fn acknowledge(&self, tx: &mut TxBatch, last: LastSent) {
        let segment = BareSegment {
            ends: self.ends.reversed(),
            seq: last.seq,
            ack: last.ack,
            flags: tcp_flags::ACK,
            window: last.window,
            timestamps: last.timestamps,
        };
        emit::tcp_bare(tx, self.path.wire, segment);
    }

    /// Moves bytes both ways and sends what is due.
    pub fn pump(&mut self, now: Instant, tx: &mut TxBatch, pool: &mut EnginePool) -> Progress {
        let Phase::Open(open) = &mut self.state else {
            return match self.state {
                Phase::Gone => Progress::Gone,
                Phase::Connecting { .. } | Phase::Open(_) | Phase::TimeWait(_) => Progress::Idle,
            };
        };
        let progress = open.pump(now, tx);
        if !matches!(progress, Progress::Closed | Progress::Gone) {
            return progress;
        }
        let last = open.engine.last_sent();
        let over = if progress == Progress::Closed {
            Phase::TimeWait(last)
        } else {
            Phase::Gone
        };
        if let Phase::Open(open) = std::mem::replace(&mut self.state, over) {
            pool.put(open.engine);
            if open.failed {
                open.socket.reset();
            }
        }
        progress
    }

    /// When the flow must be looked at next.
    pub fn deadline(&mut self, now: Instant) -> Instant {
        match &mut self.state {
            Phase::Connecting { .. } => Self::connect_deadline(now),
            Phase::Open(open) => open.deadline(now),
            Phase::TimeWait(_) | Phase::Gone => now + TIME_WAIT,
        }
    }

    /// Both sides have, or are about to have, a connection.
    #[must_use]
    pub const fn is_open(&self) -> bool {
        matches!(self.state, Phase::Open(_))
    }

    /// Only the end is remembered.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        matches!(self.state, Phase::TimeWait(_) | Phase::Gone)
    }
}

/// The connection is over. Anything else that a socket has kept is a complaint of a router's, which
/// an open connection outlives (RFC 1122 4.2.3.9).
fn is_end(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            | ErrorKind::TimedOut
    )
}

impl<S: TcpSocket> Open<S> {
    fn new(engine: Engine, socket: S, guest_deadline: Option<Instant>) -> Self {
        // A fresh socket is taken to be ready: a call finds out for less than an event costs.
        Self {
            engine,
            socket,
            readable: true,
            writable: true,
            hangup: false,
            look_for_error: false,
            guest_reset: false,
            silent: false,
            failed: false,
            host_ended: false,
            guest_ended: false,
            guest_deadline,
            tos: 0,
        }
    }

    fn pump(&mut self, now: Instant, tx: &mut TxBatch) -> Progress {
        if self.guest_deadline.is_some_and(|deadline| now >= deadline) {
            return self.fail(&Failure::Guest, now, tx);
        }
        for _ in 0..ROUNDS {
            let moved = match self.transfer() {
                Ok(moved) => moved,
                Err(failure) => return self.fail(&failure, now, tx),
            };
            if !self.silent && self.engine.egress(now, tx, true) {
                return Progress::More;
            }
            // In TIME-WAIT smoltcp would forget what the host has not taken yet.
            self.silent = self.engine.socket().state() == State::TimeWait;
            if let Some(over) = self.over() {
                return over;
            }
            if moved == 0 {
                return Progress::Idle;
            }
        }
        Progress::More
    }

    fn transfer(&mut self) -> Result<usize, Failure> {
        if self.guest_deadline.is_some() {
            match self.engine.socket().state() {
                State::SynSent | State::SynReceived => return Ok(0),
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
        let to_host = self.carry_to_host()?;
        self.wake();
        let moved = to_host + self.carry_to_guest()?;
        self.engine.carried(moved);
        if self.guest_reset || self.ended_too_soon() {
            return Err(Failure::Guest);
        }
        if std::mem::take(&mut self.look_for_error)
            && let Err(error) = self.socket.connect_outcome()
            && is_end(&error)
        {
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
    fn segment(&mut self, now: Instant, tx: &mut TxBatch, segment: &TcpSegment, packet: &[u8]) {
        self.silent = false;
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
        self.engine.segment(now, tx, segment, packet);
        let closed = matches!(self.engine.socket().state(), State::Closed | State::Listen);
        self.guest_reset |= closed && !ending && segment.has(tcp_flags::RST);
    }

    fn wake(&mut self) {
        let woken = self.socket.woken();
        self.readable |= woken.readable;
        self.writable |= woken.writable;
    }

    fn refuse(&mut self) -> bool {
        let opening = self.engine.socket().state() == State::SynSent;
        if opening {
            self.engine.socket().abort();
        }
        opening
    }

    /// Guest to host: the receive ring is handed to `send` in place.
    fn carry_to_host(&mut self) -> Result<usize, Failure> {
        let mut moved = 0;
        while self.writable && self.engine.socket().recv_queue() > 0 {
            let socket = &mut self.socket;
            let sent = self.engine.socket().recv(|bytes| match socket.send(bytes) {
                Ok(len) => (len, Ok((len, bytes.len()))),
                Err(error) => (0, Err(error)),
            });
            match sent {
                Ok(Ok((len, offered))) => {
                    moved += len;
                    self.writable = len == offered;
                }
                Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                Ok(Err(_)) => return Err(Failure::Host),
                Err(RecvError::Finished | RecvError::InvalidState) => break,
            }
        }
        self.pass_guest_end()?;
        Ok(moved)
    }

    fn pass_guest_end(&mut self) -> Result<(), Failure> {
        if self.guest_ended || self.engine.socket().recv_queue() > 0 {
            return Ok(());
        }
        match self.engine.socket().recv(|_| (0, ())) {
            Ok(()) => Ok(()),
            Err(RecvError::Finished) => {
                self.guest_ended = true;
                self.socket.shutdown_write().map_err(|_| Failure::Host)
            }
            // No connection any more; what that means `transfer` sees.
            Err(RecvError::InvalidState) => Ok(()),
        }
    }

    /// Host to guest: `recv` writes into the send ring in place.
    fn carry_to_guest(&mut self) -> Result<usize, Failure> {
        let mut moved = 0;
        while self.readable && !self.host_ended && self.engine.socket().can_send() {
            let socket = &mut self.socket;
            let received = self.engine.socket().send(|room| {
                let chunk = room.len().min(CHUNK);
                match socket.recv(&mut room[..chunk]) {
                    Ok(len) => (len, Ok((len, chunk))),
                    Err(error) => (0, Err(error)),
                }
            });
            match received {
                Ok(Ok((0, _))) => {
                    self.host_ended = true;
                    // A RST may have come with the end, in one event: the kernel tells the end first.
                    self.look_for_error |= self.hangup;
                    self.engine.socket().close();
                }
                Ok(Ok((len, room))) => {
                    moved += len;
                    // A short read found the end of what is there; the next edge tells of more.
                    self.readable = len == room || self.hangup;
                    break;
                }
                Ok(Err(error)) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                Ok(Err(_)) => return Err(Failure::Host),
                Err(_) => break,
            }
        }
        Ok(moved)
    }

    /// Both directions have ended and everything has arrived.
    fn over(&mut self) -> Option<Progress> {
        if !self.guest_ended || !self.host_ended {
            return None;
        }
        let state = self.engine.socket().state();
        if state == State::TimeWait {
            Some(Progress::Closed)
        } else {
            (state == State::Closed).then_some(Progress::Gone)
        }
    }

    fn fail(&mut self, failure: &Failure, now: Instant, tx: &mut TxBatch) -> Progress {
        self.failed = true;
        if matches!(failure, Failure::Host) || self.guest_deadline.is_some() {
            self.engine.socket().abort();
            self.engine.egress(now, tx, false);
        }
        Progress::Gone
    }

    fn deadline(&mut self, now: Instant) -> Instant {
        // The keep-alive timer runs in every open state, so there is always a time; the fallback
        // only covers states that end within this turn.
        let due = if self.silent {
            None
        } else {
            self.engine.poll_at(now)
        };
        let at = due.unwrap_or(now + TIME_WAIT).max(now);
        self.guest_deadline.map_or(at, |deadline| at.min(deadline))
    }
}
