//! A world: one private host, made of namespaces, in which the tests run as an unprivileged user.
//!
//! - network: `lo`, and `host0` with 192.0.2.1/24, 198.51.100.1/24, 198.51.100.7/24,
//!   2001:db8:1::1/64, 2001:db8:2::1/64 and 2001:db8:2::7/64; no default route; ping sockets allowed
//!   and every port free to bind, privileged ones included;
//! - `/etc`: the machine's, but every entry can be replaced, `resolv.conf` first of all;
//! - `/tmp`: empty, so that what a program leaves there is seen;
//! - `/mnt`: [`World::dir`], shared with the test; the program under test is `/mnt/tapgate`.
//!
//! Dropping a world ends its agent, and with it every mount and interface.

use std::ffi::CString;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use nix::sched::CloneFlags;
use tempfile::TempDir;

use super::process::{Running, fail, run};
use super::sockets::Sockets;
use super::sys::{Agent, Fresh, Mount, MountKind, Plan};
use super::user;

/// The program under test, as a world sees it.
pub(crate) const TAPGATE: &str = "/mnt/tapgate";

/// Nobody answers for duplicates on a link without a carrier, hence `nodad`.
const ADDRESSES: &str = "
    ip link set lo up
    ip tuntap add dev host0 mode tap
    for address in 192.0.2.1/24 198.51.100.1/24 198.51.100.7/24; do
        ip address add $address dev host0
    done
    for address in 2001:db8:1::1/64 2001:db8:2::1/64 2001:db8:2::7/64; do
        ip address add $address dev host0 nodad
    done
    ip link set host0 up
    echo 0 > /proc/sys/net/ipv4/ip_unprivileged_port_start
";

/// The way to all of IPv6 beyond the world's own networks, of which one is [`super::NOWHERE6`]'s.
const IPV6_ROUTE: &str = "
    ip -6 route add default dev host0
    ip -6 route add unreachable 2001:db8:9::/48
";

/// A private host.
pub(crate) struct World {
    // Before `dir`: its mounts lie on the folder.
    agent: Agent,
    dir: TempDir,
    enter: Plan,
}

impl World {
    pub(crate) fn new() -> Self {
        let world = Self::without_ping_sockets();
        let gid = user::ids().1;
        world.set_up(&format!(
            "echo {gid} {gid} > /proc/sys/net/ipv4/ping_group_range"
        ));
        world
    }

    /// A world with a default route of IPv6, which is what makes tapgate give its guests one.
    pub(crate) fn with_ipv6_route() -> Self {
        let world = Self::new();
        world.set_up(IPV6_ROUTE);
        world
    }

    /// A world whose `ping_group_range` is the kernel's default for a new namespace: nobody.
    pub(crate) fn without_ping_sockets() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("tapgate-ns-")
            .tempdir()
            .expect("a folder");
        fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).expect("our own folder");
        user::stage_binary(dir.path());
        lay_out_etc(dir.path()).expect("links to the entries of /etc");
        let (uid, gid) = user::ids();
        let fresh = Fresh {
            flags: CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS,
            uid_map: format!("{uid} {uid} 1"),
            gid_map: format!("{gid} {gid} 1"),
            mounts: mounts(dir.path()),
        };
        let agent = Agent::start(&user::plan(), &fresh)
            .unwrap_or_else(|error| fail(&format!("namespaces as {uid}: {error}")));
        let enter = Plan {
            enter: namespaces(agent.pid()),
            ..user::plan()
        };
        let world = Self { agent, dir, enter };
        world.set_up(ADDRESSES);
        world.set_resolv_conf("nameserver 127.0.0.1\n");
        world
    }

    /// The shared folder; inside it is `/mnt`.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Writes a file that everyone can read (and execute) to the shared folder; gives its path inside.
    pub(crate) fn file(&self, name: &str, content: &str) -> PathBuf {
        write_aside(&self.dir().join(name), content);
        Path::new("/mnt").join(name)
    }

    /// The pid of the process that holds the world; its `/proc` entry shows the world's mounts.
    pub(crate) fn pid(&self) -> i32 {
        self.agent.pid()
    }

    /// A command for the unprivileged user of this host.
    pub(crate) fn command(&self, program: &str) -> Command {
        self.command_with(program, self.enter.clone())
    }

    /// The program under test, with its first arguments.
    pub(crate) fn tapgate(&self, arguments: &[&str]) -> Command {
        let mut command = self.command(TAPGATE);
        command.args(arguments);
        command
    }

    /// [`World::tapgate`] with descriptors that it inherits under their own numbers.
    pub(crate) fn tapgate_with(&self, arguments: &[&str], inherit: Vec<Arc<OwnedFd>>) -> Command {
        let mut command = self.command_with(
            TAPGATE,
            Plan {
                inherit,
                ..self.enter.clone()
            },
        );
        let (word, options) = arguments.split_at(arguments.len().min(1));
        command.args(word);
        if word == ["run"] {
            command.args(workers(options));
        }
        command.args(options);
        command
    }

    /// A command in the world after an own plan.
    pub(crate) fn command_with(&self, program: &str, plan: Plan) -> Command {
        let mut command = Command::new(program);
        user::plain_environment(&mut command);
        plan.attach_to(&mut command);
        command
    }

    /// Runs a shell script with the powers of the host's administrator.
    pub(crate) fn set_up(&self, script: &str) {
        let plan = Plan {
            keep_capabilities: true,
            ..self.enter.clone()
        };
        let mut command = self.command_with("sh", plan);
        run(command.args(["-ec", script])).output();
    }

    /// Starts `tapgate run OPTIONS -- sh -c SCRIPT`.
    pub(crate) fn start_inside(&self, options: &[&str], script: &str) -> Running {
        let mut command = self.tapgate(&["run"]);
        Running::start(command.args(options).args(["--", "sh", "-c", script]))
    }

    /// Runs `tapgate run OPTIONS -- sh -c SCRIPT` and gives what the script printed.
    pub(crate) fn run_inside(&self, options: &[&str], script: &str) -> String {
        self.start_inside(options, script)
            .finish(super::SOON)
            .output()
    }

    /// What a program could leave on this host: mounts, and names in places for passing files.
    pub(crate) fn traces(&self) -> (String, Vec<String>) {
        let mounts = format!("/proc/{}/mountinfo", self.pid());
        let mounts = fs::read_to_string(mounts).expect("the world lives");
        let list = "find /tmp; find /mnt /mnt/etc /dev/shm -maxdepth 1";
        let listing = run(self.command("sh").args(["-c", list])).output();
        let mut names: Vec<String> = listing.lines().map(str::to_owned).collect();
        names.sort();
        (mounts, names)
    }

    /// How a process gets into this world.
    pub(crate) fn plan(&self) -> &Plan {
        &self.enter
    }

    /// Replaces `/etc/resolv.conf` by rename, as every resolver manager does.
    pub(crate) fn set_resolv_conf(&self, content: &str) {
        write_aside(&self.dir().join("etc/resolv.conf"), content);
    }

    /// Makes `/etc/resolv.conf` a link.
    pub(crate) fn link_resolv_conf(&self, target: &str) {
        self.link("etc/resolv.conf", target);
    }

    /// Makes or replaces a link in the shared folder.
    pub(crate) fn link(&self, name: &str, target: &str) {
        let aside = self.dir().join("link.new");
        symlink(target, &aside).expect("a link in our own folder");
        fs::rename(&aside, self.dir().join(name)).expect("our own folder");
    }
}

