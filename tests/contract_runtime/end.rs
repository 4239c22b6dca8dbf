//! How it ends, whoever wants it: contract 3.1, behaviour 5, and 3.11 items 3, 5, 11 and 12. Nothing may
//! stay that is in the way of the next one.

use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::attached::pipe;
use crate::support::guest::Guest;
use crate::support::process::{Mark, marked, wait_until_gone};
use crate::support::slirp4netns::{Api, Call, Served};
use crate::support::world::World;
use crate::support::{SOON, timed, wait_until};

/// How soon the end of a namespace is noticed.
const NOTICED: Duration = Duration::from_secs(1);

/// Asserts that nothing of an instance is left, and that the next one finds room.
#[track_caller]
fn assert_nothing_in_the_way(world: &World, guest: &Guest, api: &Api) {
    wait_until("the API socket to be gone", SOON, || {
        (!api.path().exists()).then_some(())
    });
    wait_until("the tap to be gone", SOON, || {
        let shown = guest.run("ip", &["link", "show", "tap0"]);
        (!shown.status.success()).then_some(())
    });
    let pid = guest.pid().to_string();
    let arguments = ["-c", "-r", "3", "-a", "/mnt/api.sock", &pid, "tap0"];
    let _again = Call::new(world, &arguments).ready_at(3);
    assert_eq!(api.publish("tcp", 8080, 80), 1);
}

/// Contract 3.1, behaviour 5: `SIGTERM`; `SIGINT` likewise.
#[test]
fn signals_end_it_with_success() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let Served {
            slirp4netns,
            guest,
            api,
            world,
        } = Served::with(&["--enable-sandbox"]);
        api.publish("tcp", 8080, 80);
        slirp4netns.signal(signal);
        let finished = slirp4netns.finish(SOON);
        assert_eq!(finished.code(), 0, "{signal}: {finished:?}");
        assert_eq!(finished.stderr, "", "{signal}");
        assert!(!api.path().exists(), "gone when the process is");
        assert_nothing_in_the_way(&world, &guest, &api);
    }
}

/// Contract 3.1, behaviour 5: `SIGKILL` "must leave nothing that blocks reuse".
#[test]
fn killed_instance_leaves_nothing() {
    let Served {
        slirp4netns,
        guest,
        api,
        world,
    } = Served::with(&["--enable-sandbox", "--enable-seccomp"]);
    api.publish("tcp", 8080, 80);
    slirp4netns.signal(Signal::SIGKILL);
    slirp4netns.finish(SOON);
    assert_nothing_in_the_way(&world, &guest, &api);
}

/// Contract 3.1, behaviour 5, and 3.11 item 5: "exit-fd HUP -> rc 0, socket unlinked".
#[test]
fn hang_up_of_the_exit_descriptor_ends_it() {
    let world = World::new();
    let guest = Guest::new(&world);
    let pid = guest.pid().to_string();
    let (exit, kept) = pipe();
    let exit = Arc::new(exit);
    let arguments = [
        "-c",
        "-e",
        "5",
        "-r",
        "3",
        "-a",
        "/mnt/api.sock",
        &pid,
        "tap0",
    ];
    let mut slirp4netns = Call::new(&world, &arguments).pass(&exit, 5).ready_at(3);
    drop(exit);
    let api = Api::new(&world, "api.sock");
    assert!(api.list().is_empty());
    assert!(slirp4netns.try_status().is_none(), "while it is open");
    drop(kept);
    let (took, finished) = timed(|| slirp4netns.finish(SOON));
    assert_eq!(finished.code(), 0, "{finished:?}");
    assert!(took < NOTICED, "quickly: {took:?}");
    assert!(!api.path().exists(), "gone when the process is");
    assert_nothing_in_the_way(&world, &guest, &api);
}

