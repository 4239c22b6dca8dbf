//! The IP headers of both families, down to the transport protocol.
//!
//! Comes in: the bytes behind an Ethernet header. Goes out: an [`Ip`], or why it goes no further.
//! IPv6 extension headers are passed over where they ask for nothing (RFC 8200 section 4); a packet
//! whose headers ask for something that is not done is dropped. No routing header is honoured
//! (RFC 5095).

use std::net::IpAddr;
use std::num::NonZeroU16;

use smoltcp::wire::Ipv4Packet;

use crate::buf::RxMeta;
use crate::net::checksum::Sum;
use crate::net::{DropReason, IPV4_HEADER, IPV6_HEADER, Marks, Wire};

/// Extension headers that a packet may have; no sender needs more (RFC 8504 5.3 allows a limit).
const MAX_EXTENSIONS: usize = 8;

/// Next-header values of IPv6 extension headers (RFC 8200 section 4).
mod extension {
    pub(super) const HOP_BY_HOP: u8 = 0;
    pub(super) const ROUTING: u8 = 43;
    pub(super) const FRAGMENT: u8 = 44;
    pub(super) const NO_NEXT_HEADER: u8 = 59;
    pub(super) const DESTINATION: u8 = 60;
}

/// Bytes of an IPv6 fragment header.
const FRAGMENT_HEADER: usize = 8;

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
    /// Hop limit, type of service and whether it may be fragmented, as received.
    pub marks: Marks,
    /// The place of this fragment, where the packet is one.
    pub fragment: Option<Fragment>,
    /// The whole packet, headers included, without link padding: quoted in ICMP errors.
    pub bytes: &'a [u8],
    /// What follows the headers.
    pub payload: &'a [u8],
    /// The transport checksum needs no verification.
    pub checksum_verified: bool,
    /// Payload bytes of each datagram of an offloaded UDP frame.
    pub udp_segment: Option<NonZeroU16>,
}

impl Ip<'_> {
    /// Bytes in front of the payload: the header with its options or extension headers.
    #[must_use]
    pub const fn header_len(&self) -> usize {
        self.bytes.len() - self.payload.len()
    }

    /// Where the headers name the payload's protocol, from the packet's first byte.
    #[must_use]
    pub fn protocol_at(&self) -> usize {
        if self.src.is_ipv4() {
            return 9;
        }
        let (mut at, mut next) = (6, IPV6_HEADER);
        while next < self.header_len() {
            let units = if self.bytes[at] == extension::FRAGMENT {
                0
            } else {
                usize::from(self.bytes[next + 1])
            };
            (at, next) = (next, next + 8 + 8 * units);
        }
        at
    }
}

/// The place of a fragment in its datagram (RFC 791 3.2, RFC 8200 4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fragment {
    /// Identification: the same for all fragments of a datagram.
    pub id: u32,
    /// Bytes of the datagram in front of this fragment.
    pub offset: usize,
    /// More fragments follow.
    pub more: bool,
}

/// Parses a packet that was put together from fragments; its frames came by `wire`.
///
/// # Errors
/// The reason for which it is dropped.
pub fn reassembled(bytes: &[u8], wire: Wire) -> Result<Ip<'_>, DropReason> {
    let meta = RxMeta::plain(wire.link);
    let mut ip = match bytes.first().map(|first| first >> 4) {
        Some(4) => ipv4(bytes, meta, wire)?,
        Some(6) => ipv6(bytes, meta, wire)?,
        Some(_) | None => return Err(DropReason::Malformed),
    };
    // Who sends fragments does not mind them.
    ip.marks.dont_fragment = false;
    Ok(ip)
}

pub(super) fn ipv4(bytes: &[u8], meta: RxMeta, wire: Wire) -> Result<Ip<'_>, DropReason> {
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
        id: packet.ident().into(),
        offset,
        more: packet.more_frags(),
    });
    Ok(Ip {
        wire,
        src: packet.src_addr().into(),
        dst: packet.dst_addr().into(),
        protocol: packet.next_header().into(),
        marks: Marks {
            hop_limit: packet.hop_limit(),
            tos: header[1],
            dont_fragment: packet.dont_frag(),
        },
        fragment,
        bytes,
        payload,
        checksum_verified: meta.checksum_verified,
        udp_segment: meta.udp_segment,
    })
}

