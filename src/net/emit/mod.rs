//! Writes the frames that the gateway itself sends: ARP, ICMP, UDP, and TCP segments past smoltcp.
//!
//! Comes in: a [`TxBatch`], both ends and the contents. Goes out: whole frames of either family with
//! every checksum in place. Datagrams above the MTU are fragmented here. Most segments of live TCP flows
//! are written by smoltcp, see `flow/tcp_engine.rs`, and the others in [`tcp`]; [`icmp`] writes echo replies and errors.

pub mod icmp;
pub mod tcp;
pub mod udp;

use std::net::{IpAddr, SocketAddr};

use super::Wire;
use super::checksum::Sum;
use super::parse::Arp;
use super::{IPV4_HEADER, IPV6_HEADER, Marks};
use crate::buf::{ETHERNET_HEADER, Offload, TxBatch};

pub(super) use icmp::fill_icmpv6_checksum;
pub use icmp::{EchoReply, IcmpError, echo_reply, icmp_error, quoted_echo, quoted_syn, quoted_udp};
pub use tcp::{BareSegment, tcp_bare, tcp_filled};
use udp::udp_header;
pub use udp::{Datagram, MAX_TRAIN, MAX_TRAIN_DATAGRAMS, fits, udp, udp_train};

/// Bytes of an Ethernet ARP packet.
const ARP_LEN: usize = 28;
/// Bytes of an IPv6 fragment header (RFC 8200 4.5), and its number.
const FRAGMENT_HEADER: usize = 8;
const PROTOCOL_FRAGMENT: u8 = 44;

/// The two transport endpoints of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// Sender.
    pub src: SocketAddr,
    /// Receiver.
    pub dst: SocketAddr,
}

impl Ends {
    /// The same pair seen from the other side.
    #[must_use]
    pub const fn reversed(self) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
        }
    }
}

/// Identification of a datagram, should it be fragmented; IPv4 has the lower half.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatagramId(pub u32);

/// Whether a packet is, or may become, fragments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fragmenting {
    /// It may (IPv4).
    Allowed(DatagramId),
    /// It must not.
    Forbidden,
    /// It is one, that far into the datagram, in bytes.
    Piece {
        id: DatagramId,
        offset: u16,
        more: bool,
    },
}

/// The fields of an IP header that differ from packet to packet. Both addresses are of one family:
/// what comes from a guest and goes to it never mixes them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    pub(crate) src: IpAddr,
    pub(crate) dst: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) marks: Marks,
    fragmenting: Fragmenting,
}

impl Header {
    /// The header of a packet that is whole and stays so.
    pub(crate) fn whole(src: IpAddr, dst: IpAddr, protocol: u8) -> Self {
        Self {
            src,
            dst,
            protocol,
            marks: Marks::default(),
            fragmenting: Fragmenting::Forbidden,
        }
    }

    /// The same header with these marks.
    pub(crate) const fn marked(self, marks: Marks) -> Self {
        Self { marks, ..self }
    }

    const fn len(&self) -> usize {
        match (self.dst, self.fragmenting) {
            (IpAddr::V4(_), _) => IPV4_HEADER,
            (IpAddr::V6(_), Fragmenting::Piece { .. }) => IPV6_HEADER + FRAGMENT_HEADER,
            (IpAddr::V6(_), Fragmenting::Allowed(_) | Fragmenting::Forbidden) => IPV6_HEADER,
        }
    }

