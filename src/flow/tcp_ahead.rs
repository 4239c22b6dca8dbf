//! The direct way of bulk to the guest: out of the host's socket into a frame, past the ring.
//!
//! A socket that can be peeked at is asked for what follows the bytes that were sent already, and told to forget those
//! that the guest has: until then it keeps them, so that nothing is kept here. smoltcp never hears of them
//! ([`Sent::withheld`]): for it our stream is shorter by as many, and everything that it has sent is acknowledged.
//! When something seems lost, or the guest takes nothing more, this way ends: the socket is read from the first byte
//! that the guest does not have, and smoltcp sends what comes as if for the first time.
//!
//! [`Sent::withheld`]: super::tcp_completion::Sent::withheld

use std::num::NonZeroU16;

use smoltcp::socket::tcp::State;

use super::tcp_completion::ahead_of;
use super::tcp_engine::{Engine, length};
use crate::buf::TxBatch;
use crate::net::parse::{self, TcpSegment, tcp_flags};
use crate::net::{Duration, Instant, emit};

/// What the host's socket gives at once is bulk from this size on; less goes by the ring, which takes a call less.
const BULK: usize = 32 * 1024;

/// Largest IP packet that is handed to a link for segmentation.
const MAX_PACKET: usize = 65_535;

/// A guest that has acknowledged nothing for this time has lost something: on a link that loses nothing it
/// answers at once, and its delayed acknowledgement comes within 200 ms.
const PATIENCE: Duration = Duration::from_millis(300);

/// So many repetitions of an acknowledgement tell of a loss (RFC 5681 3.2).
const REPETITIONS: u8 = 3;

/// By which way bytes go to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Through smoltcp's ring.
    Ring,
    /// None, until the ring has drained: then past it.
    Wait,
    /// Past the ring.
    Ahead,
}

/// What was sent past smoltcp.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// Bytes that the guest has not acknowledged.
    outstanding: u32,
    /// Bytes that it has, which the host's socket does not know yet.
    arrived: u32,
    /// How often the latest acknowledgement was repeated.
    repeated: u8,
    /// When the guest should have acknowledged some.
    due: Option<Instant>,
    /// The host's socket knows where to peek.
    begun: bool,
    /// The host's socket can't be peeked at.
    refused: bool,
    /// The host gave much at once when it was last asked.
    bulk: bool,
}

impl Ahead {
    /// Nothing is under way.
    pub(super) const fn is_settled(&self) -> bool {
        self.outstanding == 0 && self.arrived == 0
    }

    /// The guest has not acknowledged all of it.
    pub(super) const fn is_outstanding(&self) -> bool {
        self.outstanding > 0
    }

    /// When something has been lost if the guest says nothing.
    pub(super) const fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Bytes that the host's socket need not keep any longer.
    pub(super) fn take_arrived(&mut self) -> usize {
        usize::try_from(std::mem::take(&mut self.arrived)).unwrap_or(usize::MAX)
    }

    /// The host's socket has to be told that it will be peeked at.
    pub(super) const fn must_begin(&self) -> bool {
        !self.begun
    }

    /// It was told, and can be or not.
    pub(super) const fn begin(&mut self, can: bool) {
        self.begun = can;
        self.refused = !can;
    }

    /// What is under way did not arrive.
    pub(super) const fn seems_lost(&mut self) {
        if self.outstanding > 0 {
            self.repeated = REPETITIONS;
        }
    }

    /// So much the host gave at once; more than that it did not have if it is little.
    pub(super) const fn note_read(&mut self, bytes: usize) {
        self.bulk = bytes >= BULK;
    }
}

impl Engine {
    /// The sequence number behind all that was taken from the host, or is there to be taken once more.
    pub(super) const fn taken(&self) -> u32 {
        let line = &self.line;
        line.sent.initial.wrapping_add(1).wrapping_add(line.given)
    }

    /// Nothing that was sent is to be taken from the host once more; the end of our stream was sent, or not.
    pub(super) const fn has_sent_all(&self, ended: bool) -> bool {
        let next = self.line.sent.next;
        next == self.taken().wrapping_add(ended as u32)
    }

    /// Our stream goes on: its end has no number yet.
    fn is_open_to_guest(&mut self) -> bool {
        matches!(self.socket().state(), State::Established | State::CloseWait)
    }

    /// By which way what the host has for the guest goes now.
    pub(super) fn way(&mut self) -> Way {
        if self.ahead.outstanding > 0 {
            return Way::Ahead;
        }
        let capabilities = self.path.capabilities;
        let cuts = if self.path.ipv6 {
            capabilities.tso6
        } else {
            capabilities.tso4
        };
        let open = self.is_open_to_guest();
        if !(self.ahead.bulk && cuts && capabilities.checksum && open) || self.ahead.refused {
            return Way::Ring;
        }
        if self.socket().send_queue() > 0 {
            // smoltcp 0.14 probes a closed window with what it has not sent yet, and with nothing where there is none.
            let closed = self.line.guest_window == 0;
            if closed { Way::Ring } else { Way::Wait }
        } else if self.room_ahead().is_some() {
            Way::Ahead
        } else {
            Way::Ring
        }
    }

    /// Bytes that may be sent at once: up to the largest packet, in whole segments, or all that the guest's window has room
    /// for. None where not even one segment is.
    pub(super) fn room_ahead(&self) -> Option<usize> {
        let left = self.reach()?.wrapping_sub(self.taken()).cast_signed();
        let left = usize::try_from(left).unwrap_or(0);
        let segment = usize::from(self.segment_ahead()?.get());
        let ip = if self.path.ipv6 { 40 } else { 20 };
        let most = (MAX_PACKET - ip - self.header_ahead()) / segment * segment;
        (left >= segment).then(|| left.min(most.max(segment)))
    }

