//! Dialogues in virtual time over IPv6, and where both families must agree over IPv4 too.
//!
//! The guest's frames are written by `sim/packets6.rs`, the host's servers are played by the test. In
//! a [`lab::Lab`] whose smoltcp guest has the address of one family, the segments of the other come
//! back as they are, so a test can be the guest's TCP itself.
#![allow(
    clippy::unwrap_used,
    reason = "a scenario that can not go on has failed"
)]

#[path = "../sim/lab.rs"]
mod lab;
#[path = "../sim/packets.rs"]
mod packets;
#[path = "../sim/mod.rs"]
mod sim;

mod datagrams;
mod discovery;
mod errors;
mod fragments;
mod published;
mod segments;
mod streams;

use std::net::Ipv6Addr;

use lab::Lab;
use packets::v6::Ipv6;
use tapgate::config::{Config, MIN_MTU6};

const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
const RESOLVER6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 3);
/// The gateway's link-local address.
const ROUTER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
const OUTSIDE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// MTUs that differ in what is fragmented: the least, Ethernet's, the largest that engines ask for.
const MTUS: [u16; 3] = [MIN_MTU6, 1500, 65_520];

fn with_mtu(mtu: u16) -> Lab {
    Lab::with(Config {
        mtu,
        ..Config::default()
    })
}

fn without_ipv6() -> Config {
    let mut config = Config::default();
    config.plan = config.plan.without_ipv6();
    config
}

/// Every frame that came fits the link.
fn fits(lab: &Lab, mtu: u16) -> bool {
    let limit = 14 + usize::from(mtu);
    lab.0.received.iter().all(|frame| frame.len() <= limit)
}

/// An ICMPv6 header and data, as a frame.
fn icmp_frame(ip: Ipv6, kind: [u8; 2], words: [u16; 2], data: &[u8]) -> Vec<u8> {
    ip.frame(&ip.icmp(kind, words, data))
}
