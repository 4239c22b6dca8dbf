//! Gives a network to a namespace that exists.
//!
//! Comes in: a [`Target`] and a tap's plan. Goes out: the tap's descriptors. The namespaces are
//! entered by a child, so this process keeps the host's network. The child ends when the tap is made, or
//! stays as the opener.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sched::{CloneFlags, setns};
use nix::unistd::{Pid, getpid};

use super::guest::{TapPlan, make_tap};
use super::{Made, SetupError, Step, hear_made, is_ours, opener, report_made};
use crate::sys::process;

/// Names the namespace to be served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// That of a process.
    Process(Pid),
    /// The one that a file stands for.
    Path(PathBuf),
}

impl Target {
    /// A number is a process, anything else a path.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text.parse() {
            Ok(pid) if pid > 0 => Self::Process(Pid::from_raw(pid)),
            Ok(_) | Err(_) => Self::Path(PathBuf::from(text)),
        }
    }

    fn network(&self) -> PathBuf {
        match self {
            Self::Process(pid) => PathBuf::from(format!("/proc/{pid}/ns/net")),
            Self::Path(path) => path.clone(),
        }
    }
}

/// The user namespace that owns a target's network.
#[derive(Debug, Clone, Copy)]
pub struct Owner<'a> {
    /// The option that names it.
    pub option: &'static str,
    /// Its file; the kernel is asked where there is none.
    pub path: Option<&'a Path>,
}

/// The namespaces of a target, opened.
#[derive(Debug)]
struct Namespaces<'a> {
    user: Option<OwnedFd>,
    owner: Owner<'a>,
    network: OwnedFd,
}

fn open(path: &Path) -> Result<OwnedFd, SetupError> {
    File::open(path)
        .map(OwnedFd::from)
        .step(|| format!("opening the namespace {}", path.display()))
}

impl<'a> Namespaces<'a> {
    fn open(target: &Target, owner: Owner<'a>) -> Result<Self, SetupError> {
        let network = open(&target.network())?;
        let user = match owner.path {
            Some(path) => {
                let opened =
                    File::open(path).step(|| format!("{} {}", owner.option, path.display()));
                Some(opened?.into())
            }
            // The one that owns the network namespace is the one whose capabilities count there.
            None => match process::owning_user_namespace(network.as_fd()) {
                Ok(owner) => Some(owner),
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => None,
                Err(error) => {
                    return Err(error)
                        .step(|| format!("{} is no namespace", target.network().display()));
                }
            },
        };
        Ok(Self {
            user,
            owner,
            network,
        })
    }

    fn enter(&self) -> Result<(), SetupError> {
        let entered = match &self.user {
            Some(user) if !is_ours(user) => self.enter_user(user),
            Some(_) | None => Ok(()),
        };
        // Who has powers over the network already need not enter its owner.
        match (entered, self.enter_network()) {
            (_, Ok(())) => Ok(()),
            (Err(error), Err(_)) | (Ok(()), Err(error)) => Err(error),
        }
    }

    fn enter_user(&self, user: &OwnedFd) -> Result<(), SetupError> {
        setns(user, CloneFlags::CLONE_NEWUSER).step(|| match self.owner.path {
            Some(path) => format!(
                "{} {}: entering it (is it a user namespace, and yours?)",
                self.owner.option,
                path.display()
            ),
            None => "entering the user namespace that owns the target's (is it yours?)".into(),
        })
    }

    fn enter_network(&self) -> Result<(), SetupError> {
        setns(&self.network, CloneFlags::CLONE_NEWNET).step(|| {
            format!(
                "entering the network namespace ({} names the user namespace that owns it)",
                self.owner.option
            )
        })
    }
}

/// Takes over a tap that the caller has opened.
///
/// # Errors
/// When it can't be made non-blocking.
pub fn adopt_tap(tap: OwnedFd) -> Result<OwnedFd, SetupError> {
    let flags = fcntl(&tap, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
    flags
        .and_then(|flags| fcntl(&tap, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)))
        .step(|| "taking over the tap".into())?;
    Ok(tap)
}

/// Makes the tap in the target's namespace, or takes what is there.
///
/// # Errors
/// The step that failed, in the child or here.
pub fn tap(target: &Target, owner: Owner<'_>, plan: &TapPlan) -> Result<Made, SetupError> {
    let made = make(target, owner, plan);
    if made.is_ok() || plan.queues == 1 || !plan.one_will_do {
        return made;
    }
    // It may be there already, made for one.
    let plan = TapPlan {
        queues: 1,
        ..plan.clone()
    };
    make(target, owner, &plan).or(made)
}

fn make(target: &Target, owner: Owner<'_>, plan: &TapPlan) -> Result<Made, SetupError> {
    let namespaces = Namespaces::open(target, owner)?;
    let us = getpid();
    let (ours, theirs) = UnixStream::pair().step(|| "making a socket pair".into())?;
    let Some(child) = process::fork().step(|| "starting a child".into())? else {
        drop(ours);
        let made = namespaces.enter().and_then(|()| make_tap(plan));
        let (near, far) = plan.opener_lines();
        let made = made.map(|taps| Made { taps, opener: near });
        let told = report_made(&theirs, made);
        if told && !far.is_empty() {
            opener::live(far, us);
        }
        std::process::exit(i32::from(!told));
    };
    drop(theirs);
    let heard = hear_made(&ours, plan.queues);
    // An opener stays.
    if heard.as_ref().is_ok_and(|made| made.opener.is_empty()) || heard.is_err() {
        process::wait_for(child).step(|| "waiting for the child".into())?;
    }
    heard
}
