//! What one run of tapgate is asked to do: validated once, immutable after.
//!
//! A command line ([`crate::cli`]) goes in; every other room reads the result. [`AddressPlan`]
//! says which address of the virtual subnet plays which role. Nothing here reads a file, a clock
//! or the environment.

mod limits;
pub mod timeouts;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

use ipnet::{Ipv4Net, Ipv6Net};

pub use limits::Memory;
pub use timeouts::Timeouts;

/// For how long the loop looks for more before it sleeps, microseconds: about twice what waking a
/// processor costs in a virtual machine.
pub const DEFAULT_BUSY_POLL: u64 = 100;

/// Smallest MTU that IPv4 hosts must take (RFC 791).
pub const MIN_MTU: u16 = 576;
/// Smallest MTU that a link must have for IPv6 (RFC 8200 section 5).
pub const MIN_MTU6: u16 = 1280;
/// Largest MTU: a frame of 65,535 bytes less its Ethernet header, which is the tap driver's limit.
pub const MAX_MTU: u16 = 65_521;
/// Port of the domain name service (RFC 1035).
pub const DNS_PORT: u16 = 53;
/// The gateway's link-local address, which router advertisements come from (RFC 4861 4.2).
pub const GATEWAY_LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
/// Prefix length that addresses are made up for without a server (RFC 4862 with RFC 2464).
pub const SLAAC_PREFIX: u8 = 64;
/// Default limit on flows of all kinds together.
pub const DEFAULT_MAX_FLOWS: u32 = 65_536;

/// Default limit on the buffers of TCP connections together, bytes: enough for a hundred connections
/// at full speed both ways.
pub const DEFAULT_MAX_BUFFER_MEMORY: usize = 256 << 20;
/// The least limit that leaves connections a speed worth the name.
pub const MIN_MAX_BUFFER_MEMORY: usize = 1 << 20;

/// The most workers there can be: their descriptors come in one message.
pub const MAX_WORKERS: i64 = 8;

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

/// Which clients of a published TCP port are joined to a socket inside the namespace, past the tap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Splice {
    /// Clients on the host's loopback, whose address could not be kept anyway.
    #[default]
    Auto,
    /// All clients; to the guest they look like itself.
    Always,
    /// None.
    Never,
}

impl Splice {
    /// Whether a client with this address is one of them.
    #[must_use]
    pub const fn takes(self, client: IpAddr) -> bool {
        match self {
            Self::Auto => client.is_loopback(),
            Self::Always => true,
            Self::Never => false,
        }
    }
}

impl fmt::Display for Splice {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Auto => "auto",
            Self::Always => "always",
            Self::Never => "never",
        })
    }
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
    /// Who takes the short cut; nobody over UDP.
    pub splice: Splice,
}

impl Publish {
    /// Some client of this port may take the short cut.
    #[must_use]
    pub fn may_splice(&self) -> bool {
        let splices = self.protocol == Protocol::Tcp && self.splice != Splice::Never;
        // Who asks another address than a loopback one comes from another, too.
        let local = self.host.ip().is_loopback() || self.host.ip().is_unspecified();
        splices && (local || self.splice == Splice::Always)
    }
}

/// Who may send datagrams to a guest's UDP port (RFC 4787 section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UdpFiltering {
    /// Anybody, once the guest has sent anything: what games and STUN rely on.
    #[default]
    Open,
    /// Addresses that the guest has sent to.
    Address,
    /// Addresses and ports that the guest has sent to.
    Endpoint,
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
    /// Event loops, each with a queue of the tap.
    pub workers: usize,
    /// For how long at most the loop looks for more before it sleeps.
    pub busy_poll: Duration,
    /// Limit on the buffers of TCP connections together, bytes; beyond it each has room for one segment.
    pub max_buffer_memory: usize,
    /// Address space that these buffers may take, used or not, bytes; a connection that moves has two
    /// mebibytes of it.
    pub ring_space: usize,
    /// Ask the kernel for tap offloads; without, checksums and segmentation are done here.
    pub offload: bool,
    /// Search list told to DHCP clients and in router advertisements.
    pub search: Vec<String>,
    /// Who may send to a guest's UDP port.
    pub udp_filtering: UdpFiltering,
    /// When what is silent ends.
    pub timeouts: Timeouts,
    /// Guests are to make up IPv6 addresses by themselves (RFC 4862); off where they get one from us.
    pub slaac: bool,
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
            workers: 1,
            busy_poll: Duration::from_micros(DEFAULT_BUSY_POLL),
            max_buffer_memory: DEFAULT_MAX_BUFFER_MEMORY,
            ring_space: usize::MAX,
            offload: true,
            search: Vec::new(),
            udp_filtering: UdpFiltering::default(),
            timeouts: Timeouts::default(),
            slaac: true,
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
