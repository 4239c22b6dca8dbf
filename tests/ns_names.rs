//! What the gateway knows by itself, on a real kernel as an unprivileged user: its own names, for which
//! nobody else is asked, and DHCPv6, as Debian's `dhclient` understands it and tshark decodes it.

mod support;

use std::net::Ipv4Addr;

use support::attached::Net;
use support::capture::Capture;
use support::dns::Resolver;
use support::process::Running;
use support::serve;
use support::sockets::Sockets;
use support::world::World;
use support::{GATEWAY6, LOOPBACK, LOOPBACK6, SOON, at, wait_until};

/// What the host's resolver says of every name that reaches it.
const FOREIGN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 11);

// --- names ---------------------------------------------------------------------------------------

/// A network behind a host with a resolver that remembers what it was asked.
fn net(options: &[&str]) -> (Resolver, Net) {
    let world = World::new();
    let resolver = Resolver::start(&world, at(LOOPBACK, 53), FOREIGN);
    (resolver, Net::up_in(world, options))
}

fn dig(net: &Net, words: &[&str]) -> String {
    let fixed = ["+tries=1", "+time=8"];
    net.guest.run("dig", &[&fixed, words].concat()).output()
}

/// The ways to ask.
const WAYS: [[&str; 2]; 4] = [
    ["@10.0.2.3", "+notcp"],
    ["@10.0.2.3", "+tcp"],
    ["@fd00::3", "+notcp"],
    ["@fd00::3", "+tcp"],
];

#[test]
fn gateway_is_found_by_each_of_its_names() {
    let (resolver, net) = net(&[]);
    for way in WAYS {
        for name in [
            "gateway.tapgate.internal",
            "host.tapgate.internal",
            "host.containers.internal",
            "host.docker.internal",
            "Host.Docker.INTERNAL",
        ] {
            let ask = |kind| dig(&net, &[&way[..], &["+short", name, kind]].concat());
            assert_eq!(ask("A"), "10.0.2.2\n", "{name} {way:?}");
            assert_eq!(ask("AAAA"), "fd00::2\n", "{name} {way:?}");
        }
        let ask = |kind| {
            dig(
                &net,
                &[&way[..], &["+short", "dns.tapgate.internal", kind]].concat(),
            )
        };
        assert_eq!(ask("A"), "10.0.2.3\n");
        assert_eq!(ask("AAAA"), "fd00::3\n");
    }
    assert!(resolver.questions().is_empty(), "nobody else is asked");
}

#[test]
fn addresses_lead_back_to_names() {
    let (resolver, net) = net(&[]);
    for way in WAYS {
        for (addr, name) in [
            ("10.0.2.2", "gateway.tapgate.internal.\n"),
            ("fd00::2", "gateway.tapgate.internal.\n"),
            ("10.0.2.3", "dns.tapgate.internal.\n"),
            ("fd00::3", "dns.tapgate.internal.\n"),
        ] {
            let found = dig(&net, &[&way[..], &["+short", "-x", addr]].concat());
            assert_eq!(found, name, "{addr} {way:?}");
        }
    }
    assert!(resolver.questions().is_empty(), "nobody else is asked");
    dig(&net, &["@10.0.2.3", "-x", "10.0.2.4"]);
    dig(&net, &["@10.0.2.3", "-x", "fd00::4"]);
    assert_eq!(resolver.questions().len(), 2, "others are not ours");
}

#[test]
fn what_is_not_there_is_said_and_not_asked() {
    let (resolver, net) = net(&[]);
    for way in WAYS {
        let missing = [&way[..], &["nobody.tapgate.internal"]].concat();
        let said = dig(&net, &missing);
        assert!(said.contains("status: NXDOMAIN"), "{said}");
        assert!(said.contains("SOA"), "for how long: {said}");
        let other = [&way[..], &["gateway.tapgate.internal", "MX"]].concat();
        let said = dig(&net, &other);
        assert!(
            said.contains("status: NOERROR") && said.contains("ANSWER: 0"),
            "{said}"
        );
    }
    assert!(resolver.questions().is_empty());
}

