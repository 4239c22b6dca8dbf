//! `podman run --network slirp4netns:enable_ipv6=true`: the container makes up an address from our
//! advertisements, as with the peer, and reaches and is seen as with IPv4.

use crate::podman::Podman;
use crate::support::{LOOPBACK, LOOPBACK6, WORLD6_A, WORLD6_B, at};
use crate::witness::{answerer, page, testimony};

/// Prints the global addresses of a container.
const ADDRESSES: &str = "ip -6 address show dev tap0 | grep -o 'inet6 fd00:[^ ]*' || echo none";

#[test]
fn container_makes_up_an_address_before_its_command_begins() {
    let podman = Podman::new();
    let shown = podman.inside("enable_ipv6=true", ADDRESSES);
    let mut lines = shown.lines();
    let address = lines.next().unwrap_or_default();
    assert!(
        address.starts_with("inet6 fd00::") && address.ends_with("/64"),
        "{shown}"
    );
    assert_eq!(lines.next(), None, "{shown}");
    let shown = podman.inside("enable_ipv6=true", "ip -6 address show dev tap0");
    assert!(!shown.contains("tentative"), "{shown}");
}

#[test]
fn container_without_ipv6_has_none() {
    let podman = Podman::new();
    let inner = page(&podman.host, at(LOOPBACK, 0));
    let script = format!(
        "{ADDRESSES}; wget -qO- http://10.0.2.2:{}/inner",
        inner.port()
    );
    let got = podman.inside("enable_ipv6=false,allow_host_loopback=true", &script);
    let served = testimony("host", LOOPBACK, "inner");
    assert_eq!(got, format!("none\n{served}"));
}

#[test]
fn container_reaches_the_hosts_loopback_where_allowed() {
    let podman = Podman::new();
    let web = page(&podman.host, at(LOOPBACK6, 0));
    let echo = answerer(&podman.host, at(LOOPBACK6, 0));
    let old = page(&podman.host, at(LOOPBACK, 0));
    let script = format!(
        "wget -qO- 'http://[fd00::2]:{}/tcp'
         ask 'UDP6:[fd00::2]:{}' udp
         wget -qO- http://10.0.2.2:{}/ipv4",
        web.port(),
        echo.port(),
        old.port()
    );
    let got = podman.inside("enable_ipv6=true,allow_host_loopback=true", &script);
    let expected = [
        testimony("host", LOOPBACK6, "tcp"),
        testimony("host", LOOPBACK6, "udp"),
        testimony("host", LOOPBACK, "ipv4"),
    ];
    assert_eq!(got, expected.concat());
    let refused = format!(
        "wget -T5 -qO- 'http://[fd00::2]:{}/' || echo closed",
        web.port()
    );
    assert_eq!(podman.inside("enable_ipv6=true", &refused), "closed\n");
}

#[test]
fn outbound_addr6_is_the_address_that_servers_see() {
    let podman = Podman::new();
    podman.host.administer("ip -6 route add default dev host0");
    let web = page(&podman.host, at(WORLD6_B, 0));
    let echo = answerer(&podman.host, at(WORLD6_B, 0));
    let script = format!(
        "wget -qO- 'http://{}/tcp'
         ask 'UDP6:{}' udp",
        web.addr, echo.addr
    );
    for (option, seen) in [
        ("mtu=65520", WORLD6_B),
        ("outbound_addr6=2001:db8:1::1", WORLD6_A),
        // Concerns the other family.
        ("outbound_addr=192.0.2.1", WORLD6_B),
    ] {
        let options = format!("enable_ipv6=true,{option}");
        let expected = [
            testimony("host", seen, "tcp"),
            testimony("host", seen, "udp"),
        ];
        let got = podman.inside(&options, &script);
        assert_eq!(got, expected.concat(), "{option}");
    }
    drop((web, echo));
    podman.remove_all();
}
