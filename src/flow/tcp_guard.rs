//! What stands before smoltcp: segments that somebody else may have made up (RFC 5961).
//!
//! Comes in: a segment for a connection that is open. Goes out: its fate, forwarded where smoltcp is to see it; or an
//! acknowledgement that challenges its sender. A RST counts at the very byte that is expected next, a SYN
//! never, an acknowledgement of what was not sent neither; smoltcp 0.14 takes a RST anywhere in the window,
//! does not answer a SYN at all, takes what waits to be sent for sent, and compares numbers as if none were further
//! apart than half of all. Who is really there answers a challenge with the number that counts.

use smoltcp::socket::tcp::State;

use super::Fate;
use super::tcp_engine::{Engine, length};
use crate::buf::TxBatch;
use crate::net::parse::{TcpSegment, tcp_flags};
use crate::net::{DropReason, Duration, Instant};

/// A hundred challenges a second at most (RFC 5961 section 7). Each connection has its own: a count for
/// all would tell a stranger about the connections of others.
const CHALLENGE_INTERVAL: Duration = Duration::from_millis(10);

/// No window is so large, and no segment of an old one so late: from here on a number could be either.
const FAR: u32 = 1 << 30;

/// What a segment is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Worth {
    /// Smoltcp is to look at it.
    Real,
    /// It may be what it says, though not by this number.
    Doubtful,
    /// Nobody who is there sends that.
    Nothing,
}

impl Engine {
    /// Whether a segment is to be taken. Who sent one that is doubtful is challenged.
    pub(super) fn admit(&mut self, now: Instant, tx: &mut TxBatch, segment: &TcpSegment) -> Fate {
        let expected = self.expected();
        match self.worth(segment, expected) {
            Worth::Real => Fate::Forwarded,
            Worth::Doubtful if self.challenge_at.is_none_or(|at| now >= at) => {
                self.challenge_at = Some(now + CHALLENGE_INTERVAL);
                self.announce(now, tx, expected);
                Fate::Answered
            }
            Worth::Doubtful | Worth::Nothing => Fate::Dropped(DropReason::TcpUnacceptable),
        }
    }

    /// The next sequence number of the guest's (`RCV.NXT`).
    pub(super) fn expected(&mut self) -> u32 {
        self.stream_end().wrapping_add(u32::from(self.has_ended()))
    }

    /// Behind all that has come of the guest's stream in order, without its FIN.
    fn stream_end(&mut self) -> u32 {
        let queued = length(self.socket().recv_queue());
        self.line.next_in.wrapping_add(queued)
    }

    /// The guest has ended its stream, and all before that has come.
    fn has_ended(&mut self) -> bool {
        matches!(
            self.socket().state(),
            State::CloseWait | State::Closing | State::LastAck | State::TimeWait
        )
    }

    /// What is beyond this is no payload of the guest's: the window that it was given, or the end of its stream.
    pub(super) fn right_edge(&mut self) -> u32 {
        if self.has_ended() {
            self.stream_end()
        } else {
            self.line.sent.edge
        }
    }

    fn worth(&mut self, segment: &TcpSegment, expected: u32) -> Worth {
        let synchronized = match self.socket().state() {
            // The guest's part is over, the host's is not: who begins anew will ask again. A RST would refuse it.
            State::Closed if segment.is_connect() => return Worth::Nothing,
            // A RST took it there: whoever begins anew finds another connection, once this one is over.
            State::Listen => return Worth::Nothing,
            // Our own request has not left, so this is none to it.
            State::SynSent if self.line.sent.next == self.line.sent.initial => {
                return Worth::Nothing;
            }
            // Nothing is known yet of the guest's numbers, or nothing is left to be ended.
            State::Closed | State::SynSent => return Worth::Real,
            State::SynReceived => false,
            State::Established
            | State::FinWait1
            | State::FinWait2
            | State::CloseWait
            | State::Closing
            | State::LastAck
            | State::TimeWait => true,
        };
        if segment.has(tcp_flags::RST) {
            let ahead = segment.seq.wrapping_sub(expected);
            let window = self.line.sent.edge.wrapping_sub(expected).cast_signed();
            // Who has filled the window resets at its right edge.
            let inside = ahead <= window.max(0).cast_unsigned();
            return match (ahead, inside) {
                (0, _) => Worth::Real,
                (_, true) => Worth::Doubtful,
                (_, false) => Worth::Nothing,
            };
        }
        let far = segment.seq.wrapping_sub(expected).cast_signed();
        if far.unsigned_abs() >= FAR {
            return if synchronized {
                Worth::Doubtful
            } else {
                Worth::Nothing
            };
        }
        // What was not sent, or so long ago that it could be either (RFC 5961 5.2).
        let old = self.line.sent.next.wrapping_sub(segment.ack);
        let made_up = segment.has(tcp_flags::SYN) || (segment.has(tcp_flags::ACK) && old >= FAR);
        if synchronized && made_up {
            Worth::Doubtful
        } else {
            Worth::Real
        }
    }
}