#[test]
fn other_names_go_to_the_hosts_resolver() {
    let (resolver, net) = net(&[]);
    let names = [
        "tapgate.example",
        "gateway.tapgate.internal.example",
        "internal",
    ];
    for name in names {
        let found = dig(&net, &["@10.0.2.3", "+short", name]);
        assert_eq!(found, format!("{FOREIGN}\n"), "{name}");
    }
    assert_eq!(resolver.questions().len(), names.len());
}

#[test]
fn names_have_no_ipv6_where_there_is_none() {
    let (_resolver, net) = net(&["--no-ipv6"]);
    let ask = |kind| dig(&net, &["@10.0.2.3", "gateway.tapgate.internal", kind]);
    assert!(ask("A").contains("10.0.2.2"));
    let said = ask("AAAA");
    assert!(
        said.contains("status: NOERROR") && said.contains("ANSWER: 0"),
        "{said}"
    );
}

#[test]
fn names_follow_the_subnet() {
    let options = ["--subnet", "10.77.0.0/16", "--subnet6", "2001:db8:99::/64"];
    let (_resolver, net) = net(&options);
    let ask = |kind| {
        dig(
            &net,
            &["@10.77.0.3", "+short", "host.containers.internal", kind],
        )
    };
    assert_eq!(ask("A"), "10.77.0.2\n");
    assert_eq!(ask("AAAA"), "2001:db8:99::2\n");
}

#[test]
fn page_of_the_host_is_fetched_by_name() {
    let world = World::new();
    let page = serve::page(world.listen(at(LOOPBACK, 0)).unwrap(), "by name\n");
    let script = format!(
        "curl -s --max-time 15 http://host.containers.internal:{}/",
        page.port()
    );
    assert_eq!(world.run_inside(&[], &script), "by name\n");
}

#[test]
fn no_dns_knows_no_names() {
    let (resolver, net) = net(&["--no-dns"]);
    let words = [
        "@10.0.2.3",
        "+tries=1",
        "+time=1",
        "gateway.tapgate.internal",
    ];
    assert!(!net.guest.run("dig", &words).status.success());
    assert!(resolver.questions().is_empty());
}

// --- DHCPv6 --------------------------------------------------------------------------------------

const SCRIPT: &str = "#!/bin/sh
case $reason in
BOUND6|RENEW6|REBIND6)
    ip -6 address replace $new_ip6_address/128 dev $interface nodad ;;
PREINIT6) ;;
*) echo $reason ;;
esac
[ $reason = PREINIT6 ] || echo \"$reason address=$new_ip6_address life=$new_max_life \\
    dns=$new_dhcp6_name_servers search=$new_dhcp6_domain_search .\"
exit 0
";

/// A guest whose link is up, with a link-local address that can be used.
fn unconfigured(options: &[&str]) -> Net {
    let world = World::new();
    world.set_resolv_conf("nameserver 127.0.0.1\nsearch corp.example lab.example\n");
    let fixed = ["--no-configure", "--offload", "off"];
    let net = Net::up_in(world, &[&fixed, options].concat());
    let script = "echo 0 > /proc/sys/net/ipv6/conf/tap0/accept_ra
                  ip link set lo up; ip link set tap0 up
                  ip address add 10.0.2.100/24 dev tap0";
    net.guest.run("sh", &["-ec", script]).output();
    wait_until("a link-local address", SOON, || {
        let asked = ["-6", "-o", "address", "show", "dev", "tap0"];
        let shown = net.guest.run("ip", &asked).output();
        (shown.contains("fe80:") && !shown.contains("tentative")).then_some(())
    });
    net
}

