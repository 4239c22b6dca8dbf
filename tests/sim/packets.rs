//! Frames of a guest, written byte by byte, and a reader of the frames that it gets.
//!
//! Apart from `tapgate::net` on purpose: what the tests send and expect comes from the RFCs, so a
//! mistake in the stack's own writer can't hide one in its parser. Shared by `sim_services.rs`,
//! the decoder in `scenario.rs`, and through it by the fuzz target `whole_stack`.
#![allow(
    dead_code,
    reason = "each test program uses its part of the vocabulary"
)]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};

pub(crate) const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 100];
pub(crate) const GATEWAY_MAC: [u8; 6] = [0x52, 0x55, 10, 0, 2, 2];
pub(crate) const BROADCAST_MAC: [u8; 6] = [0xff; 6];
pub(crate) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 100);

pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(crate) const ETHERTYPE_ARP: u16 = 0x0806;

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

    fn pseudo_header(&self, len: usize) -> Vec<u8> {
        let mut pseudo = self.src.octets().to_vec();
        pseudo.extend(self.dst.octets());
        pseudo.extend([0, self.protocol]);
        pseudo.extend(length(len));
        pseudo
    }

    /// A UDP datagram with its checksum.
    pub(crate) fn udp(&self, from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
        let mut datagram = from.to_be_bytes().to_vec();
        datagram.extend(to.to_be_bytes());
        datagram.extend(length(8 + payload.len()));
        datagram.extend([0, 0]);
        datagram.extend(payload);
        let sum = checksum(&[&self.pseudo_header(datagram.len()), &datagram]);
        let sum = if sum == 0 { 0xffff } else { sum };
        datagram[6..8].copy_from_slice(&sum.to_be_bytes());
        datagram
    }

    /// A TCP segment with its checksum; `options` padded to words by the caller.
    pub(crate) fn tcp(&self, fields: &Segment, options: &[u8], payload: &[u8]) -> Vec<u8> {
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
        let sum = checksum(&[&self.pseudo_header(segment.len()), &segment]);
        segment[16..18].copy_from_slice(&sum.to_be_bytes());
        segment
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
pub(crate) fn udp_frame(from: u16, to: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    let ip = Ipv4::new(*to.ip(), UDP);
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

/// An IPv4 packet that came to the guest: whole, whatever it came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) src: Ipv4Addr,
    pub(crate) dst: Ipv4Addr,
    pub(crate) protocol: u8,
    pub(crate) payload: Vec<u8>,
}

impl Received {
    pub(crate) fn word(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.payload[at], self.payload[at + 1]])
    }

    /// Type and code of an ICMP message.
    pub(crate) fn icmp(&self) -> Option<(u8, u8)> {
        (self.protocol == ICMP).then(|| (self.payload[0], self.payload[1]))
    }

    /// Source, destination port and payload of a datagram.
    pub(crate) fn udp(&self) -> Option<(SocketAddrV4, u16, &[u8])> {
        let from = SocketAddrV4::new(self.src, self.word(0));
        (self.protocol == UDP).then(|| (from, self.word(2), &self.payload[8..]))
    }
}

/// A fragment: its offset and bytes.
type Piece = (usize, Vec<u8>);

/// Reads frames to the guest, with every checksum looked at: fragments are joined, anything that
/// is no IPv4 is passed over.
pub(crate) fn read(frames: &[Vec<u8>]) -> Result<Vec<Received>, String> {
    let mut whole = Vec::new();
    let mut partial: BTreeMap<(u16, u8), Vec<Piece>> = BTreeMap::new();
    for frame in frames {
        if frame.get(12..14) != Some(&[8, 0]) {
            continue;
        }
        let (header, payload) = split(&frame[14..])?;
        let received = Received {
            src: Ipv4Addr::new(header[12], header[13], header[14], header[15]),
            dst: Ipv4Addr::new(header[16], header[17], header[18], header[19]),
            protocol: header[9],
            payload: payload.to_vec(),
        };
        let fragment = u16::from_be_bytes([header[6], header[7]]);
        if fragment & 0x3fff == 0 {
            whole.push(received);
            continue;
        }
        let key = (u16::from_be_bytes([header[4], header[5]]), header[9]);
        let pieces = partial.entry(key).or_default();
        let offset = usize::from(fragment & 0x1fff) * 8;
        pieces.push((offset, payload.to_vec()));
        pieces.sort();
        if fragment & 0x2000 == 0 {
            let payload = join(pieces)?;
            partial.remove(&key);
            whole.push(Received {
                payload,
                ..received
            });
        }
    }
    for packet in &whole {
        transport_holds(packet)?;
    }
    Ok(whole)
}

/// The stack sends fragments in order, so the last one ends the datagram.
fn join(pieces: &[Piece]) -> Result<Vec<u8>, String> {
    let mut joined: Vec<u8> = Vec::new();
    for (offset, piece) in pieces {
        if *offset != joined.len() {
            return Err(format!("fragment at {offset}, expected {}", joined.len()));
        }
        joined.extend(piece);
    }
    Ok(joined)
}

fn split(packet: &[u8]) -> Result<(&[u8], &[u8]), String> {
    let header = packet.get(..20).ok_or("short IPv4 header")?;
    let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if header[0] != 0x45 || total != packet.len() || header[8] == 0 {
        return Err(format!("bad IPv4 header {header:?}"));
    }
    if checksum(&[header]) != 0 {
        return Err("bad IPv4 header checksum".into());
    }
    Ok((header, &packet[20..]))
}

/// The transport's checksum and lengths are right.
pub(crate) fn transport_holds(packet: &Received) -> Result<(), String> {
    let ip = Ipv4 {
        src: packet.src,
        ..Ipv4::new(packet.dst, packet.protocol)
    };
    let payload = &packet.payload;
    let pseudo = ip.pseudo_header(payload.len());
    let (least, sum) = match packet.protocol {
        ICMP => (8, checksum(&[payload])),
        TCP => (20, checksum(&[&pseudo, payload])),
        UDP => (8, checksum(&[&pseudo, payload])),
        other => return Err(format!("protocol {other} to the guest")),
    };
    if payload.len() < least || sum != 0 {
        return Err(format!("bad transport checksum or length: {packet:?}"));
    }
    if packet.protocol == UDP && usize::from(packet.word(4)) != payload.len() {
        return Err(format!("bad UDP length: {packet:?}"));
    }
    Ok(())
}
