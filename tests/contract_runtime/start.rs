//! The numbered behaviours of contract 3.1 until the network is ready, and how a start fails.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::time::Instant;

use crate::support::attached::pipe;
use crate::support::guest::Guest;
use crate::support::process::{fail, run};
use crate::support::slirp4netns::{Api, Call, Served, read_ready};
use crate::support::world::World;
use crate::support::{SOON, wait_until};

/// Contract 3.1, behaviour 1: "stay in foreground, keep the caller's netns".
#[test]
fn it_stays_in_the_foreground_and_in_the_hosts_network() {
    let mut net = Served::with(&["--enable-sandbox"]);
    assert!(net.slirp4netns.try_status().is_none(), "in the foreground");
    let network = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
    assert_eq!(network(net.slirp4netns.pid()), network(net.world.pid()));
    assert_ne!(network(net.slirp4netns.pid()), network(net.guest.pid()));
}

/// Contract 3.1, behaviour 2: "lo UP, tap UP, MTU, net+100/prefix, default via net+2. Must be finished
/// before ready", and 3.11 item 4. Clusters of options as in 3.1.
#[test]
fn everything_is_configured_when_ready_is_said() {
    let world = World::new();
    let guest = Guest::new(&world);
    let pid = guest.pid().to_string();
    let arguments = [
        "-c6m",
        "1432",
        &pid,
        "tap7",
        "-r3",
        "--cidr=192.168.64.0/18",
    ];
    let _slirp4netns = Call::new(&world, &arguments).ready_at(3);
    let shown = guest
        .run("sh", &["-c", "ip -o -4 address; ip -o link; ip route"])
        .output();
    for wanted in [
        "127.0.0.1/8",
        "192.168.64.100/18",
        "mtu 1432",
        "default via 192.168.64.2 dev tap7",
    ] {
        assert!(shown.contains(wanted), "{wanted}: {shown}");
    }
    for interface in [" lo:", " tap7:"] {
        let mut lines = shown.lines().filter(|line| line.contains("mtu"));
        let line = lines.find(|line| line.contains(interface)).unwrap();
        assert!(line.contains("UP"), "{line}");
    }
}

/// A guest that looks for no duplicates, as podman has it until ready is said.
fn trusting_guest(world: &World) -> Guest {
    let guest = Guest::new(world);
    let switch = "echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad";
    guest.run("sh", &["-ec", switch]).output();
    guest
}

/// The guest's address that begins like this, as `ip` shows it.
fn address_inside(guest: &Guest, beginning: &str) -> Option<String> {
    let shown = guest.run("ip", &["-6", "-o", "address", "show", "tap0"]);
    let shown = shown.output();
    let address = shown.lines().find(|line| line.contains(beginning));
    address.map(str::to_owned)
}

/// The address is settled, and nobody was asked whether it is another's. The kernel settles it in a work
/// queue, a moment after it was given.
#[track_caller]
fn assert_settled_unasked(guest: &Guest, beginning: &str) {
    wait_until("an address that is settled", SOON, || {
        address_inside(guest, beginning).filter(|address| !address.contains("tentative"))
    });
    let counters = guest.run("cat", &["/proc/net/dev_snmp6/tap0"]).output();
    let mut lines = counters.lines().map(str::split_whitespace);
    let asked = lines.find_map(|mut words| {
        (words.next() == Some("Icmp6OutNeighborSolicits"))
            .then(|| words.next().map(str::to_owned))?
    });
    assert_eq!(asked.as_deref(), Some("0"), "{counters}");
}

/// Contract 3.1, behaviour 3: podman turns duplicate detection off "until ready", so the tap has to be up
/// by then.
#[test]
fn link_local_address_waits_for_no_duplicate_detection() {
    let world = World::new();
    let guest = trusting_guest(&world);
    let pid = guest.pid().to_string();
    let _slirp4netns = Call::new(&world, &["-c", "-6", "-r", "3", &pid, "tap0"]).ready_at(3);
    assert_settled_unasked(&guest, "inet6 fe80:");
}

