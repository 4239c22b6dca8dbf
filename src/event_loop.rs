//! The loop that moves frames and events, turn by turn.
//!
//! Owns the link, the host and the stack; the batches are lent for a turn by the thread that carries it. Where several
//! loops serve one network, what is another's is handed over after a turn. A turn reads the clock, takes a batch
//! of frames, a batch of events and what is overdue, lets the flows move bytes, and sends what was
//! produced. Every batch is bounded, so no flow keeps the others waiting for longer than a turn. When to take the
//! next turn is `carrier.rs`'s to know.

use std::io;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::buf::{RxBatch, TxBatch};
use crate::config::Publish;
use crate::control::Command;
use crate::handover::Handover;
use crate::host::kernel::KernelHost;
use crate::link::{Link, Look};
use crate::preemption::Urgency;
use crate::stack::share::Handed;
use crate::stack::{self, Stack, Turn};

/// Frames and bytes taken from the link in one turn: a few of the largest size.
const TURN_FRAMES: usize = 128;
const TURN_BYTES: usize = 256 * 1024;
/// Frames and bytes taken from the link before the stack sees them: one of the largest size, which is
/// then still in the nearest cache, or many short ones.
const RX_FRAMES: usize = 64;
const RX_BYTES: usize = 96 * 1024;
/// Frames and bytes produced in one turn.
const TX_FRAMES: usize = 512;
const TX_BYTES: usize = 256 * 1024;
/// Of a frame that is many datagrams so many cost as much as a frame.
const DATAGRAMS_OF_A_FRAME: usize = 16;
/// Things from other workers that are taken in one turn.
const TURN_HANDED: usize = 128;
/// More bytes than this in a turn are bulk: whoever carries that has better use for the processor than
/// looking for more.
const BULK: u64 = 32 * 1024;
/// After bulk of one connection that went past the link, for so long: the kernel carries it, and client and server have
/// use for the processor. Measured on two cores (Linux 6.18), over looking: 11 % more throughput in, 8 % out, at 0.83 of the
/// processor time; that the thread then interrupts nobody gives 13 % more again, in and out, at half the time. What goes
/// over the link gains nothing by either.
const AFTER_SPLICED: stack::Duration = stack::Duration::from_micros(500);
/// After something came over the link, for so long somebody there may wait for an answer, whatever goes past it.
const AFTER_LINKED: stack::Duration = stack::Duration::from_millis(2);
/// A loop with something to do says so often what it holds, to who wants to hear everything.
const BETWEEN_SIZES: stack::Duration = stack::Duration::from_secs(10);

/// Why the loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was told to.
    Stopped,
    /// The link is gone: nobody is left to serve.
    LinkGone,
}

/// What a turn left to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// More, at once.
    Again,
    /// Nothing until something happens, or this time comes.
    Wait(Option<Instant>),
}

/// What came of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turned {
    /// What is left to do.
    pub next: Next,
    /// A frame or an event had come.
    pub moved: bool,
    /// Many bytes went on, or did so just now past the link.
    pub bulk: bool,
    /// How soon the next turn should come when something is there for it.
    pub urgency: Urgency,
}

impl Turned {
    /// Of no turn at all.
    pub const NOTHING: Self = Self {
        next: Next::Wait(None),
        moved: false,
        bulk: false,
        urgency: Urgency::Unknown,
    };

    /// Of two turns.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        let next = match (self.next, other.next) {
            (Next::Wait(one), Next::Wait(other)) => {
                Next::Wait([one, other].into_iter().flatten().min())
            }
            (Next::Again, _) | (_, Next::Again) => Next::Again,
        };
        Self {
            next,
            moved: self.moved || other.moved,
            bulk: self.bulk || other.bulk,
            urgency: self.urgency.max(other.urgency),
        }
    }
}

/// What a turn could not do without.
#[derive(Debug)]
pub enum Failed {
    /// The link is gone.
    Link(io::Error),
    /// Events can't be asked for.
    Poller(io::Error),
}

/// Why a loop was woken.
#[derive(Debug)]
pub enum Woken {
    /// It is told something, or nobody is left to tell it anything.
    Told(Option<Command>),
    /// There may be something to do.
    Ready,
}

