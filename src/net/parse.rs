//! The one parser of what a guest sends: every length is checked here, once.
//!
//! Comes in: a frame and what the link knows of it. Goes out: typed fields that borrow the frame,
//! or the [`DropReason`]. Transport headers are parsed apart ([`transport`]), since a datagram may
//! first have to be put together from fragments.

use std::net::{IpAddr, Ipv4Addr};
use std::num::NonZeroU16;

use smoltcp::wire::{Ipv4Packet, TcpOption, TcpPacket, UdpPacket};

use super::checksum::Sum;
use super::{DropReason, IPV4_HEADER, Mac, PROTOCOL_ICMP, PROTOCOL_TCP, PROTOCOL_UDP, Wire};
use crate::buf::{ETHERNET_HEADER, RxMeta};

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;

/// TCP flag bits (RFC 9293 3.1).
pub mod tcp_flags {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// The acknowledgement field counts.
    pub const ACK: u8 = 0x10;
}

/// A frame whose lengths hold.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    /// Link and Ethernet addresses.
    pub wire: Wire,
    /// What it carries.
    pub packet: Packet<'a>,
}

/// What a frame carries.
#[derive(Debug, Clone, Copy)]
pub enum Packet<'a> {
    /// An address resolution packet.
    Arp(Arp),
    /// An IP packet.
    Ip(Ip<'a>),
}

/// ARP for IPv4 over Ethernet (RFC 826).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arp {
    /// A request; otherwise a reply.
    pub is_request: bool,
    /// Who asks, by Ethernet address.
    pub sender_mac: Mac,
    /// Who asks, by protocol address.
    pub sender: Ipv4Addr,
    /// Who is asked for.
    pub target: Ipv4Addr,
}

/// An IP packet.
#[derive(Debug, Clone, Copy)]
pub struct Ip<'a> {
    /// Link and Ethernet addresses of its frame.
    pub wire: Wire,
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Upper-layer protocol number.
    pub protocol: u8,
    /// Time to live or hop limit, as received.
    pub hop_limit: u8,
    /// The place of this fragment, where the packet is one.
    pub fragment: Option<Fragment>,
    /// The whole packet, header included, without link padding: quoted in ICMP errors.
    pub bytes: &'a [u8],
    /// What follows the header.
    pub payload: &'a [u8],
    /// The transport checksum needs no verification.
    pub checksum_verified: bool,
    /// Payload bytes of each datagram of an offloaded UDP frame.
    pub udp_segment: Option<NonZeroU16>,
}

/// The place of a fragment in its datagram (RFC 791 3.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fragment {
    /// Identification: the same for all fragments of a datagram.
    pub id: u16,
    /// Bytes of the datagram in front of this fragment.
    pub offset: usize,
    /// More fragments follow.
    pub more: bool,
}

/// A transport header and its payload.
#[derive(Debug, Clone, Copy)]
pub enum Transport<'a> {
    /// TCP.
    Tcp(TcpSegment),
    /// UDP.
    Udp(UdpDatagram<'a>),
    /// ICMP echo request.
    Echo(Echo<'a>),
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

/// Parses a frame down to the IP payload.
///
/// # Errors
/// The reason for which the frame is dropped.
pub fn frame(bytes: &[u8], meta: RxMeta) -> Result<Frame<'_>, DropReason> {
    let (header, payload) = bytes
        .split_at_checked(ETHERNET_HEADER)
        .ok_or(DropReason::Truncated)?;
    let mac = |at: usize| Mac([0, 1, 2, 3, 4, 5].map(|i: usize| header[at + i]));
    let wire = Wire {
        link: meta.link,
        dst: mac(0),
        src: mac(6),
    };
    let packet = match u16::from_be_bytes([header[12], header[13]]) {
        ETHERTYPE_ARP => Packet::Arp(arp(payload)?),
        ETHERTYPE_IPV4 => Packet::Ip(ipv4(payload, meta, wire)?),
        ETHERTYPE_IPV6 => return Err(DropReason::Ipv6),
        _ => return Err(DropReason::EtherType),
    };
    Ok(Frame { wire, packet })
}

fn arp(bytes: &[u8]) -> Result<Arp, DropReason> {
    let bytes: &[u8; 28] = bytes.first_chunk().ok_or(DropReason::Truncated)?;
    // Hardware type Ethernet, protocol type IPv4, lengths 6 and 4.
    if bytes[..6] != [0, 1, 8, 0, 6, 4] {
        return Err(DropReason::Malformed);
    }
    let is_request = match bytes[6..8] {
        [0, 1] => true,
        [0, 2] => false,
        _ => return Err(DropReason::Malformed),
    };
    let address = |at: usize| Ipv4Addr::new(bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]);
    let sender_mac = Mac([8, 9, 10, 11, 12, 13].map(|at: usize| bytes[at]));
    Ok(Arp {
        is_request,
        sender_mac,
        sender: address(14),
        target: address(24),
    })
}

