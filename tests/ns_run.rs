//! `tapgate run` on a real kernel, as an unprivileged user: who the command is, what its network
//! and resolver look like, and whose exit status comes back. How it all ends is in `ns_end.rs`, the
//! terminal in `ns_terminal.rs`.

mod support;

use std::fs;
use std::net::Ipv4Addr;
use std::process::Command;

use support::dns::Resolver;
use support::process::{Running, run};
use support::sockets::Sockets;
use support::sys::Plan;
use support::world::World;
use support::{LOOPBACK, SOON, at, serve, user};

#[test]
fn page_of_the_hosts_loopback_is_reached_through_the_gateway() {
    let world = World::new();
    let page = serve::page(
        world.listen(at(LOOPBACK, 0)).unwrap(),
        "a page of the host\n",
    );
    let url = format!("http://10.0.2.2:{}/", page.port());
    let command = ["run", "--", "curl", "-s", "--max-time", "15", &url];
    assert_eq!(
        run(&mut world.tapgate(&command)).output(),
        "a page of the host\n"
    );
}

#[test]
fn exit_status_is_the_commands() {
    let world = World::new();
    for (script, status) in [
        ("exit 0", 0),
        ("exit 7", 7),
        ("kill -TERM $$", 128 + libc::SIGTERM),
        ("kill -KILL $$", 128 + libc::SIGKILL),
        ("kill -HUP $$", 128 + libc::SIGHUP),
    ] {
        let finished = world.start_inside(&[], script).finish(SOON);
        assert_eq!(finished.code(), status, "{script}: {finished:?}");
    }
}

#[test]
fn shell_of_the_environment_is_the_default_command() {
    let world = World::new();
    let shell = world.file("shell", "#!/bin/sh\necho the default shell, as $(id -u)\n");
    let mut command = world.tapgate(&["run"]);
    command.env("SHELL", shell);
    assert_eq!(run(&mut command).output(), "the default shell, as 0\n");
}

#[test]
fn command_that_is_not_there_fails_with_its_name() {
    let world = World::new();
    let finished = run(&mut world.tapgate(&["run", "--", "no-such-program"]));
    assert!(!finished.status.success(), "{finished:?}");
    assert!(finished.stderr.contains("no-such-program"), "{finished:?}");
}

#[test]
fn wrong_usage_exits_2() {
    let world = World::new();
    for wrong in [
        ["--mtu", "575"],
        ["--mtu", "65522"],
        ["--subnet", "10.0.2.0/33"],
        ["--mac", "01:02"],
        ["--publish", "80"],
        ["--publish", "8000-8003:9000-9001"],
        ["--dns", "nobody"],
        ["--offload", "maybe"],
        ["--no-such-option", "1"],
    ] {
        let mut command = world.tapgate(&["run"]);
        let finished = run(command.args(wrong).args(["--", "true"]));
        assert_eq!(finished.code(), 2, "{wrong:?}: {finished:?}");
        assert!(!finished.stderr.is_empty(), "{wrong:?} is explained");
    }
}

#[test]
fn caller_is_root_inside_or_keeps_its_id() {
    let world = World::new();
    let (uid, gid) = user::ids();
    assert_eq!(world.run_inside(&[], "id -u; id -g"), "0\n0\n");
    let kept = world.run_inside(&["--map", "user"], "id -u; id -g");
    assert_eq!(kept, format!("{uid}\n{gid}\n"));
}

#[test]
fn map_auto_adds_the_subordinate_ids() {
    if !user::has_program("newuidmap") || !user::has_subordinate_ids() {
        println!(
            "skipped: {:?} has no newuidmap or no line in /etc/subuid",
            user::ids()
        );
        return;
    }
    // In a world only one user exists, so newuidmap isn't root there: this runs on the machine.
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(
        folder.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let mut command = Command::new(user::stage_binary(folder.path()));
    user::plain_environment(&mut command);
    user::plan().attach_to(&mut command);
    command.args(["run", "--map", "auto", "--", "cat", "/proc/self/uid_map"]);
    let map = run(&mut command).output();
    let total: u64 = map
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2)?.parse::<u64>().ok())
        .sum();
    assert!(map.trim_start().starts_with('0') && total > 1, "{map}");
}

#[test]
fn network_is_configured_when_the_command_starts() {
    let world = World::new();
    let network = "ip -o -4 address show; ip -o link show; ip route show";
    let shown = world.run_inside(&[], network);
    for wanted in [
        "inet 127.0.0.1/8",
        "inet 10.0.2.100/24",
        "mtu 1500",
        "default via 10.0.2.2 dev tap0",
        "10.0.2.0/24 dev tap0",
    ] {
        assert!(shown.contains(wanted), "{wanted}: {shown}");
    }
    for interface in ["lo:", "tap0:"] {
        let line = shown
            .lines()
            .find(|line| line.contains(interface) && line.contains("mtu"));
        assert!(
            line.is_some_and(|line| line.contains("UP")),
            "{interface} is up: {shown}"
        );
    }
}

#[test]
fn options_change_the_network() {
    let world = World::new();
    let options = [
        "--subnet",
        "10.77.8.0/24",
        "--ifname",
        "eth7",
        "--mtu",
        "9000",
    ];
    let options = [&options[..], &["--mac", "02:00:5e:10:00:07"]].concat();
    let shown = world.run_inside(
        &options,
        "ip -o -4 address; ip -o link; ip route; cat /etc/resolv.conf",
    );
    for wanted in [
        "inet 10.77.8.100/24",
        "mtu 9000",
        "link/ether 02:00:5e:10:00:07",
        "default via 10.77.8.2 dev eth7",
        "nameserver 10.77.8.3",
    ] {
        assert!(shown.contains(wanted), "{wanted}: {shown}");
    }
}

