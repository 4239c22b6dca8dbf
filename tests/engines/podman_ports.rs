//! `podman run -p`: both port handlers, TCP and UDP, twenty containers at once, restarts and ports
//! that are taken; and the network that podman shares between containers on a bridge.

use std::net::{IpAddr, Ipv4Addr};

use crate::podman::Podman;
use crate::support::sockets::Sockets;
use crate::support::{GATEWAY, GUEST, LOOPBACK, SOON, WORLD_A, WORLD_C, at};
use crate::witness::{assert_answer, assert_closed, assert_page, page, testimony};

const CROWD: u16 = 20;

/// Of one address for datagrams, since rootlessport and slirp4netns answer from whatever address the
/// kernel picks.
const PORTS: &[&str] = &["8080:80", "192.0.2.1:5300:5000/udp"];

#[test]
fn port_handler_slirp4netns_shows_the_clients_own_address() {
    let podman = Podman::new();
    let host = &podman.host;
    podman.serve("own", "port_handler=slirp4netns", PORTS);
    assert_eq!(host.networks().len(), 1, "one of ours runs");
    for client in [WORLD_C, WORLD_A] {
        assert_page(host, client, at(WORLD_A, 8080), "own", client);
        assert_answer(host, client, at(WORLD_A, 5300), "own", client);
    }
    // The host's loopback has the name that the container knows it by.
    assert_page(host, LOOPBACK, at(LOOPBACK, 8080), "own", GATEWAY);
    podman.remove_all();
    for addr in [LOOPBACK, WORLD_A] {
        assert_closed(host, at(addr, 8080));
    }
}

#[test]
fn port_handler_rootlesskit_hands_over_inside() {
    let podman = Podman::new();
    let host = &podman.host;
    podman.serve("hands", "port_handler=rootlesskit", PORTS);
    assert_eq!(host.networks().len(), 1, "one of ours runs");
    assert_page(host, WORLD_C, at(WORLD_A, 8080), "hands", GUEST);
    assert_answer(host, WORLD_C, at(WORLD_A, 5300), "hands", GUEST);
    assert_page(host, LOOPBACK, at(LOOPBACK, 8080), "hands", GUEST);
    podman.remove_all();
    assert_closed(host, at(WORLD_A, 8080));
}

/// slirp4netns 1.2.0 answers from the port that was added last, and never to the host's loopback.
#[test]
fn answers_come_from_the_port_that_was_asked() {
    let podman = Podman::new();
    let host = &podman.host;
    let ports = ["5300:5000/udp", "5301:5000/udp"];
    podman.serve("two", "port_handler=slirp4netns", &ports);
    for port in [5300, 5301] {
        assert_answer(host, WORLD_A, at(WORLD_A, port), "two", WORLD_A);
        assert_answer(host, LOOPBACK, at(LOOPBACK, port), "two", GATEWAY);
    }
    podman.remove_all();
}

#[test]
fn port_of_one_address_is_closed_at_the_others() {
    let podman = Podman::new();
    let host = &podman.host;
    for handler in ["slirp4netns", "rootlesskit"] {
        let options = format!("port_handler={handler}");
        podman.serve("one", &options, &["127.0.0.1:8080:80", "192.0.2.1:8081:80"]);
        let seen = |by_slirp| {
            if handler == "slirp4netns" {
                by_slirp
            } else {
                GUEST
            }
        };
        assert_page(host, LOOPBACK, at(LOOPBACK, 8080), "one", seen(GATEWAY));
        assert_page(host, WORLD_C, at(WORLD_A, 8081), "one", seen(WORLD_C));
        assert_closed(host, at(WORLD_A, 8080));
        assert_closed(host, at(LOOPBACK, 8081));
        podman.remove_all();
    }
}

