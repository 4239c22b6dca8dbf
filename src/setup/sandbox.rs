//! Gives up, for good, all that carrying packets does not need. Runs last, when every descriptor that
//! will be needed is open; what only works outside is the broker's ([`super::broker`]).
//!
//! The stages, each with the reason for its place, are the bodies of [`confine`] and
//! [`filter`], which is for the time when all threads are there. Comes in: how much the
//! caller insists. Goes out: a process without files, powers or most system calls.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus, Scope,
};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Pid, Uid, chdir, getppid, pivot_root};

use super::{SetupError, Step, is_ours, scratch_directory, system_calls};
use crate::sys::{privileges, process};

/// Whether there is to be a sandbox, on our own command lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Switch {
    /// All of it (Landlock where the kernel has it), or nothing runs.
    #[default]
    On,
    /// None of it.
    Off,
}

/// How much the caller insists on a part of the sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Demand {
    /// Without it nothing runs.
    Required,
    /// As much as the system allows.
    IfPossible,
    /// Not wanted.
    Off,
}

/// How much of the sandbox there is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sandbox {
    /// An empty root, no capabilities, and what goes with them.
    pub confinement: Demand,
    /// The filter of system calls.
    pub filter: Demand,
    /// Who may look at the process.
    pub visibility: Visibility,
}

impl From<Switch> for Sandbox {
    fn from(switch: Switch) -> Self {
        let demand = match switch {
            Switch::On => Demand::Required,
            Switch::Off => Demand::Off,
        };
        Self {
            confinement: demand,
            filter: demand,
            visibility: Visibility::Hidden,
        }
    }
}

impl Demand {
    /// Goes through a stage of this part.
    fn stage(
        self,
        name: &'static str,
        work: impl FnOnce() -> Result<(), SetupError>,
    ) -> Result<(), SetupError> {
        if self == Self::Off {
            return Ok(());
        }
        match work() {
            Err(error) if self == Self::IfPossible => {
                tracing::warn!(stage = name, %error, "the sandbox lacks a stage");
                Ok(())
            }
            done => done,
        }
    }
}

/// Who may look at this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visibility {
    /// Nobody: no dumps, no tracing, and `/proc` shows only what it shows of every process.
    Hidden,
    /// The same user, as slirp4netns has it: its callers look at `/proc/PID/root`.
    SameUser,
}

/// The parent that may take us with it when it dies (prctl(2), `PR_SET_PDEATHSIG`).
struct Parent {
    pid: Pid,
    signal: Option<nix::sys::signal::Signal>,
}

impl Parent {
    fn now() -> Self {
        Self {
            pid: getppid(),
            signal: prctl::get_pdeathsig().ok().flatten(),
        }
    }

    /// To become another user clears the wish; without it an engine that is killed leaves us behind.
    fn keep(&self) -> Result<(), SetupError> {
        prctl::set_pdeathsig(self.signal).step(|| "keeping the parent's death signal".into())?;
        if self.signal.is_some() && getppid() != self.pid {
            return Err(io::ErrorKind::NotFound).step(|| "the parent is gone".into());
        }
        Ok(())
    }
}

/// Enters the sandbox but for the filter. For the time before threads are started, which inherit it.
///
/// # Errors
/// The stage that failed, where it was required.
pub fn confine(sandbox: Sandbox) -> Result<(), SetupError> {
    let parent = Parent::now();
    let confinement = sandbox.confinement;
    // First, because no namespace makes root of the system anybody else.
    confinement.stage("user", leave_root)?;
    // Mounting and changing root need capabilities, which an unprivileged process has only in a user
    // namespace of its own.
    confinement.stage("root", || namespaces().and_then(|()| empty_root()))?;
    // After the mounts, which needed them.
    confinement.stage("capabilities", || {
        privileges::keep_low_ports().step(|| "giving up capabilities".into())
    })?;
    parent.keep()?;
    // What follows must hold across exec, and Landlock and seccomp want it from the unprivileged.
    confinement.stage("no_new_privs", || {
        prctl::set_no_new_privs().step(|| "giving up new privileges".into())
    })?;
    // After the change of user, which resets it.
    confinement.stage("dumps", || hide(sandbox.visibility))?;
    // A second wall for files, and one for signals and abstract sockets.
    confinement.stage("landlock", landlock)
}

