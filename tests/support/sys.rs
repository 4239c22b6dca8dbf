//! What the harness needs of the kernel: forked agents that make sockets in a namespace, and what a
//! child does to itself before exec. The only unsafe code of the tests.
//!
//! An *agent* is a fork of the test program that enters or makes namespaces, never execs (an exec as
//! a user other than root would cost it its capabilities) and then does one thing: make sockets and
//! pass them back. A socket stays in the namespace it was made in, so the test binds, connects and
//! serves on it from its own threads. The agent ends when its end of the socket pair closes, which
//! the kernel sees to even when the test program is killed.

#![allow(
    unsafe_code,
    reason = "fork, pre_exec and descriptors from the kernel have no safe interface"
)]

use std::ffi::CString;
use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigHandler, Signal, kill, signal};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    recvmsg, sendmsg, socketpair,
};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Gid, Pid, Uid, fork, setgroups, setresgid, setresuid, setsid};

/// What a child does to itself, in this order, before it execs or serves.
#[derive(Clone, Default)]
pub(crate) struct Plan {
    /// Stop being root: take this user, and no supplementary groups.
    pub(crate) become_user: Option<(Uid, Gid)>,
    /// Namespaces to enter.
    pub(crate) enter: Vec<(Arc<OwnedFd>, CloneFlags)>,
    /// Keep the capabilities of the entered user namespace across exec.
    pub(crate) keep_capabilities: bool,
    /// Start a session with this terminal; standard input, output and error are the caller's affair.
    pub(crate) terminal: Option<Arc<OwnedFd>>,
    /// Descriptors that stay open across exec, under their own numbers.
    pub(crate) inherit: Vec<Arc<OwnedFd>>,
}

/// Tests that were started in the background of a script inherit `SIGINT` and `SIGQUIT` ignored, and
/// `SIGHUP` from nohup(1), and pass that on through exec: what a program does with them must not
/// hang on who started the tests.
fn listen_to_interrupts() -> io::Result<()> {
    for interrupt in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGHUP] {
        // SAFETY: the default action replaces "ignore"; no handler is installed.
        unsafe { signal(interrupt, SigHandler::SigDfl) }?;
    }
    Ok(())
}

impl Plan {
    /// Makes `command` carry the plan out between fork and exec.
    pub(crate) fn attach_to(self, command: &mut Command) {
        // SAFETY: `apply` makes system calls on memory that was laid out before the fork; it takes
        // no lock that another thread can hold.
        unsafe { command.pre_exec(move || self.apply()) };
    }

    fn apply(&self) -> io::Result<()> {
        listen_to_interrupts()?;
        if let Some((uid, gid)) = self.become_user {
            setgroups(&[])?;
            setresgid(gid, gid, gid)?;
            setresuid(uid, uid, uid)?;
            set_dumpable()?;
        }
        for (namespace, kind) in &self.enter {
            setns(namespace, *kind)?;
        }
        if self.keep_capabilities {
            raise_ambient()?;
        }
        if let Some(terminal) = &self.terminal {
            setsid()?;
            take_terminal(terminal)?;
        }
        for descriptor in &self.inherit {
            fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        Ok(())
    }
}

/// One mount that an agent makes in its own mount namespace.
pub(crate) struct Mount {
    pub(crate) source: CString,
    pub(crate) target: CString,
    pub(crate) kind: MountKind,
}

/// The two kinds of mounts that the harness needs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum MountKind {
    /// `mount --rbind`
    Bind,
    /// An empty tmpfs that everyone may write.
    Empty,
}

/// The namespaces that an agent makes for itself after its [`Plan`].
pub(crate) struct Fresh {
    pub(crate) flags: CloneFlags,
    /// The maps of a new user namespace; without one they are not looked at.
    pub(crate) uid_map: String,
    pub(crate) gid_map: String,
    pub(crate) mounts: Vec<Mount>,
}

/// A process that holds namespaces open and makes sockets in them.
pub(crate) struct Agent {
    pid: Pid,
    /// `None` only while dropping.
    requests: Mutex<Option<OwnedFd>>,
}

