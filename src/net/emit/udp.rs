//! Writes UDP datagrams, one by one or as a train that the link cuts up.
//!
//! Comes in: a [`TxBatch`], both ends and payloads. Goes out: whole frames. Above the MTU a datagram
//! leaves in fragments.

use std::num::NonZeroU16;

use super::{DatagramId, Ends, Fragmenting, Header, ethernet_ip, push_parts};
use crate::buf::{Cut, ETHERNET_HEADER, Offload, PartialChecksum, Segmentation, TxBatch};
use crate::net::checksum::Sum;
use crate::net::{Marks, PROTOCOL_UDP, UDP_HEADER, Wire};

/// Distance from the start of a UDP header to its checksum field.
const CHECKSUM_FIELD: u16 = 6;

/// Bytes of payload in one train at most: what fits an IPv4 packet.
pub const MAX_TRAIN: usize = 65_507;

/// Datagrams of one train at most: `UDP_MAX_SEGMENTS` of linux/udp.h, which was 64 before Linux 6.9.
pub const MAX_TRAIN_DATAGRAMS: usize = 64;

/// A UDP datagram to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Datagram<'a> {
    /// Both ends.
    pub ends: Ends,
    /// Identification, should it be fragmented.
    pub id: DatagramId,
    /// Hop limit and type of service.
    pub marks: Marks,
    /// Payload.
    pub payload: &'a [u8],
}

impl Datagram<'_> {
    fn header(&self) -> Header {
        let Ends { src, dst } = self.ends;
        Header::whole(src.ip(), dst.ip(), PROTOCOL_UDP).marked(self.marks)
    }
}

/// The header of a datagram with a payload of that length, its checksum being left out, and the sum of
/// the pseudo header.
fn bare_header(ends: Ends, payload_len: usize) -> Option<([u8; UDP_HEADER], Sum)> {
    let length = u16::try_from(UDP_HEADER + payload_len).ok()?;
    let mut header = [0; UDP_HEADER];
    header[..2].copy_from_slice(&ends.src.port().to_be_bytes());
    header[2..4].copy_from_slice(&ends.dst.port().to_be_bytes());
    header[4..6].copy_from_slice(&length.to_be_bytes());
    let sum = Sum::pseudo_header(ends.src.ip(), ends.dst.ip(), PROTOCOL_UDP, length);
    Some((header, sum))
}

/// The header of a datagram.
pub(super) fn udp_header(ends: Ends, payload: &[u8]) -> Option<[u8; UDP_HEADER]> {
    let (mut header, sum) = bare_header(ends, payload.len())?;
    let checksum = match sum.bytes(&header).bytes(payload).finish() {
        // A sum of zero is sent as its other representation: zero means "no checksum".
        0 => 0xffff_u16,
        checksum => checksum,
    };
    header[6..].copy_from_slice(&checksum.to_be_bytes());
    Some(header)
}

/// Sends a UDP datagram, in fragments where it is above `mtu`. False when it does not fit the
/// batch (a part of its fragments may have been sent) or the addresses are of two families.
pub fn udp(tx: &mut TxBatch, wire: Wire, mtu: u16, datagram: Datagram<'_>) -> bool {
    let Datagram {
        ends, payload, id, ..
    } = datagram;
    let Some(udp) = udp_header(ends, payload) else {
        return false;
    };
    push_parts(tx, (wire, mtu), datagram.header(), id, [&udp, payload])
}

/// The datagrams with headers of a train have room in an IP packet of `mtu` bytes.
#[must_use]
pub fn fits(ends: Ends, mtu: u16, payload_len: usize) -> bool {
    let ip = Header::whole(ends.src.ip(), ends.dst.ip(), PROTOCOL_UDP).len();
    ip + UDP_HEADER + payload_len <= usize::from(mtu)
}

/// Sends the payloads of several datagrams as one frame, for a link that cuts it up into datagrams of
/// `size` bytes of payload; the last may be shorter. `first` says all else of each. False where
/// it does not fit the batch, a packet, or the addresses are of two families.
pub fn udp_train<'a>(
    tx: &mut TxBatch,
    wire: Wire,
    first: Datagram<'_>,
    size: NonZeroU16,
    payloads: impl Iterator<Item = &'a [u8]> + Clone,
) -> bool {
    let total: usize = payloads.clone().map(<[u8]>::len).sum();
    let header = Header {
        fragmenting: Fragmenting::Allowed(first.id),
        ..first.header()
    };
    let (Some((mut udp, sum)), true) = (
        bare_header(first.ends, total),
        total <= MAX_TRAIN && header.src.is_ipv6() == header.dst.is_ipv6(),
    ) else {
        return false;
    };
    udp[6..].copy_from_slice(&sum.fold().to_be_bytes());
    let start = header.len();
    let position = |at: usize| u16::try_from(ETHERNET_HEADER + at).unwrap_or(u16::MAX);
    let offload = Offload {
        checksum: Some(PartialChecksum {
            start: position(start),
            offset: CHECKSUM_FIELD,
        }),
        segment: Some(Segmentation {
            cut: Cut::Udp,
            size,
            header_len: position(start + UDP_HEADER),
        }),
    };
    let len = ETHERNET_HEADER + start + UDP_HEADER + total;
    tx.push(wire.link, len, |frame| {
        let packet = ethernet_ip(frame, wire, header.dst.is_ipv6());
        packet[start..start + UDP_HEADER].copy_from_slice(&udp);
        let mut rest = &mut packet[start + UDP_HEADER..];
        for payload in payloads {
            let (place, behind) = std::mem::take(&mut rest).split_at_mut(payload.len());
            place.copy_from_slice(payload);
            rest = behind;
        }
        header.write(packet);
        (offload, ())
    })
    .is_some()
}
