//! Frames of a guest, written byte by byte, and a reader of the frames that it gets.
//!
//! Apart from `tapgate::net` on purpose: what the tests send and expect comes from the RFCs, so a
//! mistake in the stack's own writer can't hide one in its parser. What both families share and IPv4
//! stand here, IPv6 in [`v6`], the reader in [`read`]. Shared by the tests of services, the decoder in
//! `scenario.rs`, and through it by the fuzz target `whole_stack`.
#![allow(
    dead_code,
    reason = "each test program uses its part of the vocabulary"
)]

#[path = "packets_read.rs"]
pub(crate) mod read;
#[path = "packets6.rs"]
pub(crate) mod v6;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

#[allow(
    unused_imports,
    reason = "each test program uses its part of the vocabulary"
)]
pub(crate) use read::{Received, read};

pub(crate) const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 100];
pub(crate) const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 10, 0, 2, 2];
pub(crate) const BROADCAST_MAC: [u8; 6] = [0xff; 6];
pub(crate) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 100);

pub(crate) const ICMP: u8 = 1;
pub(crate) const ICMPV6: u8 = 58;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(crate) const ETHERTYPE_ARP: u16 = 0x0806;
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;

/// The Internet checksum (RFC 1071) of `parts`, taken as one; all but the last of even length.
pub(crate) fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0_u64;
    for part in parts {
        for pair in part.chunks(2) {
            let low = pair.get(1).copied().unwrap_or(0);
            sum += u64::from(u16::from_be_bytes([pair[0], low]));
        }
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !u16::try_from(sum).unwrap_or(0)
}

/// A length field: the low 16 bits.
fn length(len: usize) -> [u8; 2] {
    u16::try_from(len & 0xffff).unwrap_or(0).to_be_bytes()
}

/// The fields of an IPv4 header that tests vary.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ipv4 {
    pub(crate) src: Ipv4Addr,
    pub(crate) dst: Ipv4Addr,
    pub(crate) protocol: u8,
    pub(crate) id: u16,
    pub(crate) ttl: u8,
    /// Flags and offset in eighths, as in the header.
    pub(crate) fragment: u16,
}

impl Ipv4 {
    pub(crate) fn new(dst: Ipv4Addr, protocol: u8) -> Self {
        Self {
            src: GUEST,
            dst,
            protocol,
            id: 1,
            ttl: 64,
            fragment: 0,
        }
    }

    /// The packet, checksum in place.
    pub(crate) fn packet(&self, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0];
        packet.extend(length(20 + payload.len()));
        packet.extend(self.id.to_be_bytes());
        packet.extend(self.fragment.to_be_bytes());
        packet.extend([self.ttl, self.protocol, 0, 0]);
        packet.extend(self.src.octets());
        packet.extend(self.dst.octets());
        let sum = checksum(&[&packet]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet.extend(payload);
        packet
    }

    /// The frame to the gateway.
    pub(crate) fn frame(&self, payload: &[u8]) -> Vec<u8> {
        ethernet(GATEWAY_MAC, ETHERTYPE_IPV4, &self.packet(payload))
    }

    /// The payload in fragments of at most `step` bytes, a multiple of eight.
    pub(crate) fn fragments(&self, payload: &[u8], step: usize) -> Vec<Vec<u8>> {
        let count = payload.chunks(step).len();
        let cut = |(nth, piece): (usize, &[u8])| {
            let more = if nth + 1 < count { 0x2000 } else { 0 };
            let offset = u16::try_from(nth * step / 8).unwrap_or(u16::MAX) & 0x1fff;
            let fragment = more | offset;
            Self { fragment, ..*self }.frame(piece)
        };
        payload.chunks(step).enumerate().map(cut).collect()
    }

    /// A UDP datagram with its checksum.
    pub(crate) fn udp(&self, from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
        udp([self.src.into(), self.dst.into()], [from, to], payload)
    }

    /// A TCP segment with its checksum; `options` padded to words by the caller.
    pub(crate) fn tcp(&self, fields: &Segment, options: &[u8], payload: &[u8]) -> Vec<u8> {
        tcp([self.src.into(), self.dst.into()], fields, options, payload)
    }
}

/// What transport checksums begin with (RFC 768, RFC 8200 8.1).
fn pseudo_header([src, dst]: [IpAddr; 2], protocol: u8, len: usize) -> Vec<u8> {
    let mut pseudo = Vec::new();
    for addr in [src, dst] {
        match addr {
            IpAddr::V4(addr) => pseudo.extend(addr.octets()),
            IpAddr::V6(addr) => pseudo.extend(addr.octets()),
        }
    }
    pseudo.extend([0, protocol]);
    pseudo.extend(length(len));
    pseudo
}

