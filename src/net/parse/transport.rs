//! What an IP packet carries: TCP, UDP, echo requests, neighbour discovery.
//!
//! Comes in: a whole packet (not a fragment). Goes out: a [`Transport`], checksum verified, or why
//! it goes no further.

use std::net::{IpAddr, SocketAddr};

use smoltcp::wire::{TcpOption, TcpPacket, UdpPacket};

use super::Ip;
use crate::net::checksum::Sum;
use crate::net::emit::Ends;
use crate::net::ndp::{self, Discovery};
use crate::net::{
    DropReason, IPV6_HEADER, PROTOCOL_ICMP, PROTOCOL_ICMPV6, PROTOCOL_TCP, PROTOCOL_UDP,
    TCP_HEADER, UDP_HEADER,
};

/// Echo requests of ICMP (RFC 792) and ICMPv6 (RFC 4443 4.1).
const ECHO_REQUEST: u8 = 8;
const ECHO_REQUEST6: u8 = 128;
/// "Destination unreachable" of both, and its code for "fragmentation needed".
const UNREACHABLE: u8 = 3;
const UNREACHABLE6: u8 = 1;
const TOO_BIG: u8 = 4;

/// TCP flag bits (RFC 9293 3.1).
pub mod tcp_flags {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// What came so far is to be handed on at once.
    pub const PSH: u8 = 0x08;
    /// The acknowledgement field counts.
    pub const ACK: u8 = 0x10;
}

/// A transport header and its payload.
#[derive(Debug, Clone, Copy)]
pub enum Transport<'a> {
    /// TCP.
    Tcp(TcpSegment),
    /// UDP.
    Udp(UdpDatagram<'a>),
    /// An echo request of ICMP or ICMPv6.
    Echo(Echo<'a>),
    /// A question of neighbour discovery.
    Discovery(Discovery),
    /// The guest says that a TCP segment sent to it could not be delivered: whose it was.
    Undelivered(Ends),
}

/// The fields of a TCP segment that flow selection needs; smoltcp reads the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpSegment {
    /// Source port, never 0.
    pub src_port: u16,
    /// Destination port, never 0.
    pub dst_port: u16,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number, meaningful with the ACK flag.
    pub ack: u32,
    /// Flag bits, see [`tcp_flags`].
    pub flags: u8,
    /// Window field, unscaled.
    pub window: u16,
    /// Type of service of its packet.
    pub tos: u8,
    /// Bytes of header, options included.
    pub header_len: usize,
    /// Bytes of payload.
    pub payload_len: usize,
}

impl TcpSegment {
    /// The SYN flag alone: a connection request.
    #[must_use]
    pub const fn is_connect(&self) -> bool {
        self.flags & (tcp_flags::SYN | tcp_flags::ACK | tcp_flags::RST | tcp_flags::FIN)
            == tcp_flags::SYN
    }

    /// Header and payload, out of the IP packet that it came in.
    #[must_use]
    pub fn bytes<'a>(&self, packet: &'a [u8]) -> &'a [u8] {
        let len = self.header_len + self.payload_len;
        &packet[packet.len().saturating_sub(len)..]
    }

    /// Carries the given flag.
    #[must_use]
    pub const fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// The options of a SYN that shape a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SynOptions {
    /// Largest segment the sender takes, bytes of payload.
    pub mss: Option<u16>,
    /// Shift of the sender's window (RFC 7323), at most 14.
    pub window_scale: Option<u8>,
    /// Selective acknowledgements may be sent to it (RFC 2018).
    pub sack_permitted: bool,
    /// The sender's clock (RFC 7323 section 3), where it offers timestamps.
    pub timestamp: Option<u32>,
}

/// A UDP datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UdpDatagram<'a> {
    /// Source port; 0 means none.
    pub src_port: u16,
    /// Destination port, never 0.
    pub dst_port: u16,
    /// Payload.
    pub payload: &'a [u8],
}

/// An ICMP echo request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Echo<'a> {
    /// Identifier.
    pub ident: u16,
    /// Sequence number.
    pub seq: u16,
    /// Data to be echoed.
    pub data: &'a [u8],
}

/// Parses the transport header of a whole (not fragmented, or reassembled) packet.
///
/// # Errors
/// The reason for which the packet is dropped.
pub fn transport<'a>(ip: &Ip<'a>) -> Result<Transport<'a>, DropReason> {
    match (ip.protocol, ip.src.is_ipv6()) {
        (PROTOCOL_TCP, _) => tcp(ip).map(Transport::Tcp),
        (PROTOCOL_UDP, _) => udp(ip).map(Transport::Udp),
        (PROTOCOL_ICMP, false) => icmp(ip),
        (PROTOCOL_ICMPV6, true) => icmpv6(ip),
        _ => Err(DropReason::Protocol),
    }
}

fn verify(ip: &Ip<'_>) -> Result<(), DropReason> {
    if ip.checksum_verified {
        return Ok(());
    }
    let length = u16::try_from(ip.payload.len()).map_err(|_| DropReason::Malformed)?;
    let sum = Sum::pseudo_header(ip.src, ip.dst, ip.protocol, length).bytes(ip.payload);
    if sum.finish() == 0 {
        Ok(())
    } else {
        Err(DropReason::Checksum)
    }
}

