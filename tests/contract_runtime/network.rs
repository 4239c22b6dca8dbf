//! The network that the options of contract 3.1 ask for, as both ends see it: addresses that callers
//! compute, MTU, outbound addresses, DNS, the host's loopback.

use std::net::{IpAddr, Ipv4Addr};

use crate::support::bulk::{self, Way};
use crate::support::dns::Resolver;
use crate::support::guest::Guest;
use crate::support::serve;
use crate::support::slirp4netns::Served;
use crate::support::sockets::{Sockets, assert_errno};
use crate::support::world::World;
use crate::support::{
    GATEWAY, GATEWAY6, LOOPBACK, LOOPBACK6, RESOLVER, SOON, WORLD_A, WORLD_B, WORLD_C, WORLD6_A,
    WORLD6_B, WORLD6_C, at, wait_until,
};

/// A DNS question for the address of `x`.
const QUESTION: &[u8] =
    b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x01x\x00\x00\x01\x00\x01";

/// Whom a server at `server` sees over TCP and over UDP.
fn seen_by(host: &impl Sockets, guest: &Guest, server: IpAddr) -> [IpAddr; 2] {
    let listener = host.listen(at(server, 0)).expect("a free port");
    let _connection = guest
        .connect(listener.local_addr().expect("it is bound"))
        .expect("it is reached");
    let (_, tcp) = serve::accept(&listener);
    let socket = host.udp(at(server, 0)).expect("a free port");
    let inside = guest
        .udp_to(socket.local_addr().expect("it is bound"))
        .expect("a route");
    inside
        .send(b"who am I")
        .expect("the guest's kernel takes it");
    let (_, udp) = socket.recv_from(&mut [0; 64]).expect("it comes");
    socket.send_to(b"you", udp).expect("it can be answered");
    inside.recv(&mut [0; 64]).expect("the answer comes");
    [tcp.ip(), udp.ip()]
}

/// Contract 3.1, behaviour 6: "net+2 gateway, net+3 DNS, net+100 guest", whatever `--cidr` says.
#[test]
fn addresses_are_where_callers_compute_them() {
    for (cidr, network) in [
        ("10.0.2.0/24", [10, 0, 2, 0]),
        ("192.168.7.128/25", [192, 168, 7, 128]),
        ("172.16.0.0/12", [172, 16, 0, 0]),
    ] {
        let nth = |n: u32| IpAddr::V4(Ipv4Addr::from(u32::from_be_bytes(network) + n));
        let world = World::new();
        let _resolver = Resolver::start(&world, at(LOOPBACK, 53), [198, 18, 0, 1].into());
        let net = Served::in_world(world, &["--cidr", cidr]);
        let echo = serve::tcp_echo(net.world.listen(at(LOOPBACK, 0)).unwrap());
        let inside = net.guest.connect(at(nth(2), echo.port())).unwrap();
        assert_eq!(inside.local_addr().unwrap().ip(), nth(100), "{cidr}");
        let asking = net.guest.udp_to(at(nth(3), 53)).unwrap();
        asking.send(QUESTION).unwrap();
        let mut answer = [0; 512];
        let length = asking.recv(&mut answer).unwrap();
        assert_eq!(answer[length - 4..length], [198, 18, 0, 1], "{cidr}");
    }
}

/// Contract 3.1, options: `--mtu`, 1 to 65521. The smallest that the kernel takes for IPv4 is 68.
#[test]
fn every_mtu_carries_a_connection() {
    for mtu in ["100", "576", "1500", "65520", "65521"] {
        let net = Served::with(&["--mtu", mtu]);
        let shown = net
            .guest
            .run("ip", &["-o", "link", "show", "tap0"])
            .output();
        assert!(shown.contains(&format!("mtu {mtu} ")), "{shown}");
        let server = bulk::server(net.world.listen(at(LOOPBACK, 0)).unwrap());
        for way in [Way::Up, Way::Down] {
            bulk::transfer(&net.guest, at(GATEWAY, server.port()), way, (1, 200_000));
        }
    }
}