    /// Writes the header in front of a packet, whose length tells that of the payload.
    fn write(&self, packet: &mut [u8]) {
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                self.write_ipv4(packet, [src.octets(), dst.octets()]);
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                self.write_ipv6(packet, [src.octets(), dst.octets()]);
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => {
                debug_assert!(false, "{} and {} in one packet", self.src, self.dst);
            }
        }
    }

    fn write_ipv4(&self, packet: &mut [u8], [src, dst]: [[u8; 4]; 2]) {
        let total = u16::try_from(packet.len()).unwrap_or(u16::MAX);
        let (id, place) = match self.fragmenting {
            Fragmenting::Allowed(id) => (id, 0),
            Fragmenting::Forbidden => (DatagramId(0), 0x4000),
            Fragmenting::Piece { id, offset, more } => {
                (id, (offset / 8) | if more { 0x2000 } else { 0 })
            }
        };
        let [.., high, low] = id.0.to_be_bytes();
        packet[..2].copy_from_slice(&[0x45, self.marks.tos]);
        packet[2..4].copy_from_slice(&total.to_be_bytes());
        packet[4..6].copy_from_slice(&[high, low]);
        packet[6..8].copy_from_slice(&place.to_be_bytes());
        packet[8..12].copy_from_slice(&[self.marks.hop_limit, self.protocol, 0, 0]);
        packet[12..16].copy_from_slice(&src);
        packet[16..20].copy_from_slice(&dst);
        let checksum = Sum::default().bytes(&packet[..IPV4_HEADER]).finish();
        packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    }

    fn write_ipv6(&self, packet: &mut [u8], [src, dst]: [[u8; 16]; 2]) {
        let length = u16::try_from(packet.len() - IPV6_HEADER).unwrap_or(u16::MAX);
        let tos = self.marks.tos;
        let next = match self.fragmenting {
            Fragmenting::Allowed(_) | Fragmenting::Forbidden => self.protocol,
            Fragmenting::Piece { .. } => PROTOCOL_FRAGMENT,
        };
        packet[..4].copy_from_slice(&[0x60 | tos >> 4, tos << 4, 0, 0]);
        packet[4..6].copy_from_slice(&length.to_be_bytes());
        packet[6..8].copy_from_slice(&[next, self.marks.hop_limit]);
        packet[8..24].copy_from_slice(&src);
        packet[24..40].copy_from_slice(&dst);
        if let Fragmenting::Piece { id, offset, more } = self.fragmenting {
            packet[40..42].copy_from_slice(&[self.protocol, 0]);
            packet[42..44].copy_from_slice(&(offset | u16::from(more)).to_be_bytes());
            packet[44..48].copy_from_slice(&id.0.to_be_bytes());
        }
    }
}

fn ethernet(frame: &mut [u8], wire: Wire, ethertype: u16) -> &mut [u8] {
    let (header, payload) = frame.split_at_mut(ETHERNET_HEADER);
    header[..6].copy_from_slice(&wire.dst.0);
    header[6..12].copy_from_slice(&wire.src.0);
    header[12..].copy_from_slice(&ethertype.to_be_bytes());
    payload
}

/// Writes just the Ethernet header of an IP frame; what follows is written by somebody else.
pub fn ethernet_ip(frame: &mut [u8], wire: Wire, ipv6: bool) -> &mut [u8] {
    ethernet(frame, wire, if ipv6 { 0x86dd } else { 0x0800 })
}

/// Makes the headers of a first fragment those of the whole packet: a plain packet of `protocol` with
/// a payload of that length. Extension headers in front of the fragment's are left out.
#[must_use]
pub fn make_whole(header: &[u8], protocol: u8, payload_len: usize) -> Vec<u8> {
    let length = |bytes: usize| u16::try_from(bytes).unwrap_or(u16::MAX).to_be_bytes();
    if let Some(fixed) = header.get(..IPV6_HEADER).filter(|it| it[0] >> 4 == 6) {
        let mut header = fixed.to_vec();
        header[4..6].copy_from_slice(&length(payload_len));
        header[6] = protocol;
        return header;
    }
    let mut header = header.to_vec();
    if header.len() >= IPV4_HEADER {
        let total = length(header.len() + payload_len);
        header[2..4].copy_from_slice(&total);
        header[6..8].fill(0);
        header[10..12].fill(0);
        let checksum = Sum::default().bytes(&header).finish();
        header[10..12].copy_from_slice(&checksum.to_be_bytes());
    }
    header
}