pub(super) fn ipv6(bytes: &[u8], meta: RxMeta, wire: Wire) -> Result<Ip<'_>, DropReason> {
    let header: &[u8; IPV6_HEADER] = bytes.first_chunk().ok_or(DropReason::Truncated)?;
    let payload_len = usize::from(u16::from_be_bytes([header[4], header[5]]));
    let (next_header, hop_limit) = (header[6], header[7]);
    if header[0] >> 4 != 6 || hop_limit == 0 {
        return Err(DropReason::Malformed);
    }
    let bytes = bytes
        .get(..IPV6_HEADER + payload_len)
        .ok_or(DropReason::Truncated)?;
    let address = |at: usize| {
        let mut octets = [0; 16];
        octets.copy_from_slice(&header[at..at + 16]);
        IpAddr::from(octets)
    };
    let upper = extensions(next_header, &bytes[IPV6_HEADER..])?;
    Ok(Ip {
        wire,
        src: address(8),
        dst: address(24),
        protocol: upper.protocol,
        marks: Marks {
            hop_limit,
            tos: header[0] << 4 | header[1] >> 4,
            // Routers do not fragment IPv6.
            dont_fragment: true,
        },
        fragment: upper.fragment,
        bytes,
        payload: upper.payload,
        checksum_verified: meta.checksum_verified,
        udp_segment: meta.udp_segment,
    })
}

/// What stands behind the extension headers.
struct Upper<'a> {
    protocol: u8,
    fragment: Option<Fragment>,
    payload: &'a [u8],
}

/// Passes over extension headers, up to the upper-layer protocol or the contents of a fragment.
fn extensions(first: u8, bytes: &[u8]) -> Result<Upper<'_>, DropReason> {
    let (mut next, mut rest) = (first, bytes);
    for number in 0..=MAX_EXTENSIONS {
        let length = match next {
            // Only right behind the fixed header (RFC 8200 4.1).
            extension::HOP_BY_HOP if number > 0 => return Err(DropReason::Malformed),
            extension::HOP_BY_HOP | extension::DESTINATION => options(rest)?,
            extension::ROUTING => routing(rest)?,
            extension::FRAGMENT => {
                let fragment = fragment(rest)?;
                if fragment.offset > 0 || fragment.more {
                    let protocol = rest[0];
                    return Ok(Upper {
                        protocol,
                        fragment: Some(fragment),
                        payload: &rest[FRAGMENT_HEADER..],
                    });
                }
                // A datagram of one fragment waits for no other (RFC 6946).
                FRAGMENT_HEADER
            }
            extension::NO_NEXT_HEADER => return Err(DropReason::Malformed),
            protocol => {
                return Ok(Upper {
                    protocol,
                    fragment: None,
                    payload: rest,
                });
            }
        };
        // Each header begins with the kind of the next, and was found to be whole.
        next = rest[0];
        rest = &rest[length..];
    }
    Err(DropReason::ExtensionHeader)
}

/// The length of a header with options, all of which may be passed over (RFC 8200 4.2).
fn options(bytes: &[u8]) -> Result<usize, DropReason> {
    let length = 8 + 8 * usize::from(*bytes.get(1).ok_or(DropReason::Truncated)?);
    let mut rest = bytes.get(2..length).ok_or(DropReason::Truncated)?;
    while let Some(&kind) = rest.first() {
        // Pad1 is the one option without a length.
        let step = if kind == 0 {
            1
        } else {
            2 + usize::from(*rest.get(1).ok_or(DropReason::Malformed)?)
        };
        // The two highest bits tell what is to be done by who does not know the option.
        if kind >> 6 != 0 {
            return Err(DropReason::ExtensionHeader);
        }
        rest = rest.get(step..).ok_or(DropReason::Malformed)?;
    }
    Ok(length)
}

/// The length of a routing header that leads nowhere else any more.
fn routing(bytes: &[u8]) -> Result<usize, DropReason> {
    let header: &[u8; 8] = bytes.first_chunk().ok_or(DropReason::Truncated)?;
    let length = 8 + 8 * usize::from(header[1]);
    if header[3] != 0 {
        return Err(DropReason::ExtensionHeader);
    }
    bytes
        .get(..length)
        .map(<[u8]>::len)
        .ok_or(DropReason::Truncated)
}

