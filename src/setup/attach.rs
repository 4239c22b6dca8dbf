//! Gives a network to a namespace that exists.
//!
//! Comes in: a [`Target`] and a tap's plan. Goes out: the tap's descriptor. The namespaces are
//! entered by a short-lived child, so this process keeps the host's network.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sched::{CloneFlags, setns};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use super::guest::{TapPlan, make_tap};
use super::{SetupError, Step, hear, is_ours, message, report_tap};
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

/// The namespaces of a target, opened.
#[derive(Debug)]
struct Namespaces {
    user: Option<OwnedFd>,
    /// Where the user namespace was named.
    user_path: Option<PathBuf>,
    network: OwnedFd,
}

fn open(path: &Path) -> Result<OwnedFd, SetupError> {
    File::open(path)
        .map(OwnedFd::from)
        .step(|| format!("opening the namespace {}", path.display()))
}

impl Namespaces {
    fn open(target: &Target, user: Option<&Path>) -> Result<Self, SetupError> {
        let network = open(&target.network())?;
        let user_path = user.map(Path::to_path_buf);
        let user = match user {
            Some(path) => Some(open(path)?),
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
            user_path,
            network,
        })
    }

    fn enter(&self) -> Result<(), SetupError> {
        if let Some(user) = &self.user {
            if is_ours(user) {
                return self.enter_network();
            }
            setns(user, CloneFlags::CLONE_NEWUSER).step(|| match &self.user_path {
                Some(path) => format!(
                    "--userns {}: entering it (is it a user namespace, and yours?)",
                    path.display()
                ),
                None => "entering the user namespace that owns the target's (is it yours?)".into(),
            })?;
        }
        self.enter_network()
    }

    fn enter_network(&self) -> Result<(), SetupError> {
        setns(&self.network, CloneFlags::CLONE_NEWNET).step(|| {
            "entering the network namespace (--userns names the user namespace that owns it)".into()
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

/// Makes the tap in the target's namespace.
///
/// # Errors
/// The step that failed, in the child or here.
pub fn tap(target: &Target, user: Option<&Path>, plan: &TapPlan) -> Result<OwnedFd, SetupError> {
    let namespaces = Namespaces::open(target, user)?;
    let (ours, theirs) = UnixStream::pair().step(|| "making a socket pair".into())?;
    let Some(child) = process::fork().step(|| "starting a child".into())? else {
        drop(ours);
        let made = namespaces.enter().and_then(|()| make_tap(plan));
        let told = report_tap(&theirs, made);
        std::process::exit(i32::from(!told));
    };
    drop(theirs);
    let heard = hear(&ours, message::TAP);
    waitpid(child, None).step(|| "waiting for the child".into())?;
    heard?.ok_or(SetupError::ChildGone)
}
