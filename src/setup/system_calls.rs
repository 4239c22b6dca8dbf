//! The system calls that carrying packets needs, and the filter that ends the process at any other.
//!
//! [`CALLS`] is the one list to review; `tests/ns_sandbox.rs` fails when a call is missing from it and
//! when one that is on it is never made. [`OPENER`] is the same for the process that opens sockets inside.
//! Comes in: a list. Goes out: a filter that can't be undone
//! (seccomp(2)), which also ends the process when a call comes by another architecture's table.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use super::{SetupError, Step};
use crate::sys::tap;

/// A system call that may be made.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Its name, as the manual has it.
    pub name: &'static str,
    number: i64,
    /// With which arguments: all of one of these; any where this is empty.
    only: &'static [&'static [Only]],
    /// What it is needed for.
    pub reason: &'static str,
    /// Made on every machine, in every build.
    pub everywhere: bool,
}

/// What one argument, by its index, must be.
#[derive(Debug, Clone, Copy)]
enum Only {
    /// Equal to this.
    Is(u8, i32),
    /// Of a socket's kind (socket(2)), whatever its flags.
    Kind(u8, i32),
    /// None of these bits set.
    Without(u8, i32),
}

const fn any(name: &'static str, number: i64, reason: &'static str) -> Call {
    Call {
        name,
        number,
        only: &[],
        reason,
        everywhere: true,
    }
}

const fn only(
    name: &'static str,
    number: i64,
    only: &'static [&'static [Only]],
    reason: &'static str,
) -> Call {
    Call {
        name,
        number,
        only,
        reason,
        everywhere: true,
    }
}

/// A call that only some machines or builds make.
const fn sometimes(name: &'static str, number: i64, reason: &'static str) -> Call {
    Call {
        everywhere: false,
        ..any(name, number, reason)
    }
}

/// A socket of one family, kind and protocol.
macro_rules! socket {
    ($family:ident, $kind:ident, $protocol:expr) => {
        &[
            Only::Is(0, libc::$family),
            Only::Kind(1, libc::$kind),
            Only::Is(2, $protocol),
        ]
    };
}

/// The sockets that are opened once packets flow: TCP, UDP, ping.
const INTERNET: &[&[Only]] = &[
    socket!(AF_INET, SOCK_STREAM, 0),
    socket!(AF_INET, SOCK_DGRAM, 0),
    socket!(AF_INET, SOCK_DGRAM, libc::IPPROTO_ICMP),
    socket!(AF_INET6, SOCK_STREAM, 0),
    socket!(AF_INET6, SOCK_DGRAM, 0),
    socket!(AF_INET6, SOCK_DGRAM, libc::IPPROTO_ICMPV6),
];
/// No memory becomes a program.
const NOT_EXECUTABLE: &[&[Only]] = &[&[Only::Without(2, libc::PROT_EXEC)]];
/// Pages are given back, no advice else.
const GIVEN_BACK: &[&[Only]] = &[&[Only::Is(2, libc::MADV_DONTNEED)]];
/// A stream over the Internet's protocols.
const STREAMS: &[&[Only]] = &[
    socket!(AF_INET, SOCK_STREAM, 0),
    socket!(AF_INET6, SOCK_STREAM, 0),
];
/// A descriptor's flags are asked for, and a socket's blocking mode set, and a pipe made larger, nothing
/// else.
const FLAGS: &[&[Only]] = &[
    &[Only::Is(1, libc::F_GETFD)],
    &[Only::Is(1, libc::F_GETFL)],
    &[Only::Is(1, libc::F_SETFL)],
    &[Only::Is(1, libc::F_SETPIPE_SZ)],
];

/// Of this process, the limit on descriptors, which only a privileged one can raise above what it was.
const OWN_DESCRIPTORS: &[&[Only]] = &[&[Only::Is(0, 0), Only::Is(1, DESCRIPTORS)]];
/// `RLIMIT_NOFILE`, whose type differs from one C library to the other.
const DESCRIPTORS: i32 = 7;

/// A tap's filter is set and taken away, nothing else.
const FILTER: &[&[Only]] = &[
    &[Only::Is(1, tap::SET_FILTER)],
    &[Only::Is(1, tap::CLEAR_FILTER)],
];

/// A thread of this process works in batches or as any other, nothing else.
const IN_BATCHES: &[&[Only]] = &[
    &[Only::Is(0, 0), Only::Is(1, libc::SCHED_OTHER)],
    &[Only::Is(0, 0), Only::Is(1, libc::SCHED_BATCH)],
];

/// A descriptor's flags are asked for, nothing else.
const ASKED: &[&[Only]] = &[&[Only::Is(1, libc::F_GETFD)]];