/// Contract 3.1, options: a small MTU takes datagrams in pieces.
#[test]
fn datagram_larger_than_a_small_mtu_echoes() {
    let net = Served::with(&["--mtu=100"]);
    let echo = serve::udp_echo(net.world.udp(at(LOOPBACK, 0)).unwrap());
    let guest = net.guest.udp_to(at(GATEWAY, echo.port())).unwrap();
    for length in [0, 50, 72, 73, 600, 4000] {
        guest.send(&vec![7; length]).unwrap();
        let mut back = [0; 8192];
        assert_eq!(guest.recv(&mut back).unwrap(), length);
    }
}

/// Contract 3.1, options: `--outbound-addr A`.
#[test]
fn outbound_address_is_the_source_of_both_protocols() {
    let net = Served::with(&["--outbound-addr", "198.51.100.7"]);
    assert_eq!(seen_by(&net.world, &net.guest, WORLD_B), [WORLD_C; 2]);
    assert_eq!(seen_by(&net.world, &net.guest, WORLD_A), [WORLD_C; 2]);
    // The host's own loopback is no way out.
    let listener = net.world.listen(at(LOOPBACK, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    net.guest.connect(at(GATEWAY, port)).unwrap();
}

/// Contract 3.1, options: `--outbound-addr IF`. The route of the host leads elsewhere, to nobody.
#[test]
fn outbound_interface_is_the_way_out_of_both_protocols() {
    let world = World::new();
    let neighbour = Guest::new(&world);
    world.set_up(&format!(
        "ip link add up0 type veth peer name up1
         ip link set up1 netns {}
         ip address add 10.9.0.1/24 dev up0
         ip link set up0 up
         ip route add 10.8.0.0/24 dev host0 metric 10
         ip route add 10.8.0.0/24 via 10.9.0.2 dev up0 metric 20",
        neighbour.pid()
    ));
    let script = "ip link set lo up; ip address add 10.9.0.2/24 dev up1; ip link set up1 up
                  ip address add 10.8.0.1/24 dev lo";
    neighbour.run("sh", &["-ec", script]).output();
    let net = Served::in_world(world, &["--enable-sandbox", "--outbound-addr=up0"]);
    for server in [[10, 9, 0, 2], [10, 8, 0, 1]] {
        let seen = seen_by(&neighbour, &net.guest, server.into());
        assert_eq!(seen, [IpAddr::from([10, 9, 0, 1]); 2], "at {server:?}");
    }
}

/// Contract 3.1, options: `--macaddress XX:..`.
#[test]
fn hardware_address_is_as_asked() {
    let net = Served::with(&["--macaddress", "52:55:0A:00:02:64"]);
    let shown = net
        .guest
        .run("ip", &["-o", "link", "show", "tap0"])
        .output();
    assert!(shown.contains("52:55:0a:00:02:64"), "{shown}");
    net.guest.run("ping", &["-c1", "-W5", "10.0.2.2"]).output();
}

/// Contract 3.1, options: `--disable-dns`.
#[test]
fn resolver_can_be_disabled() {
    let world = World::new();
    let resolver = Resolver::start(&world, at(LOOPBACK, 53), [198, 18, 0, 1].into());
    let net = Served::in_world(world, &["--disable-dns"]);
    let asking = net.guest.udp_to(at(RESOLVER, 53)).unwrap();
    asking.send(QUESTION).unwrap();
    asking
        .set_read_timeout(Some(std::time::Duration::from_millis(300)))
        .unwrap();
    asking
        .recv(&mut [0; 512])
        .expect_err("nobody answers there");
    assert!(resolver.questions().is_empty());
    // The rest of the host's loopback is there.
    let echo = serve::tcp_echo(net.world.listen(at(LOOPBACK, 0)).unwrap());
    net.guest.connect(at(GATEWAY, echo.port())).unwrap();
}

/// Contract 3.1, options: `--disable-host-loopback` and its deprecated alias; the resolver stays.
#[test]
fn host_loopback_can_be_disabled() {
    for option in ["--disable-host-loopback", "--no-host-loopback"] {
        let world = World::new();
        let resolver = Resolver::start(&world, at(LOOPBACK, 53), [198, 18, 0, 1].into());
        let net = Served::in_world(world, &[option]);
        let listener = net.world.listen(at(LOOPBACK, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_errno(
            net.guest.connect(at(GATEWAY, port)),
            &[libc::ECONNREFUSED, libc::ENETUNREACH, libc::EHOSTUNREACH],
        );
        assert_eq!(seen_by(&net.world, &net.guest, WORLD_A), [WORLD_A; 2]);
        let asking = net.guest.udp_to(at(RESOLVER, 53)).unwrap();
        asking.send(QUESTION).unwrap();
        asking.recv(&mut [0; 512]).expect("DNS goes on");
        assert_eq!(resolver.questions().len(), 1);
    }
}

/// `-6`: a guest makes up its address, and reaches the host's loopback by the gateway's.
#[test]
fn ipv6_is_carried_where_it_is_asked_for() {
    for (options, carried) in [
        (&["-6"][..], true),
        (&["--enable-ipv6"], true),
        (&[], false),
    ] {
        let world = World::with_ipv6_route();
        let net = Served::in_world(world, options);
        let solicit = "echo 1 > /proc/sys/net/ipv6/conf/tap0/disable_ipv6
                       echo 0 > /proc/sys/net/ipv6/conf/tap0/accept_dad
                       echo 0 > /proc/sys/net/ipv6/conf/tap0/disable_ipv6";
        net.guest.run("sh", &["-ec", solicit]).output();
        if carried {
            let asked = ["-6", "-o", "address", "show", "dev", "tap0", "dynamic"];
            wait_until("an address", SOON, || {
                let shown = net.guest.run("ip", &asked).output();
                shown.contains("inet6 fd00:").then_some(())
            });
            let listener = net.world.listen(at(LOOPBACK6, 0)).unwrap();
            let port = listener.local_addr().unwrap().port();
            net.guest.connect(at(GATEWAY6, port)).unwrap();
            let seen = seen_by(&net.world, &net.guest, WORLD6_A);
            assert_eq!(seen, [WORLD6_A; 2]);
        } else {
            let asked = ["-6", "-c1", "-W2", "-I", "tap0", "fe80::2"];
            let finished = net.guest.run("ping", &asked);
            assert!(!finished.status.success(), "{finished:?}");
            let shown = net.guest.run("ip", &["-6", "route"]).output();
            assert!(!shown.contains("fd00:"), "{shown}");
        }
    }
}

/// `--outbound-addr6`, by address and by interface; it concerns IPv6 alone.
#[test]
fn outbound_addr6_is_the_source() {
    for (option, seen) in [
        ("2001:db8:2::7", WORLD6_C),
        ("2001:db8:1::1", WORLD6_A),
        ("host0", WORLD6_B),
    ] {
        let world = World::with_ipv6_route();
        let net = Served::in_world(world, &["-6", "--outbound-addr6", option]);
        let asked = ["-6", "-o", "address", "show", "dev", "tap0", "dynamic"];
        wait_until("a settled address", SOON, || {
            let shown = net.guest.run("ip", &asked).output();
            let there = shown.contains("inet6 fd00:") && !shown.contains("tentative");
            there.then_some(())
        });
        let found = seen_by(&net.world, &net.guest, WORLD6_B);
        assert_eq!(found, [seen; 2], "{option}");
        assert_eq!(seen_by(&net.world, &net.guest, WORLD_B), [WORLD_B; 2]);
    }
}
