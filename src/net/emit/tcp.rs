//! Writes TCP segments that smoltcp does not: without payload, or with payload that is written in place.
//!
//! Comes in: a [`TxBatch`], what the header is to say, and for payload who writes it. Goes out: a whole
//! frame, or one that the link is to complete and cut up.

use std::num::NonZeroU16;

use super::{Ends, Header, ethernet_ip, push};
use crate::buf::{Cut, ETHERNET_HEADER, Offload, PartialChecksum, Segmentation, TxBatch};
use crate::net::checksum::Sum;
use crate::net::{PROTOCOL_TCP, TCP_HEADER, Wire};

/// Two no-operations, then the option (RFC 7323 appendix A).
const TIMESTAMPS: [u8; 4] = [1, 1, 8, 10];

/// Distance from the start of a TCP header to its checksum field.
const CHECKSUM_FIELD: u16 = 16;

/// The header of a TCP segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BareSegment {
    /// Both ends.
    pub ends: Ends,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// Flag bits.
    pub flags: u8,
    /// Window field.
    pub window: u16,
    /// The value of the timestamps option (RFC 7323 section 3), where the ends agreed on one.
    pub timestamps: Option<[u8; 8]>,
}

impl BareSegment {
    /// Bytes of the header with its options.
    #[must_use]
    pub fn header_len(&self) -> usize {
        let options = self
            .timestamps
            .map_or(0, |value| TIMESTAMPS.len() + value.len());
        TCP_HEADER + options
    }

    fn ip(&self) -> Header {
        Header::whole(self.ends.src.ip(), self.ends.dst.ip(), PROTOCOL_TCP)
    }

    /// Writes the header in front of a segment, its checksum being left out.
    fn write(&self, segment: &mut [u8]) {
        let words: u8 = if self.timestamps.is_some() { 8 } else { 5 };
        segment[..2].copy_from_slice(&self.ends.src.port().to_be_bytes());
        segment[2..4].copy_from_slice(&self.ends.dst.port().to_be_bytes());
        segment[4..8].copy_from_slice(&self.seq.to_be_bytes());
        segment[8..12].copy_from_slice(&self.ack.to_be_bytes());
        segment[12..14].copy_from_slice(&[words << 4, self.flags]);
        segment[14..16].copy_from_slice(&self.window.to_be_bytes());
        segment[16..TCP_HEADER].fill(0);
        if let Some(value) = self.timestamps {
            segment[TCP_HEADER..][..4].copy_from_slice(&TIMESTAMPS);
            segment[TCP_HEADER + 4..][..8].copy_from_slice(&value);
        }
    }

    /// The sum of the pseudo header of a segment with its header of that length.
    fn pseudo_header(&self, len: usize) -> Sum {
        let length = u16::try_from(len).unwrap_or(u16::MAX);
        Sum::pseudo_header(self.ends.src.ip(), self.ends.dst.ip(), PROTOCOL_TCP, length)
    }
}

/// Sends a TCP segment without payload: a RST, or an acknowledgement.
pub fn tcp_bare(tx: &mut TxBatch, wire: Wire, segment: BareSegment) -> bool {
    push(tx, wire, segment.ip(), segment.header_len(), |packet| {
        segment.write(packet);
        let sum = segment.pseudo_header(packet.len()).bytes(packet);
        packet[16..18].copy_from_slice(&sum.finish().to_be_bytes());
    })
}

/// Sends a TCP segment whose payload, of `most` bytes or less, `fill` writes and tells the length of; nothing
/// where it gives none. The link is to complete the checksum, and to cut the segment up where its payload is
/// longer than `size`. Gives what came of filling; `None` where there is no room, or the addresses are of two families.
pub fn tcp_filled<E>(
    tx: &mut TxBatch,
    wire: Wire,
    segment: BareSegment,
    (most, size): (usize, NonZeroU16),
    fill: impl FnOnce(&mut [u8]) -> Result<usize, E>,
) -> Option<Result<usize, E>> {
    let header = segment.ip();
    if header.src.is_ipv6() != header.dst.is_ipv6() {
        return None;
    }
    let start = header.len();
    let payload_at = start + segment.header_len();
    let position = |at: usize| u16::try_from(ETHERNET_HEADER + at).unwrap_or(u16::MAX);
    tx.push_some(wire.link, ETHERNET_HEADER + payload_at + most, |frame| {
        let packet = ethernet_ip(frame, wire, header.dst.is_ipv6());
        let len = match fill(&mut packet[payload_at..]) {
            Ok(len @ 1..) => len.min(most),
            nothing => return (None, nothing),
        };
        let packet = &mut packet[..payload_at + len];
        segment.write(&mut packet[start..]);
        let sum = segment.pseudo_header(packet.len() - start).fold();
        packet[start + 16..start + 18].copy_from_slice(&sum.to_be_bytes());
        header.write(packet);
        let cut = if header.dst.is_ipv6() {
            Cut::Tcp6
        } else {
            Cut::Tcp4
        };
        let offload = Offload {
            checksum: Some(PartialChecksum {
                start: position(start),
                offset: CHECKSUM_FIELD,
            }),
            segment: (len > usize::from(size.get())).then(|| Segmentation {
                cut,
                size,
                header_len: position(payload_at),
            }),
        };
        (Some((ETHERNET_HEADER + payload_at + len, offload)), Ok(len))
    })
}
