//! `tapgate attach` on a real kernel, as an unprivileged user: the ways to name a namespace, the
//! ready and exit descriptors of the container engines, how it ends, and DHCP inside.

mod support;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use support::attached::{Attached, Net, pipe};
use support::guest::Guest;
use support::process::run;
use support::serve::{self, Server};
use support::sockets::Sockets;
use support::world::World;
use support::{GATEWAY, LOOPBACK, SOON, at, timed};

/// Asserts that the guest reaches a server on the world's loopback.
#[track_caller]
fn assert_connected(world: &World, guest: &Guest) {
    let echo: Server = serve::tcp_echo(world.listen(at(LOOPBACK, 0)).expect("a free port"));
    guest
        .connect(at(GATEWAY, echo.port()))
        .expect("the guest reaches the host");
}

#[test]
fn namespace_is_served_by_pid() {
    let net = Net::up(&[]);
    assert_connected(&net.world, &net.guest);
}

/// As by nohup(1), or in the background of a script, which a Ctrl-C is not meant for.
#[test]
fn signals_that_its_caller_ignores_do_not_end_it() {
    let world = World::new();
    let guest = Guest::new(&world);
    let script = r#"trap "" HUP INT QUIT; exec "$@""#;
    let pid = guest.pid().to_string();
    let tapgate = Attached::start_by(&world, &["sh", "-c", script, "sh"], &[&pid]);
    for ignored in [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT] {
        tapgate.signal(ignored);
        assert_connected(&world, &guest);
    }
    tapgate.signal(Signal::SIGTERM);
    assert_eq!(tapgate.finish(SOON).code(), 0);
}

#[test]
fn namespace_made_by_unshare_is_served_by_pid() {
    let world = World::new();
    let mut holder = world.command("unshare");
    let script = "echo $$; exec sleep 600";
    let mut holder = support::process::Running::start(holder.args(["-Urn", "sh", "-c", script]));
    holder.wait_for_output("\n");
    let pid = holder.said().0.trim().to_owned();
    let _tapgate = Attached::start(&world, &[&pid]);
    let mut inside = world.command("nsenter");
    let inside = inside.args([
        "-t",
        &pid,
        "-U",
        "-n",
        "--preserve-credentials",
        "ip",
        "route",
    ]);
    let routes = run(inside).output();
    assert!(routes.contains("default via 10.0.2.2 dev tap0"), "{routes}");
}

#[test]
fn namespace_is_served_by_the_path_of_a_process() {
    let world = World::new();
    let guest = Guest::new(&world);
    let folder = format!("/proc/{}/ns", guest.pid());
    let (user, net) = (format!("{folder}/user"), format!("{folder}/net"));
    let _tapgate = Attached::start(&world, &["--userns", &user, &net]);
    assert_connected(&world, &guest);
}

#[test]
fn namespace_is_served_by_a_bind_mounted_file() {
    let world = World::new();
    let guest = Guest::new(&world);
    let folder = format!("/proc/{}/ns", guest.pid());
    world.set_up(&format!(
        "touch /tmp/netns && mount --bind {folder}/net /tmp/netns"
    ));
    let user = format!("{folder}/user");
    let _tapgate = Attached::start(&world, &["--userns", &user, "/tmp/netns", "tap9"]);
    assert_connected(&world, &guest);
    assert!(guest.run("ip", &["link", "show", "tap9"]).status.success());
}

#[test]
fn network_is_complete_when_ready_is_said() {
    let net = Net::up(&["--mtu", "65520"]);
    let shown = net
        .guest
        .run("sh", &["-c", "ip -o -4 address; ip -o link; ip route"])
        .output();
    for wanted in [
        "127.0.0.1/8",
        "10.0.2.100/24",
        "mtu 65520",
        "default via 10.0.2.2 dev tap0",
    ] {
        assert!(shown.contains(wanted), "{wanted}: {shown}");
    }
    let lo = shown
        .lines()
        .find(|line| line.contains("lo:") && line.contains("mtu"));
    assert!(lo.is_some_and(|line| line.contains("UP")), "{shown}");
}

/// What `tc` says of an interface's queueing discipline.
fn discipline(guest: &Guest, interface: &str) -> String {
    let shown = guest.run("tc", &["qdisc", "show", "dev", interface]);
    shown.output()
}

/// For a tap of several queues the kernel would make 256 disciplines, with memory for all of them.
#[test]
fn nothing_queues_in_front_of_the_tap_but_what_somebody_chose() {
    for workers in ["1", "3"] {
        let net = Net::up(&["--workers", workers]);
        let shown = discipline(&net.guest, "tap0");
        assert!(shown.starts_with("qdisc noqueue"), "{shown}");
    }
    let world = World::new();
    let guest = Guest::new(&world);
    let script = "ip tuntap add dev tap0 mode tap; tc qdisc add dev tap0 root pfifo limit 77";
    guest.run("sh", &["-ec", script]).output();
    let _tapgate = Attached::start(&world, &["--workers", "1", &guest.pid().to_string()]);
    let shown = discipline(&guest, "tap0");
    assert!(shown.contains("limit 77p"), "{shown}");
    assert_connected(&world, &guest);
}

#[test]
fn sigterm_ends_it_with_success() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let Net {
            tapgate,
            guest,
            world: _world,
        } = Net::up(&[]);
        tapgate.signal(signal);
        let finished = tapgate.finish(SOON);
        assert_eq!(finished.code(), 0, "{signal}: {finished:?}");
        let left = guest.run("ip", &["link", "show", "tap0"]);
        assert!(
            !left.status.success(),
            "the interface goes with it: {left:?}"
        );
    }
}

