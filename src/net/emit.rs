//! Writes the frames that the gateway itself sends: ARP, ICMP, UDP, and a bare TCP segment.
//!
//! Comes in: a [`TxBatch`], both ends and the contents. Goes out: whole frames with every checksum
//! in place. Datagrams above the MTU are fragmented here. Segments of live TCP flows are written
//! by smoltcp, see `flow/tcp_engine.rs`.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::checksum::Sum;
use super::parse::Arp;
use super::{IPV4_HEADER, PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP, TCP_HEADER, UDP_HEADER, Wire};
use crate::buf::{ETHERNET_HEADER, Offload, TxBatch};

/// Bytes of an Ethernet ARP packet.
const ARP_LEN: usize = 28;
/// Bytes of an ICMP header.
const ICMP_HEADER: usize = 8;
/// An ICMP error is no longer than this with its IP header (RFC 1812 4.3.2.3).
const MAX_ICMP_ERROR: usize = 576;
/// Hop limit of packets that begin here (RFC 1700's successor registry recommends 64).
const HOP_LIMIT: u8 = 64;

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

/// IPv4 identification of a datagram that may be fragmented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatagramId(pub u16);

/// ICMP errors a router or host sends (RFC 792, RFC 1812 5.2.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IcmpError {
    /// No route to the network.
    NetUnreachable,
    /// No way to the host.
    HostUnreachable,
    /// The host does not speak the protocol.
    ProtocolUnreachable,
    /// Nobody listens at the port.
    PortUnreachable,
    /// Too big for a link, and not to be fragmented; the next hop's MTU.
    FragmentationNeeded(u16),
    /// Forbidden by policy or a limit.
    AdministrativelyProhibited,
    /// The time to live ran out.
    TimeExceeded,
    /// As a router on the way said it: type, code and the second word of its header.
    Raw(u8, u8, u32),
}

