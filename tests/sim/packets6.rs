//! IPv6 frames of a guest, written byte by byte from RFC 8200, RFC 4443 and RFC 4861.

use std::net::Ipv6Addr;

use super::{ETHERTYPE_IPV6, GATEWAY_MAC, ICMPV6, Segment, checksum, ethernet, length};

pub(crate) const GUEST: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x100);
/// The guest's link-local address.
pub(crate) const GUEST_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x100);
pub(crate) const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
pub(crate) const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);

/// Kinds of extension headers (RFC 8200 section 4).
pub(crate) const HOP_BY_HOP: u8 = 0;
pub(crate) const ROUTING: u8 = 43;
pub(crate) const FRAGMENT: u8 = 44;
pub(crate) const NO_NEXT_HEADER: u8 = 59;
pub(crate) const DESTINATION: u8 = 60;

/// Types of neighbour discovery (RFC 4861 section 4).
pub(crate) const ROUTER_SOLICITATION: u8 = 133;
pub(crate) const ROUTER_ADVERTISEMENT: u8 = 134;
pub(crate) const NEIGHBOUR_SOLICITATION: u8 = 135;
pub(crate) const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

/// A header between the fixed one and the payload: its kind, and what follows the two bytes for the
/// next header and the length, padded to eighths by the caller.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Extension<'a>(pub(crate) u8, pub(crate) &'a [u8]);

/// Six bytes of padding, an option of four.
pub(crate) const PADDING: &[u8] = &[1, 4, 0, 0, 0, 0];

/// The fields of an IPv6 header that tests vary.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ipv6 {
    pub(crate) src: Ipv6Addr,
    pub(crate) dst: Ipv6Addr,
    pub(crate) protocol: u8,
    pub(crate) hop_limit: u8,
    /// Traffic class.
    pub(crate) class: u8,
}

impl Ipv6 {
    pub(crate) fn new(dst: Ipv6Addr, protocol: u8) -> Self {
        Self {
            src: GUEST,
            dst,
            protocol,
            hop_limit: 64,
            class: 0,
        }
    }

    /// A message of neighbour discovery.
    pub(crate) fn discovery(src: Ipv6Addr, dst: Ipv6Addr) -> Self {
        Self {
            src,
            hop_limit: 255,
            ..Self::new(dst, ICMPV6)
        }
    }

    pub(crate) fn packet(&self, payload: &[u8]) -> Vec<u8> {
        // A flow label is nobody's business but must not be in the way.
        let mut packet = vec![0x60 | self.class >> 4, self.class << 4 | 0x0a, 0xbc, 0xde];
        packet.extend(length(payload.len()));
        packet.extend([self.protocol, self.hop_limit]);
        packet.extend(self.src.octets());
        packet.extend(self.dst.octets());
        packet.extend(payload);
        packet
    }

    /// The frame to the gateway, or to the group that is addressed.
    pub(crate) fn frame(&self, payload: &[u8]) -> Vec<u8> {
        let mac = if self.dst.is_multicast() {
            group_mac(self.dst)
        } else {
            GATEWAY_MAC
        };
        ethernet(mac, ETHERTYPE_IPV6, &self.packet(payload))
    }

