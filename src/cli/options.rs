//! The options that `run` and `attach` share, and how they become a [`Config`].
//!
//! Comes in: words. Goes out: values that are right in themselves; what is wrong is a usage error
//! that names the option and the fix (exit status 2).

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::RangedI64ValueParser;
use clap::{ArgAction, Args, ValueEnum};
use ipnet::Ipv6Net;

use super::publish::{self, Spec};
use crate::config::{
    AddressPlan, Config, DEFAULT_BUSY_POLL, DEFAULT_MAX_UDP_PORTS, DNS_PORT, Dns, MAX_MTU,
    MAX_WORKERS, MIN_MAX_BUFFER_MEMORY, MIN_MTU, Memory, Outbound, Timeouts, UdpFiltering,
    timeouts,
};
use crate::log::LogFormat;
use crate::net::Mac;
use crate::setup::sandbox::Switch;
use crate::sys::tap::MAX_NAME;

/// A switch that is named rather than negated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum OnOff {
    /// Where the kernel grants it.
    #[default]
    On,
    /// Never.
    Off,
}

/// Who may send to a guest's UDP port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Filtering {
    /// Anybody, once the guest has sent.
    #[default]
    Open,
    /// Addresses that the guest has sent to.
    Address,
    /// Addresses and ports that the guest has sent to.
    Endpoint,
}

impl From<Filtering> for UdpFiltering {
    fn from(filtering: Filtering) -> Self {
        match filtering {
            Filtering::Open => Self::Open,
            Filtering::Address => Self::Address,
            Filtering::Endpoint => Self::Endpoint,
        }
    }
}

