//! Published ports on a real kernel, as an unprivileged user: who is reached, whom the guest sees,
//! over TCP and UDP, in ranges, and what happens when a side is missing. What goes past the tap is
//! `ns_spliced.rs`'s.

mod support;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr};

use support::attached::Net;
use support::guest::Guest;
use support::process::run;
use support::serve::{self, accept};
use support::sockets::{Sockets, assert_errno};
use support::world::World;
use support::{GATEWAY, LOOPBACK, SOON, WORLD_A, WORLD_B, WORLD_C, at, wait_until};

const ANY: IpAddr = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);

#[test]
fn guest_sees_the_clients_own_address_over_tcp() {
    let net = Net::up(&["-p", "8080:80,splice=never"]);
    let listener = net.guest.listen(at(ANY, 80)).unwrap();
    for (client, seen) in [(LOOPBACK, GATEWAY), (WORLD_A, WORLD_A), (WORLD_B, WORLD_B)] {
        let mut outside = net.world.connect(at(client, 8080)).unwrap();
        let (mut inside, peer) = accept(&listener);
        assert_eq!(peer.ip(), seen, "a client at {client}");
        outside.write_all(b"question").unwrap();
        let mut heard = [0; 8];
        inside.read_exact(&mut heard).unwrap();
        inside.write_all(b"answer").unwrap();
        drop(inside);
        let mut answer = String::new();
        outside.read_to_string(&mut answer).unwrap();
        assert_eq!((&heard, answer.as_str()), (b"question", "answer"));
    }
}

#[test]
fn client_at_the_hosts_address_is_reset_when_the_guest_refuses() {
    let net = Net::up(&["-p", "8080:80,splice=never"]);
    for client in [LOOPBACK, WORLD_A] {
        // Accepted by the host's kernel at once, or already refused: both tell the client.
        let result = net
            .world
            .connect(at(client, 8080))
            .and_then(|mut stream| stream.read(&mut [0]));
        assert_errno(result, &[libc::ECONNRESET, libc::ECONNREFUSED]);
    }
}

#[test]
fn range_of_ports_leads_to_a_range() {
    let net = Net::up(&[
        "-p",
        "8000-8003:9000-9003",
        "--publish",
        "127.0.0.1:7000:9000/tcp",
    ]);
    let listeners: Vec<_> = (9000..9004)
        .map(|port| net.guest.listen(at(ANY, port)).unwrap())
        .collect();
    for (outside, listener) in (8000..8004).zip(&listeners) {
        let _client = net.world.connect(at(WORLD_A, outside)).unwrap();
        accept(listener);
    }
    let _client = net.world.connect(at(LOOPBACK, 7000)).unwrap();
    accept(&listeners[0]);
    assert_errno(net.world.connect(at(WORLD_A, 7000)), &[libc::ECONNREFUSED]);
    assert_errno(net.world.connect(at(LOOPBACK, 8004)), &[libc::ECONNREFUSED]);
}

#[test]
fn same_port_can_be_published_for_tcp_and_udp() {
    let net = Net::up(&["-p", "5300:53/udp", "-p", "5300:53/tcp"]);
    let listener = net.guest.listen(at(ANY, 53)).unwrap();
    let _echo = serve::udp_echo(net.guest.udp(at(ANY, 53)).unwrap());
    let _client = net.world.connect(at(LOOPBACK, 5300)).unwrap();
    accept(&listener);
    assert_echo(&net, LOOPBACK, 5300);
}

#[test]
fn busy_port_is_one_line_and_status_1() {
    let world = World::new();
    let guest = Guest::new(&world);
    let pid = guest.pid().to_string();
    let _tcp = world.listen(at(ANY, 8080)).unwrap();
    let busy = ["attach", "-p", "8080:80", &pid];
    run(&mut world.tapgate(&busy)).assert_runtime_error("8080");
    let _udp = world.udp(at(ANY, 8081)).unwrap();
    let busy = ["attach", "-p", "8081:80/udp", &pid];
    run(&mut world.tapgate(&busy)).assert_runtime_error("8081");
    let foreign = ["attach", "-p", "203.0.113.5:8082:80", &pid];
    run(&mut world.tapgate(&foreign)).assert_runtime_error("203.0.113.5");
    let run_too = ["run", "-p", "8080:80", "--", "echo", "started"];
    let finished = run(&mut world.tapgate(&run_too));
    finished.assert_runtime_error("8080");
    assert_eq!(finished.stdout, "", "the command was not started");
}