#[test]
fn port_is_there_again_after_a_restart() {
    let podman = Podman::new();
    let host = &podman.host;
    podman.serve("again", "port_handler=slirp4netns", &["8080:80"]);
    assert_page(host, WORLD_C, at(WORLD_A, 8080), "again", WORLD_C);
    podman.podman(&["stop", "--time", "0", "again"]).output();
    assert_closed(host, at(WORLD_A, 8080));
    podman.podman(&["start", "again"]).output();
    assert_page(host, WORLD_C, at(WORLD_A, 8080), "again", WORLD_C);
    podman.podman(&["restart", "--time", "0", "again"]).output();
    assert_page(host, WORLD_C, at(WORLD_A, 8080), "again", WORLD_C);
    podman.podman(&["kill", "again"]).output();
    podman.remove_all();
}

#[test]
fn taken_port_fails_the_run_and_leaves_nothing() {
    let podman = Podman::new();
    let taken = podman.host.listen(at(LOOPBACK, 8080)).unwrap();
    let options = "port_handler=slirp4netns";
    let refused = podman
        .start_serving("late", options, &["127.0.0.1:8080:80"])
        .finish(SOON);
    assert_ne!(refused.code(), 0, "{refused:?}");
    assert!(refused.stderr.contains("hostfwd"), "{refused:?}");
    drop(taken);
    podman.remove_all();
}

#[test]
fn twenty_containers_at_once_are_each_reached() {
    let podman = Podman::new();
    let host = &podman.host;
    let handler = |n: u16| {
        if n.is_multiple_of(2) {
            "slirp4netns"
        } else {
            "rootlesskit"
        }
    };
    let starting: Vec<_> = (0..CROWD)
        .map(|n| {
            let (tcp, udp) = (
                format!("{}:80", 8000 + n),
                format!("192.0.2.1:{}:5000/udp", 5300 + n),
            );
            let options = format!("port_handler={}", handler(n));
            podman.start_serving(&format!("box{n}"), &options, &[&tcp, &udp])
        })
        .collect();
    for container in starting {
        container.finish(3 * SOON).output();
    }
    assert_eq!(host.networks().len(), usize::from(CROWD));
    for n in 0..CROWD {
        let name = format!("box{n}");
        let seen = if handler(n) == "slirp4netns" {
            WORLD_C
        } else {
            GUEST
        };
        assert_page(host, WORLD_C, at(WORLD_A, 8000 + n), &name, seen);
        assert_answer(host, WORLD_C, at(WORLD_A, 5300 + n), &name, seen);
    }
    podman.remove_all();
    for n in 0..CROWD {
        assert_closed(host, at(WORLD_A, 8000 + n));
    }
}

#[test]
fn bridge_goes_out_through_one_shared_network() {
    let podman = Podman::new();
    let host = &podman.host;
    let web = page(host, at(WORLD_A, 0));
    podman
        .podman(&["network", "create", "--subnet=10.99.0.0/24", "street"])
        .output();
    let serve = |name: &str, addr: &str, port: &str| {
        let variable = format!("NAME={name}");
        let network = format!("--network=street:ip={addr}");
        let options = [
            "run", "--detach", "--name", name, "--env", &variable, &network,
        ];
        let serve = ["--publish", port, "box", "/bin/serve"];
        podman.podman(&[&options[..], &serve[..]].concat()).output();
    };
    serve("left", "10.99.0.11", "8081:80");
    serve("right", "10.99.0.12", "8082:80");
    assert_eq!(host.networks().len(), 1, "one for both");
    for name in ["left", "right"] {
        let url = format!("http://{}/{name}", web.addr);
        let got = podman
            .podman(&["exec", name, "wget", "-qO-", &url])
            .output();
        assert_eq!(got, testimony("host", WORLD_A, name));
    }
    let neighbour = "http://10.99.0.12/cgi-bin/who?next-door";
    let got = podman.podman(&["exec", "left", "wget", "-qO-", neighbour]);
    let left = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 11));
    assert_eq!(got.output(), testimony("right", left, "next-door"));
    // podman's own forwarder connects from inside the container.
    let right = IpAddr::V4(Ipv4Addr::new(10, 99, 0, 12));
    assert_page(host, WORLD_C, at(WORLD_A, 8082), "right", right);
    drop(web);
    podman.remove_all();
}
