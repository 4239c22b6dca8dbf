//! Bulk TCP through tapgate on a real kernel, as an unprivileged user: both families, every MTU, with
//! and without offloads, one flow and 64, both ways, each byte compared.
//!
//! `TAPGATE_TEST_BYTES` is the number of bytes for each combination and way; the default keeps the
//! suite short, 1073741824 is what the issue promises.

mod support;

use std::net::IpAddr;

use support::attached::Net;
use support::bulk::{Way, server, transfer};
use support::sockets::Sockets;
use support::{GATEWAY, GATEWAY6, LOOPBACK, LOOPBACK6, at, env_number};

/// Moves the bytes with one connection and with many at once, there and back.
fn there_and_back(mtu: &str, offload: &str) {
    by_gateway([GATEWAY, LOOPBACK], mtu, offload);
}

/// The same over IPv6.
fn there_and_back6(mtu: &str, offload: &str) {
    by_gateway([GATEWAY6, LOOPBACK6], mtu, offload);
}

fn by_gateway([gateway, loopback]: [IpAddr; 2], mtu: &str, offload: &str) {
    let total = env_number("TAPGATE_TEST_BYTES", 32 << 20);
    let net = Net::up(&["--mtu", mtu, "--offload", offload]);
    let server = server(net.world.listen(at(loopback, 0)).expect("a free port"));
    for flows in [1, 64] {
        for way in [Way::Up, Way::Down] {
            transfer(&net.guest, at(gateway, server.port()), way, (flows, total));
        }
    }
}

#[test]
fn bytes_are_equal_at_mtu_576() {
    there_and_back("576", "on");
}

#[test]
fn bytes_are_equal_at_mtu_576_without_offload() {
    there_and_back("576", "off");
}

#[test]
fn bytes_are_equal_at_mtu_1500() {
    there_and_back("1500", "on");
}

#[test]
fn bytes_are_equal_at_mtu_1500_without_offload() {
    there_and_back("1500", "off");
}

#[test]
fn bytes_are_equal_at_mtu_9000() {
    there_and_back("9000", "on");
}

#[test]
fn bytes_are_equal_at_mtu_9000_without_offload() {
    there_and_back("9000", "off");
}

#[test]
fn bytes_are_equal_at_mtu_65520() {
    there_and_back("65520", "on");
}

#[test]
fn bytes_are_equal_at_mtu_65520_without_offload() {
    there_and_back("65520", "off");
}

#[test]
fn bytes_over_ipv6_are_equal_at_mtu_1280() {
    there_and_back6("1280", "on");
}

#[test]
fn bytes_over_ipv6_are_equal_at_mtu_1280_without_offload() {
    there_and_back6("1280", "off");
}

#[test]
fn bytes_over_ipv6_are_equal_at_mtu_1500() {
    there_and_back6("1500", "on");
}

#[test]
fn bytes_over_ipv6_are_equal_at_mtu_1500_without_offload() {
    there_and_back6("1500", "off");
}

#[test]
fn bytes_over_ipv6_are_equal_at_mtu_65520() {
    there_and_back6("65520", "on");
}

#[test]
fn bytes_over_ipv6_are_equal_at_mtu_65520_without_offload() {
    there_and_back6("65520", "off");
}

#[test]
fn bytes_are_equal_both_ways_at_once_on_every_connection() {
    let net = Net::up(&[]);
    let server = server(net.world.listen(at(LOOPBACK, 0)).unwrap());
    let target = at(GATEWAY, server.port());
    let total = env_number("TAPGATE_TEST_BYTES", 32 << 20);
    std::thread::scope(|scope| {
        scope.spawn(|| transfer(&net.guest, target, Way::Up, (8, total)));
        scope.spawn(|| transfer(&net.guest, target, Way::Down, (8, total)));
    });
}

#[test]
fn bytes_through_a_port_published_over_ipv6_are_equal() {
    let net = Net::up(&["-p", "[::1]:8080:80", "-p", "[::1]:8081:80,splice=never"]);
    let _server = server(net.guest.listen(at(support::ANY6, 80)).unwrap());
    let total = env_number("TAPGATE_TEST_BYTES", 32 << 20);
    for port in [8080, 8081] {
        for way in [Way::Up, Way::Down] {
            transfer(&net.world, at(LOOPBACK6, port), way, (16, total));
        }
    }
}

#[test]
fn bytes_through_a_published_port_are_equal() {
    let net = Net::up(&["-p", "8080:80", "-p", "8081:80,splice=never"]);
    let listener = net
        .guest
        .listen(at("0.0.0.0".parse().unwrap(), 80))
        .unwrap();
    let _server = server(listener);
    let total = env_number("TAPGATE_TEST_BYTES", 32 << 20);
    for port in [8080, 8081] {
        for flows in [1, 16] {
            for way in [Way::Up, Way::Down] {
                transfer(&net.world, at(LOOPBACK, port), way, (flows, total));
            }
        }
    }
}

#[test]
fn bytes_past_the_tap_are_equal_both_ways_at_once() {
    let net = Net::up(&["-p", "8080:80"]);
    let _server = server(net.guest.listen(at(support::ANY, 80)).unwrap());
    let total = env_number("TAPGATE_TEST_BYTES", 32 << 20);
    std::thread::scope(|scope| {
        for way in [Way::Up, Way::Down] {
            let world = &net.world;
            scope.spawn(move || transfer(world, at(LOOPBACK, 8080), way, (8, total)));
        }
    });
}
