//! What one run of tapgate is asked to do: validated once, immutable after.
//!
//! A command line ([`crate::cli`]) goes in; every other room reads the result. Nothing here reads a file, a clock
//! or the environment.

mod limits;
mod plan;
pub mod timeouts;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

pub use limits::Memory;
pub use plan::{AddressPlan, GATEWAY_LINK_LOCAL, PlanError, SLAAC_PREFIX};
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
/// Default limit on flows of all kinds together.
pub const DEFAULT_MAX_FLOWS: u32 = 65_536;

/// Guests' UDP ports at most where nobody said: of the ports that Linux gives away by itself (`ip_local_port_range` of
/// ip(7)) the host keeps two fifths for everybody else.
pub const DEFAULT_MAX_UDP_PORTS: u32 = 16_384;

/// Default limit on the buffers of TCP connections together, bytes: enough for a hundred connections
/// at full speed both ways.
pub const DEFAULT_MAX_BUFFER_MEMORY: usize = 256 << 20;
/// The least limit that leaves connections a speed worth the name.
pub const MIN_MAX_BUFFER_MEMORY: usize = 1 << 20;

/// The most workers there can be: their descriptors come in one message.
pub const MAX_WORKERS: i64 = 8;

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
    /// Limit on guests' UDP ports and ping identifiers, each of which has one of the host's.
    pub max_udp_ports: u32,
    /// Event loops, each with a queue of the tap.
    pub workers: usize,
    /// For how long at most the loop looks for more before it sleeps.
    pub busy_poll: Duration,
    /// Limit on the buffers of TCP connections together, bytes; beyond it each has room for one segment.
    pub max_buffer_memory: usize,
    /// Address space that these buffers may take, used or not, bytes; a connection that moves has two
    /// mebibytes of it, so this also says how many move at a time.
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

impl Config {
    /// Where sockets of a family are bound to, as `outbound` or `outbound6` says.
    #[must_use]
    pub const fn outbound_of(&self, ipv6: bool) -> Option<&Outbound> {
        if ipv6 {
            self.outbound6.as_ref()
        } else {
            self.outbound.as_ref()
        }
    }
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
            max_udp_ports: DEFAULT_MAX_UDP_PORTS,
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
