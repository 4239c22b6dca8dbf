//! The IPv6 link as a guest's kernel finds it, on a real kernel as an unprivileged user: addresses made
//! up from router advertisements (RFC 4862), what the advertisements say as tshark decodes them, and
//! duplicate address detection.

mod support;

use support::attached::Net;
use support::capture::{Capture, Packets};
use support::process::fail;
use support::serve;
use support::sockets::Sockets;
use support::world::World;
use support::{GATEWAY6, LOOPBACK6, SOON, WORLD6_A, at, wait_until};

/// Lets the guest's kernel begin with IPv6 at the interface only now, from nothing.
const BEGIN: &str = "echo 1 > /proc/sys/net/ipv6/conf/tap0/disable_ipv6
                     echo 0 > /proc/sys/net/ipv6/conf/tap0/disable_ipv6";

/// A guest that has to configure itself, of which only IPv4 is up.
fn unconfigured(world: World, options: &[&str]) -> Net {
    let net = Net::up_in(world, &[&["--no-configure"], options].concat());
    let script = "echo 1 > /proc/sys/net/ipv6/conf/tap0/disable_ipv6
                  ip link set lo up; ip link set tap0 up
                  ip address add 10.0.2.100/24 dev tap0";
    in_guest(&net, script);
    net
}

fn in_guest(net: &Net, script: &str) -> String {
    net.guest.run("sh", &["-ec", script]).output()
}

/// Waits for an address in `prefix` that has passed the test for duplicates.
fn wait_for_address(net: &Net, prefix: &str) -> String {
    wait_until(&format!("an address of {prefix}"), SOON, || {
        let shown = in_guest(net, "ip -6 -o address show dev tap0");
        let settled = shown
            .lines()
            .find(|line| line.contains(&format!("inet6 {prefix}")) && !line.contains("tentative"));
        settled.map(str::to_owned)
    })
}

fn default_routes(net: &Net) -> String {
    in_guest(net, "ip -6 route show default")
}

/// The only advertisement to a solicitor, or to all where it asked without an address.
fn solicited(packets: &Packets<'_>, fields: &[&str]) -> Vec<String> {
    let solicitations = packets.count("icmpv6.type == 133");
    assert!(solicitations > 0, "the guest asks");
    let found = packets.fields("icmpv6.type == 134", fields);
    if found.is_empty() {
        fail("no advertisement");
    }
    found
}