impl Sockets for World {
    fn socket(&self, domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
        self.agent.socket(domain, kind, protocol)
    }
}

/// Descriptors for the namespaces of a world's agent, in the order to enter them.
fn namespaces(pid: i32) -> Vec<(Arc<OwnedFd>, CloneFlags)> {
    [
        ("user", CloneFlags::CLONE_NEWUSER),
        ("net", CloneFlags::CLONE_NEWNET),
        ("mnt", CloneFlags::CLONE_NEWNS),
    ]
    .into_iter()
    .map(|(name, kind)| (open_namespace(pid, name), kind))
    .collect()
}

/// The option that the whole suite is run with when it is to be carried by several workers; a test that chooses
/// for itself is left alone.
pub(crate) fn workers(options: &[&str]) -> Option<String> {
    let number = std::env::var("TAPGATE_TEST_WORKERS").ok()?;
    let chosen = options.contains(&"--workers");
    (!chosen).then(|| format!("--workers={number}"))
}

/// Opens `/proc/PID/ns/NAME`.
pub(crate) fn open_namespace(pid: i32, name: &str) -> Arc<OwnedFd> {
    let path = format!("/proc/{pid}/ns/{name}");
    let file = File::open(&path).unwrap_or_else(|error| fail(&format!("{path}: {error}")));
    Arc::new(OwnedFd::from(file))
}

/// A folder that stands for `/etc`: a link for each entry to where the real one will be mounted.
/// Links are copied, since they may be relative.
fn lay_out_etc(dir: &Path) -> io::Result<()> {
    let etc = dir.join("etc");
    fs::create_dir(&etc)?;
    fs::create_dir(dir.join("etc.real"))?;
    for entry in fs::read_dir("/etc")? {
        let entry = entry?;
        let target = if entry.file_type()?.is_symlink() {
            fs::read_link(entry.path())?
        } else {
            Path::new("/mnt/etc.real").join(entry.file_name())
        };
        symlink(target, etc.join(entry.file_name()))?;
    }
    Ok(())
}

/// The mounts that make `/etc`, `/mnt` and `/tmp`. The folder may lie below `/tmp`, hence last.
fn mounts(dir: &Path) -> Vec<Mount> {
    let bind = |source: &Path, target: &Path| Mount {
        source: c_path(source),
        target: c_path(target),
        kind: MountKind::Bind,
    };
    vec![
        bind(Path::new("/etc"), &dir.join("etc.real")),
        bind(&dir.join("etc"), Path::new("/etc")),
        bind(dir, Path::new("/mnt")),
        Mount {
            source: c"tmpfs".into(),
            target: c"/tmp".into(),
            kind: MountKind::Empty,
        },
    ]
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).expect("a path holds no NUL")
}

fn write_aside(path: &Path, content: &str) {
    let aside = path.with_extension("new");
    fs::write(&aside, content).expect("our own folder");
    fs::set_permissions(&aside, Permissions::from_mode(0o755)).expect("our own file");
    fs::rename(&aside, path).expect("our own folder");
}