/// What comes to a loop from within the process.
pub struct Incoming {
    /// What it is told; it ends when nobody can tell it anything any more.
    pub commands: mpsc::Receiver<Command>,
    /// What other workers hand over.
    pub handover: Handover<KernelHost>,
}

/// What a turn fills and empties. A thread has one for all its loops: memory that the last turn used is in the caches.
pub struct Batches {
    rx: RxBatch,
    tx: TxBatch,
    events: Vec<crate::host::Event>,
}

impl Default for Batches {
    fn default() -> Self {
        Self {
            rx: RxBatch::new(RX_FRAMES, RX_BYTES),
            tx: TxBatch::new(TX_FRAMES, TX_BYTES),
            events: Vec::with_capacity(256),
        }
    }
}

/// The loop and all that it owns.
pub struct EventLoop<L> {
    link: L,
    host: KernelHost,
    stack: Stack<KernelHost>,
    incoming: Incoming,
    epoch: Instant,
    /// When what the stack holds is told next.
    tells_at: stack::Instant,
    /// Until then it does not look for more.
    spliced_until: stack::Instant,
    /// Until then somebody on the link may wait for an answer.
    linked_until: stack::Instant,
}

impl<L: Link> EventLoop<L> {
    /// A loop over these.
    #[must_use]
    pub fn new(link: L, host: KernelHost, stack: Stack<KernelHost>, incoming: Incoming) -> Self {
        Self {
            link,
            host,
            stack,
            incoming,
            epoch: Instant::now(),
            tells_at: stack::Instant::ZERO,
            spliced_until: stack::Instant::ZERO,
            linked_until: stack::Instant::ZERO,
        }
    }

    /// Whether sockets can be bound as the configuration wants it.
    ///
    /// # Errors
    /// What binding reports.
    pub fn check_outbound(&self) -> io::Result<()> {
        self.host.check_outbound()
    }

    /// Publishes a port.
    ///
    /// # Errors
    /// What binding reports.
    pub fn publish(&mut self, rule: Publish) -> io::Result<usize> {
        self.stack.publish(&mut self.host, rule)
    }

    /// Its worker's number, from 0.
    #[must_use]
    pub const fn index(&self) -> usize {
        self.incoming.handover.index()
    }

    /// It goes to another thread next.
    pub fn leave(&mut self) {
        self.link.leave();
        self.host.leave();
    }

    /// It is in this thread now, whose runtime is to tell it of what comes; true when that does. Until then every turn
    /// looks for itself.
    pub fn settle(&mut self) -> bool {
        let settled = self.link.settle().and_then(|()| self.host.settle());
        if let Err(error) = &settled {
            tracing::debug!(worker = self.index(), %error, "not told of what comes");
        }
        settled.is_ok()
    }

