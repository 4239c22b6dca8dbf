//! How `tapgate run` ends, on a real kernel as an unprivileged user: signals reach the command, and
//! whichever side dies, by whatever signal, no process, mount or file is left.

mod support;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::process::{Mark, Running, wait_for_sleep, wait_until_gone};
use support::world::World;
use support::{SOON, wait_until};

/// A command that says when it is there, and on a signal says so and exits 3.
fn start_listening_command(world: &World, mark: &str) -> Running {
    let script = format!(
        "trap 'echo got TERM; kill $pid; exit 3' TERM; trap 'echo got INT; kill $pid; exit 4' INT
         trap 'echo got HUP; kill $pid; exit 5' HUP; trap 'echo got USR1; kill $pid; exit 6' USR1
         sleep {mark} & pid=$!; echo ready; wait"
    );
    let mut running = world.start_inside(&[], &script);
    running.wait_for_output("ready");
    running
}

#[test]
fn signals_to_tapgate_reach_the_command_whose_status_counts() {
    let world = World::new();
    for (signal, name, status) in [
        (Signal::SIGTERM, "TERM", 3),
        (Signal::SIGINT, "INT", 4),
        (Signal::SIGHUP, "HUP", 5),
        (Signal::SIGUSR1, "USR1", 6),
    ] {
        let mark = Mark::new();
        let running = start_listening_command(&world, &mark);
        running.signal(signal);
        let finished = running.finish(SOON);
        assert_eq!(finished.code(), status, "{name}: {finished:?}");
        assert!(
            finished.stdout.contains(&format!("got {name}")),
            "{finished:?}"
        );
        wait_until_gone(&mark);
    }
}

#[test]
fn command_that_dies_of_a_passed_signal_takes_tapgate_with_it() {
    let world = World::new();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mark = Mark::new();
        let running = world.start_inside(&[], &format!("exec sleep {mark}"));
        wait_for_sleep(&mark);
        running.signal(signal);
        let finished = running.finish(SOON);
        assert_eq!(finished.code(), 128 + signal as i32, "{finished:?}");
        wait_until_gone(&mark);
    }
}

#[test]
fn killed_tapgate_takes_the_command_and_its_background_children_along() {
    let world = World::new();
    let marks = [Mark::new(), Mark::new(), Mark::new()];
    let [first, second, own_session] = &marks;
    // The last outlives its parent and its session, as a daemon would.
    let script = format!("sleep {first} & setsid sleep {own_session} & sleep {second}; true");
    let running = world.start_inside(&[], &script);
    for mark in &marks {
        wait_for_sleep(mark);
    }
    running.signal(Signal::SIGKILL);
    assert_eq!(running.finish(SOON).code(), 128 + libc::SIGKILL);
    for mark in &marks {
        wait_until_gone(mark);
    }
}

#[test]
fn killed_command_ends_tapgate_with_its_signal() {
    let world = World::new();
    let mark = Mark::new();
    let running = world.start_inside(&[], &format!("exec sleep {mark}"));
    kill(Pid::from_raw(wait_for_sleep(&mark)), Signal::SIGKILL).unwrap();
    assert_eq!(running.finish(SOON).code(), 128 + libc::SIGKILL);
    wait_until_gone(&mark);
}

#[test]
fn background_children_do_not_outlive_the_command() {
    let world = World::new();
    let mark = Mark::new();
    let script = format!("sleep {mark} >/dev/null 2>&1 & exit 0");
    assert_eq!(world.start_inside(&[], &script).finish(SOON).code(), 0);
    wait_until_gone(&mark);
}