    /// The payload of a packet with these headers in front, whose first kind is to stand in the
    /// fixed header: see [`Ipv6::extended_frame`].
    fn extended(&self, chain: &[Extension<'_>], payload: &[u8]) -> Vec<u8> {
        let kinds = chain.iter().skip(1).map(|Extension(kind, _)| *kind);
        let mut bytes = Vec::new();
        for (Extension(_, body), next) in chain.iter().zip(kinds.chain([self.protocol])) {
            let units = u8::try_from((body.len() + 2) / 8 - 1).unwrap_or(u8::MAX);
            bytes.extend([next, units]);
            bytes.extend(*body);
        }
        bytes.extend(payload);
        bytes
    }

    /// The frame with these headers in front of the payload.
    pub(crate) fn extended_frame(&self, chain: &[Extension<'_>], payload: &[u8]) -> Vec<u8> {
        let protocol = chain.first().map_or(self.protocol, |first| first.0);
        let first = Self { protocol, ..*self };
        first.frame(&self.extended(chain, payload))
    }

    /// A fragment of a packet, `offset` bytes into it.
    pub(crate) fn fragment(&self, id: u32, (offset, more): (u16, bool), piece: &[u8]) -> Vec<u8> {
        let mut body = (offset & !7 | u16::from(more)).to_be_bytes().to_vec();
        body.extend(id.to_be_bytes());
        self.extended_frame(&[Extension(FRAGMENT, &body)], piece)
    }

    /// The payload in fragments of at most `step` bytes, a multiple of eight; whole where it fits one.
    pub(crate) fn fragments(&self, id: u32, payload: &[u8], step: usize) -> Vec<Vec<u8>> {
        if payload.len() <= step {
            return vec![self.frame(payload)];
        }
        let count = payload.chunks(step).len();
        let cut = |(nth, piece): (usize, &[u8])| {
            let offset = u16::try_from(nth * step).unwrap_or(u16::MAX);
            self.fragment(id, (offset, nth + 1 < count), piece)
        };
        payload.chunks(step).enumerate().map(cut).collect()
    }

    pub(crate) fn udp(&self, from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
        super::udp([self.src.into(), self.dst.into()], [from, to], payload)
    }

    pub(crate) fn tcp(&self, fields: &Segment, options: &[u8], payload: &[u8]) -> Vec<u8> {
        super::tcp([self.src.into(), self.dst.into()], fields, options, payload)
    }

    /// An ICMPv6 message of a type and code, with two words of its own.
    pub(crate) fn icmp(&self, kind: [u8; 2], words: [u16; 2], data: &[u8]) -> Vec<u8> {
        let mut message = vec![kind[0], kind[1], 0, 0];
        message.extend(words[0].to_be_bytes());
        message.extend(words[1].to_be_bytes());
        message.extend(data);
        self.summed(message)
    }

    /// The message with its checksum, which covers the addresses (RFC 4443 2.3).
    pub(crate) fn summed(&self, message: Vec<u8>) -> Vec<u8> {
        self.summed_from(self.src, message)
    }

    /// The same, as `src` sends it.
    pub(crate) fn summed_from(&self, src: Ipv6Addr, mut message: Vec<u8>) -> Vec<u8> {
        message[2..4].fill(0);
        let ends = [src.into(), self.dst.into()];
        let sum = checksum(&[&super::pseudo_header(ends, ICMPV6, message.len()), &message]);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
        message
    }

    /// "Who has `target`?", with these options.
    pub(crate) fn solicitation(&self, target: Ipv6Addr, options: &[u8]) -> Vec<u8> {
        self.neighbour([NEIGHBOUR_SOLICITATION, 0], target, options)
    }

    /// "`target` is here", with flags and options.
    pub(crate) fn advertisement(&self, flags: u8, target: Ipv6Addr, options: &[u8]) -> Vec<u8> {
        self.neighbour([NEIGHBOUR_ADVERTISEMENT, flags], target, options)
    }

    fn neighbour(&self, [kind, flags]: [u8; 2], target: Ipv6Addr, options: &[u8]) -> Vec<u8> {
        let mut message = vec![kind, 0, 0, 0, flags, 0, 0, 0];
        message.extend(target.octets());
        message.extend(options);
        self.summed(message)
    }

    /// "Is there a router?", with these options.
    pub(crate) fn router_solicitation(&self, options: &[u8]) -> Vec<u8> {
        self.icmp([ROUTER_SOLICITATION, 0], [0, 0], options)
    }
}

/// The option that says where somebody is: kind 1 the source of a message, 2 its target.
pub(crate) fn link_address(kind: u8, mac: [u8; 6]) -> Vec<u8> {
    let mut option = vec![kind, 1];
    option.extend(mac);
    option
}

/// The group that who has this address listens to (RFC 4291 2.7.1).
pub(crate) fn solicited_node(addr: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = addr.octets();
    let [high, low] = [u16::from(a), u16::from(b) << 8 | u16::from(c)];
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | high, low)
}

/// The Ethernet address of a group (RFC 2464 section 7).
pub(crate) fn group_mac(group: Ipv6Addr) -> [u8; 6] {
    let [.., a, b, c, d] = group.octets();
    [0x33, 0x33, a, b, c, d]
}