fn fragment(bytes: &[u8]) -> Result<Fragment, DropReason> {
    let header: &[u8; FRAGMENT_HEADER] = bytes.first_chunk().ok_or(DropReason::Truncated)?;
    let place = u16::from_be_bytes([header[2], header[3]]);
    Ok(Fragment {
        id: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
        offset: usize::from(place & !7),
        more: place & 1 != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buf::LinkId;
    use crate::net::{Mac, PROTOCOL_UDP};
    use proptest::prelude::*;

    fn parse(bytes: &[u8]) -> Result<Ip<'_>, DropReason> {
        let wire = Wire {
            link: LinkId(0),
            src: Mac([2, 0, 0, 0, 0, 1]),
            dst: Mac([2, 0, 0, 0, 0, 2]),
        };
        ipv6(bytes, RxMeta::plain(LinkId(0)), wire)
    }

    /// A packet whose fixed header is followed by `rest`.
    fn packet(next_header: u8, rest: &[u8]) -> Vec<u8> {
        let [high, low] = u16::try_from(rest.len()).unwrap().to_be_bytes();
        let mut bytes = vec![0x61, 0x23, 0, 0, high, low, next_header, 64];
        bytes.extend([0xfd; 16]);
        bytes.extend([0xfc; 16]);
        bytes.extend(rest);
        bytes
    }

    #[test]
    fn fields_are_where_they_belong() {
        let bytes = packet(PROTOCOL_UDP, &[1, 2, 3]);
        let ip = parse(&bytes).unwrap();
        assert_eq!((ip.marks.tos, ip.marks.hop_limit), (0x12, 64));
        assert_eq!((ip.protocol, ip.payload), (PROTOCOL_UDP, &[1, 2, 3][..]));
        assert!(ip.src.to_string().starts_with("fdfd:") && ip.dst.to_string().starts_with("fcfc:"));
        for len in 0..bytes.len() {
            assert_eq!(parse(&bytes[..len]).unwrap_err(), DropReason::Truncated);
        }
    }

    #[test]
    fn harmless_extension_headers_are_passed_over() {
        let mut rest = vec![60, 0, 1, 4, 0, 0, 0, 0];
        rest.extend([43, 0, 0, 0, 0, 1, 1, 0]);
        rest.extend([44, 0, 7, 0, 0, 0, 0, 0]);
        rest.extend([17, 0, 0, 0, 0, 0, 0, 9]);
        rest.extend(b"data");
        let bytes = packet(0, &rest);
        let ip = parse(&bytes).unwrap();
        assert_eq!((ip.protocol, ip.payload), (17, &b"data"[..]));
        assert_eq!(ip.fragment, None);
        assert_eq!(ip.header_len(), 72);
    }

    #[test]
    fn headers_that_ask_for_something_are_not_obeyed() {
        let routing = [17, 0, 0, 1, 0, 0, 0, 0];
        let unknown_option = [17, 0, 0xc2, 4, 0, 1, 0, 0];
        for (kind, header) in [(43, routing), (60, unknown_option)] {
            assert_eq!(
                parse(&packet(kind, &header)).unwrap_err(),
                DropReason::ExtensionHeader
            );
        }
        let late_hop_by_hop = [0, 0, 1, 4, 0, 0, 0, 0, 17, 0, 1, 4, 0, 0, 0, 0];
        assert_eq!(
            parse(&packet(60, &late_hop_by_hop)).unwrap_err(),
            DropReason::Malformed
        );
        let chain: Vec<u8> = [60, 0, 1, 4, 0, 0, 0, 0].repeat(MAX_EXTENSIONS + 1);
        assert_eq!(
            parse(&packet(60, &chain)).unwrap_err(),
            DropReason::ExtensionHeader
        );
    }

    #[test]
    fn a_fragment_tells_its_place() {
        let bytes = packet(44, &[17, 0, 0x05, 0xa9, 1, 2, 3, 4, 9, 9]);
        let ip = parse(&bytes).unwrap();
        let expected = Fragment {
            id: 0x0102_0304,
            offset: 0x5a8,
            more: true,
        };
        assert_eq!((ip.fragment, ip.payload), (Some(expected), &[9, 9][..]));
    }

    proptest! {
        #[test]
        fn no_extension_headers_panic(
            first in prop_oneof![Just(0_u8), Just(43), Just(44), Just(60), any::<u8>()],
            rest in proptest::collection::vec(prop_oneof![Just(0_u8), Just(43), Just(60), any::<u8>()], 0..120),
        ) {
            let bytes = packet(first, &rest);
            if let Ok(ip) = parse(&bytes) {
                prop_assert!(bytes.ends_with(ip.payload));
            }
        }
    }
}