fn ipv4(bytes: &[u8], meta: RxMeta, wire: Wire) -> Result<Ip<'_>, DropReason> {
    let packet = Ipv4Packet::new_checked(bytes).map_err(|_| DropReason::Truncated)?;
    let header_len = usize::from(packet.header_len());
    let total_len = usize::from(packet.total_len());
    if packet.version() != 4 || header_len < IPV4_HEADER || total_len < header_len {
        return Err(DropReason::Malformed);
    }
    let bytes = bytes.get(..total_len).ok_or(DropReason::Truncated)?;
    let (header, payload) = bytes
        .split_at_checked(header_len)
        .ok_or(DropReason::Truncated)?;
    if Sum::default().bytes(header).finish() != 0 {
        return Err(DropReason::Checksum);
    }
    if packet.hop_limit() == 0 {
        return Err(DropReason::Malformed);
    }
    let offset = usize::from(packet.frag_offset());
    let fragment = (packet.more_frags() || offset != 0).then(|| Fragment {
        id: packet.ident(),
        offset,
        more: packet.more_frags(),
    });
    Ok(Ip {
        wire,
        src: packet.src_addr().into(),
        dst: packet.dst_addr().into(),
        protocol: packet.next_header().into(),
        hop_limit: packet.hop_limit(),
        fragment,
        bytes,
        payload,
        checksum_verified: meta.checksum_verified,
        udp_segment: meta.udp_segment,
    })
}

/// Parses the transport header of a whole (not fragmented, or reassembled) packet.
///
/// # Errors
/// The reason for which the packet is dropped.
pub fn transport<'a>(ip: &Ip<'a>) -> Result<Transport<'a>, DropReason> {
    match ip.protocol {
        PROTOCOL_TCP => tcp(ip).map(Transport::Tcp),
        PROTOCOL_UDP => udp(ip).map(Transport::Udp),
        PROTOCOL_ICMP => echo(ip).map(Transport::Echo),
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
    if header_len < super::TCP_HEADER {
        return Err(DropReason::Malformed);
    }
    Ok(TcpSegment {
        src_port: packet.src_port(),
        dst_port: packet.dst_port(),
        seq: packet.seq_number().0.cast_unsigned(),
        ack: packet.ack_number().0.cast_unsigned(),
        flags: ip.payload[13],
        window: packet.window_len(),
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
            TcpOption::NoOperation
            | TcpOption::SackRange(_)
            | TcpOption::TimeStamp { .. }
            | TcpOption::Unknown { .. } => {}
        }
        rest = next;
    }
    found
}

fn udp<'a>(ip: &Ip<'a>) -> Result<UdpDatagram<'a>, DropReason> {
    let packet = UdpPacket::new_checked(ip.payload).map_err(|_| DropReason::Truncated)?;
    let length = usize::from(packet.len());
    let datagram = ip.payload.get(..length).ok_or(DropReason::Truncated)?;
    // RFC 768: an all-zero checksum over IPv4 means that the sender made none.
    if packet.checksum() != 0 || ip.src.is_ipv6() {
        verify(&Ip {
            payload: datagram,
            ..*ip
        })?;
    }
    if packet.dst_port() == 0 {
        return Err(DropReason::Malformed);
    }
    Ok(UdpDatagram {
        src_port: packet.src_port(),
        dst_port: packet.dst_port(),
        payload: datagram
            .get(super::UDP_HEADER..)
            .ok_or(DropReason::Truncated)?,
    })
}

fn echo<'a>(ip: &Ip<'a>) -> Result<Echo<'a>, DropReason> {
    let (header, data) = ip
        .payload
        .split_at_checked(8)
        .ok_or(DropReason::Truncated)?;
    if Sum::default().bytes(ip.payload).finish() != 0 {
        return Err(DropReason::Checksum);
    }
    if header[..2] != [8, 0] {
        return Err(DropReason::IcmpType);
    }
    let word = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    Ok(Echo {
        ident: word(4),
        seq: word(6),
        data,
    })
}

#[cfg(test)]
mod tests {
    use super::super::emit;
    use super::*;
    use crate::buf::{LinkId, Offload, TxBatch};
    use proptest::prelude::*;

    const META: RxMeta = RxMeta::plain(LinkId(0));

    fn wire() -> Wire {
        Wire {
            link: LinkId(0),
            src: Mac([2, 0, 0, 0, 0, 1]),
            dst: Mac([2, 0, 0, 0, 0, 2]),
        }
    }