    fn header_ahead(&self) -> usize {
        if self.line.sent.last.timestamps.is_some() {
            32
        } else {
            20
        }
    }

    /// Payload of one segment beside the options.
    fn segment_ahead(&self) -> Option<NonZeroU16> {
        let options = u16::try_from(self.header_ahead() - 20).unwrap_or(0);
        NonZeroU16::new(self.mss().saturating_sub(options))
    }

    /// Sends the guest what `peek` writes, `most` bytes or less. None where there is no room for a frame.
    pub(super) fn send_ahead<E>(
        &mut self,
        now: Instant,
        tx: &mut TxBatch,
        most: usize,
        peek: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Option<Result<usize, E>> {
        let size = self.segment_ahead()?;
        let ack = self.expected();
        let segment = emit::BareSegment {
            seq: self.taken(),
            flags: tcp_flags::ACK | tcp_flags::PSH,
            ..self.acknowledgement(now, ack)
        };
        let sent = emit::tcp_filled(tx, self.path.wire, segment, (most, size), peek)?;
        if let Ok(bytes @ 1..) = sent {
            self.note_told(&segment);
            self.owed = None;
            let bytes_sent = length(bytes);
            self.withhold(bytes_sent);
            self.ahead.outstanding += bytes_sent;
            // What is little because the window is says nothing of the host.
            if bytes < most {
                self.ahead.note_read(bytes);
            }
            self.ahead.due.get_or_insert(now + PATIENCE);
        }
        Some(sent)
    }

    /// The next bytes of the host's are none of smoltcp's, whose ring is empty.
    const fn withhold(&mut self, bytes: u32) {
        let line = &mut self.line;
        line.sent.withheld = line.sent.withheld.wrapping_add(bytes);
        line.given = line.given.wrapping_add(bytes);
        let taken = self.taken();
        if ahead_of(taken, self.line.sent.next) {
            self.line.sent.next = taken;
        }
    }

    /// A segment of the guest's may acknowledge what went past smoltcp; its header and its options are `header`.
    pub(super) fn note_ahead(&mut self, now: Instant, segment: &TcpSegment, header: &[u8]) {
        let taken = self.taken();
        let ahead = &mut self.ahead;
        if ahead.outstanding == 0 || !segment.has(tcp_flags::ACK) {
            return;
        }
        // It may have more, of what was sent before and seemed lost.
        let left = taken.wrapping_sub(segment.ack);
        let left = if left.cast_signed() < 0 { 0 } else { left };
        if left < ahead.outstanding {
            ahead.arrived += ahead.outstanding - left;
            ahead.outstanding = left;
            ahead.repeated = 0;
            ahead.due = (left > 0).then(|| now + PATIENCE);
            // RFC 7323 4.3: the time of the latest that is acknowledged in turn.
            if let Some([_, _, _, _, echo @ ..]) = &mut self.line.sent.last.timestamps
                && let Some(time) = parse::syn_options(header).timestamp
            {
                *echo = time.to_be_bytes();
            }
        } else if left == ahead.outstanding
            && segment.payload_len == 0
            && segment.window == self.line.guest_window
        {
            ahead.repeated = ahead.repeated.saturating_add(1);
        }
    }

    /// Something that went past smoltcp seems lost.
    pub(super) fn has_lost(&self, now: Instant) -> bool {
        self.ahead.repeated >= REPETITIONS || self.ahead.due.is_some_and(|due| now >= due)
    }

    /// Leaves to smoltcp what the guest has not acknowledged: it is to be received from the host anew.
    pub(super) fn fall_back(&mut self) {
        let lost = self.ahead.outstanding;
        let line = &mut self.line;
        line.sent.withheld = line.sent.withheld.wrapping_sub(lost);
        line.given = line.given.wrapping_sub(lost);
        self.ahead = Ahead {
            arrived: self.ahead.arrived,
            ..Ahead::default()
        };
    }

    /// How much the guest has acknowledged of what went past smoltcp, seemed lost, and was not received from the host
    /// anew yet.
    pub(super) fn beyond_taken(&self) -> i32 {
        let more = |acked: u32| acked.wrapping_sub(self.taken()).cast_signed().max(0);
        self.line.guest_ack.map_or(0, more)
    }

    /// How much the guest has of what is to be received from the host once more: it had seemed lost.
    pub(super) fn is_known_already(&mut self) -> u32 {
        let sent = self.line.sent.next.wrapping_sub(self.taken());
        let drained = self.is_open_to_guest() && self.socket().send_queue() == 0;
        // Nobody has what was never sent.
        let known = self.beyond_taken().min(sent.cast_signed()).max(0);
        if drained { known.cast_unsigned() } else { 0 }
    }

    /// Leaves that out.
    pub(super) fn skip_known(&mut self) {
        let known = self.is_known_already();
        if known > 0 {
            self.withhold(known);
            self.ahead.arrived += known;
        }
    }

    /// An acknowledgement of the guest's as smoltcp is to hear it: of no more than it has sent.
    pub(super) fn translated_ack(&mut self, ack: u32) -> u32 {
        let taken = self.taken();
        let behind = taken.wrapping_sub(ack);
        let ahead = behind.cast_signed() < 0 || behind <= self.ahead.outstanding;
        let ack = if ahead && self.is_open_to_guest() {
            taken
        } else {
            ack
        };
        ack.wrapping_sub(self.line.sent.withheld)
    }
}