/// What `run` and `attach` share.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Largest packet on the tap, bytes (576 to 65521; IPv6 needs 1280)
    #[arg(long, value_name = "BYTES", default_value_t = 1500, value_parser = clap::value_parser!(u16).range(i64::from(MIN_MTU)..=i64::from(MAX_MTU)))]
    pub mtu: u16,
    /// The virtual subnet: gateway .2, resolver .3, DHCP from .15, address .100
    #[arg(long, value_name = "CIDR", default_value = "10.0.2.0/24", value_parser = subnet)]
    pub subnet: AddressPlan,
    /// The virtual IPv6 subnet: gateway ::2, resolver ::3, address ::100
    #[arg(long, value_name = "CIDR", default_value = "fd00::/64", value_parser = subnet6)]
    pub subnet6: Ipv6Net,
    /// IPv4 alone
    #[arg(long)]
    pub no_ipv6: bool,
    /// Ethernet address of the tap inside
    #[arg(long, value_name = "MAC", value_parser = mac)]
    pub mac: Option<Mac>,
    /// The gateway address does not lead to the host's loopback
    #[arg(long)]
    pub no_host_loopback: bool,
    /// No DNS forwarder
    #[arg(long, conflicts_with = "dns")]
    pub no_dns: bool,
    /// Ask this resolver instead of the host's (repeatable)
    #[arg(long, value_name = "ADDR[:PORT]", value_parser = resolver)]
    pub dns: Vec<SocketAddr>,
    /// Send from this address, or by this interface (repeatable: one for each family)
    #[arg(long, value_name = "ADDR|IFACE", value_parser = outbound)]
    pub outbound: Vec<Outbound>,
    /// Ports of the host that lead inside.
    #[arg(
        short,
        long,
        value_name = "SPEC",
        value_parser = publish::parse,
        help = "Publish a port: [HOSTIP:]HOSTPORT:GUESTPORT[/tcp|/udp], or ranges a-b:c-d (repeatable); for TCP with \
                ,splice=auto|always|never behind it: which clients are joined to a socket inside, past the tap [default: auto, \
                those on the host's loopback]"
    )]
    pub publish: Vec<Spec>,
    /// Who may send to a UDP port of the guest's: anybody once it has sent (STUN and games rely on
    /// that), addresses that it sent to, or endpoints that it sent to
    #[arg(long, value_enum, default_value_t, value_name = "WHO")]
    pub udp_filtering: Filtering,
    /// End an open TCP connection whose guest has been silent for so many seconds, though it was asked up to ten minutes before
    /// whether it is still there (10 to 2592000; RFC 5382: not below 7440)
    #[arg(long, value_name = "SECONDS", default_value_t = timeouts::DEFAULT_TCP_IDLE, value_parser = seconds(timeouts::TCP_IDLE))]
    pub tcp_idle_timeout: u32,
    /// Where one stream of a TCP connection has ended, ask a guest that has been silent for so many seconds whether it is still
    /// there (5 to 86400); without an answer the connection ends
    #[arg(long, value_name = "SECONDS", default_value_t = timeouts::DEFAULT_TCP_HALF_CLOSED, value_parser = seconds(timeouts::TCP_HALF_CLOSED))]
    pub tcp_half_closed_timeout: u32,
    /// Give a TCP connection up that nobody has answered for so many seconds (1 to 86400; the host's kernel does so after
    /// some 130 whatever is said here); a guest that a published port's client waits for has 75 at most
    #[arg(long, value_name = "SECONDS", default_value_t = timeouts::DEFAULT_TCP_CONNECT, value_parser = seconds(timeouts::TCP_CONNECT))]
    pub tcp_connect_timeout: u32,
    /// Close a UDP port that has carried nothing for so many seconds (1 to 86400; RFC 4787: not below 120); one that was
    /// never answered after 30 at most, one that only spoke to port 53 after 10
    #[arg(long, value_name = "SECONDS", default_value_t = timeouts::DEFAULT_UDP_IDLE, value_parser = seconds(timeouts::UDP_IDLE))]
    pub udp_idle_timeout: u32,
    /// Limit on connections and associations together (1 to 16777216) [default: 65536, less where the memory of the control group or
    /// the address space is limited]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    pub max_flows: Option<u32>,
    /// Limit on the guest's UDP ports and pings, each of which takes a port or an identifier of the host's (1 to 65536);
    /// beyond it one that was not answered within a second, or is idle for half a minute, gives way, else the newest
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_UDP_PORTS, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub max_udp_ports: u32,
    /// Threads that carry packets, each with a queue of the tap and its share of the limits (1 to 8); the first does the
    /// work of all while it has time; no more than --max-flows or --max-udp-ports [default: 1 below four processors, below
    /// 128M of memory, or where the tap is there already and has one queue, else half of them, at most 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=MAX_WORKERS))]
    pub workers: Option<u8>,
    /// Look for packets for up to so many microseconds before going to sleep, while they come closer
    /// together than that: answers are quicker, and cost processor time (0 to 1000; 0 never does)
    #[arg(long, value_name = "MICROSECONDS", default_value_t = DEFAULT_BUSY_POLL, value_parser = clap::value_parser!(u64).range(0..=1_000))]
    pub busy_poll: u64,
    /// Where the buffers of TCP connections together stop growing, bytes, or with K, M or G: windows shrink as
    /// they come near, and nothing fails; at that limit a connection has room for a segment each way and 8K [default: 256M,
    /// less where the memory of the control group is limited]
    #[arg(long, value_name = "SIZE", value_parser = buffer_memory)]
    pub max_buffer_memory: Option<usize>,
    /// Leave checksums and segmentation to the kernel where it can
    #[arg(long, value_enum, default_value_t, value_name = "on|off")]
    pub offload: OnOff,
    /// A socket for slirp4netns's API: publish ports while it runs
    #[arg(long, value_name = "PATH")]
    pub api_socket: Option<PathBuf>,
    /// Give up files, powers and system calls before the first packet
    #[arg(long, value_enum, default_value_t, value_name = "on|off")]
    pub sandbox: Switch,
    /// More log lines (repeatable); of each kind ten a second at most
    #[arg(short, long, action = ArgAction::Count)]
    pub verbose: u8,
    /// How log lines look
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub log_format: LogFormat,
}

