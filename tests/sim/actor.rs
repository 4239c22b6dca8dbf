//! One side of a connection: an [`Actor`] that follows its part of a plan at an [`Endpoint`].
//!
//! In: the plan of a side, the time, the endpoint (the guest's socket, or the host's peer). Out: calls
//! on the endpoint, and a record of what the side did and saw. A byte out of place fails at once;
//! whether the two records agree with each other is for `sim_lives.rs` to say.
#![allow(
    clippy::unwrap_used,
    reason = "a scenario that can not go on has failed"
)]

use std::fmt;
use std::sync::LazyLock;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{RecvError, State};
use tapgate::host::simulated::{Network, SocketId};
use tapgate::net::{Duration, Instant};

use crate::plan::{End, MOST, Side, When};
use crate::sim::{Random, Sim};

/// What is sent, from two places of it: long enough not to repeat itself.
static TAPE: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut random = Random::new(7);
    let words = (0..=MOST / 4).flat_map(|_| random.next().to_be_bytes());
    words.collect()
});

/// The bytes of one direction.
struct Tape(&'static [u8]);

impl Tape {
    fn new(to_host: bool) -> Self {
        Self(&TAPE[if to_host { 0 } else { MOST }..][..MOST])
    }
}

impl fmt::Debug for Tape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tape")
    }
}

/// What an actor holds in hands.
pub(crate) trait Endpoint {
    /// How much of this was taken.
    fn write(&mut self, bytes: &[u8]) -> usize;
    /// Up to so many bytes of what came.
    fn read(&mut self, most: usize) -> Vec<u8>;
    /// Bytes that came and were not read.
    fn unread(&mut self) -> usize;
    /// Bytes written that the other end has not acknowledged, where that can be known.
    fn unacknowledged(&mut self) -> Option<usize>;
    /// What is not read now is lost.
    fn is_last_chance(&mut self) -> bool;
    /// Everything was read, and the stream has ended in order.
    fn sees_end(&mut self) -> bool;
    /// The other end has reset the connection.
    fn sees_reset(&mut self) -> bool;
    /// Ends in one of the ways; [`End::Leave`] as [`End::Close`].
    fn end(&mut self, end: End);
}

/// One side, and what it has done and seen.
#[derive(Debug)]
pub(crate) struct Actor {
    plan: Side,
    sends: Tape,
    expects: Tape,
    begun: Instant,
    next_write: Instant,
    next_read: Instant,
    paused: bool,
    pub(crate) sent: usize,
    /// Bytes that are known to have been acknowledged to this side.
    pub(crate) acknowledged: usize,
    /// Bytes that came as far as this side's socket.
    pub(crate) received: usize,
    pub(crate) ended: Option<End>,
    /// It has ended its stream in order.
    pub(crate) shut: bool,
    /// It has given up by itself: reset, forgotten, vanished.
    pub(crate) gone: bool,
    pub(crate) saw_end: bool,
    pub(crate) saw_reset: bool,
    /// When it gave up, or saw that the other had.
    pub(crate) lost_at: Option<Instant>,
}

impl Actor {
    pub(crate) fn new(plan: Side, is_guest: bool, now: Instant) -> Self {
        Self {
            plan,
            sends: Tape::new(is_guest),
            expects: Tape::new(!is_guest),
            begun: now,
            next_write: now,
            next_read: now,
            paused: false,
            sent: 0,
            acknowledged: 0,
            received: 0,
            ended: None,
            shut: false,
            gone: false,
            saw_end: false,
            saw_reset: false,
            lost_at: None,
        }
    }

    /// Nothing will change on this side any more.
    pub(crate) fn is_over(&self) -> bool {
        self.gone || self.saw_reset || (self.shut && self.saw_end)
    }

    /// Does what is due.
    pub(crate) fn act(&mut self, now: Instant, at: &mut impl Endpoint) {
        if self.gone {
            return;
        }
        self.look(at);
        self.read(now, at);
        self.look(at);
        if !self.shut && !self.saw_reset {
            self.write(now, at);
        }
        if self.ended.is_none() && !self.saw_reset && self.end_is_due(now) {
            self.end(at, self.plan.end);
        }
        if self.ended == Some(End::Leave) && at.unread() > 0 {
            self.end(at, End::Reset);
        }
        if self.gone || self.saw_reset {
            self.lost_at.get_or_insert(now);
        }
    }

    /// It reads whatever comes at once.
    pub(crate) fn is_swift(&self) -> bool {
        self.plan.pause.is_none() && self.plan.read.every == Duration::ZERO
    }

    /// Takes notice of what is left, when all is over.
    pub(crate) fn finish(&mut self, at: &mut impl Endpoint) {
        if !self.gone {
            self.drain(at);
            self.look(at);
        }
    }

    /// When it wants to act again, if not by an event.
    pub(crate) fn wake(&self, now: Instant, at: &mut impl Endpoint) -> Option<Instant> {
        if self.gone {
            return None;
        }
        let reads = at.unread() > 0 && !self.has_left();
        let writes = !self.shut && !self.saw_reset && self.sent < self.plan.total;
        let ends = match self.plan.when {
            When::After(time) if self.ended.is_none() => Some(self.begun + time),
            When::After(_) | When::AllSent | When::OtherEnded | When::Received(_) => None,
        };
        let times = [
            reads.then_some(self.next_read),
            writes.then_some(self.next_write),
            ends,
        ];
        times.into_iter().flatten().filter(|time| *time > now).min()
    }

    fn has_left(&self) -> bool {
        self.ended == Some(End::Leave)
    }