/// Pushes one IP packet whose payload `fill` writes. False when the batch is full, or where the
/// addresses are of two families.
fn push(
    tx: &mut TxBatch,
    wire: Wire,
    header: Header,
    payload_len: usize,
    fill: impl FnOnce(&mut [u8]),
) -> bool {
    if header.src.is_ipv6() != header.dst.is_ipv6() {
        return false;
    }
    let header_len = header.len();
    tx.push(
        wire.link,
        ETHERNET_HEADER + header_len + payload_len,
        |frame| {
            let packet = ethernet_ip(frame, wire, header.dst.is_ipv6());
            fill(&mut packet[header_len..]);
            header.write(packet);
            (Offload::NONE, ())
        },
    )
    .is_some()
}

/// Sends one packet that is complete but for its IP header.
pub(super) fn packet(tx: &mut TxBatch, wire: Wire, header: Header, payload: &[u8]) -> bool {
    push(tx, wire, header, payload.len(), |packet| {
        packet.copy_from_slice(payload);
    })
}

/// Sends `parts`, taken as one, in one packet or, above `mtu`, in fragments of at most that size.
fn push_parts(
    tx: &mut TxBatch,
    (wire, mtu): (Wire, u16),
    header: Header,
    id: DatagramId,
    parts: [&[u8]; 2],
) -> bool {
    let total = parts[0].len() + parts[1].len();
    let whole = Header {
        fragmenting: Fragmenting::Allowed(id),
        ..header
    };
    if whole.len() + total <= usize::from(mtu) {
        return push(tx, wire, whole, total, |packet| {
            copy_range(packet, parts, 0);
        });
    }
    let piece = |offset, more| Header {
        fragmenting: Fragmenting::Piece { id, offset, more },
        ..header
    };
    let step = usize::from(mtu).saturating_sub(piece(0, true).len()) & !7;
    let mut offset = 0;
    while offset < total {
        let len = step.min(total - offset);
        // A payload is below 64 KiB: longer ones have no UDP length.
        let Ok(place) = u16::try_from(offset) else {
            return false;
        };
        let header = piece(place, offset + len < total);
        if len == 0
            || !push(tx, wire, header, len, |packet| {
                copy_range(packet, parts, offset);
            })
        {
            return false;
        }
        offset += len;
    }
    true
}

/// Answers an ARP request for an address that we have.
pub fn arp_reply(tx: &mut TxBatch, wire: Wire, request: Arp) -> bool {
    tx.push(wire.link, ETHERNET_HEADER + ARP_LEN, |frame| {
        let packet = ethernet(frame, wire, 0x0806);
        packet[..8].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 2]);
        packet[8..14].copy_from_slice(&wire.src.0);
        packet[14..18].copy_from_slice(&request.target.octets());
        packet[18..24].copy_from_slice(&wire.dst.0);
        packet[24..28].copy_from_slice(&request.sender.octets());
        (Offload::NONE, ())
    })
    .is_some()
}

/// Copies `target.len()` bytes of the concatenation of `parts` from `offset` on.
fn copy_range(target: &mut [u8], parts: [&[u8]; 2], offset: usize) {
    let [first, second] = parts;
    let head = first.len().saturating_sub(offset).min(target.len());
    let (from_first, from_second) = target.split_at_mut(head);
    from_first.copy_from_slice(&first[offset.min(first.len())..][..head]);
    let start = offset.saturating_sub(first.len());
    let len = from_second.len();
    from_second.copy_from_slice(&second[start..start + len]);
}

#[cfg(test)]
mod tests {
    use super::super::parse::{self, Packet, Transport};
    use super::super::{DropReason, Mac};
    use super::*;
    use crate::buf::{LinkId, RxMeta};
    use crate::net::{PROTOCOL_UDP, UDP_HEADER};
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    fn wire() -> Wire {
        Wire {
            link: LinkId(3),
            src: Mac([2, 0, 0, 0, 0, 1]),
            dst: Mac([2, 0, 0, 0, 0, 2]),
        }
    }

    fn ends() -> Ends {
        Ends {
            src: "192.0.2.1:53".parse().unwrap(),
            dst: "10.0.2.100:4000".parse().unwrap(),
        }
    }

