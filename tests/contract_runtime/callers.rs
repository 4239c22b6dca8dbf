//! Table 3.2 of the contract: each argv as its caller builds it, with the descriptors under the numbers
//! that it names, and the network that the caller then takes for granted.

use std::io::{Read, Write};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::sync::Arc;

use nix::sys::signal::Signal;

use crate::support::attached::pipe;
use crate::support::guest::Guest;
use crate::support::process::{Running, run};
use crate::support::slirp4netns::{Api, Call, read_ready};
use crate::support::sockets::Sockets;
use crate::support::world::World;
use crate::support::{GATEWAY, GUEST, LOOPBACK, SOON, WORLD_A, WORLD_B, WORLD_C, at};

/// What podman passes by default, in both of its generations.
const BASICS: [&str; 5] = [
    "--disable-host-loopback",
    "--mtu=65520",
    "--enable-sandbox",
    "--enable-seccomp",
    "--enable-ipv6",
];

/// The namespace's file, where podman has it: a bind mount.
fn mounted(world: &World, guest: &Guest) -> &'static str {
    world.set_up(&format!(
        "touch /tmp/netns && mount --bind /proc/{}/ns/net /tmp/netns",
        guest.pid()
    ));
    "/tmp/netns"
}

/// The guest reaches a server at an address of the host; gives whom the server saw.
#[track_caller]
fn assert_reaches(world: &World, guest: &Guest, server: IpAddr, asked: IpAddr) -> IpAddr {
    let listener = world.listen(at(server, 0)).expect("a free port");
    let port = listener.local_addr().expect("it is bound").port();
    let mut inside = guest.connect(at(asked, port)).expect("it is reached");
    let (mut outside, peer) = crate::support::serve::accept(&listener);
    inside.write_all(b"hello").expect("it is connected");
    let mut heard = [0; 5];
    outside.read_exact(&mut heard).expect("it comes");
    assert_eq!(&heard, b"hello");
    peer.ip()
}

#[track_caller]
fn assert_no_host_loopback(world: &World, guest: &Guest) {
    let listener = world.listen(at(LOOPBACK, 0)).expect("a free port");
    let port = listener.local_addr().expect("it is bound").port();
    guest
        .connect(at(GATEWAY, port))
        .expect_err("the host's loopback is out of reach");
}

#[track_caller]
fn assert_configured(guest: &Guest, mtu: u16) {
    let shown = guest.run("ip", &["-o", "link", "show", "tap0"]).output();
    assert!(shown.contains(&format!("mtu {mtu} ")), "{shown}");
    let routes = guest.run("ip", &["route"]).output();
    assert!(routes.contains("default via 10.0.2.2 dev tap0"), "{routes}");
}

/// A port that podman publishes before it lets the container begin.
#[track_caller]
fn assert_publishes(api: &Api, world: &World, guest: &Guest) {
    let listener = guest.listen(at(GUEST, 80)).expect("the guest's address");
    api.publish("tcp", 8080, 80);
    let _client = world.connect(at(WORLD_A, 8080)).expect("it is published");
    let (_, peer) = crate::support::serve::accept(&listener);
    assert_eq!(peer.ip(), WORLD_A);
}

/// The read end of the exit pipe and the end that conmon keeps.
fn exit_pipe() -> (Arc<OwnedFd>, Arc<OwnedFd>) {
    let (read, write) = pipe();
    (Arc::new(read), write)
}

/// Contract 3.2, row "podman 4.3 container" and the LIVE argv below the table: 3=exit, 4=ready; 3.11
/// items 2 and 5.
#[test]
fn podman_4_3_container() {
    let world = World::new();
    let guest = Guest::new(&world);
    let netns = mounted(&world, &guest);
    let (exit, conmon) = exit_pipe();
    let rest = [
        "-c",
        "-e",
        "3",
        "-r",
        "4",
        "--api-socket",
        "/mnt/ctr.net",
        "--netns-type=path",
        netns,
        "tap0",
    ];
    let call = Call::new(&world, &[&BASICS[..], &rest].concat());
    let mut slirp4netns = call.pass(&exit, 3).ready_at(4);
    drop(exit);
    let api = Api::new(&world, "ctr.net");
    assert_configured(&guest, 65520);
    assert_reaches(&world, &guest, WORLD_A, WORLD_A);
    assert_no_host_loopback(&world, &guest);
    assert_publishes(&api, &world, &guest);
    assert!(slirp4netns.try_status().is_none(), "conmon still has it");
    drop(conmon);
    assert_eq!(slirp4netns.finish(SOON).code(), 0);
    assert!(!api.path().exists(), "the socket goes with it");
}