/// Starts `dhclient -6`, whose script says what it is given.
fn dhclient(net: &Net, options: &[&str]) -> Running {
    let script = net.world.file("dhclient.sh", SCRIPT);
    let wanted = "request dhcp6.name-servers, dhcp6.domain-search;\n";
    let config = net.world.file("dhclient.conf", wanted);
    let mut command = net.guest.command("dhclient");
    command.args(["-6", "-d", "-1", "-v", "-pf", "/mnt/dhclient.pid"]);
    command
        .args(["-lf", "/mnt/dhclient.leases", "-cf"])
        .arg(config);
    command.arg("-sf").arg(script).args(options).arg("tap0");
    Running::start(&mut command)
}

#[test]
fn dhclient_gets_the_address_and_the_networks_parameters() {
    let net = unconfigured(&[]);
    let capture = Capture::start(&net, "dhcpv6.pcap");
    let mut client = dhclient(&net, &[]);
    client.wait_for_output("BOUND6");
    client.wait_for_output(" .");
    let said = client.said().0;
    for wanted in [
        "address=fd00::100 ",
        "dns=fd00::3 ",
        "search=corp.example. lab.example. ",
    ] {
        assert!(said.contains(wanted), "{wanted}: {said}");
    }
    let packets = capture.stop();
    packets.assert_well_formed();
    for (kind, name) in [
        (1, "solicit"),
        (2, "advertise"),
        (3, "request"),
        (7, "reply"),
    ] {
        let found = packets.count(&format!("dhcpv6.msgtype == {kind}"));
        assert!(found > 0, "{name}");
    }
    let fields = ["ipv6.src", "dhcpv6.iaaddr.ip", "dhcpv6.dns_server"];
    for line in packets.fields("dhcpv6.msgtype == 7", &fields) {
        assert!(line.starts_with("fe80::2|fd00::100|"), "{line}");
    }

    // The address is good for something.
    let script = "ip -6 route replace fd00::/64 dev tap0";
    net.guest.run("sh", &["-ec", script]).output();
    let echo = serve::udp_echo(net.world.udp(at(LOOPBACK6, 0)).unwrap());
    let guest = net.guest.udp_to(at(GATEWAY6, echo.port())).unwrap();
    guest.send(b"x").unwrap();
    assert_eq!(guest.recv(&mut [0; 8]).unwrap(), 1);
}

#[test]
fn lease_is_given_again_and_given_back() {
    let net = unconfigured(&[]);
    for _ in 0..2 {
        let mut client = dhclient(&net, &[]);
        client.wait_for_output("BOUND6");
        assert!(client.said().0.contains("address=fd00::100 "));
    }
    let capture = Capture::start(&net, "release.pcap");
    let released = dhclient(&net, &["-r"]).finish(SOON);
    assert!(released.status.success(), "{released:?}");
    let packets = capture.stop();
    packets.assert_well_formed();
    assert!(packets.count("dhcpv6.msgtype == 8") > 0, "a release");
    let replies = packets.fields("dhcpv6.msgtype == 7", &["dhcpv6.status_code"]);
    assert!(
        replies.iter().any(|line| line.starts_with('0')),
        "{replies:?}"
    );
}

#[test]
fn information_alone_is_told_without_an_address() {
    let net = unconfigured(&[]);
    let capture = Capture::start(&net, "information.pcap");
    let mut client = dhclient(&net, &["-S"]);
    client.wait_for_output("dns=fd00::3 ");
    let packets = capture.stop();
    packets.assert_well_formed();
    assert_eq!(packets.count("dhcpv6.iaaddr.ip"), 0);
    assert!(packets.count("dhcpv6.msgtype == 11") > 0);
}

#[test]
fn no_dns_is_not_told() {
    let net = unconfigured(&["--no-dns"]);
    let mut client = dhclient(&net, &[]);
    client.wait_for_output("BOUND6");
    let said = client.said().0;
    assert!(said.contains("address=fd00::100 "), "{said}");
    assert!(!said.contains("fd00::3"), "{said}");
}