fn udp(ends: [IpAddr; 2], [from, to]: [u16; 2], payload: &[u8]) -> Vec<u8> {
    let mut datagram = from.to_be_bytes().to_vec();
    datagram.extend(to.to_be_bytes());
    datagram.extend(length(8 + payload.len()));
    datagram.extend([0, 0]);
    datagram.extend(payload);
    let sum = checksum(&[&pseudo_header(ends, UDP, datagram.len()), &datagram]);
    let sum = if sum == 0 { 0xffff } else { sum };
    datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    datagram
}

fn tcp(ends: [IpAddr; 2], fields: &Segment, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut segment = fields.from.to_be_bytes().to_vec();
    segment.extend(fields.to.to_be_bytes());
    segment.extend(fields.seq.to_be_bytes());
    segment.extend(fields.ack.to_be_bytes());
    let words = u8::try_from(5 + options.len() / 4).unwrap_or(15).min(15);
    segment.extend([words << 4, fields.flags]);
    segment.extend(fields.window.to_be_bytes());
    segment.extend([0; 4]);
    segment.extend(options);
    segment.extend(payload);
    let sum = checksum(&[&pseudo_header(ends, TCP, segment.len()), &segment]);
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    segment
}

/// A header of either family.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Ip {
    V4(Ipv4),
    V6(v6::Ipv6),
}

impl Ip {
    /// From the guest's address of that family.
    pub(crate) fn new(dst: IpAddr, protocol: u8) -> Self {
        match dst {
            IpAddr::V4(dst) => Self::V4(Ipv4::new(dst, protocol)),
            IpAddr::V6(dst) => Self::V6(v6::Ipv6::new(dst, protocol)),
        }
    }

    pub(crate) fn frame(&self, payload: &[u8]) -> Vec<u8> {
        match self {
            Self::V4(ip) => ip.frame(payload),
            Self::V6(ip) => ip.frame(payload),
        }
    }

    pub(crate) fn udp(&self, from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
        match self {
            Self::V4(ip) => ip.udp(from, to, payload),
            Self::V6(ip) => ip.udp(from, to, payload),
        }
    }

    pub(crate) fn tcp(&self, fields: &Segment, options: &[u8], payload: &[u8]) -> Vec<u8> {
        match self {
            Self::V4(ip) => ip.tcp(fields, options, payload),
            Self::V6(ip) => ip.tcp(fields, options, payload),
        }
    }

    /// An ICMP or ICMPv6 message with two words of its own.
    pub(crate) fn icmp(&self, kind: [u8; 2], words: [u16; 2], data: &[u8]) -> Vec<u8> {
        match self {
            Self::V4(_) => icmp(kind[0], kind[1], words, data),
            Self::V6(ip) => ip.icmp(kind, words, data),
        }
    }
}

/// The fields of a TCP header.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Segment {
    pub(crate) from: u16,
    pub(crate) to: u16,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
}

pub(crate) fn ethernet(dst: [u8; 6], ethertype: u16, packet: &[u8]) -> Vec<u8> {
    let mut frame = dst.to_vec();
    frame.extend(GUEST_MAC);
    frame.extend(ethertype.to_be_bytes());
    frame.extend(packet);
    frame
}

/// A UDP frame of the guest.
pub(crate) fn udp_frame(from: u16, to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let ip = Ip::new(to.ip(), UDP);
    ip.frame(&ip.udp(from, to.port(), payload))
}

/// An ICMP message with two words of its own, such as an echo request.
pub(crate) fn icmp(kind: u8, code: u8, words: [u16; 2], data: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, code, 0, 0];
    message.extend(words[0].to_be_bytes());
    message.extend(words[1].to_be_bytes());
    message.extend(data);
    let sum = checksum(&[&message]);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    message
}

/// An ARP frame; `op` 1 is a request.
pub(crate) fn arp_frame(op: u16, mac: [u8; 6], sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4];
    packet.extend(op.to_be_bytes());
    packet.extend(mac);
    packet.extend(sender.octets());
    packet.extend([0; 6]);
    packet.extend(target.octets());
    ethernet(BROADCAST_MAC, ETHERTYPE_ARP, &packet)
}

/// A DHCP message of the client `mac` with these options (RFC 2131).
pub(crate) fn dhcp(mac: [u8; 6], client: Ipv4Addr, options: &[(u8, &[u8])]) -> Vec<u8> {
    let mut message = vec![1, 1, 6, 0, 1, 2, 3, 4, 0, 0, 0, 0];
    message.extend(client.octets());
    message.resize(28, 0);
    message.extend(mac);
    message.resize(236, 0);
    message.extend([99, 130, 83, 99]);
    for (code, data) in options {
        message.extend([*code, u8::try_from(data.len()).unwrap_or(u8::MAX)]);
        message.extend(*data);
    }
    message.push(255);
    message
}
