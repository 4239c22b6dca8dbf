//! UDP as a probe behind a NAT sees it, on a real kernel as an unprivileged user: mapping, filtering,
//! port preservation and hairpinning (RFC 4787), the life of a mapping (RFC 4787 section 4.3, RFC
//! 5508 section 4), in both families where both have it.
//!
//! The servers answer as STUN servers do: with the address and port that they saw, which the probe
//! inside compares.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a scenario that can not go on has failed"
)]

mod support;

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use support::attached::{Attached, Net};
use support::guest::Guest;
use support::process::{fail, run};
use support::serve::{self, Server, readable};
use support::sockets::{Sockets, assert_errno};
use support::world::World;
use support::{
    ANY, ANY6, GATEWAY, LOOPBACK, SOON, WORLD_A, WORLD_B, WORLD_C, WORLD6_A, WORLD6_B, WORLD6_C,
    at, wait_until,
};

/// How long to wait for what must not come.
const SILENCE: Duration = Duration::from_millis(300);

/// One family's addresses.
#[derive(Clone, Copy)]
struct Family {
    any: IpAddr,
    servers: [IpAddr; 3],
}

const FAMILIES: [Family; 2] = [
    Family {
        any: ANY,
        servers: [WORLD_A, WORLD_B, WORLD_C],
    },
    Family {
        any: ANY6,
        servers: [WORLD6_A, WORLD6_B, WORLD6_C],
    },
];

/// A server that says whom it saw.
fn stun(world: &World, addr: SocketAddr) -> Server {
    let socket = world.udp(addr).expect("a free port");
    serve::udp(socket, |_, from| Some(from.to_string().into_bytes()))
}

/// Where `server` sees `probe`.
#[track_caller]
fn mapped(probe: &UdpSocket, server: SocketAddr) -> SocketAddr {
    probe
        .send_to(b"who am I?", server)
        .expect("the socket takes it");
    let mut answer = [0; 128];
    let (length, from) = probe.recv_from(&mut answer).expect("an answer");
    assert_eq!(from, server, "who was asked answers");
    let text = String::from_utf8_lossy(&answer[..length]);
    text.parse().expect("an endpoint")
}

/// Whether `probe` hears `sender`, which sends to its external endpoint.
fn hears(probe: &UdpSocket, sender: &UdpSocket, external: SocketAddr) -> bool {
    sender.send_to(b"hello", external).expect("a route");
    readable(probe, SILENCE) && {
        let (length, from) = probe.recv_from(&mut [0; 64]).expect("it is readable");
        assert_eq!(from, sender.local_addr().expect("it is bound"));
        length == 5
    }
}

fn port_of(socket: &UdpSocket) -> u16 {
    socket.local_addr().expect("it is bound").port()
}

// --- mapping (RFC 4787 section 4.1) --------------------------------------------------------------

#[test]
fn mapping_is_independent_of_the_endpoint() {
    let net = Net::up_in(World::with_ipv6_route(), &[]);
    for family in FAMILIES {
        let probe = net.guest.udp(at(family.any, 0)).unwrap();
        let mut ports = Vec::new();
        for addr in family.servers {
            // Two ports of each address.
            for _ in 0..2 {
                let server = stun(&net.world, at(addr, 0));
                ports.push(mapped(&probe, server.addr).port());
            }
        }
        assert!(
            ports.iter().all(|port| *port == ports[0]),
            "one external port: {ports:?}"
        );
    }
}

#[test]
fn families_have_mappings_of_their_own() {
    let net = Net::up_in(World::with_ipv6_route(), &[]);
    let [one, two] = FAMILIES.map(|family| net.guest.udp(at(family.any, 0)).unwrap());
    let servers = FAMILIES.map(|family| stun(&net.world, at(family.servers[0], 0)));
    assert_eq!(mapped(&one, servers[0].addr).ip(), WORLD_A);
    assert_eq!(mapped(&two, servers[1].addr).ip(), WORLD6_A);
}

