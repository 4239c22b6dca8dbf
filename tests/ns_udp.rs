//! UDP through tapgate on a real kernel, as an unprivileged user: size, endpoint-independent mapping
//! and filtering (RFC 4787), errors, and many sockets at once.

#![allow(
    clippy::disallowed_methods,
    reason = "the bans on clocks and threads are for the core"
)]

mod support;

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use support::attached::Net;
use support::process::fail;
use support::serve;
use support::sockets::{Sockets, assert_errno, closed_port};
use support::sys::raise_descriptor_limit;
use support::world::World;
use support::{GATEWAY, LOOPBACK, NOWHERE, WORLD_A, WORLD_B, WORLD_C, at};

const ANY: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
/// The longest datagram that IPv4 carries.
const LONGEST: usize = 65507;

#[test]
fn longest_datagram_echoes_at_every_mtu_and_offload() {
    for options in [
        ["--mtu", "1500", "--offload", "on"],
        ["--mtu", "1500", "--offload", "off"],
        ["--mtu", "576", "--offload", "on"],
        ["--mtu", "65520", "--offload", "on"],
    ] {
        let net = Net::up(&options);
        let echo = serve::udp_echo(net.world.udp(at(LOOPBACK, 0)).unwrap());
        let guest = net.guest.udp_to(at(GATEWAY, echo.port())).unwrap();
        for length in [0, 1, 548, 549, 1472, 1473, 9000, LONGEST - 1, LONGEST] {
            assert_echo(&guest, length, &options);
        }
    }
}

#[track_caller]
fn assert_echo(socket: &UdpSocket, length: usize, options: &[&str]) {
    let datagram: Vec<u8> = (0_u8..251).cycle().take(length).collect();
    socket.send(&datagram).expect("the guest's kernel takes it");
    let mut back = vec![0; 65536];
    let got = socket.recv(&mut back);
    let got =
        got.unwrap_or_else(|error| fail(&format!("{length} bytes with {options:?}: {error}")));
    assert!(
        back[..got] == datagram,
        "{length} bytes with {options:?} came back as {got}"
    );
}

#[test]
fn one_guest_socket_is_one_source_port_and_a_third_host_can_answer() {
    let net = Net::up(&[]);
    let servers = [
        net.world.udp(at(WORLD_A, 0)).unwrap(),
        net.world.udp(at(WORLD_B, 0)).unwrap(),
    ];
    let guest = net.guest.udp(at(ANY, 0)).unwrap();
    let mut buffer = [0; 64];
    let mut sources = Vec::new();
    for server in &servers {
        guest
            .send_to(b"who am I", server.local_addr().unwrap())
            .unwrap();
        let (_, source) = server.recv_from(&mut buffer).unwrap();
        sources.push(source);
    }
    assert_eq!(sources[0].port(), sources[1].port(), "{sources:?}");

    let stranger = net.world.udp(at(WORLD_C, 0)).unwrap();
    stranger.send_to(b"unasked", sources[0]).unwrap();
    let (length, from) = guest.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..length], b"unasked");
    assert_eq!(
        from,
        stranger.local_addr().unwrap(),
        "the guest sees who it was"
    );
    guest.send_to(b"hello", from).unwrap();
    let (_, source) = stranger.recv_from(&mut buffer).unwrap();
    assert_eq!(
        source.port(),
        sources[0].port(),
        "and answers from the same port"
    );
}

#[test]
fn two_guest_sockets_are_two_source_ports() {
    let net = Net::up(&[]);
    let server = net.world.udp(at(WORLD_A, 0)).unwrap();
    let mut ports = Vec::new();
    for _ in 0..2 {
        let guest = net.guest.udp_to(server.local_addr().unwrap()).unwrap();
        guest.send(b"x").unwrap();
        ports.push(server.recv_from(&mut [0; 8]).unwrap().1.port());
    }
    assert_ne!(ports[0], ports[1]);
}

#[test]
fn answer_comes_from_the_address_that_was_asked() {
    let net = Net::up(&[]);
    for (asked, bound) in [(GATEWAY, LOOPBACK), (WORLD_A, WORLD_A), (WORLD_B, WORLD_B)] {
        let echo = serve::udp_echo(net.world.udp(at(bound, 0)).unwrap());
        let guest = net.guest.udp(at(ANY, 0)).unwrap();
        guest.send_to(b"x", at(asked, echo.port())).unwrap();
        let (_, from) = guest.recv_from(&mut [0; 8]).unwrap();
        assert_eq!(from, at(asked, echo.port()));
    }
}

