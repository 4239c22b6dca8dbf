//! Ports published over IPv6 on a real kernel, as an unprivileged user: who is reached, whom the guest
//! sees, and where they lead when the guest has no IPv6.

mod support;

use std::io::{Read, Write};
use std::net::IpAddr;

use support::attached::Net;
use support::process::run;
use support::serve::accept;
use support::sockets::{Sockets, assert_errno};
use support::world::World;
use support::{
    ANY, ANY6, GATEWAY, GATEWAY6, LOOPBACK, LOOPBACK6, WORLD_A, WORLD6_A, WORLD6_B, WORLD6_C, at,
};

/// A question to `to`, and whom the guest's listener saw.
#[track_caller]
fn ask_over_tcp(net: &Net, listener: &std::net::TcpListener, to: std::net::SocketAddr) -> IpAddr {
    let mut outside = net.world.connect(to).expect("the port is published");
    let (mut inside, peer) = accept(listener);
    outside.write_all(b"question").expect("it is connected");
    let mut heard = [0; 8];
    inside.read_exact(&mut heard).expect("it is connected");
    inside.write_all(b"answer").expect("it is connected");
    drop(inside);
    let mut answer = String::new();
    outside
        .read_to_string(&mut answer)
        .expect("it ends with FIN");
    assert_eq!((&heard, answer.as_str()), (b"question", "answer"), "{to}");
    peer.ip()
}

/// The same with datagrams.
#[track_caller]
fn ask_over_udp(net: &Net, inside: &std::net::UdpSocket, to: std::net::SocketAddr) -> IpAddr {
    let client = net.world.udp_to(to).expect("a route");
    client.send(b"question").expect("the socket takes it");
    let mut heard = [0; 64];
    let (length, from) = inside.recv_from(&mut heard).expect("it comes in");
    assert_eq!(&heard[..length], b"question");
    inside.send_to(b"answer", from).expect("a route back");
    let length = client
        .recv(&mut heard)
        .expect("from the address that was asked");
    assert_eq!(&heard[..length], b"answer", "{to}");
    from.ip()
}

#[test]
fn clients_own_address_is_seen_inside() {
    let net = Net::up_in(
        World::with_ipv6_route(),
        &[
            "-p",
            "[::1]:8080:80,splice=never",
            "-p",
            "[2001:db8:1::1]:8080:80,splice=never",
            "-p",
            "[::1]:5353:53/udp",
            "-p",
            "[2001:db8:1::1]:5353:53/udp",
        ],
    );
    let listener = net.guest.listen(at(ANY6, 80)).unwrap();
    let inside = net.guest.udp(at(ANY6, 53)).unwrap();
    for (server, seen) in [(LOOPBACK6, GATEWAY6), (WORLD6_A, WORLD6_A)] {
        assert_eq!(ask_over_tcp(&net, &listener, at(server, 8080)), seen);
        assert_eq!(ask_over_udp(&net, &inside, at(server, 5353)), seen);
    }
    for elsewhere in [LOOPBACK, WORLD_A, WORLD6_B] {
        assert_errno(
            net.world.connect(at(elsewhere, 8080)),
            &[libc::ECONNREFUSED],
        );
    }
}

#[test]
fn port_of_every_address_answers_from_the_one_that_was_asked() {
    let net = Net::up_in(
        World::with_ipv6_route(),
        &["-p", "[::]:8080:80,splice=never", "-p", "[::]:5353:53/udp"],
    );
    let listener = net.guest.listen(at(ANY6, 80)).unwrap();
    let inside = net.guest.udp(at(ANY6, 53)).unwrap();
    for (server, seen) in [
        (LOOPBACK6, GATEWAY6),
        (WORLD6_A, WORLD6_A),
        (WORLD6_B, WORLD6_B),
        (WORLD6_C, WORLD6_C),
    ] {
        assert_eq!(ask_over_tcp(&net, &listener, at(server, 8080)), seen);
        let _ = ask_over_udp(&net, &inside, at(server, 5353));
    }
    // IPv4 is another port.
    assert_errno(net.world.connect(at(LOOPBACK, 8080)), &[libc::ECONNREFUSED]);
}