#[test]
fn guest_makes_up_an_address_and_uses_it() {
    let net = unconfigured(World::with_ipv6_route(), &["--mtu", "1400"]);
    in_guest(&net, BEGIN);
    let address = wait_for_address(&net, "fd00:");
    assert!(
        address.contains("/64 scope global") && address.contains("dynamic"),
        "{address}"
    );
    let routes = default_routes(&net);
    assert!(routes.contains("via fe80::2 dev tap0"), "{routes}");
    let mtu = in_guest(&net, "cat /proc/sys/net/ipv6/conf/tap0/mtu");
    assert_eq!(mtu.trim(), "1400");

    for (asked, bound) in [(GATEWAY6, LOOPBACK6), (WORLD6_A, WORLD6_A)] {
        let echo = serve::udp_echo(net.world.udp(at(bound, 0)).unwrap());
        let guest = net.guest.udp_to(at(asked, echo.port())).unwrap();
        guest.send(&[7; 5000]).unwrap();
        let mut back = [0; 8000];
        assert_eq!(guest.recv(&mut back).unwrap(), 5000, "{asked}");
        let listener = net.world.listen(at(bound, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        net.guest.connect(at(asked, port)).unwrap();
    }
}

#[test]
fn advertisement_says_what_the_link_is_like() {
    let world = World::with_ipv6_route();
    world.set_resolv_conf("nameserver 127.0.0.1\nsearch corp.example lab.corp.example\n");
    let net = unconfigured(world, &["--mtu", "1400", "--offload", "off"]);
    let capture = Capture::start(&net, "advertisement.pcap");
    in_guest(&net, BEGIN);
    wait_for_address(&net, "fd00:");
    let packets = capture.stop();
    packets.assert_well_formed();

    let header = [
        "ipv6.src",
        "ipv6.hlim",
        "icmpv6.nd.ra.cur_hop_limit",
        "icmpv6.nd.ra.flag.m",
        "icmpv6.nd.ra.flag.o",
        "icmpv6.nd.ra.router_lifetime",
        "icmpv6.opt.mtu",
        "icmpv6.checksum.status",
    ];
    for line in solicited(&packets, &header) {
        assert_eq!(line, "fe80::2|255|64|1|1|1800|1400|1");
    }
    let prefix = [
        "icmpv6.opt.prefix",
        "icmpv6.opt.prefix.length",
        "icmpv6.opt.prefix.flag.l",
        "icmpv6.opt.prefix.flag.a",
        "icmpv6.opt.prefix.flag.r",
        "icmpv6.opt.prefix.valid_lifetime",
        "icmpv6.opt.prefix.preferred_lifetime",
    ];
    for line in solicited(&packets, &prefix) {
        assert_eq!(line, "fd00::|64|1|1|0|86400|86400");
    }
    let names = [
        "icmpv6.opt.rdnss",
        "icmpv6.opt.rdnss.lifetime",
        "icmpv6.opt.dnssl",
        "icmpv6.opt.dnssl.lifetime",
    ];
    for line in solicited(&packets, &names) {
        assert_eq!(line, "fd00::3|86400|corp.example,lab.corp.example|86400");
    }
    for line in solicited(&packets, &["eth.src", "icmpv6.opt.linkaddr"]) {
        let (source, option) = line.split_once('|').unwrap();
        assert_eq!(
            source, option,
            "the source link-layer address is the sender's"
        );
    }
}

#[test]
fn advertisement_without_names_has_none() {
    let net = unconfigured(World::with_ipv6_route(), &["--no-dns"]);
    let capture = Capture::start(&net, "nameless.pcap");
    in_guest(&net, BEGIN);
    wait_for_address(&net, "fd00:");
    let packets = capture.stop();
    for line in solicited(&packets, &["icmpv6.opt.rdnss", "icmpv6.opt.dnssl"]) {
        assert_eq!(line, "|");
    }
}

#[test]
fn long_search_list_is_cut_not_broken() {
    let domains: Vec<String> = (0..40)
        .map(|n| format!("department-number-{n}.corp.example"))
        .collect();
    let world = World::new();
    world.set_resolv_conf(&format!(
        "nameserver 127.0.0.1\nsearch {}\n",
        domains.join(" ")
    ));
    let net = unconfigured(world, &["--offload", "off"]);
    let capture = Capture::start(&net, "long.pcap");
    in_guest(&net, BEGIN);
    wait_for_address(&net, "fd00:");
    let packets = capture.stop();
    packets.assert_well_formed();
    for line in solicited(&packets, &["icmpv6.opt.dnssl"]) {
        let told: Vec<&str> = line.split(',').collect();
        assert!(told.len() > 5, "{line}");
        assert_eq!(told, domains[..told.len()], "the first ones, each whole");
    }
}

#[test]
fn gateway_is_no_default_router_where_the_host_has_no_way() {
    let net = unconfigured(World::new(), &[]);
    let capture = Capture::start(&net, "no-router.pcap");
    in_guest(&net, BEGIN);
    wait_for_address(&net, "fd00:");
    let packets = capture.stop();
    for line in solicited(&packets, &["icmpv6.nd.ra.router_lifetime"]) {
        assert_eq!(line, "0");
    }
    assert_eq!(default_routes(&net), "");
    let echo = serve::udp_echo(net.world.udp(at(LOOPBACK6, 0)).unwrap());
    let guest = net.guest.udp_to(at(GATEWAY6, echo.port())).unwrap();
    guest.send(b"x").unwrap();
    assert_eq!(guest.recv(&mut [0; 8]).unwrap(), 1, "the link works");
}

#[test]
fn route_of_the_host_that_comes_or_goes_counts_at_the_next_question() {
    let net = unconfigured(World::new(), &[]);
    for (change, routes) in [("add", 1), ("del", 0), ("add", 1)] {
        net.world
            .set_up(&format!("ip -6 route {change} default dev host0"));
        in_guest(&net, BEGIN);
        wait_for_address(&net, "fd00:");
        let shown = default_routes(&net);
        assert_eq!(shown.lines().count(), routes, "after {change}: {shown}");
    }
}

#[test]
fn configured_guest_makes_up_no_second_address() {
    let net = Net::up_in(World::with_ipv6_route(), &["--offload", "off"]);
    let capture = Capture::start(&net, "configured.pcap");
    in_guest(&net, BEGIN);
    in_guest(&net, "ip address add fd00::100/64 dev tap0 nodad");
    wait_for_address(&net, "fe80:");
    // The advertisement has come when its route is there.
    wait_until("the advertised route", SOON, || {
        default_routes(&net).contains("via fe80::2").then_some(())
    });
    let packets = capture.stop();
    for line in solicited(&packets, &["icmpv6.opt.prefix.flag.a"]) {
        assert_eq!(line, "0");
    }
    let shown = in_guest(&net, "ip -6 -o address show dev tap0 scope global");
    assert_eq!(shown.lines().count(), 1, "{shown}");
}

#[test]
fn subnet_that_is_not_64_bits_long_is_not_for_making_up() {
    let options = ["--subnet6", "2001:db8:77::/56", "--offload", "off"];
    let net = unconfigured(World::with_ipv6_route(), &options);
    let capture = Capture::start(&net, "short.pcap");
    in_guest(&net, BEGIN);
    wait_until("the advertised route", SOON, || {
        default_routes(&net).contains("via fe80::2").then_some(())
    });
    let packets = capture.stop();
    packets.assert_well_formed();
    let fields = [
        "icmpv6.opt.prefix",
        "icmpv6.opt.prefix.length",
        "icmpv6.opt.prefix.flag.l",
        "icmpv6.opt.prefix.flag.a",
    ];
    for line in solicited(&packets, &fields) {
        assert_eq!(line, "2001:db8:77::|56|1|0");
    }
}

#[test]
fn duplicates_are_detected_with_the_gateway_and_nobody_else() {
    let net = Net::up(&[]);
    for own in ["fd00::77", "fd00:0:0:0:1:2:3:4", "fe80::77"] {
        in_guest(&net, &format!("ip address add {own}/64 dev tap0"));
        wait_until(&format!("{own} to be settled"), SOON, || {
            let shown = in_guest(&net, &format!("ip -6 -o address show to {own} dev tap0"));
            assert!(!shown.contains("dadfailed"), "{shown}");
            (!shown.is_empty() && !shown.contains("tentative")).then_some(())
        });
    }
    for taken in ["fd00::2", "fd00::3", "fe80::2"] {
        in_guest(&net, &format!("ip address add {taken}/64 dev tap0"));
        wait_until(&format!("{taken} to be found taken"), SOON, || {
            let shown = in_guest(&net, &format!("ip -6 -o address show to {taken} dev tap0"));
            assert!(shown.contains("tentative"), "{shown}");
            shown.contains("dadfailed").then_some(())
        });
        in_guest(&net, &format!("ip address del {taken}/64 dev tap0"));
    }
    let echo = serve::udp_echo(net.world.udp(at(LOOPBACK6, 0)).unwrap());
    let another = net.guest.udp(at("fd00::77".parse().unwrap(), 0)).unwrap();
    another
        .send_to(b"x", at(GATEWAY6, echo.port()))
        .expect("a route");
    assert_eq!(
        another.recv(&mut [0; 8]).unwrap(),
        1,
        "a second address works"
    );
}

#[test]
fn nobody_answers_for_an_address_of_nobody() {
    let net = Net::up(&[]);
    let finished = net.guest.run("ping", &["-6", "-c1", "-W2", "fd00::78"]);
    assert!(!finished.status.success(), "{finished:?}");
}