#[test]
fn port_unreachable_is_refused_at_the_guests_socket() {
    let net = Net::up(&[]);
    for host in [GATEWAY, WORLD_A] {
        let guest = net.guest.udp_to(at(host, closed_port(&net.world))).unwrap();
        guest.send(b"anyone?").unwrap();
        assert_errno(guest.recv(&mut [0; 8]), &[libc::ECONNREFUSED]);
        // The socket is as good as before.
        guest.send(b"anyone now?").unwrap();
        assert_errno(guest.recv(&mut [0; 8]), &[libc::ECONNREFUSED]);
    }
}

#[test]
fn unreachable_destination_is_an_error_at_the_guests_socket() {
    let net = Net::up(&["--no-host-loopback"]);
    for (host, errors) in [
        (NOWHERE, &[libc::ENETUNREACH, libc::EHOSTUNREACH][..]),
        (GATEWAY, &[libc::ENETUNREACH, libc::EHOSTUNREACH]),
    ] {
        let guest = net.guest.udp_to(at(host, 9)).unwrap();
        receive_errors(&guest);
        guest.send(b"anyone?").unwrap();
        assert_errno(guest.recv(&mut [0; 8]), errors);
    }
}

/// Unreachable is a soft error (RFC 1122 4.2.3.9), told only to a socket that asks for it.
fn receive_errors(socket: &UdpSocket) {
    setsockopt(socket, sockopt::Ipv4RecvErr, &true).expect("an old option");
}

#[test]
fn thousand_guest_sockets_at_once_lose_nothing() {
    let limit = raise_descriptor_limit().unwrap();
    assert!(
        limit > 1200,
        "the test needs a descriptor for each socket, and may have {limit}"
    );
    let net = Net::up(&[]);
    let echo = serve::udp_echo(net.world.udp(at(LOOPBACK, 0)).unwrap());
    let target = at(GATEWAY, echo.port());
    let sockets: Vec<_> = (0..1000_u32)
        .map(|_| net.guest.udp_to(target).unwrap())
        .collect();
    for round in 0..3_u32 {
        for (n, socket) in (0_u32..).zip(&sockets) {
            socket.send(&(n ^ round << 16).to_be_bytes()).unwrap();
            // A modest rate: two thousand a second.
            std::thread::sleep(Duration::from_micros(500));
        }
        for (n, socket) in (0_u32..).zip(&sockets) {
            let mut back = [0; 8];
            socket
                .set_read_timeout(Some(Duration::from_secs(5)))
                .unwrap();
            let length = socket.recv(&mut back);
            let length =
                length.unwrap_or_else(|error| fail(&format!("{n} in round {round}: {error}")));
            assert_eq!(
                back[..length],
                (n ^ round << 16).to_be_bytes(),
                "only its own answer"
            );
        }
    }
}

#[test]
fn datagrams_keep_their_order_and_borders() {
    let net = Net::up(&[]);
    let server = net.world.udp(at(WORLD_A, 0)).unwrap();
    let guest = net.guest.udp_to(server.local_addr().unwrap()).unwrap();
    // The kernel inside may send past what waits for the gateway's Ethernet address: let it learn
    // the address first.
    guest.send(b"first").unwrap();
    assert_eq!(server.recv(&mut [0; 8]).unwrap(), 5);
    // Equal lengths invite GSO and GRO to merge them; the odd ones end a batch.
    let lengths = [1000, 1000, 1000, 17, 1000, 1000, 0, 1000, 1400, 1400, 3];
    for (n, length) in (0_u8..).zip(lengths) {
        guest.send(&vec![n; length]).unwrap();
    }
    let mut source = None;
    for (n, length) in (0_u8..).zip(lengths) {
        let mut got = [0; 2048];
        let (received, from) = server.recv_from(&mut got).unwrap();
        assert_eq!(got[..received], vec![n; length], "number {n}");
        source = Some(from);
    }
    for (n, length) in (0_u8..).zip(lengths) {
        server.send_to(&vec![n; length], source.unwrap()).unwrap();
    }
    for (n, length) in (0_u8..).zip(lengths) {
        let mut got = [0; 2048];
        let received = guest.recv(&mut got).unwrap();
        assert_eq!(
            got[..received],
            vec![n; length],
            "number {n} on the way back"
        );
    }
}

#[test]
fn outbound_address_is_the_source() {
    let net = Net::up_in(World::new(), &["--outbound", "198.51.100.7"]);
    let server = net.world.udp(at(WORLD_B, 0)).unwrap();
    let guest = net.guest.udp_to(server.local_addr().unwrap()).unwrap();
    guest.send(b"x").unwrap();
    assert_eq!(server.recv_from(&mut [0; 8]).unwrap().1.ip(), WORLD_C);
}
