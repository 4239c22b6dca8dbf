//! The sandbox on a real kernel, as an unprivileged user: what is left of the process that carries
//! packets, that it can't get out, that resolvers are followed from within, and that the list of system
//! calls is neither too short (every other test would fail) nor too long.

#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking, also inside a helper"
)]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, Read, Write};

use nix::sys::signal::Signal;
use support::attached::{Attached, Net};
use support::bulk;
use support::dns::Resolver;
use support::guest::Guest;
use support::process::{Running, run};
use support::serve;
use support::slirp4netns::{Api, Call, Slirp4netns};
use support::sockets::Sockets;
use support::world::World;
use support::{GATEWAY, GUEST, LOOPBACK, RESOLVER, SOON, WORLD_A, at, wait_until};
use tapgate::setup::system_calls::{CALLS, Call as SystemCall, OPENER};

/// A field of `/proc/PID/status`.
fn status(pid: i32, field: &str) -> String {
    let text =
        fs::read_to_string(format!("/proc/{pid}/status")).expect("it is there for everybody");
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let value = line.and_then(|line| line.strip_prefix(':'));
    value.unwrap_or_default().trim().to_owned()
}

#[track_caller]
fn assert_powerless(pid: i32) {
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        let bits = u64::from_str_radix(&status(pid, set), 16).expect("a hexadecimal number");
        // CAP_NET_BIND_SERVICE is the tenth.
        assert_eq!(bits & !(1 << 10), 0, "{set}: {bits:x}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    assert_eq!(status(pid, "Seccomp"), "2", "a filter");
}

/// Under slirp4netns's name, where its own user may look at it.
fn start_visible(world: &World, guest: &Guest, options: &[&str]) -> Slirp4netns {
    let pid = guest.pid().to_string();
    let arguments = [&["-c", "-r", "3"], options, &[&pid, "tap0"]].concat();
    Call::new(world, &arguments).ready_at(3)
}

#[test]
fn nothing_of_the_host_is_left_to_see() {
    let world = World::new();
    let guest = Guest::new(&world);
    for options in [&["--enable-sandbox", "--enable-seccomp"][..], &[]] {
        let tapgate = start_visible(&world, &guest, options);
        let root = format!("/proc/{}/root", tapgate.pid());
        let mut ls = world.command("find");
        let listed = run(ls.args([&format!("{root}/"), "-mindepth", "1"])).output();
        let seen: BTreeSet<&str> = listed
            .lines()
            .filter_map(|line| line.strip_prefix(&root))
            .collect();
        assert_eq!(seen, BTreeSet::from(["/etc", "/run"]), "both are empty");
        let mut touch = world.command("touch");
        let touched = run(touch.arg(format!("{root}/run/x")));
        assert!(touched.stderr.contains("Read-only"), "{touched:?}");
        tapgate.signal(Signal::SIGTERM);
        assert_eq!(tapgate.finish(SOON).code(), 0);
    }
}

#[test]
fn no_power_is_left_whatever_the_command_line() {
    let net = Net::up(&[]);
    assert_powerless(net.tapgate.pid());
    let guest = Guest::new(&net.world);
    let slirp4netns = start_visible(&net.world, &guest, &[]);
    assert_powerless(slirp4netns.pid());
    let mut running = net.world.start_inside(&[], "echo ready; exec sleep 60");
    running.wait_for_output("ready");
    assert_powerless(running.pid());
}

#[test]
fn sandbox_can_be_left_out() {
    let net = Net::up(&["--sandbox", "off"]);
    assert_eq!(status(net.tapgate.pid(), "Seccomp"), "0");
    assert_eq!(
        status(net.tapgate.pid(), "NoNewPrivs"),
        "0",
        "{}",
        net.tapgate.log()
    );
}

#[test]
fn what_the_caller_left_open_is_closed_but_for_a_command() {
    let world = World::new();
    let guest = Guest::new(&world);
    let script = format!(
        "exec 9</etc/passwd; exec /mnt/tapgate slirp4netns -c -a /mnt/visible.sock {} tap0",
        guest.pid()
    );
    let tapgate = Running::start(world.command("sh").args(["-c", &script]));
    let api = Api::new(&world, "visible.sock");
    wait_until("the API to answer", SOON, || api.try_ask("{}").ok());
    let pid = tapgate.pid();
    let mut ls = world.command("ls");
    let open = run(ls.args(["-l", &format!("/proc/{pid}/fd")])).output();
    assert!(!open.contains("passwd"), "{open}");
    let mut command = world.command("sh");
    let script = "exec 9</etc/passwd; exec /mnt/tapgate run -- head -c4 /proc/self/fd/9";
    assert_eq!(run(command.args(["-c", script])).output(), "root");
}

/// Only a debug build can be asked to try.
#[cfg(debug_assertions)]
mod escape {
    use super::*;

    fn attempt(world: &World, name: &str, filtered: bool) -> support::process::Finished {
        let mut command = world.tapgate(&["run", "--", "true"]);
        command.env("TAPGATE_ESCAPE", name);
        // To tell more of a panic the runtime would open files.
        command.env("RUST_BACKTRACE", "0");
        if !filtered {
            command.env("TAPGATE_ESCAPE_UNFILTERED", "1");
        }
        run(&mut command)
    }

    #[test]
    fn any_call_that_leads_out_ends_the_process() {
        let world = World::new();
        for name in [
            "open", "create", "execve", "ptrace", "kill", "mount", "netlink", "packet", "unix",
            "fork",
        ] {
            let ended = attempt(&world, name, true);
            assert_eq!(ended.code(), 128 + 31, "SIGSYS for {name}: {ended:?}");
        }
    }

    #[test]
    fn panic_says_where_it_was() {
        let ended = attempt(&World::new(), "panic", true);
        assert!(ended.stderr.contains("escape.rs:"), "{ended:?}");
        assert!(ended.stderr.contains("as it was asked for"), "{ended:?}");
        assert_eq!(ended.code(), 101, "{ended:?}");
    }

    #[test]
    fn other_walls_stand_without_the_filter() {
        let world = World::new();
        for (name, refusal) in [
            ("open", "No such file"),
            ("create", "Read-only"),
            ("execve", "No such file"),
            ("ptrace", "not permitted"),
            ("mount", "not permitted"),
            ("packet", "not permitted"),
        ] {
            let ended = attempt(&world, name, false);
            assert!(ended.stderr.contains(refusal), "{name}: {ended:?}");
        }
    }
}

/// Issue 3, must show 7: two links, one of them outside /etc and /run, and a rename.
#[test]
fn resolver_behind_two_links_is_followed_from_within() {
    let (first, second) = ([198, 18, 0, 1].into(), [198, 18, 0, 2].into());
    let loopback = |last| std::net::Ipv4Addr::new(127, 0, 0, last).into();
    let world = World::new();
    let _first = Resolver::start(&world, at(loopback(1), 53), first);
    let _second = Resolver::start(&world, at(loopback(2), 53), second);
    fs::create_dir(world.dir().join("deep")).unwrap();
    world.file("deep/real.conf", "nameserver 127.0.0.1\n");
    world.link("hop.conf", "deep/real.conf");
    world.link_resolv_conf("/mnt/hop.conf");
    let net = Net::up_in(world, &["--sandbox", "on"]);
    assert_eq!(status(net.tapgate.pid(), "Seccomp"), "2");
    let look_up = |name: &str| {
        let server = format!("@{RESOLVER}");
        let answer = net.guest.run("dig", &["+short", "+tries=1", &server, name]);
        answer.output().trim().to_owned()
    };
    assert_eq!(look_up("before.example"), first.to_string());
    net.world.file("deep/real.conf", "nameserver 127.0.0.2\n");
    assert_eq!(look_up("after.example"), second.to_string());
}

// --- the list of system calls --------------------------------------------------------------------

/// What strace wrote, line by line, with the thread's number. Short numbers are padded.
fn lines(trace: &str) -> impl Iterator<Item = (i32, &str)> {
    trace.lines().filter_map(|line| {
        let (number, rest) = line.split_once(' ')?;
        Some((number.parse().ok()?, rest.trim_start()))
    })
}

/// What it wrote of thread `pid`.
fn lines_of(trace: &str, pid: i32) -> impl Iterator<Item = &str> {
    lines(trace).filter_map(move |(number, line)| (number == pid).then_some(line))
}

/// Process `pid` and the threads that it began. Where a thread is begun by clone3(2), strace may not tell its flags;
/// processes begin by clone(2).
fn threads_of(trace: &str, pid: i32) -> Vec<i32> {
    let mut threads = vec![pid];
    let mut begins = false;
    for line in lines_of(trace, pid) {
        let resumes = begins && line.starts_with("<... clone");
        begins = line.starts_with("clone3(") || line.contains("CLONE_THREAD") || resumes;
        let number = line.rsplit_once(" = ").map(|(_, number)| number);
        threads.extend(
            number
                .filter(|_| begins)
                .and_then(|it| it.parse::<i32>().ok()),
        );
    }
    threads
}

/// The names of the calls that process `pid` made, in any of its threads, once its filter was on.
fn calls_behind_the_filter(trace: &str, pid: i32) -> BTreeSet<String> {
    let threads = threads_of(trace, pid);
    let behind = lines(trace)
        .skip_while(|(number, line)| *number != pid || !line.starts_with("seccomp("))
        .skip(1);
    let own = behind.filter(|(number, _)| threads.contains(number));
    let names = own.filter_map(|(_, line)| line.split_once('(').map(|(name, _)| name));
    names
        .filter(|name| {
            name.bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        })
        .map(str::to_owned)
        .collect()
}

/// Associations at once: their table is then larger than what the heap moves by copying.
const FLOWS: usize = 4000;

/// The host's port that leads past the tap.
const SPLICED: u16 = 8081;

/// Everything that a network does: each protocol in both directions, every kind of refusal, the API.
fn do_everything(net: &Net, api: &Api) {
    let host = &net.world;
    let bytes = bulk::server(host.listen(at(LOOPBACK, 0)).unwrap());
    for way in [bulk::Way::Up, bulk::Way::Down] {
        bulk::transfer(&net.guest, at(GATEWAY, bytes.port()), way, (4, 16 << 20));
    }
    let refused = net
        .guest
        .connect(at(GATEWAY, support::sockets::closed_port(host)));
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);
    let echo = serve::udp_echo(host.udp(at(WORLD_A, 0)).unwrap());
    let socket = net.guest.udp_to(echo.addr).unwrap();
    let mut buffer = [0; 2000];
    for size in [10, 1900] {
        socket.send(&vec![7; size]).unwrap();
        assert_eq!(socket.recv(&mut buffer).unwrap(), size);
    }
    let nobody = net
        .guest
        .udp_to(at(GATEWAY, support::sockets::closed_port(host)));
    let nobody = nobody.unwrap();
    nobody.send(b"x").unwrap();
    assert_eq!(
        nobody.recv(&mut buffer).unwrap_err().kind(),
        ErrorKind::ConnectionRefused
    );
    // A connection past the host's loopback is waited for.
    let distant = serve::tcp_echo(net.world.listen(at(WORLD_A, 0)).unwrap());
    let mut stream = net.guest.connect(distant.addr).unwrap();
    stream.write_all(b"ping").unwrap();
    stream.read_exact(&mut [0; 4]).unwrap();
    let outside = WORLD_A.to_string();
    net.guest.run("ping", &["-c1", "-W5", &outside]).output();
    for how in ["+notcp", "+tcp"] {
        let server = format!("@{RESOLVER}");
        net.guest
            .run("dig", &[how, &server, "name.example"])
            .output();
    }
    let script = format!(
        "import socket
for port in range(20000, 20000 + {FLOWS}):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(('', port))
        s.sendto(b'x', ('{}', {}))",
        echo.addr.ip(),
        echo.port()
    );
    net.guest.run("/usr/bin/python3", &["-c", &script]).output();
    // Each of them costs a dozen calls, and each call a stop by the tracer: the API may have to wait.
    wait_until("all of that to be carried", 4 * SOON, || {
        api.try_ask(r#"{"execute":"list_hostfwd"}"#).ok()
    });
    publish_and_use(net, api);
}

fn publish_and_use(net: &Net, api: &Api) {
    let _inside = serve::tcp_echo(net.guest.listen(at(GUEST, 80)).unwrap());
    let port = support::sockets::closed_port(&net.world);
    for proto in ["tcp", "udp"] {
        api.publish(proto, port, 80);
    }
    let mut stream = net.world.connect(at(WORLD_A, port)).unwrap();
    stream.write_all(b"ping").unwrap();
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).unwrap();
    support::sockets::reset(stream);
    let _udp = serve::udp_echo(net.guest.udp(at(GUEST, 80)).unwrap());
    let client = net.world.udp_to(at(WORLD_A, port)).unwrap();
    client.send(b"ping").unwrap();
    client.recv(&mut answer).unwrap();
    api.remove(2);
    // By the short cut, until nothing more fits.
    let _joined = bulk::server(net.guest.listen(at(LOOPBACK, 81)).unwrap());
    bulk::transfer(
        &net.world,
        at(LOOPBACK, SPLICED),
        bulk::Way::Up,
        (2, 4 << 20),
    );
}

