//! Neighbour discovery of IPv6 (RFC 4861): questions of a guest, and the gateway's answers.
//!
//! Comes in: ICMPv6 messages. Goes out: a [`Discovery`], or frames with advertisements. What is
//! advertised the stack decides.

use std::net::{IpAddr, Ipv6Addr};

use super::emit::{self, Header};
use super::parse::Ip;
use super::{DropReason, Duration, Mac, Marks, PROTOCOL_ICMPV6, Wire};
use crate::buf::TxBatch;

/// Message types (RFC 4861 section 4).
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

/// Options (RFC 4861 4.6, RFC 8106 section 5).
const SOURCE_LINK_ADDRESS: u8 = 1;
const TARGET_LINK_ADDRESS: u8 = 2;
const PREFIX_INFORMATION: u8 = 3;
const MTU: u8 = 5;
const RESOLVERS: u8 = 25;
const SEARCH_LIST: u8 = 31;

/// The only hop limit that proves that no router was on the way (RFC 4861 6.1, 7.1).
const HOP_LIMIT: u8 = 255;
/// All stations of the link.
pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// Names of a search list take no more than this in one advertisement.
const MAX_NAMES: usize = 512;

/// What a guest asks or tells its neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Discovery {
    /// Who has this address?
    NeighbourSolicitation {
        /// The address.
        target: Ipv6Addr,
        /// Where the sender is, if it has an address already.
        source: Option<Mac>,
    },
    /// An address is here.
    NeighbourAdvertisement {
        /// The address.
        target: Ipv6Addr,
        /// Where it is.
        location: Option<Mac>,
    },
    /// Is there a router?
    RouterSolicitation {
        /// Where the sender is, if it has an address already.
        source: Option<Mac>,
    },
}

/// Reads a message of neighbour discovery; `None` where it is something else of ICMPv6.
///
/// # Errors
/// The reason for which it is dropped.
pub fn parse(ip: &Ip<'_>) -> Result<Option<Discovery>, DropReason> {
    let message = ip.payload;
    let kind = *message.first().ok_or(DropReason::Truncated)?;
    let fixed = match kind {
        ROUTER_SOLICITATION => 8,
        NEIGHBOUR_SOLICITATION | NEIGHBOUR_ADVERTISEMENT => 24,
        _ => return Ok(None),
    };
    let (header, options) = message
        .split_at_checked(fixed)
        .ok_or(DropReason::Truncated)?;
    if ip.marks.hop_limit != HOP_LIMIT || header[1] != 0 {
        return Err(DropReason::Malformed);
    }
    let source = link_address(options, SOURCE_LINK_ADDRESS)?;
    // Who has no address yet does not say where it is (RFC 4861 6.1.1, 7.1.1).
    if ip.src.is_unspecified() && source.is_some() {
        return Err(DropReason::Malformed);
    }
    // Nor does it ask one alone, to whom nobody could answer (RFC 4861 7.1.1).
    if ip.src.is_unspecified() && kind == NEIGHBOUR_SOLICITATION && !is_solicited_node(ip.dst) {
        return Err(DropReason::Malformed);
    }
    if kind == ROUTER_SOLICITATION {
        return Ok(Some(Discovery::RouterSolicitation { source }));
    }
    let mut octets = [0; 16];
    octets.copy_from_slice(&header[8..24]);
    let target = Ipv6Addr::from(octets);
    if target.is_multicast() {
        return Err(DropReason::Malformed);
    }
    Ok(Some(if kind == NEIGHBOUR_SOLICITATION {
        Discovery::NeighbourSolicitation { target, source }
    } else {
        let location = link_address(options, TARGET_LINK_ADDRESS)?;
        Discovery::NeighbourAdvertisement { target, location }
    }))
}

/// A group of those whose addresses end alike (RFC 4291 2.7.1).
fn is_solicited_node(addr: IpAddr) -> bool {
    const PREFIX: [u8; 13] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff];
    matches!(addr, IpAddr::V6(addr) if addr.octets().starts_with(&PREFIX))
}

/// The Ethernet address in the first option of a kind; every option must have a length.
fn link_address(options: &[u8], wanted: u8) -> Result<Option<Mac>, DropReason> {
    let mut rest = options;
    let mut found = None;
    while let Some((&kind, more)) = rest.split_first() {
        let length = 8 * usize::from(*more.first().ok_or(DropReason::Truncated)?);
        if length == 0 {
            return Err(DropReason::Malformed);
        }
        let (option, next) = rest.split_at_checked(length).ok_or(DropReason::Truncated)?;
        if kind == wanted && length == 8 && found.is_none() {
            found = Some(Mac([2, 3, 4, 5, 6, 7].map(|at: usize| option[at])));
        }
        rest = next;
    }
    Ok(found)
}

/// Says where one of our addresses is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NeighbourAdvertisement {
    /// The address.
    pub target: Ipv6Addr,
    /// Who asked; `None` tells all, since who asked has no address yet.
    pub asked_by: Option<Ipv6Addr>,
}

