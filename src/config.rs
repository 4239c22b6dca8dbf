//! What one run of tapgate is asked to do: validated once, immutable after.
//!
//! A command line ([`crate::cli`]) goes in; every other room reads the result. [`AddressPlan`]
//! says which address of the virtual subnet plays which role. Nothing here reads a file, a clock
//! or the environment.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;

use ipnet::Ipv4Net;

/// Smallest MTU that IPv4 hosts must take (RFC 791).
pub const MIN_MTU: u16 = 576;
/// Largest MTU: a frame of 65,535 bytes less its Ethernet header, which is the tap driver's limit.
pub const MAX_MTU: u16 = 65_521;
/// Port of the domain name service (RFC 1035).
pub const DNS_PORT: u16 = 53;
/// Default limit on flows of all kinds together.
pub const DEFAULT_MAX_FLOWS: u32 = 65_536;

/// The roles of the addresses in the virtual subnet, laid out as slirp4netns has them: engines
/// compute these addresses instead of asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressPlan {
    subnet: Ipv4Net,
}

/// A subnet that has no room for the plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Address 100 of the subnet is the guest's, so 128 addresses are the least.
    #[error("{0} is too small or too large: use a prefix length from 1 to 25")]
    PrefixLength(Ipv4Net),
    /// `10.0.2.5/24` names a host, not a network.
    #[error("{0} is not the network's own address: use {1}")]
    NotTheNetwork(Ipv4Net, Ipv4Net),
    /// Loopback, multicast, reserved or unspecified space can't be a guest's subnet.
    #[error("{0} is not unicast address space: use a private network such as 10.0.2.0/24")]
    NotUnicast(Ipv4Net),
}

impl AddressPlan {
    /// Lays the roles out over `subnet`.
    ///
    /// # Errors
    /// When the subnet is too small, too large, not a network address or not unicast.
    pub fn new(subnet: Ipv4Net) -> Result<Self, PlanError> {
        if !(1..=25).contains(&subnet.prefix_len()) {
            return Err(PlanError::PrefixLength(subnet));
        }
        if subnet.trunc() != subnet {
            return Err(PlanError::NotTheNetwork(subnet, subnet.trunc()));
        }
        let (first, last) = (subnet.network(), subnet.broadcast());
        if first.octets()[0] == 0 || first.is_loopback() || last.octets()[0] >= 224 {
            return Err(PlanError::NotUnicast(subnet));
        }
        Ok(Self { subnet })
    }

    /// The subnet itself.
    #[must_use]
    pub const fn subnet(&self) -> Ipv4Net {
        self.subnet
    }

    fn nth(&self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.subnet.network()).saturating_add(offset))
    }

    /// The bridge gateway, which stands for the host's loopback: network + 2.
    #[must_use]
    pub fn gateway(&self) -> Ipv4Addr {
        self.nth(2)
    }

    /// The resolver: network + 3.
    #[must_use]
    pub fn resolver(&self) -> Ipv4Addr {
        self.nth(3)
    }

    /// The address that `run` and `attach` configure: network + 100.
    #[must_use]
    pub fn guest(&self) -> Ipv4Addr {
        self.nth(100)
    }

    /// First and last address of the DHCP pool: network + 15 to + 30.
    #[must_use]
    pub fn lease_pool(&self) -> RangeInclusive<u32> {
        u32::from(self.nth(15))..=u32::from(self.nth(30))
    }

    /// An address that the gateway itself answers for.
    #[must_use]
    pub fn is_gateway_side(&self, addr: IpAddr) -> bool {
        addr == self.gateway() || addr == self.resolver()
    }

    /// An address that a guest may use as its own: in the subnet, and neither the gateway's, the
    /// resolver's, the network's nor the broadcast address.
    #[must_use]
    pub fn is_guest_side(&self, addr: IpAddr) -> bool {
        match addr {
            IpAddr::V4(addr) => {
                self.subnet.contains(&addr)
                    && !self.is_gateway_side(addr.into())
                    && addr != self.subnet.network()
                    && addr != self.subnet.broadcast()
            }
            IpAddr::V6(_) => false,
        }
    }

    /// In the subnet at all.
    #[must_use]
    pub fn contains(&self, addr: IpAddr) -> bool {
        matches!(addr, IpAddr::V4(addr) if self.subnet.contains(&addr))
    }
}

