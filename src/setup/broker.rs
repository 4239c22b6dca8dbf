//! The process that stays outside the sandbox, for the few things that only work there: reading
//! `/etc/resolv.conf` however it is linked and replaced, looking whether a namespace's path is still
//! there, removing socket files at the end, and for `run` keeping the command's keeper.
//!
//! We, who carry packets, start it before we give everything up; it never sees a packet. It does what
//! was settled at the start and what a few short messages say, and it ends when we do, however we
//! end. Descriptors of directories would do part of this from within a sandbox, but whoever holds one
//! can climb out by it.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::run::{self, Job};
use super::{Made, SetupError, Step, keeper, message};
use crate::host::resolv_text::{TextFile, answer};
use crate::log;
use crate::sys::process::{self, reap};
use crate::sys::signals::SignalSource;
use crate::sys::{fd, privileges};

/// How often a namespace's path is looked at, milliseconds: its end is to be noticed within a second.
const LOOK: u16 = 400;

/// How long it may take for what it is asked, and to clear up at the end.
const PATIENCE: Duration = Duration::from_secs(5);

/// What the broker is there for, beside what is asked of it later.
#[derive(Debug)]
pub struct Errands<'a> {
    /// The resolver configuration to answer questions about.
    pub resolv_conf: Option<&'a Path>,
    /// The file of a namespace whose end is to be told.
    pub namespace: Option<&'a Path>,
    /// Descriptors of the caller that the broker must not keep open.
    pub not_for_broker: &'a [i32],
}

impl Errands<'_> {
    /// There is nothing to do but what is asked for later.
    #[must_use]
    pub const fn are_none(&self) -> bool {
        self.resolv_conf.is_none() && self.namespace.is_none()
    }
}

/// What the broker says.
#[derive(Debug)]
pub enum Word {
    /// The command has ended, with this status, and everything that descends from it.
    Ended(u8),
    /// The namespace's path is gone or stands for another.
    NamespaceGone,
    /// The broker itself is gone.
    Gone,
}

/// Our end of the line to the broker.
#[derive(Debug)]
pub struct Broker {
    pid: Pid,
    line: UnixStream,
    resolver: Option<UnixStream>,
    watches_namespace: bool,
}

impl Broker {
    /// Starts a broker for a namespace that exists.
    ///
    /// # Errors
    /// When no process or descriptor is left.
    pub fn start(errands: &Errands<'_>) -> Result<Self, SetupError> {
        Self::fork(errands, |office| {
            fd::close_inherited(errands.not_for_broker);
            protect();
            office.serve();
        })?
        .patient()
    }

    /// Starts a broker that makes the namespaces and the tap of `job` and keeps its command, which
    /// waits for [`Broker::begin`].
    ///
    /// # Errors
    /// The step that failed, in whichever process.
    pub fn start_command(errands: &Errands<'_>, job: &Job) -> Result<(Self, Made), SetupError> {
        let broker = Self::fork(errands, |mut office| {
            let started = prctl::set_child_subreaper(true)
                .step(|| "adopting orphans".into())
                .and_then(|()| run::start(job));
            let made = started.map(|(started, made)| {
                office.command = Some(Command {
                    keeper: started.keeper,
                    waiting: Some(started),
                    running: None,
                });
                made
            });
            fd::close_inherited(errands.not_for_broker);
            protect();
            if super::report_made(&office.line, made) {
                office.serve();
            }
        })?;
        let made = super::hear_made(&broker.line, job.tap.queues)?;
        Ok((broker.patient()?, made))
    }

    /// From now on it is waited for only so long.
    fn patient(self) -> Result<Self, SetupError> {
        self.line
            .set_read_timeout(Some(PATIENCE))
            .step(|| "limiting the wait for the broker".into())?;
        Ok(self)
    }

