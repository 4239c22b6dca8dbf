//! Everything that a guest's link carries, captured inside while it is used, on a real kernel as an
//! unprivileged user: tshark finds nothing malformed and every checksum right. Without offload, since
//! then every checksum is made by whoever sends.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a scenario that can not go on has failed"
)]

mod support;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, UdpSocket};

use support::attached::Net;
use support::capture::{Capture, Packets};
use support::dns::Resolver;
use support::process::run;
use support::serve;
use support::sockets::{Sockets, ports_to_give, reset};
use support::world::World;
use support::{
    ANY6, GATEWAY, GATEWAY6, LOOPBACK, LOOPBACK6, NOWHERE, NOWHERE6, RESOLVER, RESOLVER6, SOON,
    WORLD_A, WORLD6_A, at, wait_until,
};

/// The parts that an address of one family plays.
#[derive(Clone, Copy)]
struct Family {
    gateway: IpAddr,
    resolver: IpAddr,
    loopback: IpAddr,
    world: IpAddr,
    nowhere: IpAddr,
}

const FAMILIES: [Family; 2] = [
    Family {
        gateway: GATEWAY,
        resolver: RESOLVER,
        loopback: LOOPBACK,
        world: WORLD_A,
        nowhere: NOWHERE,
    },
    Family {
        gateway: GATEWAY6,
        resolver: RESOLVER6,
        loopback: LOOPBACK6,
        world: WORLD6_A,
        nowhere: NOWHERE6,
    },
];

/// The ports that the kernel has to choose from: tshark knows no protocol of theirs, and what the tests send is none.
const NOBODYS_PORTS: (u16, u16) = (61_000, 64_999);

/// A network in use, whose capture is worth a look.
fn net(mtu: &str) -> Net {
    let world = World::with_ipv6_route();
    world.set_resolv_conf("nameserver 127.0.0.1\nsearch corp.example\n");
    let options = [
        "--offload",
        "off",
        "--mtu",
        mtu,
        "-p",
        "8080:60999",
        "-p",
        "[::]:8080:60999",
        "-p",
        "5353:60999/udp",
        "-p",
        "[::]:5353:60999/udp",
    ];
    let ports = ports_to_give(NOBODYS_PORTS.0, NOBODYS_PORTS.1);
    world.set_up(&ports);
    let net = Net::up_in(world, &options);
    net.guest.run("sh", &["-ec", &ports]).output();
    net
}

/// What the capture is about, from both sides.
const CONTENTS: [&str; 21] = [
    "arp.opcode == 1",
    "arp.opcode == 2",
    "icmpv6.type == 133",
    "icmpv6.type == 134",
    "icmpv6.type == 135",
    "icmpv6.type == 136",
    "dhcp.option.dhcp == 5",
    "dns.flags.response == 1 && udp && ip",
    "dns.flags.response == 1 && udp && ipv6",
    "dns.flags.response == 1 && tcp && ip",
    "dns.flags.response == 1 && tcp && ipv6",
    "icmp.type == 0",
    "icmp.type == 3",
    "icmpv6.type == 129",
    "icmpv6.type == 1",
    "tcp.flags.reset == 1 && ip",
    "tcp.flags.reset == 1 && ipv6",
    "udp.length > 20000 && ip.dst == 10.0.2.100",
    "udp.length > 20000 && ipv6.dst == fd00::100",
    "ip.flags.mf == 1 && ip.dst == 10.0.2.100",
    "ipv6.fraghdr.more == 1 && ipv6.dst == fd00::100",
];

#[test]
fn nothing_is_wrong_at_mtu_1500() {
    let net = net("1500");
    let packets = assert_nothing_wrong(&net, 1500);
    for filter in CONTENTS {
        assert!(packets.count(filter) > 0, "{filter}");
    }
}

#[test]
fn nothing_is_wrong_at_mtu_1280() {
    assert_nothing_wrong(&net("1280"), 1280);
}

#[test]
fn nothing_is_wrong_at_mtu_65520() {
    assert_nothing_wrong(&net("65520"), 65520);
}

/// Uses the network in every way, and looks at what it carried.
#[track_caller]
fn assert_nothing_wrong(net: &Net, mtu: usize) -> Packets<'_> {
    let _resolver = Resolver::start(&net.world, at(LOOPBACK, 53), Ipv4Addr::new(192, 0, 2, 9));
    let capture = Capture::start(net, "all.pcap");
    discover(net);
    for family in FAMILIES {
        exchange_streams(net, family);
        exchange_datagrams(net, family);
        ask_for_names(net, family);
        ping(net, family);
        earn_errors(net, family);
        serve_clients(net, family);
    }
    let packets = capture.stop();
    packets.assert_well_formed();
    // 14 bytes are the Ethernet header.
    let too_long = format!("frame.len > {}", mtu + 14);
    assert_eq!(packets.count(&too_long), 0, "the MTU holds");
    packets
}

/// Neighbour and router discovery, DHCP.
fn discover(net: &Net) {
    let script = "ip neighbour flush dev tap0
                  ip -6 neighbour flush dev tap0
                  ip address add fd00::55/64 dev tap0
                  echo 1 > /proc/sys/net/ipv6/conf/tap0/disable_ipv6
                  echo 0 > /proc/sys/net/ipv6/conf/tap0/disable_ipv6
                  ip address add fd00::100/64 dev tap0 nodad
                  ip -6 route replace default via fd00::2
                  udhcpc -f -q -n -i tap0 -O mtu -O search -s /bin/true
                  until ip -6 route show default | grep -q fe80::2; do sleep 0.05; done";
    net.guest.run("sh", &["-ec", script]).output();
}