#[test]
fn clients_without_a_route_inside_are_answered_all_the_same() {
    // No default route inside: the host has none. Whom the guest sees it can answer nevertheless.
    let net = Net::up(&["-p", "[::]:8080:80,splice=never", "-p", "[::]:5353:53/udp"]);
    let listener = net.guest.listen(at(ANY6, 80)).unwrap();
    let inside = net.guest.udp(at(ANY6, 53)).unwrap();
    for server in [LOOPBACK6, WORLD6_A] {
        let _ = ask_over_tcp(&net, &listener, at(server, 8080));
        let _ = ask_over_udp(&net, &inside, at(server, 5353));
    }
}

#[test]
fn both_families_can_publish_the_same_port() {
    let net = Net::up(&[
        "-p",
        "8080:80,splice=never",
        "-p",
        "[::]:8080:80,splice=never",
    ]);
    let listener4 = net.guest.listen(at(ANY, 80)).unwrap();
    let listener6 = {
        // Beside the IPv4 one, on the address alone.
        net.guest.listen(at(support::GUEST6, 80)).unwrap()
    };
    assert_eq!(ask_over_tcp(&net, &listener4, at(LOOPBACK, 8080)), GATEWAY);
    assert_eq!(
        ask_over_tcp(&net, &listener6, at(LOOPBACK6, 8080)),
        GATEWAY6
    );
}

#[test]
fn without_ipv6_inside_they_lead_to_the_ipv4_guest() {
    let options = [
        "--no-ipv6",
        "-p",
        "[::1]:8080:80,splice=never",
        "-p",
        "[2001:db8:1::1]:8080:80,splice=never",
        "-p",
        "[::1]:5353:53/udp",
        "-p",
        "[2001:db8:1::1]:5353:53/udp",
    ];
    let net = Net::up(&options);
    let listener = net.guest.listen(at(ANY, 80)).unwrap();
    let inside = net.guest.udp(at(ANY, 53)).unwrap();
    for server in [LOOPBACK6, WORLD6_A] {
        assert_eq!(ask_over_tcp(&net, &listener, at(server, 8080)), GATEWAY);
        assert_eq!(ask_over_udp(&net, &inside, at(server, 5353)), GATEWAY);
    }
}

#[test]
fn loopback_clients_are_answered_without_host_loopback() {
    let net = Net::up(&[
        "--no-host-loopback",
        "-p",
        "[::1]:5353:53/udp",
        "-p",
        "[::1]:8080:80,splice=never",
    ]);
    let listener = net.guest.listen(at(ANY6, 80)).unwrap();
    let inside = net.guest.udp(at(ANY6, 53)).unwrap();
    assert_eq!(ask_over_tcp(&net, &listener, at(LOOPBACK6, 8080)), GATEWAY6);
    assert_eq!(ask_over_udp(&net, &inside, at(LOOPBACK6, 5353)), GATEWAY6);
}

#[test]
fn client_is_reset_when_the_guest_refuses() {
    let net = Net::up(&["-p", "[::]:8080:80,splice=never"]);
    for client in [LOOPBACK6, WORLD6_A] {
        let result = net
            .world
            .connect(at(client, 8080))
            .and_then(|mut stream| stream.read(&mut [0]));
        assert_errno(result, &[libc::ECONNRESET, libc::ECONNREFUSED]);
    }
}

#[test]
fn busy_port_is_one_line_and_status_1() {
    let world = World::new();
    let _tcp = world.listen(at(LOOPBACK6, 8080)).unwrap();
    let busy = ["run", "-p", "[::1]:8080:80", "--", "echo", "started"];
    let finished = run(&mut world.tapgate(&busy));
    finished.assert_runtime_error("[::1]:8080");
    assert_eq!(finished.stdout, "", "the command was not started");
    let foreign = ["run", "-p", "[2001:db8:5::5]:8080:80", "--", "true"];
    run(&mut world.tapgate(&foreign)).assert_runtime_error("2001:db8:5::5");
}

#[test]
fn page_inside_run_is_fetched_from_outside() {
    let world = World::new();
    let serve = "python3 -c '
import socket
server = socket.create_server((\"::\", 80), family=socket.AF_INET6)
print(\"up\", flush=True)
client, peer = server.accept()
client.sendall(peer[0].encode())
'";
    let mut running = world.start_inside(&["-p", "[::1]:8080:80"], serve);
    running.wait_for_output("up");
    let mut seen = String::new();
    let mut client = world.connect(at(LOOPBACK6, 8080)).unwrap();
    client.read_to_string(&mut seen).unwrap();
    assert_eq!(seen, "fd00::100", "past the tap");
    running.finish(support::SOON).output();
}