#[test]
fn same_port_of_both_families_is_preserved_twice() {
    let net = Net::up_in(World::with_ipv6_route(), &[]);
    let servers = FAMILIES.map(|family| stun(&net.world, at(family.servers[0], 0)));
    // Two sockets inside with one number: an IPv6 one that leaves IPv4 alone.
    let one = net.guest.udp(at(ANY, 45678)).unwrap();
    let socket = socket2::Socket::from(
        net.guest
            .socket(libc::AF_INET6, libc::SOCK_DGRAM, 0)
            .unwrap(),
    );
    socket.set_only_v6(true).unwrap();
    socket.bind(&at(ANY6, 45678).into()).unwrap();
    let two = UdpSocket::from(socket);
    two.set_read_timeout(Some(support::SOON)).unwrap();
    assert_eq!(mapped(&one, servers[0].addr).port(), 45678);
    assert_eq!(mapped(&two, servers[1].addr).port(), 45678);
}

// --- port assignment (4.2.1, 4.2.2) --------------------------------------------------------------

#[test]
fn free_port_is_preserved() {
    let net = Net::up_in(World::with_ipv6_route(), &[]);
    for family in FAMILIES {
        let server = stun(&net.world, at(family.servers[0], 0));
        for port in [1024, 40000, 40001, 65535, 500] {
            let probe = net.guest.udp(at(family.any, port)).unwrap();
            assert_eq!(mapped(&probe, server.addr).port(), port);
        }
    }
}

#[test]
fn taken_port_becomes_another_of_the_same_parity() {
    let net = Net::up_in(World::with_ipv6_route(), &[]);
    for family in FAMILIES {
        let server = stun(&net.world, at(family.servers[0], 0));
        for port in [42000, 42001, 42002, 42003, 700, 701] {
            let _taken = net.world.udp(at(family.any, port)).unwrap();
            let probe = net.guest.udp(at(family.any, port)).unwrap();
            let external = mapped(&probe, server.addr).port();
            assert_ne!(external, port, "the host's own socket keeps it");
            assert_eq!(external % 2, port % 2, "{external} for {port}");
            assert!(external >= 1024, "{external} for {port}");
        }
    }
}

#[test]
fn port_that_the_host_forbids_becomes_another() {
    let world = World::with_ipv6_route();
    world.set_up("echo 1024 > /proc/sys/net/ipv4/ip_unprivileged_port_start");
    let net = Net::up_in(world, &[]);
    for family in FAMILIES {
        let server = stun(&net.world, at(family.servers[0], 0));
        for port in [123, 500] {
            let script = "echo 0 > /proc/sys/net/ipv4/ip_unprivileged_port_start";
            net.guest.run("sh", &["-c", script]).output();
            let probe = net.guest.udp(at(family.any, port)).unwrap();
            let external = mapped(&probe, server.addr).port();
            assert!(external >= 1024 && external % 2 == port % 2, "{external}");
        }
    }
}

#[test]
fn two_guests_never_share_a_port() {
    let world = World::with_ipv6_route();
    let guests = [Guest::new(&world), Guest::new(&world)];
    let pids = guests.each_ref().map(|guest| guest.pid().to_string());
    let _tapgates = pids
        .each_ref()
        .map(|pid| Attached::start(&world, &[pid, "tap0"]));
    for family in FAMILIES {
        let server = stun(&world, at(family.servers[0], 0));
        for port in [43000, 43001] {
            let probes = guests
                .each_ref()
                .map(|guest| guest.udp(at(family.any, port)).unwrap());
            let external = probes
                .each_ref()
                .map(|probe| mapped(probe, server.addr).port());
            assert_eq!(external[0], port, "the first comes first");
            assert_ne!(external[1], port);
            assert_eq!(external[1] % 2, port % 2);
            // Each is answered by its own way, still.
            let again = probes
                .each_ref()
                .map(|probe| mapped(probe, server.addr).port());
            assert_eq!(again, external);
        }
    }
}

// --- filtering (section 5) -----------------------------------------------------------------------