    fn look(&mut self, at: &mut impl Endpoint) {
        if let Some(rest) = at.unacknowledged() {
            self.acknowledged = self.acknowledged.max(self.sent - rest);
        }
        self.saw_reset |= at.sees_reset();
        self.saw_end |= at.sees_end();
    }

    fn read(&mut self, now: Instant, at: &mut impl Endpoint) {
        let pace = self.plan.read;
        if at.is_last_chance() {
            self.drain(at);
        }
        while at.unread() > 0 && now >= self.next_read && !self.has_left() {
            let mut most = pace.most;
            if let Some((after, time)) = self.plan.pause.filter(|_| !self.paused) {
                if self.received >= after {
                    self.paused = true;
                    self.next_read = now + time;
                    continue;
                }
                most = most.min(after - self.received);
            }
            self.take(at, most);
            self.next_read = now + pace.every;
        }
    }

    fn drain(&mut self, at: &mut impl Endpoint) {
        while at.unread() > 0 {
            self.take(at, usize::MAX);
        }
    }

    fn take(&mut self, at: &mut impl Endpoint, most: usize) {
        let bytes = at.read(most);
        let end = self.received + bytes.len();
        let expected = self.expects.0.get(self.received..end).unwrap_or_default();
        let wrong = (0..bytes.len()).find(|&nth| expected.get(nth) != Some(&bytes[nth]));
        assert_eq!(
            wrong.map(|nth| self.received + nth),
            None,
            "the first byte out of place"
        );
        self.received = end;
    }

    fn write(&mut self, now: Instant, at: &mut impl Endpoint) {
        while self.sent < self.plan.total && now >= self.next_write {
            let end = self.plan.total.min(self.sent + self.plan.write.most);
            let taken = at.write(&self.sends.0[self.sent..end]);
            self.sent += taken;
            if taken == 0 {
                return;
            }
            self.next_write = now + self.plan.write.every;
        }
    }

    fn end_is_due(&self, now: Instant) -> bool {
        let all_sent = self.sent == self.plan.total;
        match self.plan.when {
            When::AllSent => all_sent,
            When::OtherEnded => all_sent && self.saw_end,
            When::Received(enough) => self.received >= enough || self.saw_end,
            When::After(time) => now >= self.begun + time,
        }
    }

    fn end(&mut self, at: &mut impl Endpoint, end: End) {
        self.ended = Some(end);
        match end {
            End::Close | End::Leave => self.shut = true,
            End::Reset | End::Forget | End::Vanish => {
                // What has come this far has arrived, whether it is read or not.
                self.drain(at);
                self.look(at);
                self.gone = true;
            }
        }
        at.end(end);
    }
}

/// The guest's end.
pub(crate) struct GuestEnd<'a> {
    pub(crate) sim: &'a mut Sim,
    pub(crate) handle: SocketHandle,
}

impl Endpoint for GuestEnd<'_> {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let socket = self.sim.socket(self.handle);
        socket.send_slice(bytes).unwrap_or(0)
    }

    fn read(&mut self, most: usize) -> Vec<u8> {
        let socket = self.sim.socket(self.handle);
        let taken = socket.recv(|bytes| {
            let len = most.min(bytes.len());
            (len, bytes[..len].to_vec())
        });
        taken.unwrap_or_default()
    }

    fn unread(&mut self) -> usize {
        self.sim.socket(self.handle).recv_queue()
    }

    fn unacknowledged(&mut self) -> Option<usize> {
        let socket = self.sim.socket(self.handle);
        // A closed socket may have forgotten what it had not sent.
        let counts = socket.is_active() && socket.state() != State::TimeWait;
        counts.then(|| socket.send_queue())
    }

    fn is_last_chance(&mut self) -> bool {
        // smoltcp empties its buffer at the end of TIME-WAIT, where a kernel keeps it for the reader.
        let state = self.sim.socket(self.handle).state();
        matches!(state, State::TimeWait | State::Closed)
    }

    fn sees_end(&mut self) -> bool {
        let socket = self.sim.socket(self.handle);
        matches!(socket.recv(|_| (0, ())), Err(RecvError::Finished))
    }

    fn sees_reset(&mut self) -> bool {
        self.sim.resets.iter().any(|(handle, state)| {
            // Whoever has sent and received both ends is not concerned any more.
            *handle == self.handle && *state != State::TimeWait
        })
    }

    fn end(&mut self, end: End) {
        match end {
            End::Close | End::Leave => self.sim.close(self.handle),
            End::Reset => self.sim.socket(self.handle).abort(),
            End::Forget => self.sim.forget(self.handle),
            End::Vanish => self.sim.cut_link(),
        }
    }
}

/// The end of the host's peer: a server, or a client of a published port.
pub(crate) struct HostEnd<'a> {
    pub(crate) net: &'a Network,
    pub(crate) id: SocketId,
}

impl Endpoint for HostEnd<'_> {
    fn write(&mut self, bytes: &[u8]) -> usize {
        self.net.server_write(self.id, bytes)
    }

    fn read(&mut self, most: usize) -> Vec<u8> {
        self.net.server_read(self.id, most)
    }

    fn unread(&mut self) -> usize {
        self.net.server_unread(self.id)
    }

    fn unacknowledged(&mut self) -> Option<usize> {
        None
    }

    fn is_last_chance(&mut self) -> bool {
        false
    }

    fn sees_end(&mut self) -> bool {
        self.net.server_sees_end(self.id)
    }

    fn sees_reset(&mut self) -> bool {
        self.net.server_sees_reset(self.id) || self.net.is_broken(self.id)
    }

    fn end(&mut self, end: End) {
        match end {
            End::Close | End::Leave => self.net.server_shutdown(self.id),
            End::Reset | End::Forget | End::Vanish => self.net.server_reset(self.id),
        }
    }
}