/// The guest is told of its prefix before ready is said.
#[test]
fn made_up_address_is_there_when_ready_is_said() {
    let world = World::new();
    let guest = trusting_guest(&world);
    let pid = guest.pid().to_string();
    let _slirp4netns = Call::new(&world, &["-c", "-6", "-r", "3", &pid, "tap0"]).ready_at(3);
    let address = address_inside(&guest, "inet6 fd00:");
    assert!(address.is_some_and(|address| address.contains("/64")));
    assert_settled_unasked(&guest, "inet6 fd00:");
}

/// Contract 3.1, behaviour 4: one byte and the end; the API answers at that time.
#[test]
fn ready_is_said_once_when_the_api_answers() {
    let world = World::new();
    let guest = Guest::new(&world);
    let pid = guest.pid().to_string();
    let (ready, write_end) = pipe();
    let arguments = ["-c", "-r", "3", "-a", "/mnt/api.sock", &pid, "tap0"];
    let _running = Call::new(&world, &arguments).pass(&write_end, 3).start();
    drop(write_end);
    let mut byte = [0];
    let mut file = fs::File::from(ready.try_clone().unwrap());
    file.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"1");
    let api = Api::new(&world, "api.sock");
    api.connect().expect("it listens already");
    assert!(api.list().is_empty());
    assert_eq!(read_ready(&ready), "", "and then the end");
}

/// Contract 3.1, behaviour 4: the reader "treats EOF as error"; 7: the reason is printed.
#[test]
fn failed_start_is_never_ready_and_says_why() {
    let world = World::new();
    let (ready, write_end) = pipe();
    let arguments = ["-c", "-r", "3", "-a", "/mnt/api.sock", "4194303", "tap0"];
    let running = Call::new(&world, &arguments).pass(&write_end, 3).start();
    drop(write_end);
    assert_eq!(read_ready(&ready), "");
    running.finish(SOON).assert_runtime_error("4194303");
    assert!(!Api::new(&world, "api.sock").path().exists());
}

/// Contract 3.1, behaviour 4: podman waits for the socket file, so it appears only when it works; its
/// owner alone may use it.
#[test]
fn api_socket_appears_when_it_works_and_is_the_owners() {
    let world = World::new();
    let guest = Guest::new(&world);
    let pid = guest.pid().to_string();
    let api = Api::new(&world, "api.sock");
    let running = Call::new(&world, &["-c", "-a", "/mnt/api.sock", &pid, "tap0"]).start();
    let deadline = Instant::now() + SOON;
    let mut client = loop {
        match api.connect() {
            Ok(client) => break client,
            Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound, "{error}"),
        }
        assert!(Instant::now() < deadline, "{:?}", running.said());
    };
    let metadata = fs::metadata(api.path()).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o600);
    client.write_all(b"{}").unwrap();
    assert!(client.read(&mut [0; 64]).unwrap() > 0, "an answer");
}

/// Contract 3.2, API: "unlink old path, listen".
#[test]
fn stale_api_socket_is_replaced_and_nothing_else() {
    let world = World::new();
    let guest = Guest::new(&world);
    let pid = guest.pid().to_string();
    let api = Api::new(&world, "api.sock");
    drop(std::os::unix::net::UnixListener::bind(api.path()).unwrap());
    // A process that another test is starting may hold the listener for a moment longer.
    wait_until("a stale socket", SOON, || {
        api.connect().is_err().then_some(())
    });
    let arguments = ["-c", "-r", "3", "-a", "/mnt/api.sock", &pid, "tap0"];
    let slirp4netns = Call::new(&world, &arguments).ready_at(3);
    assert!(api.list().is_empty());
    slirp4netns.signal(nix::sys::signal::Signal::SIGTERM);
    slirp4netns.finish(SOON);

    world.file("precious", "text");
    let arguments = ["-c", "-a", "/mnt/precious", &pid, "tap0"];
    let refused = Call::new(&world, &arguments).start().finish(SOON);
    refused.assert_runtime_error("/mnt/precious");
    let precious = fs::metadata(world.dir().join("precious")).unwrap();
    assert!(!precious.file_type().is_socket() && precious.len() == 4);
}

