//! What smoltcp does not know of a segment that it wrote: numbers, window, time, checksum, where it is to be cut.
//!
//! Comes in: a frame on its way out. Goes out: the frame as it is to leave, with the offloads that the link does, or complete;
//! and what the engine keeps of it ([`Sent`]).

use std::num::NonZeroU16;

use super::tcp_device::Path;
use crate::buf::{Cut, ETHERNET_HEADER, Offload, PartialChecksum, Segmentation};
use crate::net::checksum::{Sum, complete};
use crate::net::parse::tcp_flags;
use crate::net::{Instant, PROTOCOL_TCP, TCP_HEADER};

/// TCP options (RFC 9293 3.1, RFC 2018 section 3, RFC 7323 section 3).
pub(super) const MSS: u8 = 2;
const SACK: u8 = 5;
const TIMESTAMPS: u8 = 8;

/// Distance from the start of a TCP header to its checksum field.
const CHECKSUM_FIELD: u16 = 16;

/// What the last segment said, but for a RST: beside our next sequence number all that is left to answer with once a
/// connection is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LastSent {
    /// Acknowledgement number of that segment.
    pub ack: u32,
    /// Window field of that segment.
    pub window: u16,
    /// Its timestamps option (RFC 7323), where the ends agreed on one.
    pub timestamps: Option<[u8; 8]>,
}

/// What has been sent, as far as smoltcp does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Sent {
    /// The last segment that was no RST.
    pub(super) last: LastSent,
    /// The sequence number of our SYN.
    pub(super) initial: u32,
    /// The next sequence number of ours: behind the furthest segment.
    pub(super) next: u32,
    /// The sequence number up to which the guest was ever told that it may send.
    pub(super) edge: u32,
    /// The sequence number up to which smoltcp would take what it sends.
    pub(super) room: u32,
    /// Bytes of the guest's that smoltcp has not heard of; wraps.
    pub(super) skipped: u32,
    /// Bytes of ours that smoltcp has not heard of; wraps.
    pub(super) withheld: u32,
}

impl Sent {
    /// The window field for an acknowledgement of `ack`, where the guest may send up to `limit` and there
    /// is room for the window `field`; `shift` is its scale. What was promised once stands: of the room a
    /// unit is never promised, since as much may be lost to smoltcp by rounding its window down anew.
    pub(super) fn window(&self, ack: u32, (field, shift): (u16, u32), limit: u32) -> u16 {
        let room = u32::from(field.saturating_sub(u16::from(shift > 0))) << shift;
        let upto = |edge: u32| {
            let distance = edge.wrapping_sub(ack);
            if distance.cast_signed() > 0 {
                distance
            } else {
                0
            }
        };
        let wanted = upto(limit).max(upto(self.edge)).min(room);
        // Less than a unit of the scale can't be said (RFC 7323 2.4); rounded up, it would creep on.
        // No more than the field was.
        u16::try_from(wanted >> shift).unwrap_or(field)
    }

    /// The guest is told that it may send that window from `ack` on, scaled by `shift`.
    pub(super) fn note_promise(&mut self, ack: u32, window: u16, shift: u32) {
        let edge = ack.wrapping_add(u32::from(window) << shift);
        if ahead_of(edge, self.edge) {
            self.edge = edge;
        }
    }
}

