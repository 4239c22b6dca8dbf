//! What an address that a guest names leads to, and what an outside address is called inside.
//!
//! Consulted once for each new flow. The rule that holds by construction: the gateway address is
//! the only way to the host's loopback, and only while that is allowed; unspecified, loopback,
//! multicast, broadcast and reserved destinations never become the argument of a socket call.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::config::{Config, DNS_PORT, Dns};
use crate::net::DropReason;
use crate::net::emit::IcmpError;

/// Where a packet to an address goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// To this address of the host's network.
    Host(SocketAddr),
    /// To the DNS forwarder.
    Resolver,
    /// Nobody listens there: the gateway's own address, but no service of it.
    Refuse,
    /// A router would say this.
    Unreachable(IcmpError),
    /// Nowhere, and nothing is said.
    Drop(DropReason),
}

/// Decides where a guest's packet to `to` goes.
#[must_use]
pub fn verdict(config: &Config, to: SocketAddr) -> Verdict {
    let plan = &config.plan;
    if plan.is_resolver(to.ip()) {
        return if is_for_resolver(config, to) {
            Verdict::Resolver
        } else {
            Verdict::Refuse
        };
    }
    if plan.is_gateway(to.ip()) {
        return if config.host_loopback {
            Verdict::Host(SocketAddr::new(loopback(to.ip()), to.port()))
        } else {
            Verdict::Unreachable(IcmpError::NetUnreachable)
        };
    }
    if plan.is_gateway_side(to.ip()) {
        return Verdict::Refuse;
    }
    if is_forbidden(config, to.ip()) {
        return Verdict::Drop(DropReason::Destination);
    }
    if plan.contains(to.ip()) {
        return Verdict::Unreachable(IcmpError::HostUnreachable);
    }
    Verdict::Host(to)
}

/// Whether a packet to `to` is for the DNS forwarder.
#[must_use]
pub fn is_for_resolver(config: &Config, to: SocketAddr) -> bool {
    to.port() == DNS_PORT && config.dns != Dns::Off && config.plan.is_resolver(to.ip())
}

/// The host's loopback address in the family of `addr`.
const fn loopback(addr: IpAddr) -> IpAddr {
    match addr {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
    }
}

/// Addresses that must never reach a socket call, whatever the options say.
#[must_use]
pub fn is_forbidden(config: &Config, addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(addr) => {
            let first = addr.octets()[0];
            first == 0 || first == 127 || first >= 224 || addr == config.plan.subnet().broadcast()
        }
        // The first 96 bits zero: unspecified, loopback, and the obsolete way to write an IPv4 address
        // (RFC 4291 2.5.5.1); 80 bits zero and 16 set is the one that is still in use.
        IpAddr::V6(addr) => {
            addr.is_multicast() || addr.segments()[..6] == [0; 6] || addr.to_ipv4_mapped().is_some()
        }
    }
}

/// What an outside address is called inside, for a guest that has the address `guest`: the host's
/// loopback, and whatever the guest could not answer, is the gateway.
#[must_use]
pub fn seen_inside(config: &Config, outside: SocketAddr, guest: IpAddr) -> SocketAddr {
    let plan = &config.plan;
    let (addr, port) = (outside.ip(), outside.port());
    let other_family = addr.is_ipv6() != guest.is_ipv6();
    if other_family || plan.contains(addr) || is_forbidden(config, addr) {
        let gateway = plan.gateway_like(guest);
        SocketAddr::new(gateway.unwrap_or_else(|| plan.gateway().into()), port)
    } else {
        // Without the scope that the host's address may have.
        SocketAddr::new(addr, port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn go(config: &Config, to: &str) -> Verdict {
        verdict(config, to.parse().unwrap())
    }

    #[test]
    fn the_gateway_is_the_only_way_to_loopback() {
        let mut config = Config::default();
        assert_eq!(
            go(&config, "10.0.2.2:80"),
            Verdict::Host("127.0.0.1:80".parse().unwrap())
        );
        assert_eq!(
            go(&config, "[fd00::2]:80"),
            Verdict::Host("[::1]:80".parse().unwrap())
        );
        config.host_loopback = false;
        assert_eq!(
            go(&config, "10.0.2.2:80"),
            Verdict::Unreachable(IcmpError::NetUnreachable)
        );
        for forbidden in [
            "127.0.0.1:80",
            "127.9.9.9:80",
            "0.0.0.0:80",
            "0.1.2.3:80",
            "224.0.0.1:80",
            "240.0.0.1:80",
            "255.255.255.255:80",
            "10.0.2.255:80",
            "[::1]:80",
            "[::]:80",
            "[::ffff:127.0.0.1]:80",
            "[::127.0.0.1]:80",
            "[ff02::1]:80",
        ] {
            assert_eq!(
                go(&config, forbidden),
                Verdict::Drop(DropReason::Destination),
                "{forbidden}"
            );
        }
    }

    #[test]
    fn the_resolver_serves_names_only() {
        let mut config = Config::default();
        assert_eq!(go(&config, "10.0.2.3:53"), Verdict::Resolver);
        assert_eq!(go(&config, "10.0.2.3:80"), Verdict::Refuse);
        assert_eq!(go(&config, "[fd00::3]:53"), Verdict::Resolver);
        assert_eq!(go(&config, "[fe80::2]:53"), Verdict::Refuse);
        config.dns = Dns::Off;
        assert_eq!(go(&config, "10.0.2.3:53"), Verdict::Refuse);
    }

    #[test]
    fn strangers_keep_their_address_inside() {
        let config = Config::default();
        let seen = |outside: &str, guest: &str| {
            let (outside, guest) = (outside.parse().unwrap(), guest.parse().unwrap());
            seen_inside(&config, outside, guest).to_string()
        };
        for (outside, guest, expected) in [
            ("192.0.2.9:4000", "10.0.2.100", "192.0.2.9:4000"),
            ("127.0.0.1:4000", "10.0.2.100", "10.0.2.2:4000"),
            ("10.0.2.77:4000", "10.0.2.100", "10.0.2.2:4000"),
            ("[2001:db8::9]:4000", "10.0.2.100", "10.0.2.2:4000"),
            ("[2001:db8::9]:4000", "fd00::100", "[2001:db8::9]:4000"),
            ("[::1]:4000", "fd00::100", "[fd00::2]:4000"),
            ("[fe80::9%3]:4000", "fd00::100", "[fd00::2]:4000"),
            ("192.0.2.9:4000", "fd00::100", "[fd00::2]:4000"),
        ] {
            assert_eq!(seen(outside, guest), expected);
        }
    }
}