impl Options {
    /// How many workers there are: as many as were asked for, but no more than the limits that they divide.
    fn worker_count(&self, memory: Memory) -> usize {
        let workers = self
            .workers
            .map_or_else(|| default_workers(memory), usize::from);
        let limits = self.max_flows.into_iter().chain([self.max_udp_ports]);
        let limits = limits.filter_map(|limit| usize::try_from(limit).ok());
        limits.fold(workers, usize::min)
    }

    /// The configuration that these words ask for where there is so much memory, without the host's search
    /// list.
    #[must_use]
    pub fn config(&self, memory: Memory) -> Config {
        let workers = self.worker_count(memory);
        let mut fitting = Config {
            mtu: self.mtu,
            workers,
            ..Config::default()
        };
        fitting.fit(memory);
        let plan = self.plan();
        Config {
            plan,
            mtu: self.mtu,
            host_loopback: !self.no_host_loopback,
            dns: match (self.no_dns, self.dns.is_empty()) {
                (true, _) => Dns::Off,
                (false, true) => Dns::Host,
                (false, false) => Dns::Fixed(self.dns.clone()),
            },
            outbound: self.outbound(false),
            outbound6: self.outbound(true),
            publish: self
                .publish
                .iter()
                .flat_map(|spec| spec.rules(&plan))
                .collect(),
            max_flows: self.max_flows.unwrap_or(fitting.max_flows),
            max_udp_ports: self.max_udp_ports,
            workers,
            busy_poll: Duration::from_micros(self.busy_poll),
            max_buffer_memory: self.max_buffer_memory.unwrap_or(fitting.max_buffer_memory),
            ring_space: fitting.ring_space,
            offload: self.offload == OnOff::On,
            search: Vec::new(),
            udp_filtering: self.udp_filtering.into(),
            timeouts: Timeouts {
                tcp_idle: self.tcp_idle_timeout,
                tcp_half_closed: self.tcp_half_closed_timeout,
                tcp_connect: self.tcp_connect_timeout,
                udp_idle: self.udp_idle_timeout,
            },
            slaac: true,
        }
    }

    /// The roles of addresses in both families.
    fn plan(&self) -> AddressPlan {
        if self.no_ipv6 {
            return self.subnet;
        }
        // The parser has refused what has no room.
        let plan = self.subnet.with_ipv6(self.subnet6).unwrap_or(self.subnet);
        plan.for_mtu(self.mtu)
    }

    /// The last that was said for a family; an interface is for both.
    fn outbound(&self, ipv6: bool) -> Option<Outbound> {
        let mut said = self.outbound.iter().rev();
        said.find(|outbound| match outbound {
            Outbound::Address(addr) => addr.is_ipv6() == ipv6,
            Outbound::Interface(_) => true,
        })
        .cloned()
    }
}

/// Memory that a worker nobody asked for is to have, bytes.
const FOR_A_WORKER: u64 = 64 << 20;

/// As many workers as leave processors for the guest and for the servers that it speaks to, where there is memory for them.
fn default_workers(memory: Memory) -> usize {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = match processors {
        0..4 => 1,
        4.. => (processors / 2).min(4),
    };
    let limits = [memory.resident, memory.address_space];
    let affordable = limits
        .into_iter()
        .flatten()
        .min()
        .map(|it| it / FOR_A_WORKER);
    affordable.map_or(workers, |most| {
        workers.min(usize::try_from(most).unwrap_or(workers)).max(1)
    })
}

/// A number of seconds within a range.
fn seconds(range: RangeInclusive<i64>) -> RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(range)
}

fn subnet(word: &str) -> Result<AddressPlan, String> {
    let net = word
        .parse()
        .map_err(|_| "write a network such as 10.0.2.0/24".to_owned())?;
    AddressPlan::new(net).map_err(|error| error.to_string())
}

