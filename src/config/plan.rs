//! Which address of the virtual subnets plays which role.
//!
//! Comes in: the subnets. Goes out: the addresses of gateway, resolver and guest, and whose an address is.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnet::{Ipv4Net, Ipv6Net};

use super::MIN_MTU6;

/// The gateway's link-local address, which router advertisements come from (RFC 4861 4.2).
pub const GATEWAY_LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
/// Prefix length that addresses are made up for without a server (RFC 4862 with RFC 2464).
pub const SLAAC_PREFIX: u8 = 64;

/// The roles of the addresses in the virtual subnets, laid out as slirp4netns has them: engines
/// compute these addresses instead of asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressPlan {
    subnet: Ipv4Net,
    subnet6: Option<Ipv6Net>,
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
    /// Address ::100 of the subnet is the guest's, so 512 addresses are the least.
    #[error("{0} is too small or too large: use a prefix length from 8 to 112, best 64")]
    PrefixLength6(Ipv6Net),
    /// `fd00::5/64` names a host, not a network.
    #[error("{0} is not the network's own address: use {1}")]
    NotTheNetwork6(Ipv6Net, Ipv6Net),
    /// Loopback, multicast, link-local or unspecified space can't be a guest's subnet.
    #[error("{0} is not unicast address space: use a private network such as fd00::/64")]
    NotUnicast6(Ipv6Net),
}

impl AddressPlan {
    /// Lays the roles out over `subnet`, without IPv6.
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
        Ok(Self {
            subnet,
            subnet6: None,
        })
    }

    /// Adds an IPv6 subnet, or replaces it.
    ///
    /// # Errors
    /// When the subnet is too small, too large, not a network address or not unicast.
    pub fn with_ipv6(self, subnet: Ipv6Net) -> Result<Self, PlanError> {
        if !(8..=112).contains(&subnet.prefix_len()) {
            return Err(PlanError::PrefixLength6(subnet));
        }
        if subnet.trunc() != subnet {
            return Err(PlanError::NotTheNetwork6(subnet, subnet.trunc()));
        }
        let first = subnet.network();
        let special = first.is_multicast() || first.segments()[..6] == [0; 6];
        if special || first.is_unicast_link_local() || first.octets()[0] == 0 {
            return Err(PlanError::NotUnicast6(subnet));
        }
        Ok(Self {
            subnet6: Some(subnet),
            ..self
        })
    }

    /// The same plan for IPv4 alone.
    #[must_use]
    pub const fn without_ipv6(self) -> Self {
        Self {
            subnet6: None,
            ..self
        }
    }

    /// The same plan for a link with that MTU: IPv6 needs 1280 bytes.
    #[must_use]
    pub const fn for_mtu(self, mtu: u16) -> Self {
        if mtu < MIN_MTU6 {
            self.without_ipv6()
        } else {
            self
        }
    }

    /// The IPv4 subnet.
    #[must_use]
    pub const fn subnet(&self) -> Ipv4Net {
        self.subnet
    }

    /// The IPv6 subnet, where there is one.
    #[must_use]
    pub const fn subnet6(&self) -> Option<Ipv6Net> {
        self.subnet6
    }

    fn nth(&self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.subnet.network()).saturating_add(offset))
    }

    fn nth6(&self, offset: u16) -> Option<Ipv6Addr> {
        let network = self.subnet6?.network();
        Some(Ipv6Addr::from(
            u128::from(network).saturating_add(u128::from(offset)),
        ))
    }

    /// The bridge gateway, which stands for the host's loopback: network + 2.
    #[must_use]
    pub fn gateway(&self) -> Ipv4Addr {
        self.nth(2)
    }

    /// The bridge gateway's IPv6 address: network + 2.
    #[must_use]
    pub fn gateway6(&self) -> Option<Ipv6Addr> {
        self.nth6(2)
    }

    /// The gateway's address in the family of `addr`.
    #[must_use]
    pub fn gateway_like(&self, addr: IpAddr) -> Option<IpAddr> {
        match addr {
            IpAddr::V4(_) => Some(self.gateway().into()),
            IpAddr::V6(_) => self.gateway6().map(Into::into),
        }
    }

    /// The gateway's address in one of the families; what leads to the host's loopback.
    #[must_use]
    pub fn is_gateway(&self, addr: IpAddr) -> bool {
        self.gateway_like(addr) == Some(addr)
    }

    /// The resolver: network + 3.
    #[must_use]
    pub fn resolver(&self) -> Ipv4Addr {
        self.nth(3)
    }

    /// The resolver's IPv6 address: network + 3.
    #[must_use]
    pub fn resolver6(&self) -> Option<Ipv6Addr> {
        self.nth6(3)
    }

    /// The resolver's address in the family of `addr`.
    #[must_use]
    pub fn resolver_like(&self, addr: IpAddr) -> Option<IpAddr> {
        match addr {
            IpAddr::V4(_) => Some(self.resolver().into()),
            IpAddr::V6(_) => self.resolver6().map(Into::into),
        }
    }

    /// The resolver's address in one of the families.
    #[must_use]
    pub fn is_resolver(&self, addr: IpAddr) -> bool {
        self.resolver_like(addr) == Some(addr)
    }

    /// The address that `run` and `attach` configure: network + 100.
    #[must_use]
    pub fn guest(&self) -> Ipv4Addr {
        self.nth(100)
    }

    /// The IPv6 address that `run` and `attach` configure, and that DHCPv6 leases: network + 0x100,
    /// which is written as the IPv4 one.
    #[must_use]
    pub fn guest6(&self) -> Option<Ipv6Addr> {
        self.nth6(0x100)
    }

    /// First and last address of the DHCP pool: network + 15 to + 30.
    #[must_use]
    pub fn lease_pool(&self) -> RangeInclusive<u32> {
        u32::from(self.nth(15))..=u32::from(self.nth(30))
    }

    /// An address that the gateway itself answers for.
    #[must_use]
    pub fn is_gateway_side(&self, addr: IpAddr) -> bool {
        let link_local = self.subnet6.is_some() && addr == GATEWAY_LINK_LOCAL;
        self.is_gateway(addr) || self.is_resolver(addr) || link_local
    }

    /// An address that a guest may use as its own: in the subnet or link-local, and neither the
    /// gateway's, the resolver's, the network's nor the broadcast address.
    #[must_use]
    pub fn is_guest_side(&self, addr: IpAddr) -> bool {
        if self.is_gateway_side(addr) {
            return false;
        }
        match addr {
            IpAddr::V4(addr) => {
                self.subnet.contains(&addr)
                    && addr != self.subnet.network()
                    && addr != self.subnet.broadcast()
            }
            // The subnet's own address is that of its routers (RFC 4291 2.6.1).
            IpAddr::V6(addr) => self.subnet6.is_some_and(|subnet| {
                addr.is_unicast_link_local() || (subnet.contains(&addr) && addr != subnet.network())
            }),
        }
    }

    /// On the guests' link: in one of the subnets, or link-local, which no router forwards (RFC 3927 section 7,
    /// RFC 4291 2.5.6).
    #[must_use]
    pub fn contains(&self, addr: IpAddr) -> bool {
        match addr {
            IpAddr::V4(addr) => self.subnet.contains(&addr) || addr.is_link_local(),
            IpAddr::V6(addr) => {
                addr.is_unicast_link_local()
                    || self.subnet6.is_some_and(|subnet| subnet.contains(&addr))
            }
        }
    }
}