/// What reaches a guest that has spoken to one endpoint only: from that, from another port of the same
/// address, from another address.
fn who_gets_through(net: &Net, family: Family) -> [bool; 3] {
    let [asked, other, _] = family.servers;
    let friend = net.world.udp(at(asked, 0)).expect("a free port");
    let probe = net.guest.udp(at(family.any, 0)).expect("a free port");
    probe
        .send_to(b"hello", friend.local_addr().expect("it is bound"))
        .expect("the socket takes it");
    let (_, external) = friend.recv_from(&mut [0; 64]).expect("it comes");
    let neighbour = net.world.udp(at(asked, 0)).expect("a free port");
    let stranger = net.world.udp(at(other, 0)).expect("a free port");
    let heard = [&friend, &neighbour, &stranger].map(|it| hears(&probe, it, external));
    // Whom the guest speaks to is heard from then on.
    for late in [&neighbour, &stranger] {
        probe
            .send_to(b"hi", late.local_addr().expect("it is bound"))
            .expect("the socket takes it");
        let (_, seen) = late.recv_from(&mut [0; 64]).expect("it comes");
        assert_eq!(seen.port(), external.port());
        assert!(hears(&probe, late, external));
    }
    heard
}

#[test]
fn filtering_is_independent_of_the_endpoint_by_default() {
    for options in [&[][..], &["--udp-filtering", "open"]] {
        let net = Net::up_in(World::with_ipv6_route(), options);
        for family in FAMILIES {
            assert_eq!(who_gets_through(&net, family), [true, true, true]);
        }
    }
}

#[test]
fn filtering_by_address_lets_other_ports_of_it_through() {
    let net = Net::up_in(World::with_ipv6_route(), &["--udp-filtering", "address"]);
    for family in FAMILIES {
        assert_eq!(who_gets_through(&net, family), [true, true, false]);
    }
}

#[test]
fn filtering_by_endpoint_lets_nobody_else_through() {
    let net = Net::up_in(World::with_ipv6_route(), &["--udp-filtering", "endpoint"]);
    for family in FAMILIES {
        assert_eq!(who_gets_through(&net, family), [true, false, false]);
    }
}

#[test]
fn filtering_leaves_published_ports_open() {
    let options = ["--udp-filtering", "endpoint", "-p", "5353:53/udp"];
    let net = Net::up_in(World::with_ipv6_route(), &options);
    let _echo = serve::udp_echo(net.guest.udp(at(ANY, 53)).unwrap());
    for server in [LOOPBACK, WORLD_A, WORLD_B] {
        let client = net.world.udp_to(at(server, 5353)).unwrap();
        client.send(b"question").unwrap();
        assert_eq!(client.recv(&mut [0; 64]).unwrap(), 8);
    }
}

// --- hairpinning (section 6) ---------------------------------------------------------------------

#[test]
fn guest_reaches_its_own_published_port_by_the_hosts_address() {
    let published = [
        "-p",
        "5353:53/udp",
        "-p",
        "[::]:5353:53/udp",
        "-p",
        "8080:80",
    ];
    let net = Net::up_in(World::with_ipv6_route(), &published);
    for family in FAMILIES {
        // The other family's server takes a moment to give the port up.
        let port = || net.guest.udp(at(family.any, 53)).ok();
        let _echo = serve::udp_echo(support::wait_until("a free port", support::SOON, port));
        for host in family.servers {
            let probe = net.guest.udp_to(at(host, 5353)).unwrap();
            probe.send(b"it is me").unwrap();
            let mut back = [0; 64];
            assert_eq!(probe.recv(&mut back).unwrap(), 8, "by {host}");
        }
    }
    let _tcp = serve::tcp_echo(net.guest.listen(at(ANY, 80)).unwrap());
    for host in [WORLD_A, GATEWAY] {
        let mut stream = net.guest.connect(at(host, 8080)).unwrap();
        std::io::Write::write_all(&mut stream, b"x").unwrap();
        std::io::Read::read_exact(&mut stream, &mut [0]).unwrap();
    }
}