impl Agent {
    /// Forks an agent that carries out `plan`, then makes the namespaces of `fresh`.
    pub(crate) fn start(plan: &Plan, fresh: &Fresh) -> io::Result<Self> {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        // SAFETY: the child only makes system calls and allocates (which glibc keeps usable after
        // fork), and leaves through `_exit`, so no lock of another thread is waited for and no
        // destructor of the parent runs twice.
        match unsafe { fork() }? {
            ForkResult::Child => {
                let _ = catch_unwind(AssertUnwindSafe(|| agent_main(plan, fresh, &theirs)));
                // SAFETY: ends the child at once; always allowed.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => {
                drop(theirs);
                let agent = Self {
                    pid: child,
                    requests: Mutex::new(Some(ours)),
                };
                agent.receive()?;
                Ok(agent)
            }
        }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Makes a socket in the agent's network namespace.
    pub(crate) fn socket(&self, domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
        let requests = self
            .requests
            .lock()
            .expect("another thread failed while asking");
        let agent = requests.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let request: Vec<u8> = [domain, kind, protocol]
            .iter()
            .flat_map(|word| word.to_ne_bytes())
            .collect();
        sendmsg::<UnixAddr>(
            agent.as_raw_fd(),
            &[IoSlice::new(&request)],
            &[],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        let made = receive_answer(agent);
        // From here on nobody but the caller keeps it open: once the caller closes it, its port is free.
        receive_answer(agent)?;
        made?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn receive(&self) -> io::Result<Option<OwnedFd>> {
        let requests = self
            .requests
            .lock()
            .expect("another thread failed while asking");
        receive_answer(requests.as_ref().ok_or(io::ErrorKind::NotConnected)?)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}

/// The life of an agent: set up, report, serve until the test program is gone.
fn agent_main(plan: &Plan, fresh: &Fresh, requests: &OwnedFd) {
    let ready = plan.apply().and_then(|()| make_namespaces(fresh));
    close_all_but(requests.as_raw_fd());
    if answer(requests, ready.map(|()| None)).is_err() {
        return;
    }
    let mut request = [0; 12];
    while let Ok(12) = nix::unistd::read(requests, &mut request) {
        let word = |at: usize| {
            let bytes = [
                request[at],
                request[at + 1],
                request[at + 2],
                request[at + 3],
            ];
            i32::from_ne_bytes(bytes)
        };
        let made = raw_socket(word(0), word(4), word(8)).map(Some);
        let told = answer(requests, made).and_then(|()| answer(requests, Ok(None)));
        if told.is_err() {
            return;
        }
    }
}

fn make_namespaces(fresh: &Fresh) -> io::Result<()> {
    unshare(fresh.flags)?;
    set_dumpable()?;
    if fresh.flags.contains(CloneFlags::CLONE_NEWUSER) {
        fs::write("/proc/self/setgroups", "deny")?;
        fs::write("/proc/self/uid_map", &fresh.uid_map)?;
        fs::write("/proc/self/gid_map", &fresh.gid_map)?;
    }
    if fresh.flags.contains(CloneFlags::CLONE_NEWNS) {
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>)?;
    }
    for Mount {
        source,
        target,
        kind,
    } in &fresh.mounts
    {
        match kind {
            MountKind::Bind => mount(
                Some(source.as_c_str()),
                target.as_c_str(),
                None::<&str>,
                MsFlags::MS_BIND | MsFlags::MS_REC,
                None::<&str>,
            )?,
            MountKind::Empty => mount(
                Some(source.as_c_str()),
                target.as_c_str(),
                Some("tmpfs"),
                MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
                Some("mode=1777"),
            )?,
        }
    }
    Ok(())
}

/// Sends the error number (0 for none) and, where there is one, the descriptor; its own copy is closed after that.
fn answer(requests: &OwnedFd, result: io::Result<Option<OwnedFd>>) -> io::Result<()> {
    let (error, made) = match result {
        Ok(made) => (0, made),
        Err(error) => (error.raw_os_error().unwrap_or(libc::EIO), None),
    };
    let passed: Vec<RawFd> = made.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&passed)];
    let control: &[ControlMessage<'_>] = if passed.is_empty() { &[] } else { &rights };
    sendmsg::<UnixAddr>(
        requests.as_raw_fd(),
        &[IoSlice::new(&error.to_ne_bytes())],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

fn receive_answer(agent: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let mut error = [0; 4];
    let mut control = nix::cmsg_space!(RawFd);
    let mut parts = [IoSliceMut::new(&mut error)];
    let message = recvmsg::<UnixAddr>(
        agent.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut made = None;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(descriptors) = part {
            // SAFETY: the kernel has just installed these descriptors for us, and nothing else
            // knows their numbers.
            made = descriptors
                .into_iter()
                .map(|raw| unsafe { OwnedFd::from_raw_fd(raw) })
                .next();
        }
    }
    if message.bytes != error.len() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    match i32::from_ne_bytes(error) {
        0 => Ok(made),
        number => Err(io::Error::from_raw_os_error(number)),
    }
}

/// [`nix::sys::socket::socket`] knows too few protocols.
fn raw_socket(domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved.
    let raw = unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) };
    let raw = Errno::result(raw)?;
    // SAFETY: a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// An agent must not hold the sockets of other tests that happened to be open when it was forked:
/// their peers would never see them close. Standard input, output and error stay.
fn close_all_but(kept: RawFd) {
    let kept = libc::c_uint::try_from(kept).unwrap_or(libc::c_uint::MAX);
    let ranges = [
        (3, kept.saturating_sub(1)),
        (kept.saturating_add(1), libc::c_uint::MAX),
    ];
    for (first, last) in ranges.into_iter().filter(|(first, last)| first <= last) {
        // SAFETY: the agent uses none of these any more, and leaves through `_exit`, so nothing
        // closes them again.
        unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    }
}

/// A process that changed its user is not dumpable, and then can't write its own `uid_map`.
fn set_dumpable() -> io::Result<()> {
    nix::sys::prctl::set_dumpable(true).map_err(io::Error::from)
}

/// `struct __user_cap_header_struct` of linux/capability.h.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    pid: i32,
}

/// `struct __user_cap_data_struct`; version 3 has two.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CapabilitySets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Makes every permitted capability ambient, so that it survives the exec of an ordinary program.
fn raise_ambient() -> io::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    let mut header = CapabilityHeader {
        version: VERSION_3,
        pid: 0,
    };
    let mut sets = [CapabilitySets::default(); 2];
    // SAFETY: both pointers are to live values of the layout that version 3 asks for.
    let got = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) };
    Errno::result(got)?;
    for set in &mut sets {
        set.inheritable = set.permitted;
    }
    // SAFETY: as above; the kernel only reads.
    let done = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) };
    Errno::result(done)?;
    // prctl reads every argument as an unsigned long, also the two that must be zero.
    const RAISE: libc::c_ulong = libc::PR_CAP_AMBIENT_RAISE as libc::c_ulong;
    const ZERO: libc::c_ulong = 0;
    for capability in 0..libc::c_ulong::from(64_u32) {
        if sets[usize::from(capability >= 32)].permitted >> (capability % 32) & 1 == 0 {
            continue;
        }
        // SAFETY: no memory is involved.
        let raised = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, RAISE, capability, ZERO, ZERO) };
        Errno::result(raised)?;
    }
    Ok(())
}

fn take_terminal(terminal: &OwnedFd) -> io::Result<()> {
    // SAFETY: the request takes a plain number.
    let taken = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) };
    Errno::result(taken)?;
    Ok(())
}

/// Tells the terminal's foreground programs of a new size (they get `SIGWINCH`).
pub(crate) fn set_window_size(terminal: &OwnedFd, rows: u16, columns: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the kernel reads one `winsize` through a pointer to a live one.
    let set = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    Errno::result(set)?;
    Ok(())
}

/// Raises the soft limit on descriptors to the hard one, and gives the limit.
pub(crate) fn raise_descriptor_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer is to a live `rlimit`.
    let got = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) };
    Errno::result(got)?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: as above; the kernel only reads.
    let set = unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    Errno::result(set)?;
    Ok(limit.rlim_cur)
}

/// Bytes of a socket's that the other end's system has not acknowledged (tcp(7), `SIOCOUTQ`).
pub(crate) fn unacknowledged(stream: &TcpStream) -> usize {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the call writes one integer to where the pointer says.
    let done = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    assert_eq!(done, 0, "it is a socket");
    usize::try_from(bytes).expect("a number of bytes")
}