/// Completes a frame that smoltcp wrote: what it does not know, the checksum, or what the link needs
/// to complete that.
pub(super) fn finish(
    frame: &mut [u8],
    path: &Path,
    (segment, mss): (Option<NonZeroU16>, u16),
    now: Instant,
    sent: &mut Sent,
) -> Offload {
    let ipv6 = path.ipv6;
    let start = ETHERNET_HEADER + usize::from(path.header_len());
    let tcp = &mut frame[start..];
    let tcp_header = usize::from(tcp[12] >> 4) * 4;
    let payload = tcp.len() - tcp_header;
    let last = amend(&mut tcp[..tcp_header], path, now);
    // A RST says nothing of what was received, and one that answers a wrong acknowledgement has no number of ours.
    if tcp[13] & tcp_flags::RST == 0 {
        sent.last = last;
    }
    if tcp[13] & tcp_flags::SYN != 0 {
        sent.initial = word(tcp, 4);
    }
    let whole = |len: usize| u16::try_from(len).unwrap_or(u16::MAX);
    // smoltcp says for IPv4 alone what it leaves to be segmented, and before it was shortened.
    let room = usize::from(mss).saturating_sub(tcp_header - TCP_HEADER);
    let size = segment.or_else(|| NonZeroU16::new(whole(room)).filter(|_| ipv6));
    let segment = size.filter(|size| payload > usize::from(size.get()));
    let length = whole(tcp.len());
    let pseudo = pseudo_header(&frame[ETHERNET_HEADER..], ipv6, length).fold();
    frame[start + 16..start + 18].copy_from_slice(&pseudo.to_be_bytes());
    if !path.capabilities.checksum {
        complete(frame, start, usize::from(CHECKSUM_FIELD));
        return Offload::NONE;
    }
    Offload {
        checksum: Some(PartialChecksum {
            start: whole(start),
            offset: CHECKSUM_FIELD,
        }),
        segment: segment.map(|size| Segmentation {
            cut: if ipv6 { Cut::Tcp6 } else { Cut::Tcp4 },
            size,
            header_len: whole(start + tcp_header),
        }),
    }
}

/// Writes the window into a TCP segment that the guest may fill, and takes note of what is sent.
///
/// The guest takes what is up to `reach`, where that is known.
pub(super) fn announce(
    tcp: &mut [u8],
    sent: &mut Sent,
    (limit, scale): (u32, u32),
    reach: Option<u32>,
) {
    let [.., high, low] = tcp[..16] else { return };
    let (flags, field) = (tcp[13], u16::from_be_bytes([high, low]));
    let seq = word(tcp, 4).wrapping_add(sent.withheld);
    let ack = word(tcp, 8).wrapping_add(sent.skipped);
    let controls = flags & (tcp_flags::SYN | tcp_flags::FIN);
    let header = usize::from(tcp[12] >> 4) * 4;
    let payload = tcp.len() - header;
    let length = u32::try_from(payload).unwrap_or(u32::MAX) + controls.count_ones();
    let end = seq.wrapping_add(length);
    let is_syn = flags & tcp_flags::SYN != 0;
    // A RST for an acknowledgement of what was never sent has the guest's own number.
    let is_reset = flags & tcp_flags::RST != 0;
    let is_new = is_syn || (!is_reset && ahead_of(end, sent.next));
    if is_new {
        sent.next = end;
    }
    tcp[4..8].copy_from_slice(&seq.to_be_bytes());
    if flags & tcp_flags::ACK != 0 {
        tcp[8..12].copy_from_slice(&ack.to_be_bytes());
        move_blocks(&mut tcp[..header], sent.skipped);
    }
    // A SYN without acknowledgement is sent before anything is known of the guest's numbers; a RST
    // announces nothing.
    if flags & tcp_flags::ACK != 0 && !is_reset {
        let shift = if is_syn { 0 } else { scale };
        // A byte that the guest does not take probes its window, one that it has asks whether it is there; smoltcp 0.14
        // forgets at once which window it wrote there, and takes no more than it has said elsewhere.
        let taken = reach.is_none_or(|reach| reach.wrapping_sub(end).cast_signed() >= 0);
        let limit = if payload == 1 && !(is_new && taken) {
            sent.edge
        } else {
            sent.room = ack.wrapping_add(u32::from(field) << shift);
            limit
        };
        let window = sent.window(ack, (field, shift), limit);
        sent.note_promise(ack, window, shift);
        tcp[14..16].copy_from_slice(&window.to_be_bytes());
    }
}

/// Writes into a TCP header what smoltcp does not know: the time, and the largest segment of IPv6.
fn amend(header: &mut [u8], path: &Path, now: Instant) -> LastSent {
    if path.ipv6
        && header[13] & tcp_flags::SYN != 0
        && let Some(mss) = option(header, MSS)
    {
        // smoltcp derives it from the size that it was told, see `capabilities`.
        *mss = path.mss().to_be_bytes();
    }
    let timestamps = option::<8>(header, TIMESTAMPS).map(|value| {
        let [a, b, c, d] = timestamp(now).to_be_bytes();
        value[..4].copy_from_slice(&[a, b, c, d]);
        *value
    });
    LastSent {
        ack: word(header, 8),
        window: u16::from_be_bytes([header[14], header[15]]),
        timestamps,
    }
}