#[test]
fn resolv_conf_names_the_gateways_resolver_with_the_hosts_search_list() {
    let world = World::new();
    let on_host = "nameserver 127.0.0.1\nsearch corp.example lab.example\noptions ndots:2\n";
    world.set_resolv_conf(on_host);
    let inside = world.run_inside(&[], "cat /etc/resolv.conf");
    assert_resolv_conf(&inside, "search corp.example lab.example");
    let after = fs::read_to_string(world.dir().join("etc/resolv.conf")).unwrap();
    assert_eq!(after, on_host, "the host's own file stays as it was");
}

#[test]
fn resolv_conf_may_be_a_link_to_a_link() {
    let world = World::new();
    world.file(
        "stub.conf",
        "nameserver 127.0.0.53\nsearch linked.example\n",
    );
    world.link("middle.conf", "stub.conf");
    world.link_resolv_conf("../mnt/middle.conf");
    let inside = world.run_inside(&[], "cat /etc/resolv.conf");
    assert_resolv_conf(&inside, "search linked.example");
    let target = fs::read_link(world.dir().join("etc/resolv.conf")).unwrap();
    assert_eq!(
        target.to_str(),
        Some("../mnt/middle.conf"),
        "the link stays a link"
    );
}

#[test]
fn resolv_conf_may_be_missing_or_a_dangling_link() {
    let world = World::new();
    fs::remove_file(world.dir().join("etc/resolv.conf")).unwrap();
    let inside = world.run_inside(&[], "cat /etc/resolv.conf");
    assert!(inside.contains("nameserver 10.0.2.3"), "{inside}");
    world.link_resolv_conf("/run/no/such/file");
    let inside = world.run_inside(&[], "cat /etc/resolv.conf");
    assert!(inside.contains("nameserver 10.0.2.3"), "{inside}");
}

/// A mount over the file alone would be gone once the host has renamed another over it.
#[test]
fn resolv_conf_inside_outlives_a_new_one_on_the_host() {
    let world = World::new();
    world.set_resolv_conf("nameserver 192.0.2.1\nsearch before.example\n");
    let script = "echo ready; while [ ! -e /mnt/go ]; do sleep 0.02; done; cat /etc/resolv.conf";
    let mut running = world.start_inside(&[], script);
    running.wait_for_output("ready");
    world.set_resolv_conf("nameserver 192.0.2.2\n");
    world.file("go", "");
    let inside = running.finish(std::time::Duration::from_secs(10)).output();
    assert_resolv_conf(&inside, "search before.example");
}

#[test]
fn short_name_resolves_through_the_search_list() {
    let world = World::new();
    let addr = Ipv4Addr::new(192, 0, 2, 77);
    let resolver = Resolver::start(&world, at(LOOPBACK, 53), addr);
    world.set_resolv_conf("nameserver 127.0.0.1\nsearch corp.example\n");
    let found = world.run_inside(&[], "getent ahostsv4 wiki");
    assert!(found.starts_with("192.0.2.77"), "{found}");
    let names: Vec<_> = resolver
        .questions()
        .into_iter()
        .map(|question| question.name)
        .collect();
    assert!(names.contains(&"wiki.corp.example".to_owned()), "{names:?}");
}

#[test]
fn published_port_leads_to_the_command() {
    let world = World::new();
    let script = "echo serving; exec socat -u TCP-LISTEN:80,reuseaddr STDOUT";
    let mut running = world.start_inside(&["-p", "8080:80"], script);
    running.wait_for_output("serving");
    support::wait_until("the published port to answer", SOON, || {
        use std::io::Write;
        let mut stream = world.connect(at(LOOPBACK, 8080)).ok()?;
        stream.write_all(b"through the port\n").ok()?;
        drop(stream);
        let (stdout, _) = running.said();
        stdout.contains("through the port").then_some(())
    });
}

#[test]
fn two_runs_side_by_side_do_not_meet() {
    let world = World::new();
    let mut first = world.start_inside(&[], "echo up; exec sleep 600");
    first.wait_for_output("up");
    assert_eq!(world.run_inside(&[], "echo second"), "second\n");
    assert!(first.try_status().is_none(), "the first goes on");
}

#[test]
fn environment_and_working_folder_are_the_callers() {
    let world = World::new();
    world.set_up("mkdir -p /mnt/here && chmod 777 /mnt/here");
    let mut command = world.command("sh");
    let script = "cd /mnt/here && TAPGATE_TEST=kept exec /mnt/tapgate run -- sh -c 'pwd; echo $TAPGATE_TEST'";
    assert_eq!(
        run(command.args(["-c", script])).output(),
        "/mnt/here\nkept\n"
    );
}

#[test]
fn harness_runs_its_commands_without_privilege() {
    let world = World::new();
    let status = run(world.command("cat").arg("/proc/self/status")).output();
    let effective = status
        .lines()
        .find(|line| line.starts_with("CapEff"))
        .unwrap();
    assert!(effective.ends_with("0000000000000000"), "{effective}");
    let plan = Plan {
        keep_capabilities: true,
        ..world.plan().clone()
    };
    let mut command = world.command_with("cat", plan);
    let running = Running::start(command.arg("/proc/self/status"));
    assert!(
        !running
            .finish(SOON)
            .output()
            .contains("CapEff:\t0000000000000000")
    );
}

#[track_caller]
fn assert_resolv_conf(inside: &str, search: &str) {
    let lines = |word: &str| -> Vec<&str> {
        inside
            .lines()
            .filter(|line| line.split_whitespace().next() == Some(word))
            .collect()
    };
    assert_eq!(lines("nameserver"), ["nameserver 10.0.2.3"], "{inside}");
    assert_eq!(lines("search"), [search], "{inside}");
}