#[test]
fn killed_tapgate_leaves_no_interface_and_can_be_started_again() {
    let Net {
        tapgate,
        guest,
        world,
    } = Net::up(&["-p", "8080:80"]);
    tapgate.signal(Signal::SIGKILL);
    tapgate.finish(SOON);
    let pid = guest.pid().to_string();
    let _again = Attached::start(&world, &["-p", "8080:80", &pid]);
    assert_connected(&world, &guest);
}

#[test]
fn hang_up_of_the_exit_descriptor_ends_it_with_success() {
    let world = World::new();
    let guest = Guest::new(&world);
    let (exit, kept) = pipe();
    let number = exit.as_raw_fd().to_string();
    let pid = guest.pid().to_string();
    let arguments = ["--exit-fd", &number, &pid];
    let mut tapgate = Attached::start_with(&world, &arguments, vec![Arc::new(exit)]);
    assert_connected(&world, &guest);
    assert!(
        tapgate.try_status().is_none(),
        "it stays while the descriptor is open"
    );
    drop(kept);
    let finished = tapgate.finish(SOON);
    assert_eq!(finished.code(), 0, "{finished:?}");
}

#[test]
fn end_of_the_target_ends_it_within_two_seconds() {
    let Net {
        tapgate,
        guest,
        world: _world,
    } = Net::up(&[]);
    drop(guest);
    let (took, finished) = timed(|| tapgate.finish(SOON));
    assert!(took < Duration::from_secs(2), "took {took:?}");
    assert_eq!(finished.code(), 0, "{finished:?}");
}

#[test]
fn target_that_is_not_there_is_one_line_and_status_1() {
    let world = World::new();
    let none = "4194303";
    run(&mut world.tapgate(&["attach", none])).assert_runtime_error(none);
    let none = "/no/such/namespace";
    run(&mut world.tapgate(&["attach", none])).assert_runtime_error(none);
    run(&mut world.tapgate(&["attach", "/etc/passwd"])).assert_runtime_error("/etc/passwd");
    let guest = Guest::new(&world);
    let path = format!("/proc/{}/ns/net", guest.pid());
    let wrong = ["attach", "--userns", "/etc/passwd", &path];
    run(&mut world.tapgate(&wrong)).assert_runtime_error("/etc/passwd");
}

#[test]
fn namespace_of_somebody_else_is_refused() {
    let world = World::new();
    // Process 1 is root's, and nobody here is.
    run(&mut world.tapgate(&["attach", "1"])).assert_runtime_error("1");
}

#[test]
fn interface_that_is_there_already_is_one_line_and_status_1() {
    let net = Net::up(&[]);
    let pid = net.guest.pid().to_string();
    run(&mut net.world.tapgate(&["attach", &pid, "tap0"])).assert_runtime_error("tap0");
    assert_connected(&net.world, &net.guest);
}

#[test]
fn wrong_usage_exits_2() {
    let world = World::new();
    for wrong in [
        &["attach"][..],
        &["attach", "--ready-fd", "x", "1"],
        &["attach", "1", "a", "b"],
    ] {
        let finished = run(&mut world.tapgate(wrong));
        assert_eq!(finished.code(), 2, "{wrong:?}: {finished:?}");
    }
    let name = "a-name-of-more-than-15";
    let finished = run(&mut world.tapgate(&["attach", "1", name]));
    assert_eq!(finished.code(), 2, "{finished:?}");
}

#[test]
fn json_log_is_json() {
    let net = Net::up(&["-vvv", "--log-format", "json"]);
    assert_connected(&net.world, &net.guest);
    let log = net.tapgate.log();
    assert!(!log.is_empty(), "-vvv says something");
    for line in log.lines() {
        assert!(line.starts_with('{') && line.ends_with('}'), "{line}");
    }
}

#[test]
fn dhcp_client_gets_the_first_lease_and_the_networks_parameters() {
    let world = World::new();
    world.set_resolv_conf("nameserver 127.0.0.1\nsearch corp.example\n");
    let script = world.file(
        "udhcpc.sh",
        "#!/bin/sh
        [ \"$1\" = bound ] && echo \"ip=$ip mask=$subnet router=$router dns=$dns mtu=$mtu \\
        search=$search lease=$lease server=$serverid\"
        exit 0\n",
    );
    let net = Net::up_in(world, &["--mtu", "4000"]);
    let script = script.to_str().unwrap();
    let client = [
        "-f", "-q", "-n", "-i", "tap0", "-O", "mtu", "-O", "search", "-s", script,
    ];
    let bound = net.guest.run("udhcpc", &client).output();
    for wanted in [
        "ip=10.0.2.15",
        "mask=255.255.255.0",
        "router=10.0.2.2",
        "dns=10.0.2.3",
        "mtu=4000",
        "search=corp.example",
        "server=10.0.2.2",
    ] {
        assert!(bound.contains(wanted), "{wanted}: {bound}");
    }
}

#[test]
fn leased_address_works_and_is_given_again() {
    let net = Net::up(&[]);
    net.guest
        .run("ip", &["address", "flush", "dev", "tap0"])
        .output();
    let script = net.world.file(
        "udhcpc.sh",
        "#!/bin/sh
        [ \"$1\" = bound ] || exit 0
        ip address replace $ip/24 dev $interface && ip route replace default via $router\n",
    );
    let script = script.to_str().unwrap();
    for _ in 0..2 {
        net.guest
            .run("udhcpc", &["-f", "-q", "-n", "-i", "tap0", "-s", script])
            .output();
        let addresses = net
            .guest
            .run("ip", &["-o", "-4", "address", "show", "tap0"])
            .output();
        assert!(addresses.contains("10.0.2.15/24"), "{addresses}");
    }
    assert_connected(&net.world, &net.guest);
}
