//! ICMP and ICMPv6: echo replies, and the errors that routers and hosts send.
//!
//! Comes in: what happened, and the packet that it happened to. Goes out: frames. What the guest sent
//! is quoted; where it is no longer at hand, enough of it is written anew that its kernel finds the
//! socket (RFC 1122 3.2.2, RFC 4443 section 3).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{DatagramId, Ends, Header, push, push_parts, udp_header};
use crate::buf::TxBatch;
use crate::net::checksum::Sum;
use crate::net::parse::tcp_flags;
use crate::net::{
    IPV4_HEADER, IPV6_HEADER, Marks, PROTOCOL_ICMP, PROTOCOL_ICMPV6, PROTOCOL_TCP, PROTOCOL_UDP,
    TCP_HEADER, Wire,
};

/// Bytes of an ICMP header.
const ICMP_HEADER: usize = 8;
/// An ICMP error is no longer than this with its IP header (RFC 1812 4.3.2.3).
const MAX_ERROR: usize = 576;
/// An ICMPv6 error is no longer than this with its IP header (RFC 4443 2.4 c).
const MAX_ERROR6: usize = 1280;

/// Errors that a router or host reports (RFC 792, RFC 1812 5.2.7, RFC 4443 section 3).
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
    TooBig(u32),
    /// Forbidden by policy or a limit.
    AdministrativelyProhibited,
    /// The source address means nothing beyond the link.
    BeyondScope,
    /// The hop limit ran out.
    TimeExceeded,
    /// Fragments did not come in time.
    ReassemblyTimeExceeded,
    /// As a router on the way said it: type, code and the second word of its header.
    Raw(u8, u8, u32),
}

impl IcmpError {
    /// Type, code, and the second header word.
    const fn fields(self, ipv6: bool) -> (u8, u8, u32) {
        /// Where an IPv6 header has its next-header field.
        const NEXT_HEADER: u32 = 6;
        match (self, ipv6) {
            (Self::NetUnreachable, false) | (Self::BeyondScope, false) => (3, 0, 0),
            (Self::HostUnreachable, false) => (3, 1, 0),
            (Self::ProtocolUnreachable, false) => (3, 2, 0),
            (Self::PortUnreachable, false) => (3, 3, 0),
            (Self::TooBig(mtu), false) => (3, 4, mtu & 0xffff),
            (Self::AdministrativelyProhibited, false) => (3, 13, 0),
            (Self::TimeExceeded, false) => (11, 0, 0),
            (Self::ReassemblyTimeExceeded, false) => (11, 1, 0),
            (Self::NetUnreachable, true) => (1, 0, 0),
            (Self::AdministrativelyProhibited, true) => (1, 1, 0),
            (Self::BeyondScope, true) => (1, 2, 0),
            (Self::HostUnreachable, true) => (1, 3, 0),
            (Self::PortUnreachable, true) => (1, 4, 0),
            (Self::TooBig(mtu), true) => (2, 0, mtu),
            (Self::TimeExceeded, true) => (3, 0, 0),
            (Self::ReassemblyTimeExceeded, true) => (3, 1, 0),
            (Self::ProtocolUnreachable, true) => (4, 1, NEXT_HEADER),
            (Self::Raw(kind, code, word), _) => (kind, code, word),
        }
    }
}

const fn protocol(ipv6: bool) -> u8 {
    if ipv6 { PROTOCOL_ICMPV6 } else { PROTOCOL_ICMP }
}

/// The sum that a checksum begins with: ICMPv6 covers the addresses as well (RFC 4443 2.3).
fn initial_sum(src: IpAddr, dst: IpAddr, len: usize) -> Sum {
    if src.is_ipv4() {
        return Sum::default();
    }
    let length = u16::try_from(len).unwrap_or(u16::MAX);
    Sum::pseudo_header(src, dst, PROTOCOL_ICMPV6, length)
}

/// Fills in the checksum of an ICMPv6 message.
pub(in crate::net) fn fill_icmpv6_checksum(src: IpAddr, dst: IpAddr, message: &mut [u8]) {
    let sum = initial_sum(src, dst, message.len()).bytes(message);
    if let Some(field) = message.get_mut(2..4) {
        field.copy_from_slice(&sum.finish().to_be_bytes());
    }
}

/// The header of a message whose data follow in `data`, checksum included.
fn header(ends: [IpAddr; 2], fields: (u8, u8, u32), data: &[u8]) -> [u8; ICMP_HEADER] {
    let (kind, code, word) = fields;
    let [a, b, c, d] = word.to_be_bytes();
    let mut header = [kind, code, 0, 0, a, b, c, d];
    let sum = initial_sum(ends[0], ends[1], ICMP_HEADER + data.len());
    let checksum = sum.bytes(&header).bytes(data).finish();
    header[2..4].copy_from_slice(&checksum.to_be_bytes());
    header
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
    /// Hop limit and type of service.
    pub marks: Marks,
    /// Data of the request.
    pub data: &'a [u8],
}