    #[test]
    fn arp_replies_parse() {
        let mut tx = TxBatch::new(4, 0);
        let request = Arp {
            is_request: true,
            sender_mac: wire().dst,
            sender: Ipv4Addr::new(10, 0, 2, 100),
            target: Ipv4Addr::new(10, 0, 2, 2),
        };
        assert!(arp_reply(&mut tx, wire(), request));
        let bytes = tx.frames().next().unwrap().bytes().to_vec();
        let Packet::Arp(reply) = parse::frame(&bytes, RxMeta::plain(LinkId(3)))
            .unwrap()
            .packet
        else {
            panic!("ARP expected")
        };
        assert!(!reply.is_request);
        assert_eq!(
            (reply.sender, reply.target),
            (request.target, request.sender)
        );
        assert_eq!(reply.sender_mac, wire().src);
    }

    #[test]
    fn errors_quote_no_more_than_576_bytes_allow() {
        let mut tx = TxBatch::new(4, 0);
        let original = quoted_udp(ends().reversed(), &[9; 1400]).unwrap();
        let gateway = "10.0.2.2".parse().unwrap();
        assert!(icmp_error(
            &mut tx,
            wire(),
            gateway,
            IcmpError::TooBig(1400),
            &original
        ));
        let bytes = tx.frames().next().unwrap().bytes().to_vec();
        assert_eq!(bytes.len(), ETHERNET_HEADER + 576);
        assert_eq!(bytes[34..36], [3, 4]);
        assert_eq!(bytes[40..42], 1400_u16.to_be_bytes());
        assert_eq!(Sum::default().bytes(&bytes[34..]).finish(), 0);
    }

    #[test]
    fn a_bare_segment_verifies() {
        let mut tx = TxBatch::new(4, 0);
        let segment = BareSegment {
            ends: ends(),
            seq: 7,
            ack: 8,
            flags: 0x14,
            window: 0,
            timestamps: Some([1, 2, 3, 4, 5, 6, 7, 8]),
        };
        assert!(tcp_bare(&mut tx, wire(), segment));
        let bytes = tx.frames().next().unwrap().bytes().to_vec();
        let Packet::Ip(ip) = parse::frame(&bytes, RxMeta::plain(LinkId(3)))
            .unwrap()
            .packet
        else {
            panic!("IP expected")
        };
        let Transport::Tcp(tcp) = parse::transport(&ip).unwrap() else {
            panic!("TCP expected")
        };
        assert_eq!((tcp.seq, tcp.ack, tcp.flags), (7, 8, 0x14));
    }

    proptest! {
        /// Fragments fit the MTU, tile the datagram and carry the right bytes.
        #[test]
        fn fragments_tile_the_datagram(len in 0_usize..9000, mtu in 576_u16..9000) {
            let payload: Vec<u8> = (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let mut tx = TxBatch::new(64, 64 * 1024);
            let datagram = Datagram { ends: ends(), id: DatagramId(77), marks: Marks::default(), payload: &payload };
            prop_assert!(udp(&mut tx, wire(), mtu, datagram));
            let mut whole = Vec::new();
            let count = tx.len();
            for (i, frame) in tx.frames().enumerate() {
                let bytes = frame.bytes().to_vec();
                prop_assert!(bytes.len() <= usize::from(mtu) + ETHERNET_HEADER);
                let parsed = parse::frame(&bytes, RxMeta::plain(LinkId(3))).map_err(|r: DropReason| {
                    TestCaseError::fail(format!("{r:?}"))
                })?;
                let Packet::Ip(ip) = parsed.packet else { panic!("IP expected") };
                if let Some(fragment) = ip.fragment {
                    prop_assert_eq!(fragment.offset, whole.len());
                    prop_assert_eq!(fragment.more, i + 1 < count);
                    prop_assert_eq!(fragment.id, 77);
                }
                whole.extend(ip.payload);
            }
            let length = u16::try_from(whole.len()).unwrap();
            let sum = Sum::pseudo_header(ends().src.ip(), ends().dst.ip(), PROTOCOL_UDP, length);
            prop_assert_eq!(sum.bytes(&whole).finish(), 0);
            prop_assert_eq!(&whole[UDP_HEADER..], &payload[..]);
        }
    }
}