impl Default for AddressPlan {
    fn default() -> Self {
        let subnet6 = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0);
        Self {
            subnet: Ipv4Net::new_assert(Ipv4Addr::new(10, 0, 2, 0), 24),
            subnet6: Some(Ipv6Net::new_assert(subnet6, SLAAC_PREFIX)),
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
    fn the_ipv6_plan_is_slirp4netns_s_too() {
        let plan = AddressPlan::default();
        let text = |addr: Option<Ipv6Addr>| addr.unwrap().to_string();
        assert_eq!(text(plan.gateway6()), "fd00::2");
        assert_eq!(text(plan.resolver6()), "fd00::3");
        assert_eq!(text(plan.guest6()), "fd00::100");
        let plan = plan.without_ipv6();
        assert_eq!(plan.gateway6(), None);
        assert!(!plan.is_guest_side("fd00::100".parse().unwrap()));
    }

    #[test]
    fn ipv6_subnets_without_room_or_sense_are_refused() {
        let plan = |text: &str| AddressPlan::default().with_ipv6(text.parse().unwrap());
        assert!(plan("2001:db8:7::/48").is_ok());
        assert!(matches!(
            plan("fd00::/113"),
            Err(PlanError::PrefixLength6(_))
        ));
        assert!(matches!(
            plan("fd00::5/64"),
            Err(PlanError::NotTheNetwork6(..))
        ));
        for special in ["fe80::/64", "ff02::/64", "::/64", "::ffff:0:0/96"] {
            assert!(
                matches!(plan(special), Err(PlanError::NotUnicast6(_))),
                "{special}"
            );
        }
    }

    #[test]
    fn the_gateway_is_no_guest() {
        let plan = AddressPlan::default();
        for addr in ["10.0.2.100", "fd00::100", "fe80::1"] {
            assert!(plan.is_guest_side(addr.parse().unwrap()), "{addr}");
        }
        for addr in [
            "10.0.2.0",
            "10.0.2.2",
            "10.0.2.3",
            "10.0.2.255",
            "10.0.3.1",
            "::1",
            "fd00::",
            "fd00::2",
            "fd00::3",
            "fe80::2",
            "fd01::5",
        ] {
            assert!(!plan.is_guest_side(addr.parse().unwrap()), "{addr}");
        }
    }
}
