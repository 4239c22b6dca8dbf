//! The direct way from the guest: out of the frame into the host's socket, past the ring.
//!
//! smoltcp copies what it receives into its ring, where it waits for the host's socket. A long segment, or one that
//! is a request, need not, if it comes in order while nothing waits: the socket takes it from the frame, as far as it
//! has room. smoltcp never hears of those bytes. For it the guest's stream is shorter by as many ([`Sent::skipped`]):
//! sequence numbers are translated on the way to it, acknowledgements on the way from it, and what it would have
//! acknowledged is acknowledged here: that of a request a little later, since the answer may say it.
//!
//! [`Sent::skipped`]: super::tcp_completion::Sent::skipped

use smoltcp::socket::tcp::State;

use super::tcp_completion::ahead_of;
use super::tcp_dialogue::REQUEST_DELAY;
use super::tcp_engine::{Engine, MAX_HEADERS, length};
use crate::buf::TxBatch;
use crate::net::Instant;
use crate::net::parse::{self, TcpSegment, tcp_flags};

/// Shorter payload goes by the ring, out of which the host's socket has several in one call, but for requests.
const LEAST: usize = 4096;

/// Bytes by which an acknowledgement may be behind what was sent last: no window is larger (RFC 5961 5.2, RFC 7323 2.2).
const OLDEST: u32 = 1 << 30;

/// Where a TCP header has its numbers and its flags.
const SEQUENCE: usize = 4;
const ACKNOWLEDGEMENT: usize = 8;
pub(super) const FLAGS: usize = 13;

/// An acknowledgement that smoltcp does not know of. The lesser of two is due first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Owed {
    /// When it is due.
    pub(super) at: Instant,
    /// It waits for an answer.
    pub(super) waits: bool,
}

impl Engine {
    /// The host's socket may have a segment's payload at once: it is next in the stream, nothing is left
    /// that came before or after it, and it says nothing that smoltcp would have to judge (RFC 9293
    /// 3.10.7.4, RFC 5961 section 5).
    pub(super) fn may_skip(&mut self, segment: &TcpSegment) -> bool {
        let line = self.line;
        let request = segment.payload_len > 0 && self.dialogue.expects_request(line.given);
        let long = segment.payload_len >= LEAST;
        if !(long || request) || segment.flags & !tcp_flags::PSH != tcp_flags::ACK {
            return false;
        }
        let end = segment.seq.wrapping_add(length(segment.payload_len));
        let in_order = segment.seq == line.next_in && self.has_no_gap();
        let in_window = !ahead_of(end, line.sent.edge);
        let acknowledges = line.sent.next.wrapping_sub(segment.ack) <= OLDEST;
        let socket = self.socket();
        let open = matches!(socket.state(), State::Established | State::FinWait2);
        in_order && in_window && acknowledges && open && socket.recv_queue() == 0
    }

    /// Takes a segment of which the host's socket has so much of the payload already.
    pub(super) fn segment_behind(
        &mut self,
        now: Instant,
        tx: &mut TxBatch,
        (segment, packet): (&TcpSegment, &[u8]),
        taken: usize,
    ) {
        let header = packet.len() - segment.payload_len - segment.header_len;
        // What the ring takes counts there.
        if taken == segment.payload_len {
            self.dialogue.note_guest(self.line.given);
        }
        let waits = segment.payload_len < LEAST && !self.is_part(segment);
        let at = if waits { now + REQUEST_DELAY } else { now };
        let tcp = &packet[header..header + segment.header_len];
        self.skip(taken, Owed { at, waits }, tcp);
        let rest = TcpSegment {
            seq: self.line.next_in,
            payload_len: segment.payload_len - taken,
            ..*segment
        };
        let (headers, payload) = packet.split_at(header + segment.header_len);
        let mut short = [0; MAX_HEADERS];
        if let (0, Some(short)) = (rest.payload_len, short.get_mut(..headers.len())) {
            // smoltcp would take it for an acknowledgement that is repeated because of a loss.
            if self.tells_nothing(segment) {
                return;
            }
            short.copy_from_slice(headers);
            make_shorter(short, header, rest.seq);
            self.segment(now, tx, &rest, short);
        } else {
            let mut longer = tx.scratch.take();
            longer.extend_from_slice(headers);
            longer.extend_from_slice(&payload[taken..]);
            make_shorter(&mut longer, header, rest.seq);
            self.segment(now, tx, &rest, &longer);
            tx.scratch.put(longer);
        }
    }