/// A caller that wishes its children dead when it dies, as Go's `Pdeathsig` does, and is killed.
fn kill_a_caller(world: &World, guest: &Guest, options: &[&str], as_administrator: bool) {
    let mark = Mark::new();
    let pid = guest.pid().to_string();
    let socket = format!("/mnt/{mark}.sock");
    let caller = ["sh", "-c", "setpriv --pdeathsig KILL \"$@\" & wait", "sh"];
    let arguments = ["-c", "-a", &socket, &pid, "tap0"];
    let arguments = [options, &arguments[..]].concat();
    let call = Call::new(world, &arguments);
    let call = if as_administrator {
        call.with_powers()
    } else {
        call
    };
    let caller = call.by(&caller).start();
    let api = Api::new(world, &format!("{}.sock", &*mark));
    wait_until("the API to answer", SOON, || {
        api.try_ask(r#"{"execute":"list_hostfwd"}"#).ok()
    });
    assert!(marked(&mark).len() >= 3, "caller, slirp4netns, its broker");
    kill(Pid::from_raw(caller.pid()), Signal::SIGKILL).expect("our own child");
    wait_until_gone(&mark);
    assert!(!api.path().exists(), "the broker came last");
    wait_until("the tap to be gone", SOON, || {
        let shown = guest.run("ip", &["link", "show", "tap0"]);
        (!shown.status.success()).then_some(())
    });
}

/// Contract 3.11 item 3: "kill -9 parent -> child dies (PDEATHSIG inherited by exec'd binary)", with
/// all that it started.
#[test]
fn killed_caller_takes_it_along() {
    let world = World::new();
    let guest = Guest::new(&world);
    kill_a_caller(
        &world,
        &guest,
        &["--enable-sandbox", "--enable-seccomp"],
        false,
    );
    kill_a_caller(&world, &guest, &[], false);
}

/// Contract 3.11 item 3 for a caller with powers over the network, where the sandbox has no user namespace
/// of its own.
#[test]
fn killed_administrator_takes_it_along() {
    let world = World::new();
    let guest = Guest::new(&world);
    kill_a_caller(
        &world,
        &guest,
        &["--enable-sandbox", "--enable-seccomp"],
        true,
    );
}

/// Contract 3.11 item 12: "`/proc/PID/ns/net` target -> exit on PID death", and the same by pid.
#[test]
fn end_of_the_process_is_noticed() {
    for by_path in [false, true] {
        let world = World::new();
        let guest = Guest::new(&world);
        let pid = guest.pid().to_string();
        let path = format!("/proc/{pid}/ns/net");
        let target = if by_path {
            ["--netns-type=path", &path]
        } else {
            ["--netns-type=pid", &pid]
        };
        let rest = ["tap0", "-c", "-r", "3", "-a", "/mnt/api.sock"];
        let slirp4netns = Call::new(&world, &[&target[..], &rest].concat()).ready_at(3);
        drop(guest);
        let (took, finished) = timed(|| slirp4netns.finish(SOON));
        assert_eq!(finished.code(), 0, "{target:?}: {finished:?}");
        assert!(took < NOTICED, "{target:?}: {took:?}");
        assert!(!Api::new(&world, "api.sock").path().exists());
    }
}

/// Contract 3.11 item 11: "netns path unlink -> exit < 2 s".
#[test]
fn end_of_the_mounted_namespace_is_noticed() {
    let world = World::new();
    let guest = Guest::new(&world);
    world.set_up(&format!(
        "touch /tmp/netns && mount --bind /proc/{}/ns/net /tmp/netns",
        guest.pid()
    ));
    let arguments = [
        "-c",
        "-r",
        "3",
        "-a",
        "/mnt/api.sock",
        "--netns-type=path",
        "/tmp/netns",
        "tap0",
    ];
    let slirp4netns = Call::new(&world, &arguments).ready_at(3);
    world.set_up("umount /tmp/netns && rm /tmp/netns");
    let (took, finished) = timed(|| slirp4netns.finish(SOON));
    assert_eq!(finished.code(), 0, "{finished:?}");
    assert!(took < NOTICED, "{took:?}");
    assert!(!Api::new(&world, "api.sock").path().exists());
}