    fn fork(errands: &Errands<'_>, work: impl FnOnce(Office<'_>)) -> Result<Self, SetupError> {
        let pair = || fd::message_pair().step(|| "making a socket pair".into());
        let (ours, theirs) = pair()?;
        let (asking, answering) = match errands.resolv_conf {
            Some(path) => {
                let (asking, answering) = pair()?;
                (Some(asking), Some((answering, TextFile::new(path))))
            }
            None => (None, None),
        };
        let namespace = errands.namespace.map(Watched::new).transpose()?;
        if let Some(pid) = process::fork().step(|| "starting the broker".into())? {
            return Ok(Self {
                pid,
                line: ours,
                resolver: asking,
                watches_namespace: errands.namespace.is_some(),
            });
        }
        drop((ours, asking));
        let _ = prctl::set_name(c"tapgate-broker");
        if let Ok(signals) = SignalSource::new() {
            work(Office {
                line: theirs,
                signals,
                resolver: answering,
                namespace,
                remove: Vec::new(),
                sealed: false,
                command: None,
            });
        }
        log::end();
        std::process::exit(0);
    }

    /// The socket to ask for the resolver configuration by, once.
    pub fn take_resolver(&mut self) -> Option<UnixStream> {
        self.resolver.take()
    }

    /// Has a socket's file removed at the end, if it is still the one that is there now.
    ///
    /// # Errors
    /// When the broker is gone or can't see the file.
    pub fn remove_at_end(&self, socket: &Path) -> Result<(), SetupError> {
        let path = std::path::absolute(socket).step(|| "finding the working directory".into())?;
        let mut bytes = vec![message::REMOVE];
        bytes.extend(path.as_os_str().as_bytes());
        fd::send(&self.line, &bytes, None).step(|| "speaking to the broker".into())?;
        super::hear(&self.line, message::REMOVE).map(drop)
    }

    /// It tells the end of the namespace, so nobody does when it is gone.
    #[must_use]
    pub const fn watches_namespace(&self) -> bool {
        self.watches_namespace
    }

    /// From now on no file can be named to be removed: what is said later may not come from us.
    ///
    /// # Errors
    /// When the broker is gone.
    pub fn seal(&self) -> io::Result<()> {
        fd::send(&self.line, &[message::SEALED], None)
    }

    /// Lets the command begin.
    ///
    /// # Errors
    /// When the broker is gone.
    pub fn begin(&self) -> io::Result<()> {
        fd::send(&self.line, &[message::GO], None)
    }

    /// Passes a signal on to the command.
    ///
    /// # Errors
    /// When the broker is gone.
    pub fn pass_on(&self, signal: Signal) -> io::Result<()> {
        let number = u8::try_from(signal as i32).unwrap_or(0);
        fd::send(&self.line, &[message::SIGNAL, number], None)
    }

    /// What the broker says next.
    ///
    /// # Errors
    /// `WouldBlock` when it has said nothing.
    pub fn try_hear(&self) -> io::Result<Word> {
        let mut bytes = Vec::new();
        match fd::try_receive(&self.line, &mut bytes) {
            // It died with something unread.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => bytes.clear(),
            heard => drop(heard?),
        }
        match *bytes.as_slice() {
            [message::ENDED, status] => Ok(Word::Ended(status)),
            [message::NAMESPACE_GONE] => Ok(Word::NamespaceGone),
            _ => Ok(Word::Gone),
        }
    }

    /// A descriptor that becomes readable when the broker says something.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn readable(&self) -> io::Result<OwnedFd> {
        self.line.as_fd().try_clone_to_owned()
    }
}

impl Drop for Broker {
    /// Ends the broker and waits until it has cleared up, but not for ever: it may be stuck.
    fn drop(&mut self) {
        let _ = self.line.shutdown(std::net::Shutdown::Write);
        let mut bytes = Vec::new();
        let ended = loop {
            match fd::receive(&self.line, &mut bytes) {
                Ok(_) if bytes.is_empty() => break true,
                Ok(_) => {}
                Err(error) => break error.kind() == io::ErrorKind::ConnectionReset,
            }
        };
        if ended {
            let _ = process::wait_for(self.pid);
        } else {
            tracing::warn!(pid = %self.pid, "the broker does not end");
        }
    }
}

/// A process without a sandbox that knows nothing worth to be had, but sees the host: nobody may get
/// into it, and what it does needs no power but to reach files that we, perhaps root, could reach.
fn protect() {
    let _ = privileges::keep_files();
    let _ = prctl::set_no_new_privs();
    let _ = prctl::set_dumpable(false);
}

/// A path that stood for a namespace at the start.
#[derive(Debug)]
struct Watched<'a> {
    path: &'a Path,
    first: Identity,
    told: bool,
}

/// Device and inode of a file.
type Identity = (u64, u64);

fn identity(path: &Path) -> io::Result<Identity> {
    fs::symlink_metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

fn identity_behind(path: &Path) -> io::Result<Identity> {
    fs::metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

impl<'a> Watched<'a> {
    fn new(path: &'a Path) -> Result<Self, SetupError> {
        let first =
            identity_behind(path).step(|| format!("opening the namespace {}", path.display()))?;
        Ok(Self {
            path,
            first,
            told: false,
        })
    }

    fn is_gone(&self) -> bool {
        match identity_behind(self.path) {
            Ok(now) => now != self.first,
            // Only these say that the namespace is gone; to be out of descriptors does not. ESRCH is
            // the /proc entry of a process that has ended.
            Err(error) => {
                matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) || error.raw_os_error() == Some(libc::ESRCH)
            }
        }
    }
}

/// A command that the broker keeps.
#[derive(Debug)]
struct Command {
    keeper: Pid,
    waiting: Option<run::Started>,
    /// The keeper ends everything when this is closed.
    running: Option<UnixStream>,
}

/// What to do after a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Stay,
    End,
}

