//! A private host for container engines: user, process, mount, network and cgroup namespaces with
//! 65,536 users, in which `host.sh` has furnished what engines look for.
//!
//! - network: `lo`, and `host0` with 192.0.2.1, 198.51.100.1, 198.51.100.7, 2001:db8:1::1 and
//!   2001:db8:2::1; every port free to bind;
//! - `/etc`: the machine's, with other users, subordinate ids and resolver;
//! - `/home/user`: configuration and storage of the unprivileged user 1000;
//! - `/mnt`: shared with the test; `/mnt/bin/slirp4netns` is the program under test;
//! - `/run/image.tar`: a container image.
//!
//! The first process of the host ends when the test lets go of its standard input, or dies; the
//! kernel then ends every other process, mount and interface.

use std::env;
use std::fs::{self, File, Permissions};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sched::CloneFlags;
use tempfile::TempDir;

use crate::support::process::{Finished, fail, run};
use crate::support::sockets::Sockets;
use crate::support::sys::{Agent, Fresh, Plan};
use crate::support::world::open_namespace;
use crate::support::{SOON, serve, user};

const FURNISH: &str = include_str!("host.sh");
/// The program under test comes before the machine's.
const PATH: &str = "/mnt/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What a host is made with and of.
const NEEDED: &[&str] = &[
    "unshare",
    "nsenter",
    "setpriv",
    "newuidmap",
    "newgidmap",
    "ip",
    "ss",
    "ps",
    "busybox",
    "socat",
];
/// Names another program to test.
const STAND_IN: &str = "TAPGATE_ENGINES_SLIRP4NETNS";

/// One process of a host.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) command: String,
}

/// See the head of this file.
pub(crate) struct Host {
    // In the order to end.
    sockets: Agent,
    holder: Holder,
    dir: TempDir,
}

impl Host {
    /// A host for tests that need `engines`.
    pub(crate) fn new(engines: &[&str]) -> Self {
        assert_there(&[NEEDED, engines].concat());
        let dir = tempfile::Builder::new()
            .prefix("tapgate-engines-")
            .tempdir()
            .expect("a folder");
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("our own folder");
        stage_program(dir.path()).expect("there is room for the program");
        let holder = Holder::start(dir.path());
        let sockets = holder.sockets();
        Self {
            sockets,
            holder,
            dir,
        }
    }

