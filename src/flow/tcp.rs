//! A TCP flow: the guest's connection on one side, the host's on the other, bytes in between.
//!
//! Owns the phases of its life: the guest's SYN is kept until the host has connected, then bytes are
//! moved (`tcp_open.rs`), then the end is remembered for a while. Comes in: segments of this flow,
//! readiness of its host socket, the time. Goes out: frames to the guest, and a [`Progress`] that tells
//! the stack what to do next.

use std::io::{self, ErrorKind};

use super::Fate;
use super::tcp_engine::{Engine, LastSent, Path, Syn};
use super::tcp_open::Open;
use super::tcp_patience::seconds;
use super::tcp_pool::EnginePool;
use super::tcp_rest::Rest;
use crate::buf::TxBatch;
use crate::host::{Event, QueuedError, TcpSocket};
use crate::net::emit::{self, BareSegment, Ends};
use crate::net::parse::{self, TcpSegment, tcp_flags};
use crate::net::{DropReason, Duration, Instant, Wire};

/// How long the end of a connection is remembered, to answer a repeated FIN.
pub(super) const TIME_WAIT: Duration = Duration::from_secs(10);

/// How long a flow that has something to do waits for memory.
const MEMORY_PATIENCE: Duration = Duration::from_millis(100);

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
    /// The same, but the guest remembers it: it has ended its stream first.
    Left,
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
    Open(Open<S>),
    /// So they have, but nothing moves.
    Resting(Open<S, Rest>),
    /// Over, but a repeated FIN is answered, with this sequence number.
    TimeWait(u32, LastSent),
    /// Over.
    Gone,
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
        mut engine: Box<Engine>,
        now: Instant,
    ) -> Option<Self> {
        engine.connect(ends.reversed()).ok()?;
        let guest_deadline = now + seconds(path.timeouts.guest());
        Some(Self {
            ends,
            tried: 0,
            path,
            state: Phase::Open(Open::new(engine, socket, guest_deadline)),
        })
    }

    /// The way to the guest.
    #[must_use]
    pub const fn wire(&self) -> Wire {
        self.path.wire
    }

    /// The guest has another Ethernet address by now.
    pub const fn follow(&mut self, wire: Wire) {
        self.path.wire = wire;
        if let Phase::Open(open) = &mut self.state {
            open.follow(wire);
        }
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
            Phase::Open(_) | Phase::Resting(_) | Phase::TimeWait(..) | Phase::Gone => None,
        }
    }

    /// The host had connected before the call that began it returned.
    #[must_use]
    pub fn is_connected_already(&self) -> bool {
        match &self.state {
            Phase::Connecting { socket, .. } => socket.is_connected_already(),
            Phase::Open(_) | Phase::Resting(_) | Phase::TimeWait(..) | Phase::Gone => false,
        }
    }

    /// The guest's SYN, while it waits.
    #[must_use]
    pub const fn waiting_syn(&self) -> Option<Syn> {
        match &self.state {
            Phase::Connecting { syn, .. } => Some(*syn),
            Phase::Open(_) | Phase::Resting(_) | Phase::TimeWait(..) | Phase::Gone => None,
        }
    }

    /// The host socket became ready.
    pub fn ready(&mut self, event: Event) {
        match &mut self.state {
            Phase::Open(open) => open.ready(event),
            Phase::Resting(open) => open.ready(event),
            Phase::Connecting { .. } | Phase::TimeWait(..) | Phase::Gone => {}
        }
    }

    /// The host's connect ended one way or the other: on success the guest's SYN is answered.
    pub fn finish_connect(
        &mut self,
        now: Instant,
        tx: &mut TxBatch,
        engine: impl FnOnce(Path, std::net::IpAddr) -> Option<Box<Engine>>,
    ) -> Connected {
        let Phase::Connecting { socket, syn } = &mut self.state else {
            return Connected::Pending;
        };
        if !socket.is_connected_already()
            && let Err(error) = socket.connect_outcome()
        {
            return Connected::Failed(error);
        }
        let syn = *syn;
        let Some(mut engine) = engine(self.path, self.ends.dst.ip()) else {
            return Connected::Failed(ErrorKind::OutOfMemory.into());
        };
        if engine.accept(now, tx, self.ends, syn).is_err() {
            return Connected::Failed(ErrorKind::InvalidInput.into());
        }
        if let Phase::Connecting { socket, .. } = std::mem::replace(&mut self.state, Phase::Gone) {
            let patience = seconds(self.path.timeouts.guest());
            let open = Open::new(engine, socket, now + patience).marked(syn.tos);
            self.state = Phase::Open(open);
        }
        Connected::Yes
    }

    /// A segment of this flow came from the guest; `packet` is its whole IP packet. Gives what became of it, and whether
    /// the flow wants to be pumped.
    pub fn segment(
        &mut self,
        now: Instant,
        (tx, pool): (&mut TxBatch, &mut EnginePool),
        segment: &TcpSegment,
        packet: &[u8],
    ) -> (Fate, bool) {
        const UNACCEPTABLE: Fate = Fate::Dropped(DropReason::TcpUnacceptable);
        self.wake(now, pool);
        match &mut self.state {
            Phase::Open(open) => {
                let fate = open.segment(now, tx, segment, packet);
                (fate, true)
            }
            // No memory. A RST takes none, and is not repeated; anything else the guest will send again.
            Phase::Resting(open) => {
                let ends = segment.has(tcp_flags::RST) && open.is_reset_at(segment.seq);
                if ends
                    && let Phase::Resting(open) = std::mem::replace(&mut self.state, Phase::Gone)
                {
                    open.reset();
                    return (Fate::Forwarded, true);
                }
                (Fate::Dropped(DropReason::TcpNoMemory), false)
            }
            // The guest gave up or started over while the host connects.
            Phase::Connecting { syn, .. } => {
                if segment.has(tcp_flags::RST) && segment.seq == syn.seq.wrapping_add(1) {
                    self.state = Phase::Gone;
                    return (Fate::Forwarded, true);
                }
                if !segment.is_connect() {
                    return (UNACCEPTABLE, false);
                }
                if segment.seq != syn.seq {
                    *syn = Syn {
                        seq: segment.seq,
                        window: segment.window,
                        tos: segment.tos,
                        options: parse::syn_options(segment.bytes(packet)),
                    };
                }
                (Fate::Answered, false)
            }
            Phase::TimeWait(seq, last) => {
                if segment.has(tcp_flags::RST) {
                    // RFC 1337: an old or made up one ends nothing.
                    if segment.seq != last.ack {
                        return (UNACCEPTABLE, false);
                    }
                    self.state = Phase::Gone;
                    return (Fate::Answered, true);
                }
                if segment.payload_len > 0 || segment.has(tcp_flags::FIN | tcp_flags::SYN) {
                    let last = (*seq, *last);
                    self.say(tx, last, tcp_flags::ACK);
                }
                (Fate::Answered, false)
            }
            Phase::Gone => (UNACCEPTABLE, true),
        }
    }

    /// The guest does not want the connection that is being opened to it; one that is open lives on
    /// (RFC 1122 4.2.3.9). True when the flow wants to be pumped.
    pub fn refuse(&mut self) -> bool {
        match &mut self.state {
            Phase::Open(open) => open.refuse(),
            Phase::Connecting { .. } | Phase::Resting(_) | Phase::TimeWait(..) | Phase::Gone => {
                false
            }
        }
    }

    /// A SYN may begin a new connection on this flow's endpoints (RFC 9293 3.6.1: from TIME-WAIT,
    /// with a sequence number beyond the old connection's).
    #[must_use]
    pub fn gives_way_to(&self, segment: &TcpSegment) -> bool {
        match &self.state {
            Phase::TimeWait(_, last) => {
                segment.is_connect() && segment.seq.wrapping_sub(last.ack).cast_signed() >= 0
            }
            Phase::Gone => true,
            Phase::Connecting { .. } | Phase::Open(_) | Phase::Resting(_) => false,
        }
    }

    /// Has a guest that remembers the connection ([`Progress::Left`]) forget it, by the RST that ends TIME-WAIT (RFC 9293
    /// 3.10.7.4). That is to keep the segments of an old connection out of a new one (RFC 1337): of this one none is left,
    /// since all that we sent was acknowledged, and the link keeps nothing back.
    pub fn end_wait(&self, tx: &mut TxBatch) {
        if let Phase::TimeWait(seq, last) = self.state {
            self.say(tx, (seq, last), tcp_flags::RST | tcp_flags::ACK);
        }
    }

    fn say(&self, tx: &mut TxBatch, (seq, last): (u32, LastSent), flags: u8) {
        let segment = BareSegment {
            ends: self.ends.reversed(),
            seq,
            ack: last.ack,
            flags,
            window: last.window,
            timestamps: last.timestamps,
        };
        emit::tcp_bare(tx, self.path.wire, segment);
    }

    /// Moves bytes both ways and sends what is due.
    pub fn pump(&mut self, now: Instant, tx: &mut TxBatch, pool: &mut EnginePool) -> Progress {
        if let Phase::Resting(open) = &self.state
            && (open.is_called() || now >= open.deadline(self.path.timeouts))
        {
            self.wake(now, pool);
        }
        let Phase::Open(open) = &mut self.state else {
            return match self.state {
                Phase::Gone => Progress::Gone,
                Phase::Connecting { .. }
                | Phase::Open(_)
                | Phase::Resting(_)
                | Phase::TimeWait(..) => Progress::Idle,
            };
        };
        let progress = open.pump(now, tx);
        if matches!(progress, Progress::Idle | Progress::More) {
            if open.has_too_much(now) {
                self.exchange(now, pool);
                if self.is_moving() {
                    // It may have waited for room.
                    return Progress::More;
                }
            } else if !open.save_memory(now, tx) {
                return Progress::More;
            }
            return progress;
        }
        let (seq, last) = open.last_sent();
        let over = if progress == Progress::Gone {
            Phase::Gone
        } else {
            Phase::TimeWait(seq, last)
        };
        if let Phase::Open(open) = std::mem::replace(&mut self.state, over) {
            open.end(pool);
        }
        progress
    }

    /// Sends what is outstanding again in the next pump. True when the flow wants to be pumped.
    pub fn repeat(&mut self) -> bool {
        match &mut self.state {
            Phase::Open(open) => {
                open.repeat();
                true
            }
            Phase::Connecting { .. } | Phase::Resting(_) | Phase::TimeWait(..) | Phase::Gone => {
                false
            }
        }
    }

    /// When the flow must be looked at next.
    pub fn deadline(&mut self, now: Instant) -> Instant {
        let timeouts = self.path.timeouts;
        match &mut self.state {
            Phase::Connecting { .. } => now + seconds(timeouts.tcp_connect),
            Phase::Open(open) => open.deadline(now),
            Phase::Resting(open) if open.is_called() || now >= open.deadline(timeouts) => {
                now + MEMORY_PATIENCE
            }
            Phase::Resting(open) => open.deadline(timeouts),
            Phase::TimeWait(..) | Phase::Gone => now + TIME_WAIT,
        }
    }

    /// One side has no connection yet: the host's, or the guest's.
    #[must_use]
    pub const fn is_half_open(&self) -> bool {
        match &self.state {
            Phase::Connecting { .. } => true,
            Phase::Open(open) => open.is_half_open(),
            Phase::Resting(_) | Phase::TimeWait(..) | Phase::Gone => false,
        }
    }

    /// Ends it for want of room. A guest that was answered hears of it, and so does the host.
    pub fn abandon(self, now: Instant, tx: &mut TxBatch, pool: &mut EnginePool) {
        if let Phase::Open(mut open) = self.state {
            open.give_up(now, tx);
            open.end(pool);
        }
    }

    /// Both sides have, or are about to have, a connection.
    #[must_use]
    pub const fn is_open(&self) -> bool {
        matches!(self.state, Phase::Open(_) | Phase::Resting(_))
    }

    /// It holds an engine and has moved for the first time since it took it, or since it was not let rest.
    pub const fn begins_to_move(&mut self) -> bool {
        match &mut self.state {
            Phase::Open(open) => open.begins_to_move(),
            Phase::Connecting { .. } | Phase::Resting(_) | Phase::TimeWait(..) | Phase::Gone => {
                false
            }
        }
    }

    const fn is_moving(&self) -> bool {
        matches!(self.state, Phase::Open(_))
    }

    /// When a flow that holds an engine last had something to do.
    #[must_use]
    pub const fn active_at(&self) -> Option<Instant> {
        match &self.state {
            Phase::Open(open) => Some(open.active_at()),
            Phase::Connecting { .. } | Phase::Resting(_) | Phase::TimeWait(..) | Phase::Gone => {
                None
            }
        }
    }

    /// Gives its engine back if nothing is under way; what is left takes it again when something comes.
    /// True when it did.
    pub fn rest(&mut self, now: Instant, pool: &mut EnginePool) -> bool {
        let drained = match &mut self.state {
            Phase::Open(open) => open.is_drained(now),
            Phase::Connecting { .. } | Phase::Resting(_) | Phase::TimeWait(..) | Phase::Gone => {
                false
            }
        };
        if drained {
            self.give_engine(pool);
        }
        drained
    }

    fn give_engine(&mut self, pool: &mut EnginePool) {
        self.state = match std::mem::replace(&mut self.state, Phase::Gone) {
            Phase::Open(open) => Phase::Resting(open.rest(pool)),
            other @ (Phase::Connecting { .. }
            | Phase::Resting(_)
            | Phase::TimeWait(..)
            | Phase::Gone) => other,
        };
    }

    /// Takes another engine, whose rings hold nothing.
    fn exchange(&mut self, now: Instant, pool: &mut EnginePool) {
        self.give_engine(pool);
        self.wake(now, pool);
        if let Phase::Open(open) = &mut self.state {
            open.goes_on_moving(true);
        }
    }

    /// Takes an engine again, if there is memory for one.
    fn wake(&mut self, now: Instant, pool: &mut EnginePool) {
        if !matches!(self.state, Phase::Resting(_)) {
            return;
        }
        if let Phase::Resting(open) = std::mem::replace(&mut self.state, Phase::Gone) {
            self.state = match open.wake(now, (self.path, self.ends), pool) {
                Ok(open) => Phase::Open(open),
                Err(open) => open.map_or(Phase::Gone, Phase::Resting),
            };
        }
    }

    /// Only the end is remembered.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        matches!(self.state, Phase::TimeWait(..) | Phase::Gone)
    }
}
