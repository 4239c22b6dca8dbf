//! SIGKILL at random moments, with the real program: any of its processes, while it starts or later.
//!
//! In: a seed for each round, which says which process is killed, and when. Out: that no process, mount, file
//! or interface is left, and that the next start works on the same name, port, socket and namespace.

use std::fs;
use std::io::{Read, Write};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::attached::Attached;
use crate::support::guest::Guest;
use crate::support::process::{Mark, Running, marked, wait_until_gone};
use crate::support::slirp4netns::Api;
use crate::support::sockets::Sockets;
use crate::support::world::World;
use crate::support::{GATEWAY, LOOPBACK, SOON, at, serve, wait_until};
use crate::{Random, count};

/// A start takes some ten milliseconds; this is the time in which somebody is killed.
const MOMENTS_MICROS: usize = 30_000;

/// Kills one of the processes that have `mark`, at a moment of the generator's choice; says who it was.
fn kill_one(mark: &str, random: &mut Random) -> String {
    let micros = u64::try_from(random.below(MOMENTS_MICROS)).unwrap();
    // Nothing is waited for: this is the moment.
    thread::sleep(Duration::from_micros(micros));
    let victims = wait_until("a process to kill", SOON, || {
        Some(marked(mark)).filter(|found| !found.is_empty())
    });
    let (victim, _) = victims[random.below(victims.len())];
    let name = fs::read_to_string(format!("/proc/{victim}/comm")).unwrap_or_default();
    // It may have ended just now by itself.
    let _ = kill(Pid::from_raw(victim), Signal::SIGKILL);
    format!("{} after {micros} us", name.trim_end())
}

/// Kills the first process as well, if it has outlived the other one.
fn end(running: Running) {
    running.signal(Signal::SIGKILL);
    running.finish(SOON);
}

#[test]
fn killing_any_process_of_run_leaves_nothing() {
    let world = World::new();
    let before = world.traces();
    for round in 0..count(8, 100) {
        let mark = Mark::new();
        let options = ["-p", "8080:80", "--api-socket", "/tmp/api.sock"];
        let running = world.start_inside(&options, &format!("exec sleep {mark}"));
        let victim = kill_one(&mark, &mut Random::new(round as u64));
        end(running);
        wait_until_gone(&mark);
        // Who removes the socket may be the one who was killed.
        let _ = fs::remove_file(format!("/proc/{}/root/tmp/api.sock", world.pid()));
        assert_eq!(world.traces(), before, "{victim}");
        let shown = world.run_inside(&options, "ip -4 address show dev tap0");
        assert!(shown.contains("10.0.2.100"), "{victim}: {shown}");
    }
    assert_eq!(world.traces(), before);
}

#[test]
fn killing_any_process_of_attach_leaves_nothing() {
    let world = World::new();
    let echo = serve::tcp_echo(world.listen(at(LOOPBACK, 0)).unwrap());
    let guest = Guest::new(&world);
    let pid = guest.pid().to_string();
    for round in 0..count(8, 100) {
        let mark = Mark::new();
        let api = Api::new(&world, &format!("{mark}.sock"));
        let socket = format!("/mnt/{mark}.sock");
        let options = ["-p", "8080:80", "--api-socket", &socket, &pid, "tap0"];
        let before = world.traces().0;
        let running = Running::start(world.tapgate(&["attach"]).args(options));
        let victim = kill_one(&mark, &mut Random::new(1000 + round as u64));
        end(running);
        wait_until_gone(&mark);
        assert_eq!(world.traces().0, before, "{victim}");
        let links = guest.run("ip", &["-o", "link"]).output();
        assert_eq!(links.lines().count(), 1, "{victim}: {links}");

        let tapgate = Attached::start(&world, &options);
        let mut stream = guest.connect(at(GATEWAY, echo.port())).unwrap();
        stream.write_all(b"next").unwrap();
        let mut heard = [0; 4];
        stream.read_exact(&mut heard).unwrap();
        assert_eq!(api.list().len(), 1, "{victim}");
        tapgate.signal(Signal::SIGTERM);
        assert_eq!(tapgate.finish(SOON).code(), 0, "{victim}");
        assert!(!api.path().exists(), "{victim}");
    }
}