/// Everything that may be called once packets flow.
pub const CALLS: &[Call] = &[
    any("read", libc::SYS_read, "frames, streams, signals, wake-ups"),
    any(
        "write",
        libc::SYS_write,
        "frames, the log, the ready descriptor, API answers",
    ),
    any("close", libc::SYS_close, "flows end"),
    any("epoll_ctl", libc::SYS_epoll_ctl, "a new socket is watched"),
    #[cfg(target_arch = "x86_64")]
    any(
        "epoll_wait",
        libc::SYS_epoll_wait,
        "waiting for anything to happen",
    ),
    #[cfg(not(target_arch = "x86_64"))]
    any(
        "epoll_pwait",
        libc::SYS_epoll_pwait,
        "waiting for anything to happen",
    ),
    only(
        "socket",
        libc::SYS_socket,
        INTERNET,
        "a flow to the host, a published port",
    ),
    any("connect", libc::SYS_connect, "a flow to the host"),
    any(
        "bind",
        libc::SYS_bind,
        "a published port, an outbound address",
    ),
    any("listen", libc::SYS_listen, "a published TCP port"),
    any(
        "accept4",
        libc::SYS_accept4,
        "clients of published ports and of the API",
    ),
    any(
        "sendto",
        libc::SYS_sendto,
        "streams, pings, questions to the broker",
    ),
    any(
        "recvfrom",
        libc::SYS_recvfrom,
        "streams, answers of the broker",
    ),
    any(
        "sendmsg",
        libc::SYS_sendmsg,
        "datagrams, words to the broker and the opener",
    ),
    any(
        "recvmsg",
        libc::SYS_recvmsg,
        "errors of the network, words of the broker, sockets inside",
    ),
    any(
        "recvmmsg",
        libc::SYS_recvmmsg,
        "datagrams, as many as are there",
    ),
    any(
        "shutdown",
        libc::SYS_shutdown,
        "one direction of a stream ends",
    ),
    any(
        "setsockopt",
        libc::SYS_setsockopt,
        "no delay, keep-alive, linger, error queue, device, ports, buffers",
    ),
    any(
        "getsockopt",
        libc::SYS_getsockopt,
        "how a connect ended, how near a peer is",
    ),
    any(
        "getsockname",
        libc::SYS_getsockname,
        "whether a connection leads to itself",
    ),
    sometimes(
        "gettid",
        libc::SYS_gettid,
        "what the runtime says of a panic names the thread",
    ),
    only(
        "fcntl",
        libc::SYS_fcntl,
        FLAGS,
        "accepted clients must not block; larger pipes; debug builds check what they close",
    ),
    any(
        "splice",
        libc::SYS_splice,
        "published ports' clients that go past the tap",
    ),
    any("pipe2", libc::SYS_pipe2, "between those and the guest"),
    Call {
        everywhere: false,
        ..only(
            "prlimit64",
            libc::SYS_prlimit64,
            OWN_DESCRIPTORS,
            "an API client gets one of the last descriptors",
        )
    },
    only("mmap", libc::SYS_mmap, NOT_EXECUTABLE, "rings of a flow"),
    any("munmap", libc::SYS_munmap, "rings of a flow that ended"),
    any("brk", libc::SYS_brk, "the heap"),
    any("mremap", libc::SYS_mremap, "a large table grows"),
    Call {
        everywhere: false,
        ..only(
            "madvise",
            libc::SYS_madvise,
            GIVEN_BACK,
            "what a crowd leaves",
        )
    },
    sometimes(
        "clock_gettime",
        libc::SYS_clock_gettime,
        "time, where the vDSO has none",
    ),
    any(
        "sigaltstack",
        libc::SYS_sigaltstack,
        "the standard library tidies up at the end",
    ),
    #[cfg(target_arch = "x86_64")]
    sometimes(
        "poll",
        libc::SYS_poll,
        "whether standard error takes a line, where it could not be opened anew",
    ),
    #[cfg(not(target_arch = "x86_64"))]
    sometimes(
        "ppoll",
        libc::SYS_ppoll,
        "whether standard error takes a line, where it could not be opened anew",
    ),
    Call {
        everywhere: false,
        ..only(
            "ioctl",
            libc::SYS_ioctl,
            FILTER,
            "a flood is thinned out before it is queued",
        )
    },
    any(
        "futex",
        libc::SYS_futex,
        "locks of the runtime, the log and the filter of the tap",
    ),
    any(
        "sched_yield",
        libc::SYS_sched_yield,
        "others have the processor while the loop looks for more",
    ),
    only(
        "sched_setscheduler",
        libc::SYS_sched_setscheduler,
        IN_BATCHES,
        "bulk past the tap waits for who has the processor",
    ),
    any("wait4", libc::SYS_wait4, "the broker ends first"),
    any("exit_group", libc::SYS_exit_group, "the end"),
];