/// Sends an echo reply; fragmented where `mtu` demands it.
pub fn echo_reply(
    tx: &mut TxBatch,
    wire: Wire,
    mtu: u16,
    reply: EchoReply<'_>,
    id: DatagramId,
) -> bool {
    let ipv6 = reply.src.is_ipv6();
    let kind = if ipv6 { 129 } else { 0 };
    let word = u32::from(reply.ident) << 16 | u32::from(reply.seq);
    let icmp = header([reply.src, reply.dst], (kind, 0, word), reply.data);
    let header = Header::whole(reply.src, reply.dst, protocol(ipv6)).marked(reply.marks);
    push_parts(tx, (wire, mtu), header, id, [&icmp, reply.data])
}

/// Sends an ICMP error from `from` about `original`, the bytes of an IP packet that the guest sent,
/// of which as much is quoted as fits. False when the batch is full, or where `from` is of another
/// family than the original.
pub fn icmp_error(
    tx: &mut TxBatch,
    wire: Wire,
    from: IpAddr,
    error: IcmpError,
    original: &[u8],
) -> bool {
    let Some(guest) = source(original) else {
        return false;
    };
    let ipv6 = guest.is_ipv6();
    let room = if ipv6 {
        MAX_ERROR6 - IPV6_HEADER - ICMP_HEADER
    } else {
        MAX_ERROR - IPV4_HEADER - ICMP_HEADER
    };
    let quoted = &original[..original.len().min(room)];
    let icmp = header([from, guest], error.fields(ipv6), quoted);
    let header = Header::whole(from, guest, protocol(ipv6));
    push(tx, wire, header, ICMP_HEADER + quoted.len(), |packet| {
        let (first, rest) = packet.split_at_mut(ICMP_HEADER);
        first.copy_from_slice(&icmp);
        rest.copy_from_slice(quoted);
    })
}

/// The source address of an IP packet.
fn source(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => {
            let octets: &[u8; 4] = packet.get(12..16)?.first_chunk()?;
            Some(Ipv4Addr::from(*octets).into())
        }
        6 => {
            let octets: &[u8; 16] = packet.get(8..24)?.first_chunk()?;
            Some(Ipv6Addr::from(*octets).into())
        }
        _ => None,
    }
}

/// The packet that a guest sent, from its transport header on.
fn quoted(ends: [IpAddr; 2], protocol: u8, parts: [&[u8]; 2]) -> Option<Vec<u8>> {
    let [src, dst] = ends;
    if src.is_ipv6() != dst.is_ipv6() {
        return None;
    }
    let header = Header::whole(src, dst, protocol);
    let mut packet = vec![0; header.len()];
    packet.extend(parts[0]);
    packet.extend(parts[1]);
    header.write(&mut packet);
    Some(packet)
}

/// Rebuilds the packet of a UDP datagram that a guest sent. `payload` is what the error quotes of it.
#[must_use]
pub fn quoted_udp(ends: Ends, payload: &[u8]) -> Option<Vec<u8>> {
    let udp = udp_header(ends, payload)?;
    quoted(
        [ends.src.ip(), ends.dst.ip()],
        PROTOCOL_UDP,
        [&udp, payload],
    )
}

/// Rebuilds the packet of a SYN: ports and sequence number.
#[must_use]
pub fn quoted_syn(ends: Ends, seq: u32) -> Option<Vec<u8>> {
    let mut tcp = [0; TCP_HEADER];
    tcp[..2].copy_from_slice(&ends.src.port().to_be_bytes());
    tcp[2..4].copy_from_slice(&ends.dst.port().to_be_bytes());
    tcp[4..8].copy_from_slice(&seq.to_be_bytes());
    tcp[12..14].copy_from_slice(&[0x50, tcp_flags::SYN]);
    quoted([ends.src.ip(), ends.dst.ip()], PROTOCOL_TCP, [&tcp, &[]])
}

/// Rebuilds the packet of an echo request. `data` is what the error quotes of it.
#[must_use]
pub fn quoted_echo(ends: [IpAddr; 2], ident: u16, seq: u16, data: &[u8]) -> Option<Vec<u8>> {
    let ipv6 = ends[0].is_ipv6();
    let kind = if ipv6 { 128 } else { 8 };
    let word = u32::from(ident) << 16 | u32::from(seq);
    let icmp = header(ends, (kind, 0, word), data);
    quoted(ends, protocol(ipv6), [&icmp, data])
}
