//! The harness of the real-namespace tests (`tests/ns_*.rs`).
//!
//! A [`world::World`] is a private host: its own network, mounts, `/etc` and `/tmp`, seen by an
//! unprivileged user. A [`guest::Guest`] is a namespace on that host for `tapgate attach` to serve,
//! and [`attached::Net`] is the three together, up and ready. Sockets are made inside a namespace
//! and used from the test's own threads ([`sockets::Sockets`]), so a test reads as a dialogue of
//! `TcpStream`s and `UdpSocket`s with both ends in view.
//!
//! Nothing here sleeps for a fixed time to wait for something: [`wait_until`] polls with a limit.

#![allow(
    dead_code,
    reason = "each test program includes the whole vocabulary and uses a part of it"
)]
#![allow(
    clippy::disallowed_methods,
    reason = "the bans on clocks and threads are for the core; tests measure time and serve from threads"
)]

pub(crate) mod attached;
pub(crate) mod benches;
pub(crate) mod bulk;
pub(crate) mod capture;
pub(crate) mod dns;
pub(crate) mod guest;
pub(crate) mod nonsense;
pub(crate) mod process;
pub(crate) mod routers;
pub(crate) mod serve;
pub(crate) mod slirp4netns;
pub(crate) mod sockets;
pub(crate) mod sys;
pub(crate) mod terminal;
pub(crate) mod user;
pub(crate) mod world;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

/// The address in the default network that stands for the host's loopback.
pub(crate) const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 2, 2));
/// The resolver of the default network.
pub(crate) const RESOLVER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 2, 3));
/// The guest's own address in the default network.
pub(crate) const GUEST: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 2, 100));
/// The host's loopback.
pub(crate) const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Addresses of every world beside its loopback; see [`world`].
pub(crate) const WORLD_A: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
/// A second address, in another network.
pub(crate) const WORLD_B: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1));
/// A third address, a neighbour of the second.
pub(crate) const WORLD_C: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 7));
/// Has no route in any world.
pub(crate) const NOWHERE: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 9));
/// Every address of a socket's own family.
pub(crate) const ANY: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

/// What stands for the host's loopback over IPv6.
pub(crate) const GATEWAY6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2));
/// The resolver over IPv6.
pub(crate) const RESOLVER6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 3));
/// The guest's own IPv6 address.
pub(crate) const GUEST6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x100));
/// The host's IPv6 loopback.
pub(crate) const LOOPBACK6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);
/// IPv6 addresses of every world, as [`WORLD_A`] and its companions. A guest has a way to them in a
/// [`world::World::with_ipv6_route`] only.
pub(crate) const WORLD6_A: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1));
/// A second IPv6 address, in another network.
pub(crate) const WORLD6_B: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 1));
/// A third IPv6 address, a neighbour of the second.
pub(crate) const WORLD6_C: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 7));
/// Unreachable from every world.
pub(crate) const NOWHERE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 9));
/// Every address of the other family.
pub(crate) const ANY6: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// How long anything may take that is expected to happen at once, on a busy machine.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// `addr:port`, to keep call sites short.
pub(crate) fn at(addr: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(addr, port)
}

/// Polls until `probe` gives something; fails the test with `what` after `limit`.
pub(crate) fn wait_until<T>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> Option<T>,
) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(
            Instant::now() < deadline,
            "after {limit:?} still waiting: {what}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// How long `action` took, and what it gave.
pub(crate) fn timed<T>(action: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let result = action();
    (start.elapsed(), result)
}

/// The number in an environment variable, or `default`.
pub(crate) fn env_number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}