#[test]
fn guest_sees_the_clients_own_address_over_udp() {
    let net = Net::up(&["-p", "5353:53/udp"]);
    let inside = net.guest.udp(at(ANY, 53)).unwrap();
    for (server, seen) in [(LOOPBACK, GATEWAY), (WORLD_A, WORLD_A)] {
        let client = net.world.udp_to(at(server, 5353)).unwrap();
        client.send(b"question").unwrap();
        let mut heard = [0; 64];
        let (length, from) = inside.recv_from(&mut heard).unwrap();
        assert_eq!(&heard[..length], b"question");
        assert_eq!(from.ip(), seen, "a client at {server}");
        inside.send_to(b"answer", from).unwrap();
        let length = client.recv(&mut heard).unwrap();
        assert_eq!(&heard[..length], b"answer", "to a client at {server}");
    }
}

#[test]
fn udp_answers_leave_from_the_address_that_was_asked() {
    let net = Net::up(&["-p", "5353:53/udp", "-p", "[::]:5353:53/udp"]);
    // In both families.
    let _echo = serve::udp_echo(net.guest.udp(at(support::ANY6, 53)).unwrap());
    // A connected client hears nobody else; the kernel would answer it from its own network.
    for (client, server) in [(WORLD_C, WORLD_A), (WORLD_A, WORLD_B), (WORLD_C, LOOPBACK)] {
        let client = net.world.udp(at(client, 0)).unwrap();
        client.connect(at(server, 5353)).unwrap();
        client.send(b"question").unwrap();
        let mut heard = [0; 64];
        assert_eq!(client.recv(&mut heard).unwrap(), 8, "by {server}");
    }
    let localhost = std::net::Ipv6Addr::LOCALHOST.into();
    let client = net.world.udp(at(localhost, 0)).unwrap();
    client.connect(at(localhost, 5353)).unwrap();
    client.send(b"question").unwrap();
    assert_eq!(client.recv(&mut [0; 64]).unwrap(), 8);
}

#[test]
fn udp_answers_reach_loopback_clients_without_host_loopback() {
    let tcp = "8080:80,splice=never";
    let net = Net::up(&["--no-host-loopback", "-p", "5353:53/udp", "-p", tcp]);
    let _echo = serve::udp_echo(net.guest.udp(at(ANY, 53)).unwrap());
    assert_echo(&net, LOOPBACK, 5353);
    assert_echo(&net, WORLD_A, 5353);
    // The same for TCP, whose answers also go to the gateway's address.
    let _tcp = serve::tcp_echo(net.guest.listen(at(ANY, 80)).unwrap());
    let mut client = net.world.connect(at(LOOPBACK, 8080)).unwrap();
    client.write_all(b"x").unwrap();
    client.read_exact(&mut [0]).unwrap();
}

#[test]
fn udp_clients_are_told_apart() {
    let net = Net::up(&["-p", "5353:53/udp"]);
    let _echo = serve::udp_echo(net.guest.udp(at(ANY, 53)).unwrap());
    let clients: Vec<_> = (0..20)
        .map(|n: u8| {
            let server = if n.is_multiple_of(2) {
                LOOPBACK
            } else {
                WORLD_A
            };
            (n, net.world.udp_to(at(server, 5353)).unwrap())
        })
        .collect();
    for (n, client) in &clients {
        client.send(&[*n]).unwrap();
    }
    for (n, client) in &clients {
        let mut back = [0];
        client.recv(&mut back).unwrap();
        assert_eq!(back[0], *n);
    }
}

#[test]
fn published_port_works_as_soon_as_the_guest_listens() {
    let net = Net::up(&["-p", "8080:80,splice=never"]);
    let early = net
        .world
        .connect(at(LOOPBACK, 8080))
        .and_then(|mut one| one.read(&mut [0]));
    assert!(early.is_err(), "nobody listens yet");
    let listener = net.guest.listen(at(ANY, 80)).unwrap();
    let _client = net.world.connect(at(LOOPBACK, 8080)).unwrap();
    accept(&listener);
}

#[test]
fn host_port_is_free_again_after_the_end() {
    let Net {
        tapgate,
        guest,
        world,
    } = Net::up(&["-p", "8080:80", "-p", "5353:53/udp"]);
    assert_errno(world.listen(at(ANY, 8080)), &[libc::EADDRINUSE]);
    tapgate.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(tapgate.finish(SOON).code(), 0);
    wait_until("the ports to be free", SOON, || {
        let addr: SocketAddr = at(ANY, 8080);
        world.listen(addr).ok().and(world.udp(at(ANY, 5353)).ok())
    });
    drop(guest);
}

#[track_caller]
fn assert_echo(net: &Net, server: IpAddr, port: u16) {
    let client = net.world.udp_to(at(server, port)).expect("a route");
    client.send(b"echo me").expect("the socket takes it");
    let mut back = [0; 64];
    let length = client.recv(&mut back).expect("an answer");
    assert_eq!(&back[..length], b"echo me", "{server}");
}