/// Contract 3.1, behaviours 5 and 7: who comes second hears why, and the first is not disturbed.
#[test]
fn second_instance_on_a_tap_is_one_line_and_leaves_the_first_alone() {
    let net = Served::with(&[]);
    let pid = net.guest.pid().to_string();
    let id = net.api.publish("tcp", 8080, 80);
    let inode = |api: &Api| std::os::unix::fs::MetadataExt::ino(&fs::metadata(api.path()).unwrap());
    let before = inode(&net.api);
    let (ready, write_end) = pipe();
    let arguments = [
        "-c",
        "-r",
        "3",
        "--api-socket",
        "/mnt/api.sock",
        &pid,
        "tap0",
    ];
    let second = Call::new(&net.world, &arguments)
        .pass(&write_end, 3)
        .start();
    drop(write_end);
    assert_eq!(read_ready(&ready), "");
    second.finish(SOON).assert_runtime_error("tap0");
    assert_eq!(inode(&net.api), before, "the same socket");
    assert_eq!(net.api.list()[0]["id"], id);
}

/// Contract 3.1, behaviour 7: "do not depend on a tty or stdin", nor on any standard descriptor.
#[test]
fn closed_standard_descriptors_do_not_matter() {
    let world = World::new();
    let guest = Guest::new(&world);
    let pid = guest.pid().to_string();
    let closing = ["sh", "-c", "exec \"$@\" <&- >&- 2>&-", "sh"];
    let arguments = ["-c", "-r", "3", "-a", "/mnt/api.sock", &pid, "tap0"];
    let _slirp4netns = Call::new(&world, &arguments).by(&closing).ready_at(3);
    assert!(Api::new(&world, "api.sock").list().is_empty());
    guest.run("ping", &["-c1", "-W5", "10.0.2.2"]).output();
}

/// Contract 3.1, behaviour 8: podman has made a user namespace (we are root there) and private mounts.
#[test]
fn sandbox_works_as_root_of_podmans_user_namespace() {
    let world = World::new();
    Call::new(&world, &[]);
    let script = "
        touch /tmp/netns; unshare --net=/tmp/netns true
        mkfifo /tmp/ready
        /mnt/slirp4netns --disable-host-loopback --mtu=65520 --enable-sandbox --enable-seccomp \\
            -c -r 3 --netns-type=path /tmp/netns tap0 3>/tmp/ready &
        read -r ready < /tmp/ready || [ \"$ready\" = 1 ]
        grep -E '^(Seccomp|NoNewPrivs|CapEff):' /proc/$!/status
        nsenter --net=/tmp/netns ping -c1 -W5 10.0.2.2 >/dev/null && echo reached
        kill $!; wait $!; echo status $?";
    let mut unshare = world.command("unshare");
    let output = run(unshare.args(["-Urm", "sh", "-c", script])).output();
    // CAP_NET_BIND_SERVICE, for ports below 1024, is the tenth.
    let capabilities = output
        .lines()
        .next()
        .and_then(|line| line.strip_prefix("CapEff:\t"));
    let capabilities = u64::from_str_radix(capabilities.unwrap_or(&output), 16).unwrap();
    assert_eq!(capabilities & !(1 << 10), 0, "{output}");
    let rest: Vec<&str> = output.lines().skip(1).collect();
    assert_eq!(
        rest,
        ["NoNewPrivs:\t1", "Seccomp:\t2", "reached", "status 0"]
    );
}

/// Contract 3.1, options: what can't be done is one line, and names the option.
#[test]
fn wrong_outbound_address_is_one_line() {
    let world = World::new();
    let guest = Guest::new(&world);
    let pid = guest.pid().to_string();
    for wrong in ["203.0.113.77", "nodev9"] {
        let arguments = [
            "-c",
            "--outbound-addr",
            wrong,
            "-a",
            "/mnt/api.sock",
            &pid,
            "tap0",
        ];
        let refused = Call::new(&world, &arguments).start().finish(SOON);
        refused.assert_runtime_error(wrong);
        if Api::new(&world, "api.sock").path().exists() {
            fail("no socket stays");
        }
    }
}

/// Contract 3.1, options: descriptors that are none end it before anything is made.
#[test]
fn descriptor_that_is_not_open_is_one_line() {
    let world = World::new();
    let guest = Guest::new(&world);
    let pid = guest.pid().to_string();
    for option in ["-r", "-e"] {
        let arguments = ["-c", option, "9", &pid, "tap0"];
        let refused = Call::new(&world, &arguments).start().finish(SOON);
        refused.assert_runtime_error("9");
        assert!(!guest.run("ip", &["link", "show", "tap0"]).status.success());
    }
}
