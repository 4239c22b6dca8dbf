//! A pseudo-terminal with a program on it: what a person types and sees.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::stat::Mode;
use nix::unistd::fchown;

use super::process::{exit_code, fail};
use super::serve::readable;
use super::sys::{Plan, set_window_size};
use super::world::World;
use super::{SOON, user, wait_until};

/// The keyboard and the screen. The program is killed on drop.
pub(crate) struct Terminal {
    keyboard: File,
    screen: File,
    child: Child,
    /// What was shown and not yet waited for.
    unseen: String,
    shown: String,
}

impl Terminal {
    /// Starts a program of `world` as the leader of a session on a new terminal.
    pub(crate) fn start(world: &World, program: &str, arguments: &[&str]) -> Self {
        let (keyboard, slave) = open().expect("a pseudo-terminal");
        let slave = Arc::new(slave);
        let plan = Plan {
            terminal: Some(Arc::clone(&slave)),
            ..world.plan().clone()
        };
        let mut command: Command = world.command_with(program, plan);
        let copy = || Stdio::from(slave.try_clone().expect("a free descriptor"));
        let child = command
            .args(arguments)
            .env("PS1", "ready> ")
            .stdin(copy())
            .stdout(copy())
            .stderr(copy())
            .spawn()
            .unwrap_or_else(|error| fail(&format!("{command:?}: {error}")));
        let screen = keyboard.try_clone().expect("a free descriptor");
        Self {
            keyboard,
            screen,
            child,
            unseen: String::new(),
            shown: String::new(),
        }
    }

    /// Types `text`; a line ends with `\n`, Ctrl-C is `\x03`.
    pub(crate) fn type_in(&mut self, text: &str) {
        self.keyboard
            .write_all(text.as_bytes())
            .expect("the terminal is open");
    }

    /// Waits until `text` shows on the screen, behind what was waited for before.
    pub(crate) fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(place) = self.unseen.find(text) {
                self.unseen.drain(..place + text.len());
                return;
            }
            self.read_some();
            if Instant::now() > deadline {
                fail(&format!(
                    "{text:?} never showed; the screen:\n{}",
                    self.shown
                ));
            }
        }
    }

    /// Everything that has been shown.
    pub(crate) fn shown(&self) -> &str {
        &self.shown
    }

    pub(crate) fn resize(&self, rows: u16, columns: u16) {
        let terminal = OwnedFd::from(self.keyboard.try_clone().expect("a free descriptor"));
        set_window_size(&terminal, rows, columns).expect("a terminal has a size");
    }

    /// Closes the window, and waits for the end of the program.
    pub(crate) fn hang_up(mut self) {
        let nothing = || File::open("/dev/null").expect("it is always there");
        (self.keyboard, self.screen) = (nothing(), nothing());
        wait_until("the end of a program without its terminal", SOON, || {
            self.child.try_wait().expect("our own child")
        });
    }

    /// Waits for the end of the program; its exit status.
    pub(crate) fn finish(mut self) -> i32 {
        let status = wait_until("the end of the program on the terminal", SOON, || {
            self.read_some();
            self.child.try_wait().expect("our own child")
        });
        exit_code(status)
    }

    fn read_some(&mut self) {
        if !readable(&self.screen, Duration::from_millis(20)) {
            return;
        }
        let mut buffer = [0; 4096];
        // EIO: no program has the terminal open any more.
        let got = self.screen.read(&mut buffer).unwrap_or(0);
        let text = String::from_utf8_lossy(&buffer[..got]);
        self.unseen.push_str(&text);
        self.shown.push_str(&text);
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Both ends of a new pseudo-terminal, the far one given to the test user. No child inherits the near
/// end (which openpty(3) would let it): a window closes only when nobody holds it open.
fn open() -> io::Result<(File, OwnedFd)> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let near = posix_openpt(flags)?;
    grantpt(&near)?;
    unlockpt(&near)?;
    let far = nix::fcntl::open(ptsname_r(&near)?.as_str(), flags, Mode::empty())?;
    let (uid, gid) = user::ids();
    fchown(&far, Some(uid), Some(gid))?;
    Ok((File::from(OwnedFd::from(near)), far))
}