/// Contract 3.2, row "podman 4.3 container", its optional words, and "with PostConfigureNetNS: `... <pid>
/// tap0`".
#[test]
fn podman_4_3_container_by_pid_with_options() {
    let world = World::new();
    let guest = Guest::new(&world);
    let (exit, _conmon) = exit_pipe();
    let pid = guest.pid().to_string();
    let arguments = [
        "--disable-host-loopback",
        "--mtu=65520",
        "--enable-sandbox",
        "--enable-seccomp",
        "--cidr=10.0.2.0/24",
        "--enable-ipv6",
        "--outbound-addr=198.51.100.7",
        "--outbound-addr6=::1",
        "-c",
        "-e",
        "3",
        "-r",
        "4",
        "--api-socket",
        "/mnt/ctr.net",
        &pid,
        "tap0",
    ];
    let _slirp4netns = Call::new(&world, &arguments).pass(&exit, 3).ready_at(4);
    assert_configured(&guest, 65520);
    assert_eq!(assert_reaches(&world, &guest, WORLD_B, WORLD_B), WORLD_C);
    assert_publishes(&Api::new(&world, "ctr.net"), &world, &guest);
}

/// Contract 3.2, row "podman 4.3 rootless-netns": 3=ready, ended by `SIGTERM`.
#[test]
fn podman_4_3_rootless_netns() {
    let world = World::new();
    let guest = Guest::new(&world);
    let netns = mounted(&world, &guest);
    let rest = ["-c", "-r", "3", "--netns-type=path", netns, "tap0"];
    let slirp4netns = Call::new(&world, &[&BASICS[..], &rest].concat()).ready_at(3);
    assert_configured(&guest, 65520);
    assert_reaches(&world, &guest, WORLD_A, WORLD_A);
    slirp4netns.signal(Signal::SIGTERM);
    assert_eq!(slirp4netns.finish(SOON).code(), 0);
}

/// Contract 3.2, row "podman 4.9-5.8": 3=ready, 4=exit, the other way round than 4.3; an own process
/// group.
#[test]
fn podman_4_9_to_5_8() {
    let world = World::new();
    let guest = Guest::new(&world);
    let netns = mounted(&world, &guest);
    let (exit, conmon) = exit_pipe();
    let (ready, write_end) = pipe();
    let rest = [
        "-c",
        "-r",
        "3",
        "-e",
        "4",
        "--api-socket",
        "/mnt/ctr.net",
        "--netns-type=path",
        netns,
        "tap0",
    ];
    let call = Call::new(&world, &[&BASICS[..], &rest].concat());
    let mut command = call.pass(&write_end, 3).pass(&exit, 4).command();
    let slirp4netns = Running::start(command.process_group(0));
    drop((command, write_end, exit));
    assert_eq!(read_ready(&ready), "1");
    let api = Api::new(&world, "ctr.net");
    assert_configured(&guest, 65520);
    assert_no_host_loopback(&world, &guest);
    assert_publishes(&api, &world, &guest);
    drop(conmon);
    assert_eq!(slirp4netns.finish(SOON).code(), 0);
    assert!(!api.path().exists(), "the socket goes with it");
}

/// Contract 3.2, row "podman 4.9-5.8" without what is in brackets, for a rootless-netns.
#[test]
fn podman_4_9_to_5_8_rootless_netns() {
    let world = World::new();
    let guest = Guest::new(&world);
    let netns = mounted(&world, &guest);
    let rest = ["-c", "-r", "3", "--netns-type=path", netns, "tap0"];
    let call = Call::new(&world, &[&BASICS[..], &rest].concat());
    let _slirp4netns = call.by(&["setpriv", "--pdeathsig", "KILL"]).ready_at(3);
    assert_configured(&guest, 65520);
    assert_reaches(&world, &guest, WORLD_A, WORLD_A);
}

/// Contract 3.2, row "buildah <=1.30": no sandbox is asked for, the loopback is enabled; ended by
/// `SIGKILL`.
#[test]
fn buildah_until_1_30() {
    let world = World::new();
    let guest = Guest::new(&world);
    let pid = guest.pid().to_string();
    let arguments = ["--mtu", "65520", "-r", "3", "-c", &pid, "tap0"];
    for _ in 0..2 {
        let slirp4netns = Call::new(&world, &arguments).ready_at(3);
        assert_configured(&guest, 65520);
        assert_reaches(&world, &guest, LOOPBACK, GATEWAY);
        slirp4netns.signal(Signal::SIGKILL);
        slirp4netns.finish(SOON);
    }
}

/// Contract 3.2, row "buildah 1.31-1.42": as podman 4.9 without an exit descriptor.
#[test]
fn buildah_1_31_to_1_42() {
    let world = World::new();
    let guest = Guest::new(&world);
    let netns = format!("/proc/{}/ns/net", guest.pid());
    let rest = ["-c", "-r", "3", "--netns-type=path", &netns, "tap0"];
    let call = Call::new(&world, &[&BASICS[..], &rest].concat());
    let _slirp4netns = call.by(&["setpriv", "--pdeathsig", "KILL"]).ready_at(3);
    assert_configured(&guest, 65520);
    assert_reaches(&world, &guest, WORLD_A, WORLD_A);
    assert_no_host_loopback(&world, &guest);
}