impl Default for AddressPlan {
    fn default() -> Self {
        Self {
            subnet: Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 2, 0), 24),
        }
    }
}

/// Where the DNS forwarder sends queries.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Dns {
    /// To the resolvers that the host's `/etc/resolv.conf` names at that moment.
    #[default]
    Host,
    /// To these, in order.
    Fixed(Vec<SocketAddr>),
    /// Nowhere: the resolver's address answers nothing.
    Off,
}

/// What outgoing connections are bound to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outbound {
    /// A source address.
    Address(IpAddr),
    /// An interface, by `SO_BINDTODEVICE`, so that routing follows it.
    Interface(String),
}

impl fmt::Display for Outbound {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(addr) => addr.fmt(out),
            Self::Interface(name) => name.fmt(out),
        }
    }
}

/// A transport protocol that ports are published for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// One host port that leads to a guest's port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Publish {
    /// Transport protocol.
    pub protocol: Protocol,
    /// Address and port that the host listens at.
    pub host: SocketAddr,
    /// Address and port inside.
    pub guest: SocketAddr,
}

/// Everything that the stack, the link and the host edge need to know.
#[derive(Debug, Clone)]
pub struct Config {
    /// Roles of the addresses.
    pub plan: AddressPlan,
    /// Largest IP packet on the link, bytes.
    pub mtu: u16,
    /// The gateway address leads to the host's loopback.
    pub host_loopback: bool,
    /// Where names are resolved.
    pub dns: Dns,
    /// What outgoing IPv4 sockets are bound to.
    pub outbound: Option<Outbound>,
    /// What outgoing IPv6 sockets are bound to.
    pub outbound6: Option<Outbound>,
    /// Ports published from the start.
    pub publish: Vec<Publish>,
    /// Limit on flows of all kinds together.
    pub max_flows: u32,
    /// Ask the kernel for tap offloads; without, checksums and segmentation are done here.
    pub offload: bool,
    /// Search list told to DHCP clients.
    pub search: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            plan: AddressPlan::default(),
            mtu: 1500,
            host_loopback: true,
            dns: Dns::default(),
            outbound: None,
            outbound6: None,
            publish: Vec::new(),
            max_flows: DEFAULT_MAX_FLOWS,
            offload: true,
            search: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(text: &str) -> Result<AddressPlan, PlanError> {
        AddressPlan::new(text.parse().unwrap())
    }

    #[test]
    fn the_default_plan_is_slirp4netns_s() {
        let plan = AddressPlan::default();
        assert_eq!(plan.gateway(), Ipv4Addr::new(10, 0, 2, 2));
        assert_eq!(plan.resolver(), Ipv4Addr::new(10, 0, 2, 3));
        assert_eq!(plan.guest(), Ipv4Addr::new(10, 0, 2, 100));
        assert_eq!(
            Ipv4Addr::from(*plan.lease_pool().start()),
            Ipv4Addr::new(10, 0, 2, 15)
        );
        assert_eq!(
            Ipv4Addr::from(*plan.lease_pool().end()),
            Ipv4Addr::new(10, 0, 2, 30)
        );
    }

    #[test]
    fn subnets_without_room_or_sense_are_refused() {
        assert!(plan("192.168.7.128/25").is_ok());
        assert!(matches!(
            plan("192.168.7.0/26"),
            Err(PlanError::PrefixLength(_))
        ));
        assert!(matches!(
            plan("10.0.2.5/24"),
            Err(PlanError::NotTheNetwork(..))
        ));
        assert!(matches!(plan("127.0.0.0/8"), Err(PlanError::NotUnicast(_))));
        assert!(matches!(plan("224.0.0.0/8"), Err(PlanError::NotUnicast(_))));
    }

    #[test]
    fn the_gateway_is_no_guest() {
        let plan = AddressPlan::default();
        assert!(plan.is_guest_side(plan.guest().into()));
        for addr in [
            "10.0.2.0",
            "10.0.2.2",
            "10.0.2.3",
            "10.0.2.255",
            "10.0.3.1",
            "::1",
        ] {
            assert!(!plan.is_guest_side(addr.parse().unwrap()), "{addr}");
        }
    }
}