#[test]
fn no_mount_and_no_file_is_left_however_it_ends() {
    let world = World::new();
    let before = world.traces();
    for end in [
        None,
        Some(Signal::SIGTERM),
        Some(Signal::SIGINT),
        Some(Signal::SIGKILL),
    ] {
        let mark = Mark::new();
        let script = match end {
            Some(_) => format!("echo ready; exec sleep {mark}"),
            None => format!("echo ready {mark}"),
        };
        let mut running = world.start_inside(&["-p", "8080:80"], &script);
        running.wait_for_output("ready");
        if let Some(signal) = end {
            wait_for_sleep(&mark);
            assert_eq!(
                world.traces().0,
                before.0,
                "no mount shows on the host meanwhile"
            );
            running.signal(signal);
        }
        running.finish(SOON);
        wait_until_gone(&mark);
        assert_eq!(world.traces(), before, "after {end:?}");
    }
}

#[test]
fn no_interface_and_no_socket_is_left() {
    let world = World::new();
    let mut running = world.start_inside(&["-p", "8080:80"], "echo ready; exec sleep 600");
    running.wait_for_output("ready");
    running.signal(Signal::SIGKILL);
    running.finish(SOON);
    wait_until("the published port to be free again", SOON, || {
        use support::sockets::Sockets;
        let listener = world.listen(support::at(support::LOOPBACK, 8080));
        listener.ok()
    });
}

#[test]
fn interrupted_start_leaves_nothing() {
    let world = World::new();
    let before = world.traces();
    for _ in 0..20 {
        let mark = Mark::new();
        let running = world.start_inside(&[], &format!("exec sleep {mark}"));
        // Whatever stage it is in by now.
        running.signal(Signal::SIGKILL);
        running.finish(SOON);
        wait_until_gone(&mark);
    }
    assert_eq!(world.traces(), before);
}

#[test]
fn zombies_of_the_command_are_no_reason_to_stay() {
    let world = World::new();
    let mark = Mark::new();
    // The orphans end after their parent; somebody has to reap them.
    let script = format!("for i in 1 2 3; do (sh -c 'exit 0' {mark} &) ; done; echo done");
    let finished = world.start_inside(&[], &script).finish(SOON);
    assert_eq!(finished.output(), "done\n");
    wait_until_gone(&mark);
}

#[test]
fn signals_without_a_name_count_as_any() {
    let world = World::new();
    let finished = world.start_inside(&[], "kill -40 $$").finish(SOON);
    assert_eq!(finished.code(), 128 + 40, "{finished:?}");
    // An orphan is the keeper's to reap, and no reason to end the command.
    let mark = Mark::new();
    let script = format!(
        "orphan=$(sleep {mark} >/dev/null & echo $!); kill -40 $orphan
         while kill -0 $orphan 2>/dev/null; do sleep 0.01; done; echo on; exit 5"
    );
    let finished = world.start_inside(&[], &script).finish(SOON);
    assert_eq!(
        (finished.code(), finished.stdout.as_str()),
        (5, "on\n"),
        "{finished:?}"
    );
    // The keeper itself.
    let mark = Mark::new();
    let script = format!("setsid sleep {mark} & kill -40 $PPID; exec sleep {mark}");
    let finished = world.start_inside(&[], &script).finish(SOON);
    assert_eq!(finished.code(), 128 + 40, "{finished:?}");
    wait_until_gone(&mark);
}

#[test]
fn covered_proc_hides_nobody_from_the_end() {
    let world = World::new();
    let covers = [
        "mount -t tmpfs none /proc",
        "mount --bind /dev/null /proc/$!/stat",
        "mount --bind /dev/zero /proc/$!/stat",
        "mkfifo fifo && mount --bind fifo /proc/$!/stat",
        "echo 1 '(x)' S $PPID >claim && mount --bind claim /proc/1/stat",
    ];
    for (options, cover) in [&[][..], &["-p", "8080:80"]]
        .into_iter()
        .flat_map(|options| covers.map(|cover| (options, cover)))
    {
        let mark = Mark::new();
        let script = format!(
            "mount -t tmpfs none /mnt && cd /mnt || exit
             setsid sleep {mark} >/dev/null 2>&1 & {cover} && exit 3"
        );
        let finished = world.start_inside(options, &script).finish(SOON);
        assert_eq!(finished.code(), 3, "{cover}: {finished:?}");
        wait_until_gone(&mark);
    }
}