    /// A well-formed UDP frame, as the emitter writes it.
    fn udp_frame(payload: &[u8]) -> Vec<u8> {
        let mut batch = TxBatch::new(4, 0);
        let ends = emit::Ends {
            src: "10.0.2.100:4000".parse().unwrap(),
            dst: "192.0.2.1:53".parse().unwrap(),
        };
        let datagram = emit::Datagram {
            ends,
            id: emit::DatagramId(1),
            payload,
        };
        assert!(emit::udp(&mut batch, wire(), 65_520, datagram));
        batch.frames().next().unwrap().bytes().to_vec()
    }

    #[test]
    fn a_udp_frame_parses_to_its_fields() {
        let bytes = udp_frame(b"hello");
        let parsed = frame(&bytes, META).unwrap();
        let Packet::Ip(ip) = parsed.packet else {
            panic!("IP expected")
        };
        assert_eq!(ip.dst, "192.0.2.1".parse::<IpAddr>().unwrap());
        let Transport::Udp(udp) = transport(&ip).unwrap() else {
            panic!("UDP expected")
        };
        assert_eq!(
            (udp.src_port, udp.dst_port, udp.payload),
            (4000, 53, &b"hello"[..])
        );
    }

    #[test]
    fn every_truncation_is_dropped() {
        let bytes = udp_frame(b"hello, world");
        for len in 0..bytes.len() {
            let short = &bytes[..len];
            let dropped = match frame(short, META) {
                Err(_) => true,
                Ok(Frame {
                    packet: Packet::Ip(ip),
                    ..
                }) => transport(&ip).is_err(),
                Ok(Frame {
                    packet: Packet::Arp(_),
                    ..
                }) => false,
            };
            assert!(dropped, "{len} bytes");
        }
    }

    #[test]
    fn a_flipped_bit_fails_a_checksum_unless_the_link_vouches() {
        let mut bytes = udp_frame(b"hello");
        *bytes.last_mut().unwrap() ^= 1;
        let Packet::Ip(ip) = frame(&bytes, META).unwrap().packet else {
            panic!("IP expected")
        };
        assert_eq!(transport(&ip).unwrap_err(), DropReason::Checksum);
        let vouched = Ip {
            checksum_verified: true,
            ..ip
        };
        assert!(transport(&vouched).is_ok());
    }

    #[test]
    fn syn_options_survive_nonsense() {
        let mut segment = vec![0; 20];
        segment[12] = 0xf0;
        // MSS 1460, then an option whose length is zero.
        segment.extend([2, 4, 5, 0xb4, 8, 0]);
        segment.resize(60, 0);
        assert_eq!(syn_options(&segment).mss, Some(1460));
        assert_eq!(syn_options(&segment).window_scale, None);
        assert_eq!(syn_options(&[]), SynOptions::default());
    }

    #[test]
    fn arp_of_another_kind_is_malformed() {
        let mut bytes = vec![0xff; 12];
        bytes.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        bytes.extend([0; 20]);
        assert!(matches!(
            frame(&bytes, META).unwrap().packet,
            Packet::Arp(_)
        ));
        for at in 14..20 {
            let mut other = bytes.clone();
            other[at] ^= 0x40;
            assert_eq!(
                frame(&other, META).unwrap_err(),
                DropReason::Malformed,
                "byte {at}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), verified: bool) {
            let meta = RxMeta { checksum_verified: verified, ..META };
            if let Ok(Frame { packet: Packet::Ip(ip), .. }) = frame(&bytes, meta) {
                let _ = transport(&ip);
            }
        }

        #[test]
        fn mutated_frames_do_not_panic(
            payload in proptest::collection::vec(any::<u8>(), 0..64),
            at in 0_usize..100, value: u8, protocol in prop_oneof![Just(1_u8), Just(6), Just(17)],
        ) {
            let mut bytes = udp_frame(&payload);
            bytes[23] = protocol;
            let at = at % bytes.len();
            bytes[at] = value;
            // A right header checksum, so that the fields behind it are reached.
            bytes[24..26].fill(0);
            let header_len = (usize::from(bytes[14] & 0xf) * 4).clamp(20, bytes.len() - 14);
            let sum = Sum::default().bytes(&bytes[14..14 + header_len]).finish();
            bytes[24..26].copy_from_slice(&sum.to_be_bytes());
            let meta = RxMeta { checksum_verified: true, ..META };
            if let Ok(Frame { packet: Packet::Ip(ip), .. }) = frame(&bytes, meta) {
                let _ = transport(&ip);
                let _ = syn_options(ip.payload);
            }
        }
    }

    #[test]
    fn offload_none_is_the_default() {
        assert_eq!(Offload::default(), Offload::NONE);
    }
}
