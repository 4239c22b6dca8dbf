//! The reader of frames to the guest: every checksum and length is looked at, fragments are joined.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use super::v6::FRAGMENT;
use super::{ICMP, ICMPV6, TCP, UDP, checksum, pseudo_header};

/// A packet that came to the guest: whole, whatever it came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) src: IpAddr,
    pub(crate) dst: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) payload: Vec<u8>,
    /// Time to live, or hop limit.
    pub(crate) hop_limit: u8,
    /// Type of service, or traffic class.
    pub(crate) tos: u8,
    /// Packets that it came in.
    pub(crate) pieces: usize,
}

impl Received {
    pub(crate) fn word(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.payload[at], self.payload[at + 1]])
    }

    /// Type and code of an ICMP or ICMPv6 message.
    pub(crate) fn icmp(&self) -> Option<(u8, u8)> {
        let is = self.protocol == ICMP || self.protocol == ICMPV6;
        is.then(|| (self.payload[0], self.payload[1]))
    }

    /// Source, destination port and payload of a datagram.
    pub(crate) fn udp(&self) -> Option<(SocketAddr, u16, &[u8])> {
        let from = SocketAddr::new(self.src, self.word(0));
        (self.protocol == UDP).then(|| (from, self.word(2), &self.payload[8..]))
    }

    /// The transport's checksum and lengths are right.
    fn holds(&self) -> Result<(), String> {
        let payload = &self.payload;
        let pseudo = pseudo_header([self.src, self.dst], self.protocol, payload.len());
        let (least, sum) = match (self.protocol, self.src.is_ipv6()) {
            (ICMP, false) => (8, checksum(&[payload])),
            (ICMPV6, true) => (4, checksum(&[&pseudo, payload])),
            (TCP, _) => (20, checksum(&[&pseudo, payload])),
            (UDP, _) => (8, checksum(&[&pseudo, payload])),
            (other, _) => return Err(format!("protocol {other} to the guest")),
        };
        if payload.len() < least || sum != 0 {
            return Err(format!("bad transport checksum or length: {self:?}"));
        }
        if self.protocol == UDP {
            if usize::from(self.word(4)) != payload.len() {
                return Err(format!("bad UDP length: {self:?}"));
            }
            if self.src.is_ipv6() && self.word(6) == 0 {
                return Err(format!("no UDP checksum: {self:?}"));
            }
        }
        Ok(())
    }
}

/// A packet as it stands in one frame: where it belongs in its datagram, if it is a fragment.
struct Piece {
    packet: Received,
    fragment: Option<Place>,
}

#[derive(Clone, Copy)]
struct Place {
    id: u32,
    offset: usize,
    more: bool,
}

/// What fragments of one datagram have in common: identification, protocol, sender.
type Datagram = (u32, u8, IpAddr);
/// Where a fragment's bytes belong, and they.
type Part = (usize, Vec<u8>);

/// Reads frames to the guest; anything that is no IP is passed over.
pub(crate) fn read(frames: &[Vec<u8>]) -> Result<Vec<Received>, String> {
    let mut whole = Vec::new();
    let mut partial: BTreeMap<Datagram, Vec<Part>> = BTreeMap::new();
    for frame in frames {
        let piece = match frame.get(12..14) {
            Some(&[8, 0]) => ipv4(&frame[14..])?,
            Some(&[0x86, 0xdd]) => ipv6(&frame[14..])?,
            _ => continue,
        };
        let Some(place) = piece.fragment else {
            whole.push(piece.packet);
            continue;
        };
        let key = (place.id, piece.packet.protocol, piece.packet.src);
        let pieces = partial.entry(key).or_default();
        if place.more && !piece.packet.payload.len().is_multiple_of(8) {
            return Err("a fragment in the middle of odd length".into());
        }
        pieces.push((place.offset, piece.packet.payload.clone()));
        pieces.sort();
        // The stack sends fragments in order, so the last one ends the datagram.
        if !place.more {
            whole.push(Received {
                payload: join(pieces)?,
                pieces: pieces.len(),
                ..piece.packet
            });
            partial.remove(&key);
        }
    }
    if !partial.is_empty() {
        return Err("fragments without an end".into());
    }
    for packet in &whole {
        packet.holds()?;
    }
    Ok(whole)
}

fn join(pieces: &[Part]) -> Result<Vec<u8>, String> {
    let mut joined: Vec<u8> = Vec::new();
    for (offset, piece) in pieces {
        if *offset != joined.len() {
            return Err(format!("fragment at {offset}, expected {}", joined.len()));
        }
        joined.extend(piece);
    }
    Ok(joined)
}

fn ipv4(packet: &[u8]) -> Result<Piece, String> {
    let header = packet.get(..20).ok_or("short IPv4 header")?;
    let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if header[0] != 0x45 || total != packet.len() || header[8] == 0 {
        return Err(format!("bad IPv4 header {header:?}"));
    }
    if checksum(&[header]) != 0 {
        return Err("bad IPv4 header checksum".into());
    }
    let place = u16::from_be_bytes([header[6], header[7]]);
    let address = |at: usize| <[u8; 4]>::try_from(&header[at..at + 4]).map(IpAddr::from);
    Ok(Piece {
        packet: Received {
            src: address(12).map_err(|error| error.to_string())?,
            dst: address(16).map_err(|error| error.to_string())?,
            protocol: header[9],
            payload: packet[20..].to_vec(),
            hop_limit: header[8],
            tos: header[1],
            pieces: 1,
        },
        fragment: (place & 0x3fff != 0).then(|| Place {
            id: u16::from_be_bytes([header[4], header[5]]).into(),
            offset: usize::from(place & 0x1fff) * 8,
            more: place & 0x2000 != 0,
        }),
    })
}

/// The stack writes no extension header but that of a fragment.
fn ipv6(packet: &[u8]) -> Result<Piece, String> {
    let header = packet.get(..40).ok_or("short IPv6 header")?;
    let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
    if header[0] >> 4 != 6 || 40 + length != packet.len() || header[7] == 0 {
        return Err(format!("bad IPv6 header {header:?}"));
    }
    let address = |at: usize| <[u8; 16]>::try_from(&header[at..at + 16]).map(IpAddr::from);
    let mut piece = Piece {
        packet: Received {
            src: address(8).map_err(|error| error.to_string())?,
            dst: address(24).map_err(|error| error.to_string())?,
            protocol: header[6],
            payload: packet[40..].to_vec(),
            hop_limit: header[7],
            tos: header[0] << 4 | header[1] >> 4,
            pieces: 1,
        },
        fragment: None,
    };
    if header[6] == FRAGMENT {
        let extension = packet.get(40..48).ok_or("short fragment header")?;
        let place = u16::from_be_bytes([extension[2], extension[3]]);
        if extension[1] != 0 || place & 6 != 0 {
            return Err(format!("reserved bits in {extension:?}"));
        }
        let id = [4, 5, 6, 7].map(|at: usize| extension[at]);
        piece.packet.protocol = extension[0];
        piece.packet.payload = packet[48..].to_vec();
        piece.fragment = Some(Place {
            id: u32::from_be_bytes(id),
            offset: usize::from(place & !7),
            more: place & 1 != 0,
        });
    }
    Ok(piece)
}