impl IcmpError {
    /// Type, code, and the second header word.
    const fn fields(self) -> (u8, u8, u32) {
        match self {
            Self::NetUnreachable => (3, 0, 0),
            Self::HostUnreachable => (3, 1, 0),
            Self::ProtocolUnreachable => (3, 2, 0),
            Self::PortUnreachable => (3, 3, 0),
            Self::FragmentationNeeded(mtu) => (3, 4, mtu as u32),
            Self::AdministrativelyProhibited => (3, 13, 0),
            Self::TimeExceeded => (11, 0, 0),
            Self::Raw(kind, code, word) => (kind, code, word),
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

/// Writes just the Ethernet header of an IPv4 frame; what follows is written by somebody else.
pub fn ethernet_ipv4(frame: &mut [u8], wire: Wire) -> &mut [u8] {
    ethernet(frame, wire, 0x0800)
}

/// The IPv4 fields that differ from packet to packet.
#[derive(Clone, Copy)]
struct Ipv4Fields {
    src: Ipv4Addr,
    dst: Ipv4Addr,
    protocol: u8,
    id: u16,
    /// Flags and fragment offset as on the wire.
    fragment: u16,
}

fn ipv4_header(packet: &mut [u8], fields: Ipv4Fields) {
    let total = u16::try_from(packet.len()).unwrap_or(u16::MAX);
    packet[..2].copy_from_slice(&[0x45, 0]);
    packet[2..4].copy_from_slice(&total.to_be_bytes());
    packet[4..6].copy_from_slice(&fields.id.to_be_bytes());
    packet[6..8].copy_from_slice(&fields.fragment.to_be_bytes());
    packet[8..12].copy_from_slice(&[HOP_LIMIT, fields.protocol, 0, 0]);
    packet[12..16].copy_from_slice(&fields.src.octets());
    packet[16..20].copy_from_slice(&fields.dst.octets());
    let checksum = Sum::default().bytes(&packet[..IPV4_HEADER]).finish();
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
}

/// Makes the header of a first fragment that of the whole packet, `total` bytes long.
pub fn make_whole(header: &mut [u8], total: u16) {
    if header.len() < IPV4_HEADER {
        return;
    }
    header[2..4].copy_from_slice(&total.to_be_bytes());
    header[6..8].fill(0);
    header[10..12].fill(0);
    let checksum = Sum::default().bytes(header).finish();
    header[10..12].copy_from_slice(&checksum.to_be_bytes());
}

/// Pushes one whole IPv4 packet whose payload `fill` writes. False when the batch is full.
fn push_ipv4(
    tx: &mut TxBatch,
    wire: Wire,
    fields: Ipv4Fields,
    payload_len: usize,
    fill: impl FnOnce(&mut [u8]),
) -> bool {
    let len = ETHERNET_HEADER + IPV4_HEADER + payload_len;
    tx.push(wire.link, len, |frame| {
        let packet = ethernet_ipv4(frame, wire);
        fill(&mut packet[IPV4_HEADER..]);
        ipv4_header(packet, fields);
        (Offload::NONE, ())
    })
    .is_some()
}

/// The IPv4 pair of addresses; `None` for IPv6, which this emitter does not write yet.
fn ipv4_pair(src: IpAddr, dst: IpAddr) -> Option<(Ipv4Addr, Ipv4Addr)> {
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => Some((src, dst)),
        _ => None,
    }
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

fn fill_icmp(packet: &mut [u8], kind: u8, code: u8, word: u32, data: &[u8]) {
    packet[..4].copy_from_slice(&[kind, code, 0, 0]);
    packet[4..8].copy_from_slice(&word.to_be_bytes());
    packet[ICMP_HEADER..].copy_from_slice(data);
    let checksum = Sum::default().bytes(packet).finish();
    packet[2..4].copy_from_slice(&checksum.to_be_bytes());
}

/// Sends an ICMP echo reply; fragmented where `mtu` demands it.
pub fn echo_reply(
    tx: &mut TxBatch,
    wire: Wire,
    mtu: u16,
    reply: EchoReply<'_>,
    id: DatagramId,
) -> bool {
    let Some((src, dst)) = ipv4_pair(reply.src, reply.dst) else {
        return false;
    };
    let fields = Ipv4Fields {
        src,
        dst,
        protocol: PROTOCOL_ICMP,
        id: id.0,
        fragment: 0,
    };
    let word = u32::from(reply.ident) << 16 | u32::from(reply.seq);
    let len = ICMP_HEADER + reply.data.len();
    if IPV4_HEADER + len <= usize::from(mtu) {
        return push_ipv4(tx, wire, fields, len, |packet| {
            fill_icmp(packet, 0, 0, word, reply.data)
        });
    }
    let mut header = [0; ICMP_HEADER];
    fill_icmp(&mut header, 0, 0, word, &[]);
    header[2..4].fill(0);
    let checksum = Sum::default().bytes(&header).bytes(reply.data).finish();
    header[2..4].copy_from_slice(&checksum.to_be_bytes());
    push_fragments(tx, wire, mtu, fields, [&header, reply.data])
}

/// The contents of an echo reply.
#[derive(Debug, Clone, Copy)]
pub struct EchoReply<'a> {
    /// Who answers.
    pub src: IpAddr,
    /// Who asked.
    pub dst: IpAddr,
    /// Identifier of the request.
    pub ident: u16,
    /// Sequence number of the request.
    pub seq: u16,
    /// Data of the request.
    pub data: &'a [u8],
}

/// Sends an ICMP error from `from` about `original`, the bytes of an IP packet that the guest
/// sent. At most 576 bytes, as much of the original as fits (RFC 1812 4.3.2.3).
pub fn icmp_error(
    tx: &mut TxBatch,
    wire: Wire,
    from: IpAddr,
    error: IcmpError,
    original: &[u8],
) -> bool {
    let Some(source) = original.get(12..16) else {
        return false;
    };
    let guest = Ipv4Addr::new(source[0], source[1], source[2], source[3]);
    let IpAddr::V4(from) = from else { return false };
    let quoted = &original[..original
        .len()
        .min(MAX_ICMP_ERROR - IPV4_HEADER - ICMP_HEADER)];
    let (kind, code, word) = error.fields();
    let fields = Ipv4Fields {
        src: from,
        dst: guest,
        protocol: PROTOCOL_ICMP,
        id: 0,
        fragment: 0,
    };
    push_ipv4(tx, wire, fields, ICMP_HEADER + quoted.len(), |packet| {
        fill_icmp(packet, kind, code, word, quoted);
    })
}

fn udp_header(ends: Ends, payload: &[u8]) -> Option<[u8; UDP_HEADER]> {
    let length = u16::try_from(UDP_HEADER + payload.len()).ok()?;
    let mut header = [0; UDP_HEADER];
    header[..2].copy_from_slice(&ends.src.port().to_be_bytes());
    header[2..4].copy_from_slice(&ends.dst.port().to_be_bytes());
    header[4..6].copy_from_slice(&length.to_be_bytes());
    let sum = Sum::pseudo_header(ends.src.ip(), ends.dst.ip(), PROTOCOL_UDP, length);
    let checksum = match sum.bytes(&header).bytes(payload).finish() {
        // A sum of zero is sent as its other representation: zero means "no checksum".
        0 => 0xffff_u16,
        checksum => checksum,
    };
    header[6..].copy_from_slice(&checksum.to_be_bytes());
    Some(header)
}

/// A UDP datagram to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Datagram<'a> {
    /// Both ends.
    pub ends: Ends,
    /// Identification, should it be fragmented.
    pub id: DatagramId,
    /// Payload.
    pub payload: &'a [u8],
}

/// Sends a UDP datagram, in fragments where it is above `mtu`. False when it does not fit the
/// batch (a part of its fragments may have been sent) or the addresses are of two families.
pub fn udp(tx: &mut TxBatch, wire: Wire, mtu: u16, datagram: Datagram<'_>) -> bool {
    let Datagram { ends, id, payload } = datagram;
    let (Some((src, dst)), Some(header)) = (
        ipv4_pair(ends.src.ip(), ends.dst.ip()),
        udp_header(ends, payload),
    ) else {
        return false;
    };
    let fields = Ipv4Fields {
        src,
        dst,
        protocol: PROTOCOL_UDP,
        id: id.0,
        fragment: 0,
    };
    let len = UDP_HEADER + payload.len();
    if IPV4_HEADER + len <= usize::from(mtu) {
        return push_ipv4(tx, wire, fields, len, |packet| {
            let (first, rest) = packet.split_at_mut(UDP_HEADER);
            first.copy_from_slice(&header);
            rest.copy_from_slice(payload);
        });
    }
    push_fragments(tx, wire, mtu, fields, [&header, payload])
}

/// Cuts `parts`, taken as one, into fragments of at most `mtu` bytes (RFC 791 3.2).
fn push_fragments(
    tx: &mut TxBatch,
    wire: Wire,
    mtu: u16,
    fields: Ipv4Fields,
    parts: [&[u8]; 2],
) -> bool {
    let total = parts[0].len() + parts[1].len();
    let step = (usize::from(mtu) - IPV4_HEADER) & !7;
    let mut offset = 0;
    while offset < total {
        let len = step.min(total - offset);
        let more = if offset + len < total { 0x2000 } else { 0 };
        let Ok(eighths) = u16::try_from(offset / 8) else {
            return false;
        };
        let fields = Ipv4Fields {
            fragment: more | eighths,
            ..fields
        };
        let pushed = push_ipv4(tx, wire, fields, len, |packet| {
            copy_range(packet, parts, offset)
        });
        if !pushed {
            return false;
        }
        offset += len;
    }
    true
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

/// A TCP segment without payload or options.
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
}

/// Sends a TCP segment that belongs to no live flow: a RST, or the last ACK of a closed one.
pub fn tcp_bare(tx: &mut TxBatch, wire: Wire, segment: BareSegment) -> bool {
    let ends = segment.ends;
    let Some((src, dst)) = ipv4_pair(ends.src.ip(), ends.dst.ip()) else {
        return false;
    };
    // Don't-fragment, as every TCP segment of ours.
    let fields = Ipv4Fields {
        src,
        dst,
        protocol: PROTOCOL_TCP,
        id: 0,
        fragment: 0x4000,
    };
    push_ipv4(tx, wire, fields, TCP_HEADER, |packet| {
        packet[..2].copy_from_slice(&ends.src.port().to_be_bytes());
        packet[2..4].copy_from_slice(&ends.dst.port().to_be_bytes());
        packet[4..8].copy_from_slice(&segment.seq.to_be_bytes());
        packet[8..12].copy_from_slice(&segment.ack.to_be_bytes());
        packet[12..14].copy_from_slice(&[0x50, segment.flags]);
        packet[14..16].copy_from_slice(&segment.window.to_be_bytes());
        packet[16..].fill(0);
        let length = u16::try_from(TCP_HEADER).unwrap_or(u16::MAX);
        let sum = Sum::pseudo_header(src.into(), dst.into(), PROTOCOL_TCP, length).bytes(packet);
        packet[16..18].copy_from_slice(&sum.finish().to_be_bytes());
    })
}

/// Rebuilds the first 28 bytes of the packet that a guest sent, for an ICMP error about a datagram
/// that is no longer at hand. `payload` is what the error quotes of it.
#[must_use]
pub fn quoted_udp(ends: Ends, payload: &[u8]) -> Option<Vec<u8>> {
    let (src, dst) = ipv4_pair(ends.src.ip(), ends.dst.ip())?;
    let mut packet = vec![0; IPV4_HEADER];
    packet.extend(udp_header(ends, payload)?);
    packet.extend(payload);
    ipv4_header(
        &mut packet,
        Ipv4Fields {
            src,
            dst,
            protocol: PROTOCOL_UDP,
            id: 0,
            fragment: 0,
        },
    );
    Some(packet)
}

/// Rebuilds the packet of a SYN, for an ICMP error about it: header, ports and sequence number.
#[must_use]
pub fn quoted_syn(ends: Ends, seq: u32) -> Option<Vec<u8>> {
    let (src, dst) = ipv4_pair(ends.src.ip(), ends.dst.ip())?;
    let mut packet = vec![0; IPV4_HEADER + TCP_HEADER];
    packet[20..22].copy_from_slice(&ends.src.port().to_be_bytes());
    packet[22..24].copy_from_slice(&ends.dst.port().to_be_bytes());
    packet[24..28].copy_from_slice(&seq.to_be_bytes());
    packet[32..34].copy_from_slice(&[0x50, super::parse::tcp_flags::SYN]);
    ipv4_header(
        &mut packet,
        Ipv4Fields {
            src,
            dst,
            protocol: PROTOCOL_TCP,
            id: 0,
            fragment: 0x4000,
        },
    );
    Some(packet)
}

#[cfg(test)]
mod tests {
    use super::super::parse::{self, Packet, Transport};
    use super::super::{DropReason, Mac};
    use super::*;
    use crate::buf::{LinkId, RxMeta};
    use proptest::prelude::*;

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
            IcmpError::FragmentationNeeded(1400),
            &original
        ));
        let bytes = tx.frames().next().unwrap().bytes().to_vec();
        assert_eq!(bytes.len(), ETHERNET_HEADER + MAX_ICMP_ERROR);
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
            let datagram = Datagram { ends: ends(), id: DatagramId(77), payload: &payload };
            prop_assert!(udp(&mut tx, wire(), mtu, datagram));
            let mut whole = Vec::new();
            let count = tx.len();
            for (i, frame) in tx.frames().enumerate() {
                let bytes = frame.bytes().to_vec();
                prop_assert!(bytes.len() <= usize::from(mtu) + ETHERNET_HEADER);
                let parsed = parse::frame(&bytes, RxMeta::plain(LinkId(3))).map_err(|r: DropReason| {
                    TestCaseError::fail(r.name())
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