    /// A command for the unprivileged user of this host.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = self.holder.enter();
        command
            .args(["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"])
            .args(["--inh-caps=-all", program])
            .env("HOME", "/home/user")
            .env("USER", "user")
            .env("XDG_RUNTIME_DIR", "/run/user/1000")
            // The default in a namespace that looks like a container would be `chroot`, which
            // has no network of its own.
            .env("BUILDAH_ISOLATION", "rootless");
        command
    }

    /// Runs a command of the unprivileged user to its end: the program, then its arguments.
    pub(crate) fn run(&self, words: &[&str]) -> Finished {
        let (program, arguments) = words.split_first().expect("a program");
        run(self.command(program).args(arguments))
    }

    /// What a shell script of the host's administrator prints.
    pub(crate) fn administer(&self, script: &str) -> String {
        run(self.holder.enter().args(["sh", "-ec", script])).output()
    }

    /// The folder behind `/mnt`.
    pub(crate) fn shared(&self) -> &Path {
        self.dir.path()
    }

    /// Where a process of this host leads to with its `ns/pid`.
    pub(crate) fn process_namespace(&self) -> PathBuf {
        let pid = self.holder.unshare.id();
        let link = format!("/proc/{pid}/ns/pid_for_children");
        fs::read_link(link).expect("our own child")
    }

    /// The processes of this host, without its first one.
    pub(crate) fn processes(&self) -> Vec<Process> {
        let listing = self.administer("exec ps -ww -e -o pid= -o args=");
        let parse = |line: &str| {
            let (pid, command) = line.trim().split_once(' ')?;
            Some(Process {
                pid: pid.parse().ok()?,
                command: command.trim().to_owned(),
            })
        };
        let all = listing.lines().filter_map(parse);
        all.filter(|it| it.pid != 1 && !it.command.starts_with("ps -ww -e"))
            .collect()
    }

    /// The networks that the program under test provides, each by its first process; the program may
    /// be several processes.
    pub(crate) fn networks(&self) -> Vec<u32> {
        self.pids(
            "for process in /proc/[0-9]*; do
                parent=$(sed -n 's/^PPid:[[:space:]]*//p' $process/status 2>/dev/null || true)
                if [ $process/exe -ef /mnt/bin/slirp4netns ] &&
                    ! [ \"/proc/$parent/exe\" -ef /mnt/bin/slirp4netns ]
                then echo ${process#/proc/}; fi
            done",
        )
    }

    /// The processes that read what guests send.
    pub(crate) fn packet_readers(&self) -> Vec<u32> {
        self.pids(
            "for process in /proc/[0-9]*; do
                if ls -l $process/fd 2>/dev/null | grep -q ' /dev/net/tun$'
                then echo ${process#/proc/}; fi
            done",
        )
    }

    fn pids(&self, script: &str) -> Vec<u32> {
        let found = self.administer(script);
        found.lines().filter_map(|pid| pid.parse().ok()).collect()
    }

    /// Waits until no process is left, save the one with which podman holds its user namespace, and
    /// asserts that no socket is: neither in the network nor as a file.
    pub(crate) fn assert_nothing_left(&self) {
        let deadline = Instant::now() + SOON;
        loop {
            let mut left = self.processes();
            left.retain(|process| process.command != "podman");
            if left.is_empty() {
                break;
            }
            assert!(Instant::now() < deadline, "left behind: {left:#?}");
            sleep(Duration::from_millis(20));
        }
        let sockets =
            self.administer("ss -Han --tcp --udp --raw --unix | grep -v TIME-WAIT || true");
        assert_eq!(sockets, "", "sockets left behind");
        // slirp4netns 1.2.0 can't reach its own socket's name once it is in its sandbox.
        if env::var_os(STAND_IN).is_none() {
            let files = self.administer("find /home /run /tmp /var/tmp -type s");
            assert_eq!(files, "", "sockets left behind");
        }
    }
}

impl Sockets for Host {
    fn socket(&self, domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
        self.sockets.socket(domain, kind, protocol)
    }
}

/// The processes of the machine whose `ns/pid` leads to `namespace`.
pub(crate) fn processes_in(namespace: &Path) -> Vec<i32> {
    let entries = fs::read_dir("/proc").expect("/proc is there").flatten();
    let inside = entries.filter(|entry| {
        let link = fs::read_link(entry.path().join("ns/pid"));
        link.is_ok_and(|link| link == namespace)
    });
    inside
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

/// The program that made the namespaces and waits for their first process.
struct Holder {
    unshare: Child,
}

impl Holder {
    fn start(dir: &Path) -> Self {
        let mut command = Command::new("unshare");
        user::plain_environment(&mut command);
        user::plan().attach_to(&mut command);
        let mut complaints = tempfile::tempfile().expect("a nameless temporary file");
        let copy = complaints.try_clone().expect("a free descriptor");
        let mut unshare = command
            .args([
                "--user",
                "--map-root-user",
                "--map-auto",
                "--net",
                "--mount",
            ])
            .args([
                "--ipc",
                "--cgroup",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
            ])
            .args(["sh", "-c", FURNISH, "host.sh"])
            .arg(dir)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(copy)
            .spawn()
            .expect("unshare is there");
        let said = unshare.stdout.take().map(first_words).unwrap_or_default();
        let holder = Self { unshare };
        if said != "ready\n" {
            fail(&format!(
                "no private host as {:?}: {}",
                user::ids(),
                read_again(&mut complaints)
            ));
        }
        holder
    }

    /// A command that enters the host as its administrator; the program has still to be named.
    fn enter(&self) -> Command {
        let mut command = Command::new("nsenter");
        user::plain_environment(&mut command);
        user::plan().attach_to(&mut command);
        let pid = self.unshare.id();
        command
            .args(["--target", &pid.to_string()])
            .args(["--user", "--mount", "--net", "--ipc", "--cgroup"])
            // `unshare` itself stayed outside; its child is the first process within.
            .arg(format!("--pid=/proc/{pid}/ns/pid_for_children"))
            .current_dir("/")
            .env("PATH", PATH);
        command
    }

    /// Makes sockets in the host's network for the test's own threads.
    fn sockets(&self) -> Agent {
        let pid = i32::try_from(self.unshare.id()).expect("pids are small");
        let enter = [
            ("user", CloneFlags::CLONE_NEWUSER),
            ("net", CloneFlags::CLONE_NEWNET),
        ];
        let plan = Plan {
            enter: enter
                .into_iter()
                .map(|(name, kind)| (open_namespace(pid, name), kind))
                .collect(),
            ..user::plan()
        };
        let fresh = Fresh {
            flags: CloneFlags::CLONE_NEWUSER,
            uid_map: "0 0 1".to_owned(),
            gid_map: "0 0 1".to_owned(),
            mounts: Vec::new(),
        };
        Agent::start(&plan, &fresh)
            .unwrap_or_else(|error| fail(&format!("sockets of a private host: {error}")))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.unshare.stdin.take());
        let deadline = Instant::now() + SOON;
        while matches!(self.unshare.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                // Its child dies with it.
                let _ = self.unshare.kill();
                let _ = self.unshare.wait();
                eprintln!("a private host had to be killed");
                return;
            }
            sleep(Duration::from_millis(5));
        }
    }
}

/// A test without its engine fails: skipped, it would be skipped for good.
fn assert_there(programs: &[&str]) {
    let missing: Vec<_> = programs
        .iter()
        .filter(|name| !user::has_program(name))
        .collect();
    assert!(
        missing.is_empty(),
        "the tests with real engines need {missing:?}; `.ci/run` installs them where there is apt \
         and root, elsewhere they are yours to install"
    );
    assert!(
        user::has_subordinate_ids(),
        "the tests with real engines need subordinate ids for uid {}: see subuid(5)",
        user::ids().0
    );
}

/// Puts the program under test into the shared folder, under the name that the engines know.
fn stage_program(dir: &Path) -> io::Result<()> {
    let bin = dir.join("bin");
    fs::create_dir(&bin)?;
    match env::var_os(STAND_IN) {
        Some(other) => {
            fs::copy(other, bin.join("slirp4netns"))?;
        }
        None => {
            user::stage_binary(dir);
            symlink("../tapgate", bin.join("slirp4netns"))?;
        }
    }
    Ok(())
}

/// What a program says first, within a limit.
fn first_words(mut stdout: ChildStdout) -> String {
    let mut words = [0; 64];
    let length = if serve::readable(&stdout, SOON) {
        stdout.read(&mut words).unwrap_or(0)
    } else {
        0
    };
    String::from_utf8_lossy(&words[..length]).into_owned()
}

fn read_again(file: &mut File) -> String {
    let mut text = String::new();
    let _ = io::Seek::rewind(file).and_then(|()| file.read_to_string(&mut text));
    text
}
