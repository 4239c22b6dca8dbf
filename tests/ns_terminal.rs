//! `tapgate run` on a terminal: job control, Ctrl-C, Ctrl-Z, the window's size, on a real kernel as
//! an unprivileged user.

mod support;

use support::process::{Mark, marked, state_of, wait_for_sleep, wait_until_gone};
use support::terminal::Terminal;
use support::world::{TAPGATE, World};
use support::{SOON, wait_until};

/// An interactive shell below `tapgate run`, at its first prompt.
fn shell(world: &World, shell: &[&str]) -> Terminal {
    let mut terminal = Terminal::start(world, TAPGATE, &[&["run", "--"], shell].concat());
    terminal.wait_for("ready> ");
    terminal
}

const BASH: [&str; 5] = ["bash", "--norc", "--noprofile", "--noediting", "-i"];

#[test]
fn shell_has_job_control() {
    let world = World::new();
    for program in [&BASH[..], &["sh", "-i"]] {
        let mut terminal = shell(&world, program);
        terminal.type_in("set -o | grep monitor; tty\n");
        terminal.wait_for("on\r\n");
        terminal.wait_for("/dev/");
        terminal.type_in("exit 9\n");
        let shown = terminal.shown().to_owned();
        assert_eq!(terminal.finish(), 9, "{shown}");
        for complaint in ["job control", "can't access tty", "cannot set terminal"] {
            assert!(!shown.contains(complaint), "{program:?}: {shown}");
        }
    }
}

#[test]
fn ctrl_c_interrupts_the_foreground_and_the_shell_lives_on() {
    let world = World::new();
    let mut terminal = shell(&world, &BASH);
    let mark = Mark::new();
    terminal.type_in(&format!("sleep {mark}\n"));
    wait_for_sleep(&mark);
    terminal.type_in("\x03");
    wait_until("the sleep to be interrupted", SOON, || {
        running_sleep(&mark).is_none().then_some(())
    });
    terminal.type_in("echo status $? alive $((40 + 2))\n");
    terminal.wait_for("status 130 alive 42");
    terminal.type_in("exit\n");
    terminal.finish();
}

#[test]
fn ctrl_c_ends_a_plain_command_and_tapgate() {
    let world = World::new();
    let mark = Mark::new();
    let mut terminal = Terminal::start(&world, TAPGATE, &["run", "--", "sleep", &mark]);
    wait_for_sleep(&mark);
    terminal.type_in("\x03");
    assert_eq!(terminal.finish(), 128 + libc::SIGINT);
    wait_until_gone(&mark);
}

#[test]
fn ctrl_z_stops_a_job_and_fg_continues_it() {
    let world = World::new();
    let mut terminal = shell(&world, &BASH);
    let mark = Mark::new();
    terminal.type_in(&format!("sleep {mark}\n"));
    let pid = wait_for_sleep(&mark);
    terminal.type_in("\x1a");
    terminal.wait_for("Stopped");
    terminal.wait_for("ready> ");
    wait_until("the job to be stopped", SOON, || {
        (state_of(pid) == Some('T')).then_some(())
    });
    terminal.type_in("fg\n");
    wait_until("the job to run again", SOON, || {
        (state_of(pid) == Some('S')).then_some(())
    });
    terminal.type_in("\x03");
    terminal.wait_for("ready> ");
    terminal.type_in("exit\n");
    terminal.finish();
}

#[test]
fn window_size_is_seen_and_its_change_is_signalled() {
    let world = World::new();
    let mut terminal = shell(&world, &BASH);
    terminal.resize(37, 113);
    terminal.type_in("stty size\n");
    terminal.wait_for("37 113");
    terminal.type_in("trap 'echo resized $(stty size)' WINCH; echo list''ening\n");
    terminal.wait_for("listening\r\n");
    terminal.resize(41, 97);
    // The shell runs a trap when it next has something to do.
    terminal.type_in("true\n");
    terminal.wait_for("resized 41 97");
    terminal.type_in("exit\n");
    terminal.finish();
}

#[test]
fn closed_terminal_ends_everything() {
    let world = World::new();
    let mut terminal = shell(&world, &BASH);
    let mark = Mark::new();
    terminal.type_in(&format!("sleep {mark}\n"));
    wait_for_sleep(&mark);
    terminal.hang_up();
    wait_until_gone(&mark);
}

fn running_sleep(mark: &str) -> Option<i32> {
    marked(mark)
        .into_iter()
        .find(|(_, words)| words.first().is_some_and(|word| word == "sleep"))
        .map(|it| it.0)
}