#[test]
fn two_sockets_of_a_guest_talk_by_their_external_endpoints() {
    let net = Net::up_in(World::with_ipv6_route(), &[]);
    for family in FAMILIES {
        let server = stun(&net.world, at(family.servers[0], 0));
        let probes = [(); 2].map(|()| net.guest.udp(at(family.any, 0)).unwrap());
        let external = probes.each_ref().map(|probe| mapped(probe, server.addr));
        // There and back, twice: by whichever address of the host, as with an outside peer.
        for _ in 0..2 {
            for (from, to) in [(0, 1), (1, 0)] {
                probes[from].send_to(b"peer?", external[to]).unwrap();
                let mut heard = [0; 64];
                let (length, seen) = probes[to].recv_from(&mut heard).unwrap();
                assert_eq!(&heard[..length], b"peer?");
                // REQ-9: the source is the external endpoint, not the internal one.
                assert_eq!(seen, external[from]);
            }
        }
    }
}

#[test]
fn two_guests_talk_by_their_external_endpoints() {
    let world = World::with_ipv6_route();
    let guests = [Guest::new(&world), Guest::new(&world)];
    let pids = guests.each_ref().map(|guest| guest.pid().to_string());
    let _tapgates = pids
        .each_ref()
        .map(|pid| Attached::start(&world, &["--udp-filtering", "endpoint", pid, "tap0"]));
    for family in FAMILIES {
        let server = stun(&world, at(family.servers[0], 0));
        let probes = guests
            .each_ref()
            .map(|guest| guest.udp(at(family.any, 0)).unwrap());
        let external = probes.each_ref().map(|probe| mapped(probe, server.addr));
        // Hole punching: what comes before the other has opened the way is lost, so it is repeated.
        for (probe, peer) in [(0, 1), (1, 0)] {
            probes[probe].set_read_timeout(Some(SILENCE)).unwrap();
            let (_, seen) = wait_until("the peer", SOON, || {
                for (from, to) in [(probe, peer), (peer, probe)] {
                    probes[from].send_to(b"peer?", external[to]).unwrap();
                }
                probes[probe].recv_from(&mut [0; 64]).ok()
            });
            assert_eq!(seen, external[peer]);
        }
    }
}

// --- life of a mapping (4.3), errors (section 10, RFC 5508) ----------------------------------------

#[test]
fn mapping_keeps_its_port_while_it_is_used() {
    let net = Net::up_in(World::with_ipv6_route(), &[]);
    for family in FAMILIES {
        let server = stun(&net.world, at(family.servers[0], 0));
        let probe = net.guest.udp(at(family.any, 0)).unwrap();
        let first = mapped(&probe, server.addr);
        for _ in 0..20 {
            assert_eq!(mapped(&probe, server.addr), first);
        }
        // A socket of the same port inside is the same endpoint: its mapping is the one there is.
        let port = port_of(&probe);
        drop(probe);
        let again = net.guest.udp(at(family.any, port)).unwrap();
        assert_eq!(mapped(&again, server.addr), first);
    }
}

#[test]
fn error_does_not_end_a_mapping() {
    let net = Net::up_in(World::with_ipv6_route(), &[]);
    for family in FAMILIES {
        let server = stun(&net.world, at(family.servers[0], 0));
        let closed = {
            let free = net.world.udp(at(family.servers[1], 0)).unwrap();
            free.local_addr().unwrap()
        };
        let probe = net.guest.udp(at(family.any, 0)).unwrap();
        if family.any.is_ipv4() {
            setsockopt(&probe, sockopt::Ipv4RecvErr, &true).unwrap();
        } else {
            setsockopt(&probe, sockopt::Ipv6RecvErr, &true).unwrap();
        }
        let first = mapped(&probe, server.addr);
        for _ in 0..3 {
            probe.send_to(b"anyone?", closed).unwrap();
            assert_errno(probe.recv(&mut [0; 8]), &[libc::ECONNREFUSED]);
            assert_eq!(mapped(&probe, server.addr), first);
        }
        let stranger = net.world.udp(at(family.servers[2], 0)).unwrap();
        assert!(hears(&probe, &stranger, first), "and is open as before");
    }
}