#[test]
fn every_call_on_the_list_is_made() {
    let world = World::new();
    let _resolver = Resolver::start(&world, at(LOOPBACK, 53), [198, 18, 0, 1].into());
    let trace = world.dir().join("trace");
    let guest = Guest::new(&world);
    let pid = guest.pid().to_string();
    let strace = ["strace", "-D", "-f", "-o", "/mnt/trace"];
    fs::File::create(&trace).unwrap();
    let everyone = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    fs::set_permissions(&trace, everyone).unwrap();
    let options = ["-p", "8081:81", "--api-socket", "/mnt/api.sock", &pid];
    let tapgate = Attached::start_by(&world, &strace, &options);
    let own = tapgate.pid();
    let net = Net {
        tapgate,
        guest,
        world,
    };
    do_everything(&net, &Api::new(&net.world, "api.sock"));
    net.tapgate.signal(Signal::SIGTERM);
    let Net { tapgate, world, .. } = net;
    assert_eq!(tapgate.finish(SOON).code(), 0);
    let text = wait_until("the end of the trace", SOON, || {
        let text = fs::read_to_string(world.dir().join("trace")).ok()?;
        let ended = lines_of(&text, own).any(|line| line.starts_with("+++ exited"));
        ended.then_some(text)
    });
    assert_made(&text, own, CALLS);
    let opener = text.lines().find_map(|line| {
        let (pid, rest) = line.split_once(' ')?;
        let named = rest.contains("PR_SET_NAME") && rest.contains("tapgate-opener");
        named.then(|| pid.parse().ok())?
    });
    assert_made(&text, opener.expect("there is one"), OPENER);
}

/// Every call of a list that can be made everywhere was made by `pid`, and no other.
#[track_caller]
fn assert_made(trace: &str, pid: i32, list: &[SystemCall]) {
    let made = calls_behind_the_filter(trace, pid);
    let listed = list.iter().filter(|call| call.everywhere);
    let never: Vec<&str> = listed
        .map(|call| call.name)
        .filter(|name| !made.contains(*name))
        .collect();
    assert!(never.is_empty(), "listed but never made: {never:?}");
    let all: BTreeSet<&str> = list.iter().map(|call| call.name).collect();
    let unlisted: Vec<_> = made
        .iter()
        .filter(|name| !all.contains(name.as_str()))
        .collect();
    assert!(unlisted.is_empty(), "made but not listed: {unlisted:?}");
}