/// Everything that the opener may call.
pub const OPENER: &[Call] = &[
    #[cfg(target_arch = "x86_64")]
    any("poll", libc::SYS_poll, "waiting for a request"),
    #[cfg(not(target_arch = "x86_64"))]
    any("ppoll", libc::SYS_ppoll, "waiting for a request"),
    sometimes(
        "restart_syscall",
        libc::SYS_restart_syscall,
        "the kernel goes on waiting so after a stop or a freeze",
    ),
    any("recvmsg", libc::SYS_recvmsg, "a request"),
    only("socket", libc::SYS_socket, STREAMS, "what is asked for"),
    any("sendmsg", libc::SYS_sendmsg, "the answer"),
    any("close", libc::SYS_close, "what was sent"),
    Call {
        everywhere: false,
        ..only(
            "fcntl",
            libc::SYS_fcntl,
            ASKED,
            "debug builds check what they close",
        )
    },
    sometimes("brk", libc::SYS_brk, "the heap"),
    any("exit_group", libc::SYS_exit_group, "the end"),
];

fn condition(only: Only) -> Result<SeccompCondition, seccompiler::BackendError> {
    /// The bits of a socket's kind that are not flags (`SOCK_TYPE_MASK` of linux/net.h).
    const KIND: u64 = 0xf;
    let wide = |value: i32| u64::from(value.unsigned_abs());
    let (index, operation, value) = match only {
        Only::Is(index, value) => (index, SeccompCmpOp::Eq, wide(value)),
        Only::Kind(index, value) => (index, SeccompCmpOp::MaskedEq(KIND), wide(value)),
        Only::Without(index, bits) => (index, SeccompCmpOp::MaskedEq(wide(bits)), 0),
    };
    SeccompCondition::new(index, SeccompCmpArgLen::Dword, operation, value)
}

fn rule(all: &[Only]) -> Result<SeccompRule, seccompiler::BackendError> {
    let conditions = all.iter().map(|only| condition(*only));
    SeccompRule::new(conditions.collect::<Result<_, _>>()?)
}

fn program(calls: &[Call]) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules = BTreeMap::new();
    for call in calls {
        let conditions = call.only.iter().map(|all| rule(all));
        rules.insert(call.number, conditions.collect::<Result<_, _>>()?);
    }
    let architecture = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        architecture,
    )?;
    filter.try_into()
}

/// Ends the process, from now on, at any call that is not on a list.
///
/// # Errors
/// `EINVAL` on kernels without seccomp filters.
pub(super) fn restrict(calls: &[Call]) -> Result<(), SetupError> {
    Filter::of(calls)?.enter()
}

/// A filter that is ready to be entered.
pub(super) struct Filter(BpfProgram);

impl Filter {
    /// The filter that ends the process at any call that is not on a list.
    pub(super) fn of(calls: &[Call]) -> Result<Self, SetupError> {
        let program = program(calls)
            .map_err(io::Error::other)
            .step(|| "making the filter of system calls".into())?;
        Ok(Self(program))
    }

    /// From now on it holds for every thread of the process.
    pub(super) fn enter(&self) -> Result<(), SetupError> {
        seccompiler::apply_filter_all_threads(&self.0)
            .map_err(io::Error::other)
            .step(|| "filtering system calls".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_lists_are_short_and_have_no_call_twice() {
        for calls in [CALLS, OPENER] {
            let names: BTreeSet<_> = calls.iter().map(|call| call.name).collect();
            let numbers: BTreeSet<_> = calls.iter().map(|call| call.number).collect();
            assert_eq!(names.len(), calls.len());
            assert_eq!(numbers.len(), calls.len());
            assert!(calls.iter().all(|call| !call.reason.is_empty()));
        }
        assert!(CALLS.len() <= 43, "pasta's number");
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_documents_tell_how_many_there_are() {
        let count = CALLS.len();
        let security = include_str!("../../doc/security.md");
        assert!(security.contains(&format!("{count} system calls allow")));
        let promises = include_str!("../../doc/promises.md");
        let opener = match OPENER.len() {
            9 => "nine",
            other => panic!("{other} of the opener's"),
        };
        assert!(promises.contains(&format!("({count} calls today, {opener} of the opener's;")));
    }

    #[test]
    fn the_list_becomes_a_filter() {
        assert!(program(CALLS).unwrap().len() > CALLS.len());
    }
}
