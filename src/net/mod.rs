//! Packets as pure functions: bytes in, fields or bytes out.
//!
//! [`parse`] is the only place where bytes from a guest are measured; [`emit`] the only place
//! where headers are written (but for TCP segments, which smoltcp writes); [`drop`](mod@drop)
//! names every reason for which a frame goes no further. No state, no clock, no descriptor.

pub mod checksum;
pub mod dns;
pub mod drop;
pub mod emit;
pub mod ndp;
pub mod parse;

use std::fmt;

pub use drop::DropReason;
pub use smoltcp::time::{Duration, Instant};

/// IP protocol number of ICMP.
pub const PROTOCOL_ICMP: u8 = 1;
/// IP protocol number of TCP.
pub const PROTOCOL_TCP: u8 = 6;
/// IP protocol number of UDP.
pub const PROTOCOL_UDP: u8 = 17;
/// IP protocol number of ICMPv6.
pub const PROTOCOL_ICMPV6: u8 = 58;

/// Bytes of an IPv4 header without options.
pub const IPV4_HEADER: usize = 20;
/// Bytes of an IPv6 header without extension headers.
pub const IPV6_HEADER: usize = 40;
/// Bytes of a UDP header.
pub const UDP_HEADER: usize = 8;
/// Bytes of a TCP header without options.
pub const TCP_HEADER: usize = 20;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// All stations of the link.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// A group of stations, or all.
    #[must_use]
    pub const fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// One station: neither a group address nor all zero.
    #[must_use]
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text that is not six hexadecimal octets with colons.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not an Ethernet address: write six hexadecimal octets, such as 02:00:5e:10:00:01")]
pub struct MacParseError;

impl std::str::FromStr for Mac {
    type Err = MacParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().ok_or(MacParseError)?;
            if part.is_empty() || part.len() > 2 {
                return Err(MacParseError);
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| MacParseError)?;
        }
        if parts.next().is_some() {
            return Err(MacParseError);
        }
        Ok(Self(octets))
    }
}

/// What a packet's IP header says beside addresses: the guest's choice reaches the wire, and the
/// peer's reaches the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    /// Time to live (RFC 791) or hop limit.
    pub hop_limit: u8,
    /// Type of service or traffic class: the DSCP (RFC 2474) and the two bits of ECN (RFC 3168).
    pub tos: u8,
    /// Routers must not fragment it.
    pub dont_fragment: bool,
}

impl Marks {
    /// The hop limit of packets that begin here (the registry of IP parameters recommends it).
    pub const DEFAULT_HOP_LIMIT: u8 = 64;

    /// The same after one hop, which this gateway is.
    #[must_use]
    pub const fn after_hop(self) -> Self {
        Self {
            hop_limit: self.hop_limit.saturating_sub(1),
            ..self
        }
    }
}

impl Default for Marks {
    fn default() -> Self {
        Self {
            hop_limit: Self::DEFAULT_HOP_LIMIT,
            tos: 0,
            dont_fragment: false,
        }
    }
}

/// Both ends of a frame on a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wire {
    /// The link.
    pub link: crate::buf::LinkId,
    /// Source address.
    pub src: Mac,
    /// Destination address.
    pub dst: Mac,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ethernet_addresses_round_trip() {
        let mac: Mac = "52:55:0a:00:02:02".parse().unwrap();
        assert_eq!(mac.to_string(), "52:55:0a:00:02:02");
        assert!(mac.is_unicast());
        assert!(!Mac::BROADCAST.is_unicast());
        for bad in [
            "",
            "52:55:0a:00:02",
            "52:55:0a:00:02:02:01",
            "52:55:0a:00:02:zz",
            "525:5:0a:0:2:2",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }
}
