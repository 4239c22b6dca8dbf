//! Gives up, for good, all that carrying packets does not need. Runs last, when every descriptor that
//! will be needed is open; what only works outside is the broker's ([`super::broker`]).
//!
//! The stages, each with the reason for its place, are the body of [`enter`]. Comes in: how much the
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

/// How much of the sandbox there is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Sandbox {
    /// All of it, or nothing runs.
    #[default]
    On,
    /// None of it.
    Off,
    /// As much as the system allows.
    #[value(skip)]
    IfPossible,
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

/// Enters the sandbox.
///
/// # Errors
/// The stage that failed. With [`Sandbox::IfPossible`] a stage that fails is passed over.
pub fn enter(wanted: Sandbox, visibility: Visibility) -> Result<(), SetupError> {
    if wanted == Sandbox::Off {
        return Ok(());
    }
    let parent = Parent::now();
    let try_stage = |name: &'static str, done: Result<(), SetupError>| match done {
        Err(error) if wanted == Sandbox::IfPossible => {
            tracing::info!(stage = name, %error, "sandbox without this stage");
            Ok(())
        }
        other => other,
    };
    // First, because mounting and changing root need capabilities, which an unprivileged process
    // has only in a user namespace of its own.
    let mut place = Place::Outside;
    let placed = namespaces().and_then(|found| {
        place = found;
        if place == Place::Outside {
            Ok(())
        } else {
            empty_root()
        }
    });
    try_stage("root", placed)?;
    // After the mounts, which needed them.
    try_stage("capabilities", capabilities(place))?;
    parent.keep()?;
    // What follows must hold across exec, and Landlock and seccomp want it from the unprivileged.
    try_stage(
        "no_new_privs",
        prctl::set_no_new_privs().step(|| "giving up new privileges".into()),
    )?;
    // After the change of user, which resets it.
    try_stage("dumps", hide(visibility))?;
    // A second wall for files, and one for signals and abstract sockets.
    try_stage("landlock", landlock())?;
    // Last: the filter has no call that any stage above needs.
    #[cfg(debug_assertions)]
    if super::escape::is_unfiltered() {
        return Ok(());
    }
    try_stage("seccomp", system_calls::restrict())
}

/// Whether a privileged port could be opened here: the network belongs to our own user namespace. A
/// new one would lose that.
fn has_low_ports() -> bool {
    let owner = fs::File::open("/proc/self/ns/net")
        .and_then(|network| process::owning_user_namespace(network.as_fd()));
    privileges::holds_low_ports() && owner.is_ok_and(|owner| is_ours(&owner))
}

/// Where this process lives now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In a user and a mount namespace of its own, where there is no other user.
    Own,
    /// In a mount namespace of its own.
    OwnMounts,
    /// Where it was.
    Outside,
}

fn namespaces() -> Result<Place, SetupError> {
    let keeps_low_ports = has_low_ports();
    if !keeps_low_ports {
        match own_user_namespace() {
            // Where there can be no more of them, the powers that an engine gave us will do.
            Err(error) if privileges::holds_mounts() => {
                tracing::debug!(%error, "no user namespace of our own");
            }
            done => return done.map(|()| Place::Own),
        }
    } else if !privileges::holds_mounts() {
        // A program file with just that capability: files are out of reach by the filter alone.
        return Ok(Place::Outside);
    }
    unshare(CloneFlags::CLONE_NEWNS).step(|| "sandbox: making a mount namespace".into())?;
    Ok(Place::OwnMounts)
}

/// A user namespace with nobody but us, and a mount namespace that it owns.
fn own_user_namespace() -> Result<(), SetupError> {
    let (uid, gid) = (Uid::effective(), Gid::effective());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS).step(|| {
        "sandbox: making a user namespace (see user.max_user_namespaces, or use --sandbox off)"
            .into()
    })?;
    let write = |file: &str, text: &str| {
        fs::write(Path::new("/proc/self").join(file), text)
            .step(|| format!("sandbox: writing {file}"))
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
        .step(|| "sandbox: making mounts private".into())?;
    let root = scratch_directory()?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let options = Some("size=64k,nr_inodes=8,mode=555");
    mount(Some("tapgate"), root, Some("tmpfs"), flags, options)
        .step(|| format!("sandbox: mounting a tmpfs on {}", root.display()))?;
    chdir(root).step(|| "sandbox: entering the new root".into())?;
    for name in ["etc", "run"] {
        fs::create_dir(name).step(|| format!("sandbox: making {name}"))?;
    }
    // pivot_root(2): with both the same, the old root lies on top of the new one and comes off.
    pivot_root(".", ".").step(|| "sandbox: changing root (or use --sandbox off)".into())?;
    umount2(".", MntFlags::MNT_DETACH).step(|| "sandbox: letting go of the old root".into())?;
    chdir("/").step(|| "sandbox: entering the new root".into())?;
    let flags = flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(none, "/", none, flags, none).step(|| "sandbox: making the root read-only".into())
}

/// No powers left; root becomes nobody, where there is anybody else to become.
fn capabilities(place: Place) -> Result<(), SetupError> {
    if place != Place::Own && Uid::effective().is_root() {
        match privileges::become_nobody() {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPERM)) => {
                tracing::debug!(%error, "nobody does not exist in this user namespace");
            }
            done => done.step(|| "sandbox: becoming nobody".into())?,
        }
    }
    privileges::keep_low_ports().step(|| "sandbox: giving up capabilities".into())
}

fn hide(visibility: Visibility) -> Result<(), SetupError> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).step(|| "sandbox: forbidding core dumps".into())?;
    prctl::set_dumpable(visibility == Visibility::SameUser)
        .step(|| "sandbox: forbidding dumps".into())
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
        Err(error) => Err(io::Error::other(error)).step(|| "sandbox: Landlock".into()),
    }
}
