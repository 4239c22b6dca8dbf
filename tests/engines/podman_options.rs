//! `podman run --network slirp4netns:OPTION`, one test for each option: what the container is given,
//! whom it reaches, and as whom it is seen. IPv6 is in `podman_ipv6.rs`.

use std::net::{IpAddr, Ipv4Addr};

use crate::host::Host;
use crate::podman::Podman;
use crate::support::dns::Resolver;
use crate::support::serve;
use crate::support::sockets::Sockets;
use crate::support::{LOOPBACK, WORLD_A, WORLD_B, at};
use crate::witness::{answerer, page, testimony};

#[test]
fn container_reaches_the_hosts_loopback_where_allowed() {
    let podman = Podman::new();
    let host = &podman.host;
    assert_eq!(host.run(&["id", "-u"]).output(), "1000\n", "unprivileged");
    let web = page(host, at(LOOPBACK, 0));
    let url = format!("http://10.0.2.2:{}/by-podman", web.port());
    let network = "slirp4netns:allow_host_loopback=true";
    let command = ["run", "--rm", "--network", network, "box", "wget", "-qO-"];
    let got = podman.podman(&[&command[..], &[&url]].concat()).output();
    assert_eq!(got, testimony("host", LOOPBACK, "by-podman"));

    let echo = answerer(host, at(LOOPBACK, 0));
    let ask = format!("ask UDP4:10.0.2.2:{} by-datagram", echo.port());
    let got = podman.inside("allow_host_loopback=true", &ask);
    assert_eq!(got, testimony("host", LOOPBACK, "by-datagram"));
    drop((web, echo));
    podman.remove_all();
}

#[test]
fn hosts_loopback_is_closed_unless_allowed() {
    let podman = Podman::new();
    let inner = podman.host.listen(at(LOOPBACK, 0)).unwrap();
    let outer = page(&podman.host, at(WORLD_B, 0));
    let port = inner.local_addr().unwrap().port();
    let refused = format!("wget -T5 -qO- http://10.0.2.2:{port}/ && exit 9");
    let reached = format!("wget -qO- http://{}/outer", outer.addr);
    for option in ["mtu=65520", "allow_host_loopback=false"] {
        let got = podman.inside(option, &format!("{refused}; {reached}"));
        assert_eq!(got, testimony("host", WORLD_B, "outer"), "{option}");
    }
    inner.set_nonblocking(true).unwrap();
    assert!(inner.accept().is_err(), "nobody came to the loopback");
}

#[test]
fn options_in_containers_conf_count_too() {
    let podman = Podman::new();
    let web = page(&podman.host, at(LOOPBACK, 0));
    podman.host.administer(
        "sed -i '$a network_cmd_options=[\"allow_host_loopback=true\"]' \
         /home/user/.config/containers/containers.conf",
    );
    let url = format!("http://10.0.2.2:{}/from-conf", web.port());
    let got = podman.podman(&["run", "--rm", "box", "wget", "-qO-", &url]);
    assert_eq!(got.output(), testimony("host", LOOPBACK, "from-conf"));
    let info = podman.podman(&["info", "--format", "{{.Host.Slirp4NetNS.Executable}}"]);
    assert_eq!(info.output(), "/mnt/bin/slirp4netns\n");
    let info = podman.podman(&["info", "--format", "{{.Host.Slirp4NetNS.Version}}"]);
    let version = info.output();
    assert!(version.starts_with("slirp4netns version 1."), "{version}");
}

#[test]
fn cidr_moves_guest_gateway_and_resolver() {
    let podman = Podman::new();
    let _resolver = Resolver::start(
        &podman.host,
        at(WORLD_A, 53),
        Ipv4Addr::new(198, 51, 100, 1),
    );
    let web = page(&podman.host, at(LOOPBACK, 0));
    let port = web.port();
    let got = podman.inside(
        "cidr=192.168.77.0/24,allow_host_loopback=true",
        &format!(
            "ip -4 address show tap0 | grep -o 'inet [^ ]*'
             ip route | grep default | cut -d' ' -f3
             grep -m1 nameserver /etc/resolv.conf
             nslookup -type=a a1.example 192.168.77.3 | grep -o 'Address: 198.*'
             wget -qO- http://192.168.77.2:{port}/elsewhere"
        ),
    );
    let network = "inet 192.168.77.100/24\n192.168.77.2\nnameserver 192.168.77.3\n";
    let address = "Address: 198.51.100.1\n";
    let served = testimony("host", LOOPBACK, "elsewhere");
    assert_eq!(got, format!("{network}{address}{served}"));
}