#[test]
fn error_of_one_socket_is_not_anothers() {
    let net = Net::up_in(World::with_ipv6_route(), &[]);
    for family in FAMILIES {
        let closed = {
            let free = net.world.udp(at(family.servers[1], 0)).unwrap();
            free.local_addr().unwrap()
        };
        let [one, other] = [(); 2].map(|()| net.guest.udp_to(closed).unwrap());
        one.send(b"anyone?").unwrap();
        assert_errno(one.recv(&mut [0; 8]), &[libc::ECONNREFUSED]);
        other.set_read_timeout(Some(SILENCE)).unwrap();
        let kind = other.recv(&mut [0; 8]).expect_err("nothing came").kind();
        assert_eq!(kind, ErrorKind::WouldBlock);
    }
}

#[test]
fn longest_datagram_goes_there_and_back_through_a_hairpin() {
    let net = Net::up_in(World::with_ipv6_route(), &[]);
    for (family, longest) in FAMILIES.into_iter().zip([65507, 65527]) {
        let echo = serve::udp_echo(net.world.udp(at(family.servers[0], 0)).unwrap());
        let probe = net.guest.udp_to(echo.addr).unwrap();
        let datagram: Vec<u8> = (0_u8..251).cycle().take(longest).collect();
        probe.send(&datagram).unwrap();
        let mut back = vec![0; 65536];
        let got = probe.recv(&mut back).unwrap();
        assert!(back[..got] == datagram, "{got} of {longest}");

        let server = stun(&net.world, at(family.servers[0], 0));
        let sockets = [(); 2].map(|()| net.guest.udp(at(family.any, 0)).unwrap());
        let external = mapped(&sockets[0], server.addr);
        sockets[1].send_to(&datagram, external).unwrap();
        let got = sockets[0].recv(&mut back).unwrap();
        assert!(back[..got] == datagram, "{got} of {longest} by a hairpin");
    }
}

// --- by somebody else's probe ----------------------------------------------------------------------

/// A server of RFC 3489 at two addresses and two ports, which answers from another where it is asked
/// to: all that a classic probe needs to tell the kinds of NAT apart.
const STUN_SERVER: &str = include_str!("support/stun_server.py");

/// What Debian's `stun` says of a network with these options.
fn classic_probe(options: &[&str]) -> String {
    // One address for all destinations, as a machine behind a router has.
    let net = Net::up(&[options, &["--outbound", "198.51.100.7"]].concat());
    let mut command = net.world.command("/usr/bin/python3");
    let script = net.world.file("stun_server.py", STUN_SERVER);
    let arguments = [WORLD_A.to_string(), WORLD_B.to_string()];
    let mut server =
        support::process::Running::start(command.arg("-I").arg(script).args(&arguments));
    server.wait_for_output("ready");
    let mut probe = net.guest.command("stun");
    let finished = run(probe.arg(&arguments[0]));
    let said = finished.stdout.clone() + &finished.stderr;
    let verdict = said.lines().find_map(|line| line.strip_prefix("Primary: "));
    verdict.map_or_else(|| fail(&said), str::to_owned)
}

#[test]
fn classic_probe_finds_the_kind_of_nat_that_was_asked_for() {
    for (filtering, kind) in [
        ("open", "Independent Mapping, Independent Filter"),
        ("address", "Independent Mapping, Address Dependent Filter"),
        ("endpoint", "Independent Mapping, Port Dependent Filter"),
    ] {
        let verdict = classic_probe(&["--udp-filtering", filtering]);
        assert!(verdict.starts_with(kind), "{filtering}: {verdict}");
        assert!(
            verdict.contains("preserves ports") && !verdict.contains("no hairpin"),
            "{filtering}: {verdict}"
        );
    }
}