    /// The host's socket has taken payload that smoltcp will not hear of; it came with this header.
    fn skip(&mut self, bytes: usize, owed: Owed, header: &[u8]) {
        let line = &mut self.line;
        let skipped = length(bytes);
        // An answer may have carried what was owed.
        let before = self.owed.filter(|_| line.sent.last.ack != line.next_in);
        line.next_in = line.next_in.wrapping_add(skipped);
        line.furthest = line.next_in;
        line.sent.skipped = line.sent.skipped.wrapping_add(skipped);
        // What smoltcp would take moves along.
        line.sent.room = line.sent.room.wrapping_add(skipped);
        self.extent.skip(bytes);
        // RFC 7323 4.3: of several that are acknowledged together, the first one's time is given back.
        self.owed = Some(before.map_or(owed, |before| before.min(owed)));
        if before.is_none()
            && let Some([_, _, _, _, echo @ ..]) = &mut line.sent.last.timestamps
            && let Some(time) = parse::syn_options(header).timestamp
        {
            *echo = time.to_be_bytes();
        }
    }

    /// Something is outstanding for the guest, of which a segment says no more than the last one.
    fn tells_nothing(&mut self, segment: &TcpSegment) -> bool {
        let line = self.line;
        let known = line.guest_ack == Some(segment.ack) && line.guest_window == segment.window;
        known && (self.ahead.is_outstanding() || self.socket().send_queue() > 0)
    }

    /// Acknowledges what smoltcp does not know of, unless a segment of its own has done so.
    pub(super) fn acknowledge(&mut self, now: Instant, tx: &mut TxBatch) {
        let Some(owed) = self.owed else {
            return;
        };
        let due = self.expected();
        if self.line.sent.last.ack == due {
            self.owed = None;
        } else if now >= owed.at && self.announce(now, tx, due) {
            self.owed = None;
            if owed.waits {
                self.dialogue.end();
            }
        }
    }

    /// Acknowledges the end of the guest's stream, unless that was done: smoltcp may have put it off for a moment.
    pub(super) fn acknowledge_end(&mut self, now: Instant, tx: &mut TxBatch) {
        let due = self.expected();
        if self.line.sent.last.ack != due {
            self.announce(now, tx, due);
        }
    }

    /// The guest has sent nothing out of order that smoltcp still holds.
    pub(super) const fn has_no_gap(&self) -> bool {
        !ahead_of(self.line.furthest, self.line.next_in)
    }

    /// Gives smoltcp a packet with the numbers that it expects there.
    pub(super) fn ingress(&mut self, now: Instant, tx: &mut TxBatch, packet: &[u8]) {
        let (skipped, withheld) = (self.line.sent.skipped, self.line.sent.withheld);
        if skipped == 0 && withheld == 0 && self.beyond_taken() == 0 {
            return self.hear(now, tx, packet);
        }
        let mut translated = tx.scratch.take();
        translated.extend_from_slice(packet);
        let header = header_of(packet);
        let mut translate = |at: usize, to: &mut dyn FnMut(u32) -> u32| {
            if let Some(field) = translated[header + at..].first_chunk_mut() {
                *field = to(u32::from_be_bytes(*field)).to_be_bytes();
            }
        };
        translate(SEQUENCE, &mut |seq| seq.wrapping_sub(skipped));
        // Without the flag the field means nothing.
        if packet[header + FLAGS] & tcp_flags::ACK != 0 {
            translate(ACKNOWLEDGEMENT, &mut |ack| self.translated_ack(ack));
        }
        self.hear(now, tx, &translated);
        tx.scratch.put(translated);
    }
}

/// Where the TCP header begins in a packet without IPv6 extension headers.
pub(super) fn header_of(packet: &[u8]) -> usize {
    if packet[0] >> 4 == 6 {
        40
    } else {
        usize::from(packet[0] & 0xf) * 4
    }
}

/// Makes a packet's headers right for the rest of its payload.
fn make_shorter(packet: &mut [u8], header: usize, seq: u32) {
    packet[header + SEQUENCE..header + SEQUENCE + 4].copy_from_slice(&seq.to_be_bytes());
    packet[header + FLAGS] &= !tcp_flags::PSH;
    set_length(packet);
}

/// Writes a packet's length into its IP header.
pub(super) fn set_length(packet: &mut [u8]) {
    let (at, counted) = if packet[0] >> 4 == 6 {
        (4, packet.len() - 40)
    } else {
        (2, packet.len())
    };
    let counted = u16::try_from(counted).unwrap_or(u16::MAX);
    packet[at..at + 2].copy_from_slice(&counted.to_be_bytes());
}