    /// Has the task woken when there is something to do for this loop.
    ///
    /// # Errors
    /// When the runtime goes away.
    pub fn poll_woken(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Woken>> {
        if let Poll::Ready(command) = self.incoming.commands.poll_recv(cx) {
            return Poll::Ready(Ok(Woken::Told(command)));
        }
        let ready = [
            self.link.poll_readable(cx),
            self.host.poll_readable(cx),
            self.incoming.handover.poll_arrived(cx).map(Ok),
        ];
        let ready = ready.into_iter().find(Poll::is_ready);
        ready.map_or(Poll::Pending, |ready| ready.map_ok(|()| Woken::Ready))
    }

    /// One turn, which sends what it has put into the batches.
    ///
    /// # Errors
    /// When the link or the poller is gone.
    pub fn turn(&mut self, batches: &mut Batches, look: Look) -> Result<Turned, Failed> {
        let Batches { rx, tx, events } = batches;
        let now = now(self.epoch);
        let spliced = self.stack.counters().bytes_spliced;
        let (mut frames, mut bytes, mut more_frames) = (0, 0, true);
        while more_frames && frames < TURN_FRAMES && bytes < TURN_BYTES {
            rx.clear();
            more_frames = self.link.receive(rx, look).map_err(Failed::Link)?;
            let mut turn = Turn {
                now,
                host: &mut self.host,
                tx,
            };
            for (frame, meta) in rx.frames() {
                self.stack.handle_frame(&mut turn, frame, meta);
                let datagrams = meta
                    .udp_segment
                    .map_or(1, |it| frame.len() / usize::from(it.get()));
                frames += 1 + datagrams / DATAGRAMS_OF_A_FRAME;
                bytes += frame.len();
            }
        }
        let more_events = self
            .host
            .poll_events(events, look)
            .map_err(Failed::Poller)?;
        let mut turn = Turn {
            now,
            host: &mut self.host,
            tx,
        };
        let mut handed = 0;
        while handed < TURN_HANDED
            && let Some(thing) = self.incoming.handover.take()
        {
            // Of neighbours little waits, and it is soon noted.
            handed += usize::from(!matches!(thing, Handed::Neighbour(..)));
            self.stack.handle_handed(&mut turn, thing);
        }
        let moved = frames + handed > 0 || !events.is_empty();
        for event in events.drain(..) {
            self.stack.handle_host(&mut turn, event);
        }
        if self.link.is_back() {
            self.stack.handle_link_back(now);
        }
        self.stack.handle_timeout(&mut turn);
        let mut more_flows = self.stack.poll_transmit(&mut turn);
        while let Some((to, thing)) = self.stack.next_handed() {
            if let Err(refused) = self.incoming.handover.send(to, thing) {
                self.stack.handle_refused(&mut turn, refused);
                // What comes back is this worker's, and may have something to do.
                more_flows = true;
            }
        }
        let spliced = self.stack.counters().bytes_spliced - spliced;
        let linked = frames + handed > 0 || tx.bytes() > 0;
        let urgency = self.urgency(now, linked);
        let bulk = (bytes + tx.bytes()) as u64 + spliced > BULK || now < self.spliced_until;
        self.link.transmit(tx).map_err(Failed::Link)?;
        if now >= self.tells_at {
            self.tells_at = now + BETWEEN_SIZES;
            self.stack.tell_sizes();
        }
        let more_events = more_events || self.host.has_own_events();
        let again = more_frames || more_events || more_flows || handed == TURN_HANDED;
        let next = if again {
            Next::Again
        } else {
            let timeout = self.stack.poll_timeout().map(|at| self.wake_at(at));
            let alone = self.link.patience().map(|time| Instant::now() + time);
            Next::Wait(timeout.into_iter().chain(alone).min())
        };
        Ok(Turned {
            next,
            moved,
            bulk,
            urgency,
        })
    }

    /// Takes note of what has just gone over the link and past it, in a turn that began `now`.
    fn urgency(&mut self, now: stack::Instant, linked: bool) -> Urgency {
        if linked {
            self.linked_until = now + AFTER_LINKED;
        }
        if self.stack.take_spliced_most() > BULK {
            self.spliced_until = self::now(self.epoch) + AFTER_SPLICED;
        }
        if now < self.linked_until {
            Urgency::AtOnce
        } else if now < self.spliced_until {
            Urgency::Later
        } else {
            Urgency::Unknown
        }
    }

    /// The runtime's time for a time of the stack.
    fn wake_at(&self, at: stack::Instant) -> Instant {
        let micros = u64::try_from(at.total_micros()).unwrap_or(0);
        self.epoch + Duration::from_micros(micros)
    }

    /// Does what it is told; true when that is to stop. Whoever asked may be gone by now.
    pub fn obey(&mut self, command: Option<Command>) -> bool {
        match command {
            Some(Command::Publish { rule, reply }) => {
                let _ = reply.send(self.stack.publish(&mut self.host, rule));
            }
            Some(Command::Unpublish { id, reply }) => {
                let freed = move || {
                    let _ = reply.send(());
                };
                self.stack.unpublish(id, Some(Box::new(freed)));
            }
            Some(Command::ListPublished { reply }) => {
                let _ = reply.send(self.stack.published().collect());
            }
            Some(Command::Stop) | None => return true,
        }
        false
    }
}

/// The stack's time: microseconds since the loop began.
fn now(epoch: Instant) -> stack::Instant {
    stack::Instant::from_micros(i64::try_from(epoch.elapsed().as_micros()).unwrap_or(i64::MAX))
}
