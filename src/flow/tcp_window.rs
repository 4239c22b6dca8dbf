//! Windows of an engine, both ways: how much the guest may send and is told so, and what is made of the window that it
//! announces.
//!
//! Comes in: segments of the guest, what there is room for. Goes out: acknowledgements that smoltcp does not send, and
//! segments cut or changed to what smoltcp 0.14 takes as it should.

use smoltcp::socket::tcp::State;
use smoltcp::wire::TcpControl;

use super::tcp_completion::{ahead_of, stamped};
use super::tcp_direct::{FLAGS, header_of, set_length};
use super::tcp_engine::{Engine, MAX_HEADERS, RING, RING_SCALE, length};
use super::tcp_written::Written;
use crate::buf::TxBatch;
use crate::net::parse::{TcpSegment, tcp_flags};
use crate::net::{Instant, emit};

impl Engine {
    /// Tells the guest how much it may send, if that has become much more than it knows, as soon as there is room for it.
    pub(super) fn open_window(&mut self, now: Instant, tx: &mut TxBatch) {
        if !self.owes_window {
            return;
        }
        let sent = self.line.sent;
        let signed = |distance: u32| distance.cast_signed().max(0);
        let gain = signed(self.acceptable().wrapping_sub(sent.edge));
        let left = signed(sent.edge.wrapping_sub(self.line.next_in));
        let much = gain >= left.max(i32::from(self.path.mss().min(0x7fff)));
        self.owes_window = much && !self.announce(now, tx, sent.last.ack);
    }

    /// Acknowledges up to a sequence number, and tells the guest how much it may send; false when there is no room for
    /// that.
    pub(super) fn announce(&mut self, now: Instant, tx: &mut TxBatch, ack: u32) -> bool {
        let segment = self.acknowledgement(now, ack);
        let told = emit::tcp_bare(tx, self.path.wire, segment);
        if told {
            self.note_told(&segment);
        }
        told
    }

    /// The header of a segment that acknowledges up to a sequence number; [`Engine::note_told`] once it was sent.
    pub(super) fn acknowledgement(&mut self, now: Instant, ack: u32) -> emit::BareSegment {
        let (limit, shift) = (self.acceptable(), self.limit().1);
        let queue = length(self.socket().recv_queue());
        let room = (length(RING) - queue) >> shift;
        let room = u16::try_from(room).unwrap_or(u16::MAX);
        let reach = self.reach();
        let sent = self.line.sent;
        let beyond = |reach: &u32| ahead_of(sent.next, *reach);
        emit::BareSegment {
            ends: self.ends.reversed(),
            // What probed the guest's window is behind what it takes: such a number it would not look at.
            seq: reach.filter(beyond).unwrap_or(sent.next),
            ack,
            flags: tcp_flags::ACK,
            window: sent.window(ack, (room, shift), limit),
            timestamps: sent.last.timestamps.map(|value| stamped(value, now)),
        }
    }

    /// The guest was sent a segment that smoltcp does not know of.
    pub(super) fn note_told(&mut self, segment: &emit::BareSegment) {
        let (_, shift) = self.limit();
        self.line
            .sent
            .note_promise(segment.ack, segment.window, shift);
        let last = &mut self.line.sent.last;
        (last.ack, last.window) = (segment.ack, segment.window);
    }

    /// The sequence number up to which the guest may send without being told by smoltcp.
    fn acceptable(&self) -> u32 {
        let (limit, _) = self.limit();
        let room = self.line.sent.room;
        if room.wrapping_sub(limit).cast_signed() < 0 {
            room
        } else {
            limit
        }
    }

    /// The sequence number up to which the guest may send, and the scale of the window.
    pub(super) fn limit(&self) -> (u32, u32) {
        let scales = self.line.options.window_scale.is_some();
        let shift = if scales { RING_SCALE } else { 0 };
        let segment = u32::from(self.path.mss()).next_multiple_of(1 << shift);
        (self.extent.edge(self.line.next_in, segment), shift)
    }

    /// What is to be taken of a segment that reaches beyond the window that was announced, or the end of the
    /// stream, or for which there is no memory; none where that is all. smoltcp 0.14 takes a window that is not scaled, in a
    /// SYN, for one that is, and what is beyond its ring it would take for received.
    pub(super) fn cut(
        &mut self,
        segment: &TcpSegment,
        packet: &[u8],
        header: usize,
    ) -> Option<(Vec<u8>, TcpSegment)> {
        let end = segment.seq.wrapping_add(length(segment.payload_len));
        let over = end.wrapping_sub(self.right_edge()).cast_signed().max(0);
        let over = usize::try_from(over).unwrap_or(usize::MAX);
        // A window of one segment is announced in whole units of its scale.
        let least = u32::from(self.path.mss()).next_multiple_of(1 << RING_SCALE);
        let over = over.max(self.extent.excess(end, self.line.next_in, least));
        if over == 0 {
            return None;
        }
        let kept = segment.payload_len.saturating_sub(over);
        let mut cut = packet[..header + segment.header_len + kept].to_vec();
        cut[header + FLAGS] &= !tcp_flags::FIN;
        set_length(&mut cut);
        let segment = TcpSegment {
            payload_len: kept,
            flags: segment.flags & !tcp_flags::FIN,
            ..*segment
        };
        Some((cut, segment))
    }