#[test]
fn names_come_from_the_hosts_resolver() {
    let podman = Podman::new();
    let resolver = Resolver::start(
        &podman.host,
        at(WORLD_A, 53),
        Ipv4Addr::new(198, 51, 100, 1),
    );
    let web = page(&podman.host, at(WORLD_B, 0));
    let port = web.port();
    let got = podman.inside(
        "enable_ipv6=false",
        &format!(
            "nslookup -type=a a1.first.example 10.0.2.3 | grep -o 'Address: 198.*'
             wget -qO- http://a1.second.example:{port}/by-name"
        ),
    );
    let served = testimony("host", WORLD_B, "by-name");
    assert_eq!(got, format!("Address: 198.51.100.1\n{served}"));
    let questions = resolver.questions();
    for name in ["a1.first.example", "a1.second.example"] {
        let asked = questions.iter().find(|it| it.name == name);
        assert_eq!(asked.unwrap().from.ip(), WORLD_A, "{name}");
    }
}

#[test]
fn mtu_is_the_containers_and_carries_data() {
    const LENGTH: usize = 300_000;
    let podman = Podman::new();
    let echo = serve::tcp_echo(podman.host.listen(at(LOOPBACK, 0)).unwrap());
    let port = echo.port();
    let there_and_back = format!(
        "cat /sys/class/net/tap0/mtu
         head -c {LENGTH} /dev/zero | tr '\\0' m | socat -t5 - TCP4:10.0.2.2:{port} | tr -d '\\n' | \
         tr m '\\n' | wc -l"
    );
    for (option, mtu) in [
        ("mtu=1400", 1400),
        ("mtu=9000", 9000),
        ("cidr=10.0.2.0/24", 65520),
    ] {
        let options = format!("{option},allow_host_loopback=true");
        let got = podman.inside(&options, &there_and_back);
        assert_eq!(got, format!("{mtu}\n{LENGTH}\n"), "{option}");
    }
}

/// Asserts as whom containers with each of `options` are seen by a server at `server`.
fn assert_seen_as(podman: &Podman, server: IpAddr, options: &[(&str, IpAddr)]) {
    let web = page(&podman.host, at(server, 0));
    let echo = answerer(&podman.host, at(server, 0));
    let script = format!(
        "wget -qO- http://{}/tcp
         ask UDP4:{} udp",
        web.addr, echo.addr
    );
    for (option, seen) in options {
        let expected = [
            testimony("host", *seen, "tcp"),
            testimony("host", *seen, "udp"),
        ];
        assert_eq!(
            podman.inside(option, &script),
            expected.concat(),
            "{option}"
        );
    }
}

#[test]
fn outbound_addr_is_the_address_that_servers_see() {
    let podman = Podman::new();
    let options = [
        ("mtu=65520", WORLD_B),
        ("outbound_addr=192.0.2.1", WORLD_A),
        // Routing follows an interface, and takes the nearest of its addresses.
        ("outbound_addr=host0", WORLD_B),
        // Concerns the other family.
        ("outbound_addr6=2001:db8:1::1", WORLD_B),
    ];
    assert_seen_as(&podman, WORLD_B, &options);
}

#[test]
fn image_is_built_with_a_network() {
    let podman = Podman::new();
    crate::buildah::assert_build(&podman.host, &["podman", "build"]);
    let page = podman.podman(&["run", "--rm", "--network=none", "built", "cat", "/page"]);
    assert_eq!(page.output(), testimony("host", LOOPBACK, "in-a-build"));
    podman.remove_all();
}

#[test]
fn private_host_ends_with_its_test() {
    let host = Host::new(&[]);
    let shared = host.shared().to_owned();
    let script = "sleep 1000 </dev/null >/dev/null 2>&1 & echo started";
    assert_eq!(host.administer(script), "started\n");
    let namespace = host.process_namespace();
    drop(host);
    assert!(!shared.exists(), "{shared:?}");
    let left = crate::host::processes_in(&namespace);
    assert_eq!(left, Vec::<i32>::new());
}
