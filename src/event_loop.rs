//! The one loop that moves frames and events; the only place on the data path that awaits.
//!
//! Owns the link, the host, the stack and both batches. Where several of them serve one network, what is
//! another's is handed over after a turn. A turn reads the clock once, takes a batch
//! of frames, a batch of events and what is overdue, lets the flows move bytes, and sends what was
//! produced. Every batch is bounded, so no flow keeps the others waiting for longer than a turn.

use std::io;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::buf::{RxBatch, TxBatch};
use crate::busy_poll::BusyPoll;
use crate::config::Publish;
use crate::control::Command;
use crate::handover::Handover;
use crate::host::kernel::KernelHost;
use crate::link::{Link, Look};
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
/// Things from other workers that are taken in one turn.
const TURN_HANDED: usize = 128;
/// Busy turns in a row before signals and commands get a hearing.
const BUSY_TURNS: u32 = 16;
/// More bytes than this in a turn are bulk: whoever carries that has better use for the processor than
/// looking for more.
const BULK: u64 = 32 * 1024;
/// A loop with something to do says so often what it holds, to who wants to hear everything.
const BETWEEN_SIZES: stack::Duration = stack::Duration::from_secs(10);
/// How long to sleep when there is no deadline at all.
const NO_DEADLINE: Duration = Duration::from_secs(3600);

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
enum Next {
    /// More, at once.
    Again,
    /// Nothing until something happens, or this time comes.
    Wait(Option<stack::Instant>),
}

/// What came of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Turned {
    next: Next,
    /// A frame or an event had come.
    moved: bool,
    /// Many bytes went on.
    bulk: bool,
}

/// What a turn could not do without.
#[derive(Debug)]
enum Failed {
    Link(io::Error),
    Poller(io::Error),
}

/// What comes to a loop from within the process.
pub struct Incoming {
    /// What it is told; it ends when nobody can tell it anything any more.
    pub commands: mpsc::Receiver<Command>,
    /// What other workers hand over.
    pub handover: Handover<KernelHost>,
}

/// The loop and all that it owns.
pub struct EventLoop<L> {
    link: L,
    host: KernelHost,
    stack: Stack<KernelHost>,
    incoming: Incoming,
    epoch: Instant,
    rx: RxBatch,
    tx: TxBatch,
    events: Vec<crate::host::Event>,
    busy_poll: BusyPoll,
    /// When what the stack holds is told next.
    tells_at: stack::Instant,
}