    /// Takes a segment that lies within the window, and in the memory that there is; the TCP header begins at `header`.
    pub(super) fn take(
        &mut self,
        now: Instant,
        tx: &mut TxBatch,
        segment: &TcpSegment,
        (packet, header): (&[u8], usize),
    ) {
        self.delay_answer(segment);
        let options = header..header + segment.header_len;
        self.note_ahead(now, segment, &packet[options]);
        self.note_segment(segment);
        let opened = self.open_at_the_end(segment, packet);
        let packet = opened.as_deref().unwrap_or(packet);
        if segment.has(tcp_flags::FIN) && self.is_beyond_window(segment) {
            let mut without = packet.to_vec();
            without[header + FLAGS] &= !tcp_flags::FIN;
            return self.ingress(now, tx, &without);
        }
        let window = if self.only_fin_outstanding() {
            Some(1)
        } else {
            self.small_window(segment)
        };
        let mut copy = [0; MAX_HEADERS];
        match (copy.get_mut(..packet.len()), window) {
            (Some(copy), Some(window)) if segment.payload_len == 0 => {
                copy.copy_from_slice(packet);
                self.vary_window(copy, window);
                self.ingress(now, tx, copy);
            }
            _ => self.ingress(now, tx, packet),
        }
    }

    /// Some of a segment's payload is beyond the window that the guest was given. smoltcp 0.14 takes the
    /// rest, and a FIN behind what it left out; without its FIN the segment is only one to be repeated.
    pub(super) fn is_beyond_window(&self, segment: &TcpSegment) -> bool {
        let end = segment.seq.wrapping_add(length(segment.payload_len));
        ahead_of(end, self.line.sent.edge)
    }

    /// The window less one, if it is too small for a whole segment. An open one is not closed by that,
    /// since nothing would probe it, nor made larger, since what goes beyond it is lost.
    pub(super) fn small_window(&self, segment: &TcpSegment) -> Option<u16> {
        let bytes = u32::from(segment.window) << self.scale();
        let small = bytes < u32::from(self.mss()) && !segment.has(tcp_flags::SYN);
        (small && segment.window > 1).then(|| segment.window - 1)
    }

    /// The segment with a window, where it has none and acknowledges our FIN: smoltcp 0.14 would send the probe of its
    /// closed window again and again at once, though it has nothing to send.
    pub(super) fn open_at_the_end(
        &mut self,
        segment: &TcpSegment,
        packet: &[u8],
    ) -> Option<Vec<u8>> {
        let end = self.taken().wrapping_add(1);
        let closes = segment.window == 0
            && segment.has(tcp_flags::ACK)
            && segment.ack == end
            && self.socket().state() == State::FinWait1;
        closes.then(|| {
            let mut opened = packet.to_vec();
            self.vary_window(&mut opened, 1);
            opened
        })
    }

    pub(super) fn only_fin_outstanding(&mut self) -> bool {
        let socket = self.socket();
        matches!(
            socket.state(),
            State::FinWait1 | State::Closing | State::LastAck
        ) && socket.send_queue() == 0
    }

    /// Keeps three repetitions of an acknowledgement from being taken for a loss, by a window that
    /// changes between `window` and one more. Two cases need that, for smoltcp 0.14:
    ///
    /// - Nothing but our FIN is outstanding: it stops its retransmission timer without sending, and the
    ///   FIN, if it was lost, never goes out again. The window itself no longer matters.
    /// - The window has no room for a whole segment: it retransmits one all the same, which the guest
    ///   takes in part, and when the window next closes and opens, it waits for ever for an
    ///   acknowledgement of the rest. The window is true within one unit.
    pub(super) fn vary_window(&mut self, packet: &mut [u8], window: u16) {
        self.varied = !self.varied;
        let window = window.saturating_add(u16::from(self.varied));
        let header_len = header_of(packet);
        if let Some(field) = packet.get_mut(header_len + 14..header_len + 16) {
            field.copy_from_slice(&window.to_be_bytes());
        }
    }

    /// Something is under way to the guest, and smoltcp neither waits for its acknowledgement nor probes the window: so
    /// it is in 0.14 where a window closes while data is in flight and opens again, and where data comes while the window
    /// is closed.
    fn is_stuck(&mut self, now: Instant) -> bool {
        let socket = self.socket();
        let sends = matches!(
            socket.state(),
            State::Established
                | State::CloseWait
                | State::FinWait1
                | State::Closing
                | State::LastAck
        );
        sends && socket.send_queue() > 0 && self.is_settled(now)
    }

    /// Has smoltcp send again, if it is stuck, what the guest has not acknowledged, or probe its window: by three
    /// repetitions of the last acknowledgement, behind one that says which window they repeat.
    pub(super) fn unstick(&mut self, now: Instant, tx: &mut TxBatch) {
        let Some(ack) = self.line.guest_ack.filter(|_| self.is_stuck(now)) else {
            return;
        };
        let numbers = [self.expected(), ack];
        let repeated = Written::ack(self.ends, TcpControl::None, numbers, self.line.guest_window);
        for _ in 0..4 {
            self.ingress(now, tx, repeated.bytes());
        }
        self.egress(now, tx, true);
    }
}