/// Sends a neighbour advertisement. False when the batch is full.
pub fn neighbour_advertisement(
    tx: &mut TxBatch,
    wire: Wire,
    advertisement: NeighbourAdvertisement,
) -> bool {
    /// Router, solicited, override (RFC 4861 4.4).
    const FLAGS: [u8; 3] = [0x80, 0x40, 0x20];
    let NeighbourAdvertisement { target, asked_by } = advertisement;
    let solicited = if asked_by.is_some() { FLAGS[1] } else { 0 };
    let mut message = vec![NEIGHBOUR_ADVERTISEMENT, 0, 0, 0];
    message.extend([FLAGS[0] | solicited | FLAGS[2], 0, 0, 0]);
    message.extend(target.octets());
    message.extend([TARGET_LINK_ADDRESS, 1]);
    message.extend(wire.src.0);
    send(tx, wire, [target, asked_by.unwrap_or(ALL_NODES)], message)
}

/// What a router tells about the link (RFC 4861 4.2).
#[derive(Debug, Clone, Copy)]
pub struct RouterAdvertisement<'a> {
    /// The router's link-local address.
    pub router: Ipv6Addr,
    /// Who is told.
    pub to: Ipv6Addr,
    /// How long it is a default router; zero where it is none.
    pub lifetime: Duration,
    /// The subnet.
    pub prefix: ipnet::Ipv6Net,
    /// Stations are to make up addresses in it by themselves.
    pub autonomous: bool,
    /// Largest packet, bytes.
    pub mtu: u16,
    /// The resolver.
    pub resolver: Option<Ipv6Addr>,
    /// The search list, as far as it fits.
    pub search: &'a [String],
    /// How long prefix, resolver and search list hold.
    pub validity: Duration,
}

/// Seconds as options have them.
fn seconds(duration: Duration) -> [u8; 4] {
    u32::try_from(duration.secs())
        .unwrap_or(u32::MAX)
        .to_be_bytes()
}

/// Sends a router advertisement. False when the batch is full.
pub fn router_advertisement(
    tx: &mut TxBatch,
    wire: Wire,
    advertisement: &RouterAdvertisement<'_>,
) -> bool {
    /// Addresses and other information are to be had by DHCPv6.
    const MANAGED_AND_OTHER: u8 = 0xc0;
    /// Stations of the prefix are neighbours.
    const ON_LINK: u8 = 0x80;
    const AUTONOMOUS: u8 = 0x40;
    let it = advertisement;
    let lifetime = u16::try_from(it.lifetime.secs()).unwrap_or(u16::MAX);
    let mut message = vec![ROUTER_ADVERTISEMENT, 0, 0, 0];
    message.extend([Marks::DEFAULT_HOP_LIMIT, MANAGED_AND_OTHER]);
    message.extend(lifetime.to_be_bytes());
    message.extend([0; 8]);
    message.extend([SOURCE_LINK_ADDRESS, 1]);
    message.extend(wire.src.0);
    message.extend([MTU, 1, 0, 0]);
    message.extend(u32::from(it.mtu).to_be_bytes());
    let autonomous = if it.autonomous { AUTONOMOUS } else { 0 };
    message.extend([PREFIX_INFORMATION, 4, it.prefix.prefix_len()]);
    message.push(ON_LINK | autonomous);
    message.extend(seconds(it.validity));
    message.extend(seconds(it.validity));
    message.extend([0; 4]);
    message.extend(it.prefix.network().octets());
    if let Some(resolver) = it.resolver {
        message.extend([RESOLVERS, 3, 0, 0]);
        message.extend(seconds(it.validity));
        message.extend(resolver.octets());
    }
    search_list(&mut message, it);
    send(tx, wire, [it.router, it.to], message)
}

/// Adds the option for the search list (RFC 8106 5.2): names as in DNS, padded with zeros.
fn search_list(message: &mut Vec<u8>, advertisement: &RouterAdvertisement<'_>) {
    let mut names = super::dns::encode_names(advertisement.search, MAX_NAMES);
    if names.is_empty() {
        return;
    }
    names.resize(names.len().next_multiple_of(8), 0);
    let Ok(units) = u8::try_from(1 + names.len() / 8) else {
        return;
    };
    message.extend([SEARCH_LIST, units, 0, 0]);
    message.extend(seconds(advertisement.validity));
    message.extend(names);
}

fn send(tx: &mut TxBatch, wire: Wire, [src, dst]: [Ipv6Addr; 2], mut message: Vec<u8>) -> bool {
    let (src, dst) = (IpAddr::from(src), IpAddr::from(dst));
    emit::fill_icmpv6_checksum(src, dst, &mut message);
    let marks = Marks {
        hop_limit: HOP_LIMIT,
        ..Marks::default()
    };
    let header = Header::whole(src, dst, PROTOCOL_ICMPV6).marked(marks);
    emit::packet(tx, wire, header, &message)
}

/// The Ethernet address of a multicast group (RFC 2464 section 7).
#[must_use]
pub fn group_mac(group: Ipv6Addr) -> Mac {
    let octets = group.octets();
    Mac([0x33, 0x33, octets[12], octets[13], octets[14], octets[15]])
}