fn subnet6(word: &str) -> Result<Ipv6Net, String> {
    let net = word
        .parse()
        .map_err(|_| "write a network such as fd00::/64".to_owned())?;
    match AddressPlan::default().with_ipv6(net) {
        Ok(_) => Ok(net),
        Err(error) => Err(error.to_string()),
    }
}

fn mac(word: &str) -> Result<Mac, String> {
    let mac: Mac = word
        .parse()
        .map_err(|error: crate::net::MacParseError| error.to_string())?;
    if mac.is_unicast() {
        Ok(mac)
    } else {
        Err("a group address: its first octet must be even".into())
    }
}

/// A number of bytes, in units of 1024 to the first, second or third power where it ends in K, M or G.
fn buffer_memory(word: &str) -> Result<usize, String> {
    let units = [('K', 10), ('M', 20), ('G', 30)];
    let unit = units
        .iter()
        .find_map(|(letter, bits)| Some((word.strip_suffix(*letter)?, *bits)));
    let (digits, bits) = unit.unwrap_or((word, 0));
    let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
    let number: Option<usize> = digits.parse().ok().filter(|_| plain);
    number
        .and_then(|number| number.checked_mul(1 << bits))
        .filter(|bytes| *bytes >= MIN_MAX_BUFFER_MEMORY)
        .ok_or_else(|| "write a number of bytes, such as 64M, of 1M or more".into())
}

/// An address with or without a port; IPv6 with a port in brackets.
fn resolver(word: &str) -> Result<SocketAddr, String> {
    let bare = word
        .parse::<IpAddr>()
        .map(|addr| SocketAddr::new(addr, DNS_PORT));
    bare.or_else(|_| word.parse())
        .map_err(|_| "write an address, or address:port".into())
}

fn outbound(word: &str) -> Result<Outbound, String> {
    match word.parse() {
        Ok(addr) => Ok(Outbound::Address(addr)),
        Err(_) => interface_name(word).map(Outbound::Interface),
    }
}

/// A name that the kernel would take for an interface.
pub(super) fn interface_name(word: &str) -> Result<String, String> {
    let fits = !word.is_empty() && word.len() <= MAX_NAME && word != "." && word != "..";
    let sane = word
        .bytes()
        .all(|byte| byte.is_ascii_graphic() && !b"/:%".contains(&byte));
    if fits && sane {
        Ok(word.to_owned())
    } else {
        Err(format!(
            "an interface's name has 1 to {MAX_NAME} letters, digits or signs, but no slash, colon or percent sign"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolvers_have_a_port() {
        assert_eq!(resolver("192.0.2.1"), Ok("192.0.2.1:53".parse().unwrap()));
        assert_eq!(
            resolver("127.0.0.1:5353"),
            Ok("127.0.0.1:5353".parse().unwrap())
        );
        assert_eq!(resolver("[::1]:5353"), Ok("[::1]:5353".parse().unwrap()));
        assert!(resolver("localhost").is_err());
    }

    #[test]
    fn memory_has_units() {
        assert_eq!(buffer_memory("1048576"), Ok(1 << 20));
        assert_eq!(buffer_memory("2048K"), Ok(2 << 20));
        assert_eq!(buffer_memory("64M"), Ok(64 << 20));
        assert_eq!(buffer_memory("3G"), Ok(3 << 30));
        for wrong in [
            "",
            "M",
            "64m",
            "1000K",
            "-5M",
            "+5M",
            "64MB",
            "99999999999999999999",
            "99999999999G",
        ] {
            assert!(buffer_memory(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn outbound_is_an_address_or_a_name() {
        assert_eq!(
            outbound("192.0.2.1"),
            Ok(Outbound::Address([192, 0, 2, 1].into()))
        );
        assert_eq!(outbound("eth0"), Ok(Outbound::Interface("eth0".into())));
        assert!(outbound("much-too-long-a-name").is_err());
    }
}
