//! What tells one flow from another, and a hash that a guest can't aim at.
//!
//! Keys are for both address families. The hash is SipHash-1-3 keyed at start, because a guest
//! chooses most of a key's bits.

use std::hash::BuildHasher;
use std::net::{IpAddr, SocketAddr};

use siphasher::sip::SipHasher13;

use crate::buf::LinkId;

/// Identifies a flow. The guest's side is always the namespace's, whoever began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FlowKey {
    /// A TCP connection: both endpoints as the guest sees them.
    Tcp {
        /// The guest's link.
        link: LinkId,
        /// The guest's endpoint.
        guest: SocketAddr,
        /// The other endpoint as the guest sees it.
        remote: SocketAddr,
    },
    /// A TCP connection of a published port's client that goes past the link.
    Spliced {
        /// The guest's link.
        link: LinkId,
        /// The guest's endpoint.
        guest: SocketAddr,
        /// The client.
        client: SocketAddr,
        /// Tells it from another of the same client's by another address of the host.
        serial: u64,
    },
    /// A guest's UDP endpoint, whatever it speaks to (RFC 4787 REQ-1).
    Udp {
        /// The guest's link.
        link: LinkId,
        /// The guest's endpoint.
        guest: SocketAddr,
        /// For the host's loopback only: such datagrams don't leave by the outbound interface.
        loopback: bool,
    },
    /// A client of a published UDP port.
    Peer {
        /// The guest's link.
        link: LinkId,
        /// The guest's endpoint.
        guest: SocketAddr,
        /// The client as the guest sees it.
        remote: SocketAddr,
    },
    /// A guest's echo identifier (RFC 5508 REQ-1).
    Echo {
        /// The guest's link.
        link: LinkId,
        /// The guest's address.
        guest: IpAddr,
        /// The identifier.
        ident: u16,
    },
    /// A DNS query: a repeated one is the same flow.
    Query {
        /// The guest's link.
        link: LinkId,
        /// The guest's endpoint.
        guest: SocketAddr,
        /// The identifier in the query.
        id: u16,
    },
}

/// What flows carry, as far as they share the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A TCP connection.
    Stream,
    /// UDP, pings, queries: each costs a guest no more than a packet.
    Datagrams,
}

impl FlowKey {
    /// What such a flow carries.
    #[must_use]
    pub const fn kind(&self) -> Kind {
        match self {
            Self::Tcp { .. } | Self::Spliced { .. } => Kind::Stream,
            Self::Udp { .. } | Self::Peer { .. } | Self::Echo { .. } | Self::Query { .. } => {
                Kind::Datagrams
            }
        }
    }

    /// It is a client of a published UDP port.
    #[must_use]
    pub const fn is_peer(&self) -> bool {
        matches!(self, Self::Peer { .. })
    }

    /// It is a guest's UDP port or ping identifier, which has one of the host's.
    #[must_use]
    pub const fn is_port(&self) -> bool {
        matches!(self, Self::Udp { .. } | Self::Echo { .. })
    }
}

/// Builds keyed hashers for maps whose keys a guest chooses.
#[derive(Debug, Clone, Copy)]
pub struct KeyedState {
    key: (u64, u64),
}

impl KeyedState {
    /// A hash family member chosen by a secret of the process.
    #[must_use]
    pub const fn new(key: (u64, u64)) -> Self {
        Self { key }
    }
}

impl BuildHasher for KeyedState {
    type Hasher = SipHasher13;

    fn build_hasher(&self) -> SipHasher13 {
        SipHasher13::new_with_keys(self.key.0, self.key.1)
    }
}