/// Lets the process, with all its threads, make no more system calls than they will need.
///
/// # Errors
/// When that was required, and failed.
pub fn filter(sandbox: Sandbox) -> Result<(), SetupError> {
    #[cfg(debug_assertions)]
    if super::escape::is_unfiltered() {
        return Ok(());
    }
    // Last: the filter has no call that any stage above needs.
    sandbox
        .filter
        .stage("seccomp", || system_calls::restrict(system_calls::CALLS))
}

/// Root of the system becomes nobody, where there is anybody else to become.
fn leave_root() -> Result<(), SetupError> {
    if !privileges::is_real_root() {
        return Ok(());
    }
    match privileges::become_nobody() {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL)) => {
            tracing::debug!(%error, "nobody does not exist in this user namespace");
            Ok(())
        }
        done => done.step(|| "becoming nobody".into()),
    }
}

/// Whether a privileged port could be opened here: the network belongs to our own user namespace. A
/// new one would lose that.
fn has_low_ports() -> bool {
    let owner = fs::File::open("/proc/self/ns/net")
        .and_then(|network| process::owning_user_namespace(network.as_fd()));
    privileges::holds_low_ports() && owner.is_ok_and(|owner| is_ours(&owner))
}

/// A mount namespace of our own, and a user namespace, unless that would cost privileged ports.
fn namespaces() -> Result<(), SetupError> {
    let may_mount = privileges::holds_mounts();
    let low_ports = has_low_ports();
    if !(low_ports && may_mount) {
        match own_user_namespace() {
            // Where there can be no more of them, the powers that an engine gave us will do.
            Err(error) if may_mount => {
                tracing::debug!(%error, "no user namespace of our own");
            }
            done => {
                if low_ports {
                    tracing::warn!("privileged ports can be published at the start only");
                }
                return done;
            }
        }
    }
    unshare(CloneFlags::CLONE_NEWNS).step(|| "making a mount namespace".into())
}

/// A user namespace with nobody but us, and a mount namespace that it owns.
fn own_user_namespace() -> Result<(), SetupError> {
    let (uid, gid) = (Uid::effective(), Gid::effective());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)
        .step(|| "making a user namespace (see user.max_user_namespaces)".into())?;
    let write = |file: &str, text: &str| {
        fs::write(Path::new("/proc/self").join(file), text).step(|| format!("writing {file}"))
    };
    write("setgroups", "deny")?;
    write("uid_map", &format!("{uid} {uid} 1"))?;
    write("gid_map", &format!("{gid} {gid} 1"))
}

/// Nothing to see: an empty, read-only root. The two directories are there because slirp4netns has
/// them.
fn empty_root() -> Result<(), SetupError> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .step(|| "making mounts private".into())?;
    let root = scratch_directory()?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let options = Some("size=64k,nr_inodes=8,mode=555");
    mount(Some("tapgate"), root, Some("tmpfs"), flags, options)
        .step(|| format!("mounting a tmpfs on {}", root.display()))?;
    chdir(root).step(|| "entering the new root".into())?;
    for name in ["etc", "run"] {
        fs::create_dir(name).step(|| format!("making {name}"))?;
    }
    // pivot_root(2): with both the same, the old root lies on top of the new one and comes off.
    pivot_root(".", ".").step(|| "changing root".into())?;
    umount2(".", MntFlags::MNT_DETACH).step(|| "letting go of the old root".into())?;
    chdir("/").step(|| "entering the new root".into())?;
    let flags = flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(none, "/", none, flags, none).step(|| "making the root read-only".into())
}

fn hide(visibility: Visibility) -> Result<(), SetupError> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).step(|| "forbidding core dumps".into())?;
    prctl::set_dumpable(visibility == Visibility::SameUser).step(|| "forbidding dumps".into())
}

/// No file may be opened, no process outside be signalled (Landlock, kernel
/// `Documentation/userspace-api/landlock.rst`). TCP ports stay free: any may be asked for.
fn landlock() -> Result<(), SetupError> {
    let restricted = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))
        .and_then(|rules| rules.scope(Scope::from_all(ABI::V6)))
        .and_then(|rules| rules.create())
        .and_then(|rules| rules.restrict_self());
    match restricted {
        Ok(status) if status.ruleset == RulesetStatus::NotEnforced => {
            tracing::debug!("no Landlock in this kernel");
            Ok(())
        }
        Ok(_) => Ok(()),
        Err(error) => Err(io::Error::other(error)).step(|| "Landlock".into()),
    }
}
