//! The broker, which stays outside the sandbox, on a real kernel as an unprivileged user: that nobody
//! gets into it, that its end or silence costs no more than it must, and that callers who pass odd
//! descriptors or signal settings get what they mean.

#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking, also inside a helper"
)]

mod support;

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::attached::{Attached, Net, pipe};
use support::guest::Guest;
use support::process::{run, state_of};
use support::serve;
use support::sockets::Sockets;
use support::world::World;
use support::{GATEWAY, LOOPBACK, SOON, at, timed, wait_until};

/// The children of a process, by their names in proc(5).
fn children(pid: i32) -> Vec<(i32, String)> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|child: i32| {
        let stat = fs::read_to_string(format!("/proc/{child}/stat")).ok()?;
        let (name, rest) = stat.rsplit_once(')')?;
        let parent: i32 = rest.split_whitespace().nth(1)?.parse().ok()?;
        let name = name.split_once('(')?.1.to_owned();
        (parent == pid).then_some((child, name))
    })
    .collect()
}

/// The broker of a network.
fn broker_of(pid: i32) -> i32 {
    let children = children(pid);
    let broker = children.iter().find(|(_, name)| name == "tapgate-broker");
    broker.expect("it is the child of tapgate").0
}

#[track_caller]
fn assert_connected(net: &Net) {
    let echo = serve::tcp_echo(net.world.listen(at(LOOPBACK, 0)).unwrap());
    net.guest.connect(at(GATEWAY, echo.port())).unwrap();
}

#[test]
fn nobody_gets_into_the_broker() {
    let net = Net::up(&[]);
    let broker = broker_of(net.tapgate.pid());
    let mem = fs::metadata(format!("/proc/{broker}/mem")).unwrap();
    let own = fs::metadata("/proc/self/mem").unwrap();
    let root = 0;
    assert_eq!(mem.uid(), root, "not its user's own: {}", own.uid());
    let status = fs::read_to_string(format!("/proc/{broker}/status")).unwrap();
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
}

#[test]
fn network_lives_on_when_the_broker_is_killed() {
    let net = Net::up(&[]);
    kill(Pid::from_raw(broker_of(net.tapgate.pid())), Signal::SIGKILL).unwrap();
    wait_until("a word about it", SOON, || {
        net.tapgate.log().contains("broker is gone").then_some(())
    });
    assert_connected(&net);
    net.tapgate.signal(Signal::SIGTERM);
    assert_eq!(net.tapgate.finish(SOON).code(), 0);
}

#[test]
fn stuck_broker_delays_neither_packets_nor_the_end_for_long() {
    let net = Net::up(&[]);
    let broker = Pid::from_raw(broker_of(net.tapgate.pid()));
    kill(broker, Signal::SIGSTOP).unwrap();
    wait_until("the broker to stop", SOON, || {
        (state_of(broker.as_raw()) == Some('T')).then_some(())
    });
    // The query waits for the broker a moment; what comes after it does not.
    net.guest
        .run("dig", &["+tries=1", "+time=1", "@10.0.2.3", "name.example"]);
    let (took, ()) = timed(|| assert_connected(&net));
    assert!(took < Duration::from_secs(2), "took {took:?}");
    net.tapgate.signal(Signal::SIGTERM);
    let (took, finished) = timed(|| net.tapgate.finish(SOON));
    assert_eq!(finished.code(), 0, "{finished:?}");
    assert!(took < Duration::from_secs(10), "took {took:?}");
    kill(broker, Signal::SIGKILL).unwrap();
}

#[test]
fn broker_is_gone_and_reaped_before_tapgate_is() {
    let Net {
        tapgate,
        guest: _guest,
        world: _world,
    } = Net::up(&[]);
    let broker = broker_of(tapgate.pid());
    tapgate.signal(Signal::SIGTERM);
    tapgate.finish(SOON);
    assert_eq!(state_of(broker), None, "nobody is left to reap it");
}

#[test]
fn exit_descriptor_that_can_not_hang_up_ends_nothing() {
    let world = World::new();
    let guest = Guest::new(&world);
    let null = fs::File::open("/dev/null").unwrap();
    let number = null.as_raw_fd().to_string();
    let pid = guest.pid().to_string();
    let arguments = ["--exit-fd", &number, &pid];
    let tapgate = Attached::start_with(&world, &arguments, vec![Arc::new(null.into())]);
    let net = Net {
        tapgate,
        guest,
        world,
    };
    assert_connected(&net);
}

#[test]
fn odd_descriptors_are_refused_before_anything_is_made() {
    let world = World::new();
    let guest = Guest::new(&world);
    let pid = guest.pid().to_string();
    let (read, write) = pipe();
    let (read, write) = (Arc::new(read), write);
    let (reading, writing) = (read.as_raw_fd().to_string(), write.as_raw_fd().to_string());
    for (arguments, text) in [
        (
            ["--ready-fd", &writing, "--exit-fd", &writing],
            "named twice",
        ),
        (
            ["--ready-fd", &reading, "--exit-fd", &writing],
            "--ready-fd",
        ),
        (
            ["--ready-fd", "999", "--exit-fd", &reading],
            "--ready-fd 999",
        ),
    ] {
        let inherit = vec![Arc::clone(&read), Arc::clone(&write)];
        let mut command = world.tapgate_with(&["attach"], inherit);
        run(command.args(arguments).arg(&pid)).assert_runtime_error(text);
    }
    let left = guest.run("ip", &["link", "show", "tap0"]);
    assert!(!left.status.success(), "no interface was made: {left:?}");
}

#[test]
fn standard_output_may_be_the_ready_descriptor() {
    let world = World::new();
    let guest = Guest::new(&world);
    let script = format!(
        "/mnt/tapgate slirp4netns -c -r 1 {} tap0 | {{ cat; echo ' and closed'; }}",
        guest.pid()
    );
    let mut shell = support::process::Running::start(world.command("sh").args(["-c", &script]));
    shell.wait_for_output("1 and closed");
}

#[test]
fn caller_that_ignores_its_children_still_hears_of_the_command() {
    let world = World::new();
    let script = "import os, signal
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
os.execv('/mnt/tapgate', ['tapgate', 'run', '--', 'sh', '-c', 'exit 7'])";
    let mut command = world.command("/usr/bin/python3");
    assert_eq!(run(command.args(["-c", script])).code(), 7);
}

#[test]
fn command_dies_with_a_killed_broker_and_nothing_is_left() {
    let world = World::new();
    let mark = support::process::Mark::new();
    let running = world.start_inside(&[], &format!("sleep {mark}"));
    support::process::wait_for_sleep(&mark);
    kill(Pid::from_raw(broker_of(running.pid())), Signal::SIGKILL).unwrap();
    let finished = running.finish(SOON);
    assert_eq!(finished.code(), 1, "{finished:?}");
    assert!(finished.stderr.contains("broker"), "{finished:?}");
    support::process::wait_until_gone(&mark);
}