/// rootlesskit's own part before it calls: parentutils.go:11-31, without `-m`, since the guest has the
/// mounts of its world.
fn make_tap(world: &World, guest: &Guest) {
    let pid = guest.pid().to_string();
    for words in [
        &["ip", "tuntap", "add", "name", "tap0", "mode", "tap"][..],
        &["ip", "link", "set", "tap0", "up"],
    ] {
        let mut nsenter = world.command("nsenter");
        let enter = ["-t", &pid, "-n", "-U", "--preserve-credentials"];
        run(nsenter.args(enter).args(words)).output();
    }
}

/// rootlesskit's own part after ready, in its child.
fn configure_tap(guest: &Guest, network: &str, mtu: &str) {
    let script = format!(
        "ip link set lo up; ip link set tap0 up; ip link set dev tap0 mtu {mtu}
         ip address add {network}.100/24 dev tap0; ip route add default via {network}.2 dev tap0"
    );
    guest.run("sh", &["-ec", &script]).output();
}

/// Contract 3.2, row "rootlesskit", by pid: no `-c`, the tap is there already; 3.11 item 8. The tap
/// outlives it, so it can be killed and called again.
#[test]
fn rootlesskit_by_pid() {
    let world = World::new();
    let guest = Guest::new(&world);
    make_tap(&world, &guest);
    let pid = guest.pid().to_string();
    let arguments = [
        "--mtu",
        "65520",
        "-r",
        "3",
        "--disable-host-loopback",
        "--cidr",
        "10.0.7.0/24",
        "--api-socket",
        "/mnt/.s4nn.sock",
        "--enable-sandbox",
        "--enable-seccomp",
        "--enable-ipv6",
        &pid,
        "tap0",
    ];
    let api = Api::new(&world, ".s4nn.sock");
    for round in 0..2 {
        let call = Call::new(&world, &arguments);
        let slirp4netns = call.by(&["setpriv", "--pdeathsig", "KILL"]).ready_at(3);
        let addresses = guest
            .run("ip", &["-o", "-4", "address", "show", "tap0"])
            .output();
        assert_eq!(
            addresses.is_empty(),
            round == 0,
            "configured by rootlesskit: {addresses}"
        );
        if round == 0 {
            configure_tap(&guest, "10.0.7", "65520");
        }
        assert_reaches(&world, &guest, WORLD_A, WORLD_A);
        let listener = guest.listen(at([10, 0, 7, 100].into(), 80)).unwrap();
        assert_eq!(api.publish("tcp", 8080, 80), 1);
        let _client = world.connect(at(WORLD_A, 8080)).unwrap();
        crate::support::serve::accept(&listener);
        slirp4netns.signal(Signal::SIGKILL);
        slirp4netns.finish(SOON);
    }
    assert!(
        guest.run("ip", &["link", "show", "tap0"]).status.success(),
        "persistent"
    );
}

/// Contract 3.2, row "rootlesskit", by paths (detach-netns, which is without a sandbox, 3.6).
#[test]
fn rootlesskit_by_path() {
    let world = World::new();
    let guest = Guest::new(&world);
    make_tap(&world, &guest);
    let userns = format!("--userns-path=/proc/{}/ns/user", guest.pid());
    let netns = mounted(&world, &guest);
    let arguments = [
        "--mtu",
        "1400",
        "-r",
        "3",
        "--disable-host-loopback",
        "--api-socket",
        "/mnt/.s4nn.sock",
        "--enable-ipv6",
        &userns,
        "--netns-type=path",
        netns,
        "tap0",
    ];
    let _slirp4netns = Call::new(&world, &arguments).ready_at(3);
    configure_tap(&guest, "10.0.2", "1400");
    assert_configured(&guest, 1400);
    assert_reaches(&world, &guest, WORLD_A, WORLD_A);
    assert_no_host_loopback(&world, &guest);
    assert_publishes(&Api::new(&world, ".s4nn.sock"), &world, &guest);
}

/// Contract 3.2, row "podman slirp options mapping": `allow_host_loopback=true` leaves its option out,
/// `enable_ipv6=false` likewise, the others come with their values.
#[test]
fn podman_slirp_options() {
    let world = World::new();
    let guest = Guest::new(&world);
    let netns = mounted(&world, &guest);
    let arguments = [
        "--mtu=1400",
        "--enable-sandbox",
        "--enable-seccomp",
        "--cidr=10.0.2.0/24",
        "--outbound-addr=198.51.100.7",
        "-c",
        "-r",
        "3",
        "--api-socket",
        "/mnt/ctr.net",
        "--netns-type=path",
        netns,
        "tap0",
    ];
    let _slirp4netns = Call::new(&world, &arguments).ready_at(3);
    assert_configured(&guest, 1400);
    assert_eq!(assert_reaches(&world, &guest, WORLD_B, WORLD_B), WORLD_C);
    assert_reaches(&world, &guest, LOOPBACK, GATEWAY);
    // port_handler=slirp4netns
    assert_publishes(&Api::new(&world, "ctr.net"), &world, &guest);
}