fn tcp(ip: &Ip<'_>) -> Result<TcpSegment, DropReason> {
    let packet = TcpPacket::new_checked(ip.payload).map_err(|_| DropReason::Truncated)?;
    verify(ip)?;
    if packet.src_port() == 0 || packet.dst_port() == 0 {
        return Err(DropReason::Malformed);
    }
    let header_len = usize::from(packet.header_len());
    if header_len < TCP_HEADER {
        return Err(DropReason::Malformed);
    }
    Ok(TcpSegment {
        src_port: packet.src_port(),
        dst_port: packet.dst_port(),
        seq: packet.seq_number().0.cast_unsigned(),
        ack: packet.ack_number().0.cast_unsigned(),
        flags: ip.payload[13],
        window: packet.window_len(),
        tos: ip.marks.tos,
        header_len,
        payload_len: ip.payload.len() - header_len,
    })
}

/// Reads the options of a SYN out of the bytes of its TCP header. Unknown options are passed over;
/// at the first malformed one reading stops (RFC 9293 3.1: a receiver must not fail on it).
#[must_use]
pub fn syn_options(segment: &[u8]) -> SynOptions {
    let mut found = SynOptions::default();
    let Ok(packet) = TcpPacket::new_checked(segment) else {
        return found;
    };
    let mut rest = packet.options();
    while !rest.is_empty() {
        let Ok((next, option)) = TcpOption::parse(rest) else {
            break;
        };
        match option {
            TcpOption::EndOfList => break,
            TcpOption::MaxSegmentSize(mss) => found.mss = Some(mss),
            TcpOption::WindowScale(shift) => found.window_scale = Some(shift.min(14)),
            TcpOption::SackPermitted => found.sack_permitted = true,
            TcpOption::TimeStamp { tsval, .. } => found.timestamp = Some(tsval),
            TcpOption::NoOperation | TcpOption::SackRange(_) | TcpOption::Unknown { .. } => {}
        }
        rest = next;
    }
    found
}

fn udp<'a>(ip: &Ip<'a>) -> Result<UdpDatagram<'a>, DropReason> {
    let packet = UdpPacket::new_checked(ip.payload).map_err(|_| DropReason::Truncated)?;
    let length = usize::from(packet.len());
    let datagram = ip.payload.get(..length).ok_or(DropReason::Truncated)?;
    match (packet.checksum(), ip.src.is_ipv6()) {
        // The sender made none: allowed by RFC 768, and by RFC 8200 8.1 not over IPv6.
        (0, false) => {}
        (0, true) => return Err(DropReason::Checksum),
        _ => verify(&Ip {
            payload: datagram,
            ..*ip
        })?,
    }
    if packet.dst_port() == 0 {
        return Err(DropReason::Malformed);
    }
    Ok(UdpDatagram {
        src_port: packet.src_port(),
        dst_port: packet.dst_port(),
        payload: datagram.get(UDP_HEADER..).ok_or(DropReason::Truncated)?,
    })
}

fn icmp<'a>(ip: &Ip<'a>) -> Result<Transport<'a>, DropReason> {
    if Sum::default().bytes(ip.payload).finish() != 0 {
        return Err(DropReason::Checksum);
    }
    // "Fragmentation needed" refuses nothing.
    if let [UNREACHABLE, code, ..] = *ip.payload
        && code != TOO_BIG
    {
        return undelivered(ip.payload);
    }
    echo(ip.payload, ECHO_REQUEST).map(Transport::Echo)
}

fn icmpv6<'a>(ip: &Ip<'a>) -> Result<Transport<'a>, DropReason> {
    verify(ip)?;
    if ip.payload.first() == Some(&UNREACHABLE6) {
        return undelivered(ip.payload);
    }
    match ndp::parse(ip)? {
        Some(discovery) => Ok(Transport::Discovery(discovery)),
        None => echo(ip.payload, ECHO_REQUEST6).map(Transport::Echo),
    }
}

/// The connection that an error is about, out of the packet that it quotes (RFC 792, RFC 4443 3.1).
fn undelivered(message: &[u8]) -> Result<Transport<'static>, DropReason> {
    let packet = message.get(8..).ok_or(DropReason::Truncated)?;
    let quoted = match packet.first().map(|first| first >> 4) {
        Some(4) => {
            let header_len = 4 * usize::from(packet[0] & 0xf);
            (
                packet.get(9),
                header_len,
                address::<4>(packet, 12),
                address::<4>(packet, 16),
            )
        }
        Some(6) => (
            packet.get(6),
            IPV6_HEADER,
            address::<16>(packet, 8),
            address::<16>(packet, 24),
        ),
        Some(_) | None => return Err(DropReason::Malformed),
    };
    let (Some(&PROTOCOL_TCP), header_len, Some(src), Some(dst)) = quoted else {
        return Err(DropReason::IcmpType);
    };
    let ports = packet
        .get(header_len..header_len + 4)
        .ok_or(DropReason::Truncated)?;
    let port = |at: usize| u16::from_be_bytes([ports[at], ports[at + 1]]);
    Ok(Transport::Undelivered(Ends {
        src: SocketAddr::new(src, port(0)),
        dst: SocketAddr::new(dst, port(2)),
    }))
}

fn address<const LEN: usize>(packet: &[u8], at: usize) -> Option<IpAddr>
where
    IpAddr: From<[u8; LEN]>,
{
    packet.get(at..)?.first_chunk().copied().map(IpAddr::from)
}

fn echo(message: &[u8], request: u8) -> Result<Echo<'_>, DropReason> {
    let (header, data) = message.split_at_checked(8).ok_or(DropReason::Truncated)?;
    if header[..2] != [request, 0] {
        return Err(DropReason::IcmpType);
    }
    let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    Ok(Echo {
        ident: word(4),
        seq: word(6),
        data,
    })
}