/// The broker's own side.
#[derive(Debug)]
struct Office<'a> {
    line: UnixStream,
    signals: SignalSource,
    resolver: Option<(UnixStream, TextFile)>,
    namespace: Option<Watched<'a>>,
    /// Files to remove at the end.
    remove: Vec<(PathBuf, Identity)>,
    sealed: bool,
    command: Option<Command>,
}

impl Office<'_> {
    /// Works until the other process is gone, then clears up.
    fn serve(mut self) {
        while self.work() == Next::Stay {}
        if let Some(command) = self.command.take() {
            drop(command);
            keeper::end_descendants();
        }
        for (path, first) in &self.remove {
            if identity(path).is_ok_and(|now| now == *first) {
                let _ = fs::remove_file(path);
            }
        }
    }

    /// Waits for something to do and does it.
    fn work(&mut self) -> Next {
        let mut sources = vec![
            PollFd::new(self.line.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
        ];
        if let Some((resolver, _)) = &self.resolver {
            sources.push(PollFd::new(resolver.as_fd(), PollFlags::POLLIN));
        }
        let limit = match &self.namespace {
            Some(watched) if !watched.told => PollTimeout::from(LOOK),
            Some(_) | None => PollTimeout::NONE,
        };
        match poll(&mut sources, limit) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return Next::End,
        }
        let ready: Vec<bool> = sources.iter().map(|it| it.any().unwrap_or(true)).collect();
        self.look_at_namespace();
        self.look_at_signals();
        if ready.get(2) == Some(&true)
            && let Some((resolver, text)) = &mut self.resolver
            && answer(resolver, text).is_err()
        {
            self.resolver = None;
        }
        if ready[0] { self.obey() } else { Next::Stay }
    }

    fn obey(&mut self) -> Next {
        let mut bytes = Vec::new();
        if fd::receive(&self.line, &mut bytes).is_err() {
            return Next::End;
        }
        match bytes.split_first() {
            None => return Next::End,
            Some((&message::REMOVE, path)) if !self.sealed => {
                let path = PathBuf::from(std::ffi::OsString::from_vec(path.to_vec()));
                return self.note(path);
            }
            Some((&message::SEALED, _)) => self.sealed = true,
            Some((&message::GO, _)) => {
                if let Some(command) = &mut self.command {
                    let started = command.waiting.take();
                    command.running = started.and_then(|started| started.begin().ok());
                }
            }
            Some((&message::SIGNAL, &[number])) => self.pass_on(number),
            Some(_) => {}
        }
        Next::Stay
    }

    /// Notes a file to be removed at the end, and answers.
    fn note(&mut self, path: PathBuf) -> Next {
        let mut answer = vec![message::REMOVE];
        match identity(&path) {
            Ok(identity) => self.remove.push((path, identity)),
            Err(error) => {
                answer = vec![message::ERROR];
                answer.extend(format!("{} can't be seen: {error}", path.display()).bytes());
            }
        }
        match fd::send(&self.line, &answer, None) {
            Ok(()) => Next::Stay,
            Err(_) => Next::End,
        }
    }

    fn pass_on(&self, number: u8) {
        if let (Some(command), Ok(signal)) = (&self.command, Signal::try_from(i32::from(number))) {
            // The keeper may be gone already; then its end comes next.
            let _ = kill(command.keeper, signal);
        }
    }

    /// Signals concern the others; only the end of the keeper is ours to notice.
    fn look_at_signals(&mut self) {
        while let Ok(arrived) = self.signals.try_next() {
            let Some(command) = &self.command else {
                continue;
            };
            if arrived.signal == Signal::SIGCHLD
                && let Ok(Some(status)) = reap(command.keeper)
            {
                self.command = None;
                keeper::end_descendants();
                let _ = fd::send(&self.line, &[message::ENDED, status], None);
            }
        }
    }

    fn look_at_namespace(&mut self) {
        if let Some(watched) = &mut self.namespace
            && !watched.told
            && watched.is_gone()
        {
            watched.told = true;
            let _ = fd::send(&self.line, &[message::NAMESPACE_GONE], None);
        }
    }
}