/// The number at a place in a TCP header.
pub(super) fn word(tcp: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]])
}

/// Whether `one` comes after `other` in the stream, by less than half of all sequence numbers (RFC 9293 3.4).
pub(super) const fn ahead_of(one: u32, other: u32) -> bool {
    one.wrapping_sub(other).cast_signed() > 0
}

/// Moves the blocks that a header says were received out of order (RFC 2018 section 3).
fn move_blocks(header: &mut [u8], by: u32) {
    fn each<const LEN: usize>(header: &mut [u8], by: u32) {
        if let Some(blocks) = option::<LEN>(header, SACK) {
            for edge in blocks.as_chunks_mut().0 {
                *edge = u32::from_be_bytes(*edge).wrapping_add(by).to_be_bytes();
            }
        }
    }
    if by != 0 {
        each::<8>(header, by);
        each::<16>(header, by);
        each::<24>(header, by);
    }
}

/// The value of the timestamps option, sent again at another time.
pub(super) fn stamped(mut value: [u8; 8], now: Instant) -> [u8; 8] {
    value[..4].copy_from_slice(&timestamp(now).to_be_bytes());
    value
}

/// The clock of timestamps: milliseconds, wrapping (RFC 7323 5.4).
fn timestamp(now: Instant) -> u32 {
    let millis = now.total_millis() & i64::from(u32::MAX);
    u32::try_from(millis).unwrap_or_default()
}

/// The value of an option in a TCP header, if it is there, in `LEN` bytes (RFC 9293 3.1).
pub(super) fn option<const LEN: usize>(header: &mut [u8], wanted: u8) -> Option<&mut [u8; LEN]> {
    /// Kinds without a length.
    const END: u8 = 0;
    const NO_OPERATION: u8 = 1;
    let mut at = 20;
    loop {
        let length = match (*header.get(at)?, header.get(at + 1)) {
            (END, _) => return None,
            (NO_OPERATION, _) => 1,
            (kind, Some(&length)) if kind == wanted => {
                let whole = usize::from(length) == 2 + LEN;
                return header
                    .get_mut(at + 2..)
                    .filter(|_| whole)?
                    .first_chunk_mut();
            }
            (_, Some(&length @ 2..)) => usize::from(length),
            (_, Some(_) | None) => return None,
        };
        at += length;
    }
}

fn pseudo_header(packet: &[u8], ipv6: bool, length: u16) -> Sum {
    // The addresses stand next to each other in both headers, so their order does not matter.
    let addresses = if ipv6 {
        &packet[8..40]
    } else {
        &packet[12..20]
    };
    Sum::default()
        .bytes(addresses)
        .word(u16::from(PROTOCOL_TCP))
        .word(length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::tcp_engine::RING;

    #[test]
    fn blocks_are_moved_and_nothing_else() {
        let mut header = [0; 20].to_vec();
        header.extend([1, 1, 8, 10, 9, 9, 9, 9, 9, 9, 9, 9, 1, 1, 5, 18]);
        for edge in [10_u32, 20, u32::MAX, 3] {
            header.extend(edge.to_be_bytes());
        }
        let before = header.clone();
        move_blocks(&mut header, 0);
        assert_eq!(header, before);
        move_blocks(&mut header, 5);
        let (words, _) = header[36..].as_chunks::<4>();
        let edges: Vec<u32> = words.iter().map(|it| u32::from_be_bytes(*it)).collect();
        assert_eq!(edges, [15, 25, 4, 8]);
        assert_eq!(header[..36], before[..36]);
    }

    #[test]
    fn what_was_promised_is_still_taken_when_the_window_is_rounded_anew() {
        let (ring, shift) = (u32::try_from(RING).unwrap(), 5);
        for start in [0, 24, u32::MAX - 100] {
            let mut sent = Sent::default();
            // The ring fills: nothing is taken from it, and each piece is acknowledged.
            for came in (0..ring).step_by(1_013) {
                let ack = u32::wrapping_add(start, came);
                let field = u16::try_from((ring - came) >> shift).unwrap();
                let takes = u32::from(field) << shift;
                let window = sent.window(ack, (field, shift), start.wrapping_add(ring));
                sent.note_promise(ack, window, shift);
                let promised = sent.edge.wrapping_sub(ack);
                assert!(promised <= takes, "{promised} of {takes} at {came}");
            }
        }
    }
}