impl<L: Link> EventLoop<L> {
    /// A loop over these. For no longer than `busy_poll` it looks for more
    /// before it sleeps.
    #[must_use]
    pub fn new(
        link: L,
        host: KernelHost,
        stack: Stack<KernelHost>,
        incoming: Incoming,
        busy_poll: Duration,
    ) -> Self {
        Self {
            link,
            host,
            stack,
            incoming,
            epoch: Instant::now(),
            rx: RxBatch::new(RX_FRAMES, RX_BYTES),
            tx: TxBatch::new(TX_FRAMES, TX_BYTES),
            events: Vec::with_capacity(256),
            busy_poll: BusyPoll::new(busy_poll),
            tells_at: stack::Instant::ZERO,
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

    /// Takes the first turn, so that the guest has heard of the network before anybody says that it
    /// works.
    ///
    /// # Errors
    /// When the poller fails.
    pub fn begin(&mut self) -> io::Result<()> {
        match self.turn(Look::WhenTold) {
            // A link that is gone already `run` will find so.
            Ok(_) | Err(Failed::Link(_)) => Ok(()),
            Err(Failed::Poller(error)) => Err(error),
        }
    }

    /// Runs until told to stop or the link is gone.
    ///
    /// # Errors
    /// When the poller fails.
    pub async fn run(mut self) -> io::Result<Ended> {
        let sleep = tokio::time::sleep(NO_DEADLINE);
        tokio::pin!(sleep);
        let mut busy = 0;
        loop {
            let turned = self.turn(Look::WhenTold);
            let looks = matches!(turned, Ok(turned) if !turned.bulk);
            let next = turned.and_then(|turned| {
                if looks {
                    self.look(turned.next)
                } else {
                    Ok(turned.next)
                }
            });
            let pauses = looks && matches!(next, Ok(Next::Wait(_)));
            match next {
                Ok(Next::Again) if busy < BUSY_TURNS => {
                    busy += 1;
                    continue;
                }
                // Signals and timers of others are served in between, then it goes on.
                Ok(Next::Again) => {
                    tokio::task::yield_now().await;
                    sleep.as_mut().reset(self.epoch);
                }
                Ok(Next::Wait(at)) => sleep.as_mut().reset(self.wake_at(at)),
                Err(Failed::Link(error)) => {
                    tracing::debug!(%error, "link gone");
                    return Ok(Ended::LinkGone);
                }
                Err(Failed::Poller(error)) => return Err(error),
            }
            busy = 0;
            let asleep = Instant::now();
            tokio::select! {
                biased;
                command = self.incoming.commands.recv() => if self.obey(command) { return Ok(Ended::Stopped) },
                ready = self.link.readable() => ready?,
                ready = self.host.readable() => ready?,
                () = self.incoming.handover.arrived() => {}
                () = &mut sleep => {}
            }
            if pauses {
                self.busy_poll.slept(asleep.elapsed());
            }
        }
    }

    /// Looks for more for a while, if there is nothing to do; what comes is done at once.
    fn look(&mut self, mut next: Next) -> Result<Next, Failed> {
        let since = Instant::now();
        while let Next::Wait(_) = next
            && since.elapsed() < self.busy_poll.window()
        {
            // Who waits for this processor may be the one that is waited for.
            std::thread::yield_now();
            let turned = self.turn(Look::Anyway)?;
            if turned.moved {
                return Ok(Next::Again);
            }
            next = turned.next;
        }
        Ok(next)
    }

    /// One turn.
    ///
    /// # Errors
    /// When the link or the poller is gone.
    fn turn(&mut self, look: Look) -> Result<Turned, Failed> {
        let now = now(self.epoch);
        let spliced = self.stack.counters().bytes_spliced;
        let (mut frames, mut bytes, mut more_frames) = (0, 0, true);
        while more_frames && frames < TURN_FRAMES && bytes < TURN_BYTES {
            self.rx.clear();
            more_frames = self
                .link
                .receive(&mut self.rx, look)
                .map_err(Failed::Link)?;
            let mut turn = Turn {
                now,
                host: &mut self.host,
                tx: &mut self.tx,
            };
            for (frame, meta) in self.rx.frames() {
                self.stack.handle_frame(&mut turn, frame, meta);
                frames += 1;
                bytes += frame.len();
            }
        }
        let more_events = self
            .host
            .poll_events(&mut self.events, look)
            .map_err(Failed::Poller)?;
        let mut turn = Turn {
            now,
            host: &mut self.host,
            tx: &mut self.tx,
        };
        let mut handed = 0;
        while handed < TURN_HANDED
            && let Some(thing) = self.incoming.handover.take()
        {
            self.stack.handle_handed(&mut turn, thing);
            handed += 1;
        }
        let moved = frames + handed > 0 || !self.events.is_empty();
        for event in self.events.drain(..) {
            self.stack.handle_host(&mut turn, event);
        }
        if self.link.is_back() {
            self.stack.handle_link_back(now);
        }
        self.stack.handle_timeout(&mut turn);
        let more_flows = self.stack.poll_transmit(&mut turn);
        while let Some((to, thing)) = self.stack.next_handed() {
            if let Err(refused) = self.incoming.handover.send(to, thing) {
                self.stack.handle_refused(&mut turn, refused);
            }
        }
        let spliced = self.stack.counters().bytes_spliced - spliced;
        let bulk = (bytes + self.tx.bytes()) as u64 + spliced > BULK;
        self.link.transmit(&mut self.tx).map_err(Failed::Link)?;
        if now >= self.tells_at {
            self.tells_at = now + BETWEEN_SIZES;
            self.stack.tell_sizes();
        }
        let more_events = more_events || self.host.has_own_events();
        let again = more_frames || more_events || more_flows || handed == TURN_HANDED;
        let next = if again {
            Next::Again
        } else {
            Next::Wait(self.stack.poll_timeout())
        };
        Ok(Turned { next, moved, bulk })
    }

    /// The runtime's time for a time of the stack.
    fn wake_at(&self, at: Option<stack::Instant>) -> Instant {
        match at.map(|at| u64::try_from(at.total_micros())) {
            Some(Ok(micros)) => self.epoch + Duration::from_micros(micros),
            Some(Err(_)) => self.epoch,
            None => Instant::now() + NO_DEADLINE,
        }
    }

    /// Does what it is told; true when that is to stop. Whoever asked may be gone by now.
    fn obey(&mut self, command: Option<Command>) -> bool {
        match command {
            Some(Command::Publish { rule, reply }) => {
                let _ = reply.send(self.stack.publish(&mut self.host, rule));
            }
            Some(Command::Unpublish { id, reply }) => {
                let _ = reply.send(self.stack.unpublish(id));
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