/// Connections that carry data and end well, and some that are reset or refused.
fn exchange_streams(net: &Net, family: Family) {
    const LENGTH: u64 = 300_000;
    for (asked, bound) in [
        (family.gateway, family.loopback),
        (family.world, family.world),
    ] {
        let echo = serve::tcp_echo(net.world.listen(at(bound, 0)).expect("a free port"));
        let stream = net
            .guest
            .connect(at(asked, echo.port()))
            .expect("a way there");
        let mut writer = stream.try_clone().expect("a free descriptor");
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::io::copy(&mut std::io::repeat(7).take(LENGTH), &mut writer)
                    .expect("it is connected");
                writer
                    .shutdown(std::net::Shutdown::Write)
                    .expect("it is connected");
            });
            let got = std::io::copy(&mut &stream, &mut std::io::sink()).expect("it is connected");
            assert_eq!(got, LENGTH);
        });
        let mut cut = net
            .guest
            .connect(at(asked, echo.port()))
            .expect("a way there");
        cut.write_all(b"never mind").expect("it is connected");
        reset(cut);
        let port = echo.port();
        drop(echo);
        // A process that another test is starting may hold the listener for a moment longer.
        wait_until("a refusal", SOON, || {
            net.guest.connect(at(asked, port)).is_err().then_some(())
        });
    }
}

fn exchange_datagrams(net: &Net, family: Family) {
    let echo = serve::udp_echo(net.world.udp(at(family.loopback, 0)).expect("a free port"));
    let guest = net
        .guest
        .udp_to(at(family.gateway, echo.port()))
        .expect("a way there");
    for length in [0, 1, 2, 1231, 1232, 1233, 1472, 1473, 4001, 65507] {
        assert_echo(&guest, length);
    }
}

#[track_caller]
fn assert_echo(socket: &UdpSocket, length: usize) {
    socket
        .send(&vec![0x5a; length])
        .expect("the guest's kernel takes it");
    let got = socket.recv(&mut vec![0; 65536]).expect("it comes back");
    assert_eq!(got, length);
}

fn ask_for_names(net: &Net, family: Family) {
    let server = format!("@{}", family.resolver);
    for options in [
        &["+notcp", "+ignore", "+bufsize=1232", "one.example"][..],
        &["+notcp", "+ignore", "+bufsize=4096", "a200.example"],
        &["+notcp", "+ignore", "+noedns", "a60.example"],
        &["+tcp", "a300.example"],
    ] {
        let fixed = [&server, "+tries=1", "+time=8"];
        net.guest.run("dig", &[&fixed, options].concat()).output();
    }
}

fn ping(net: &Net, family: Family) {
    for addr in [family.gateway, family.resolver, family.world] {
        for size in ["0", "56", "4000"] {
            let addr = addr.to_string();
            let arguments = ["-c2", "-i0.2", "-W5", "-s", size, &addr];
            net.guest.run("ping", &arguments).output();
        }
    }
}

/// Errors of the gateway's own and of the host's network.
fn earn_errors(net: &Net, family: Family) {
    for (addr, bound) in [
        (family.gateway, family.loopback),
        (family.world, family.world),
        (family.resolver, family.loopback),
    ] {
        let port = {
            let free = net.world.udp(at(bound, 0)).expect("a free port");
            free.local_addr().expect("it is bound").port()
        };
        for length in [1, 2000] {
            let guest = net.guest.udp_to(at(addr, port)).expect("a way there");
            guest.send(&vec![1; length]).expect("the socket takes it");
            assert!(guest.recv(&mut [0; 8]).is_err());
        }
    }
    assert!(net.guest.connect(at(family.nowhere, 80)).is_err());
    let nowhere = family.nowhere.to_string();
    net.guest.run("ping", &["-c1", "-W2", &nowhere]);
    let world = family.world.to_string();
    // A hop limit that is used up.
    net.guest.run("ping", &["-c1", "-W1", "-t1", &world]);
}

/// Clients of the published ports.
fn serve_clients(net: &Net, family: Family) {
    let _tcp = serve::tcp_echo(net.guest.listen(at(ANY6, 60999)).expect("a free port"));
    let _udp = serve::udp_echo(net.guest.udp(at(ANY6, 60999)).expect("a free port"));
    for server in [family.loopback, family.world] {
        let mut client = net.world.connect(at(server, 8080)).expect("a way there");
        client.write_all(&[9; 5000]).expect("it is connected");
        client.read_exact(&mut [0; 5000]).expect("it is connected");
        let client = net.world.udp_to(at(server, 5353)).expect("a way there");
        client.set_read_timeout(Some(SOON)).expect("an old option");
        for length in [1, 1472, 9000] {
            assert_echo(&client, length);
        }
    }
}

/// What tshark would say of a packet that is wrong: the judge is awake.
#[test]
fn wrong_checksum_would_be_found() {
    let net = Net::up(&["--offload", "off"]);
    let gateway = net.guest.gateway_mac();
    let capture = Capture::start(&net, "wrong.pcap");
    let mut frame = [&gateway[..], &[2, 0, 0, 0, 0, 1, 8, 0]].concat();
    frame.extend([0x45, 0, 0, 29, 0, 0, 0, 0, 64, 17, 0xde, 0xad]);
    frame.extend([10, 0, 2, 100, 10, 0, 2, 2, 0, 9, 0, 9, 0, 9, 0xbe, 0xef, 7]);
    net.guest.send_frames(&[frame]);
    let packets = capture.stop();
    assert_eq!(packets.count("ip.checksum.status == 0"), 1);
    assert_eq!(packets.count("udp.checksum.status == 0"), 1);
    let judged = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        packets.assert_well_formed();
    }));
    assert!(judged.is_err());
    // The gateway is as well as before.
    let mut ping = net.guest.command("ping");
    run(ping.args(["-c1", "-W5", "10.0.2.2"])).output();
}
