//! Makes new namespaces with a network for a command.
//!
//! Comes in: the command and the plan of its tap. Goes out: what was made inside and a [`Started`]
//! keeper, which waits for the word to begin. The child makes the namespaces; we, the broker, outside,
//! give it its identities, since only we can, and are to have adopted orphans before
//! (`PR_SET_CHILD_SUBREAPER`): what the keeper leaves behind, should it be killed, is ours to end.

use std::ffi::CString;
use std::io;
use std::os::unix::net::UnixStream;

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Pid, getpid};

use super::guest::{TapPlan, make_tap};
use super::idmap::{self, Mapping};
use super::{
    Made, SetupError, Step, hear, hear_made, keeper, message, opener, report_made, resolv_conf,
};
use crate::sys::{fd, process};

/// What is to be run, and how.
#[derive(Debug)]
pub struct Job {
    /// Program and arguments.
    pub command: Vec<CString>,
    /// Identities inside.
    pub mapping: Mapping,
    /// The tap.
    pub tap: TapPlan,
    /// Text for `/etc/resolv.conf`; the host's file is seen where there is none.
    pub resolv_conf: Option<String>,
}

/// A keeper that waits to begin.
#[derive(Debug)]
pub struct Started {
    /// Its process, our child.
    pub keeper: Pid,
    socket: UnixStream,
}

impl Started {
    /// Lets the command begin. Keep the result for as long as the command may run: the keeper ends
    /// everything when it is dropped.
    ///
    /// # Errors
    /// When the keeper is gone.
    pub fn begin(self) -> io::Result<UnixStream> {
        fd::send(&self.socket, &[message::GO], None)?;
        Ok(self.socket)
    }
}

/// Makes the namespaces and the tap.
///
/// # Errors
/// The step that failed, in the child or here.
pub fn start(job: &Job) -> Result<(Started, Made), SetupError> {
    let (ours, theirs) = UnixStream::pair().step(|| "making a socket pair".into())?;
    let Some(child) = process::fork().step(|| "starting a child".into())? else {
        drop(ours);
        std::process::exit(i32::from(child(&theirs, job)));
    };
    drop(theirs);
    let prepared = prepare(&ours, job, child);
    match prepared {
        Ok(made) => Ok((
            Started {
                keeper: child,
                socket: ours,
            },
            made,
        )),
        Err(error) => {
            drop(ours);
            keeper::end_descendants();
            Err(error)
        }
    }
}

fn prepare(socket: &UnixStream, job: &Job, child: Pid) -> Result<Made, SetupError> {
    hear(socket, message::UNMAPPED)?;
    idmap::apply(job.mapping, child)?;
    fd::send(socket, &[message::MAPPED], None).step(|| "speaking to the child".into())?;
    hear_made(socket, job.tap.queues)
}

/// The child's life: namespaces, tap, then keeper of the command.
fn child(socket: &UnixStream, job: &Job) -> u8 {
    if !report_made(socket, enter(socket, job)) || hear(socket, message::GO).is_err() {
        return 1;
    }
    match keeper::keep(socket, &job.command) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("tapgate: {error}");
            1
        }
    }
}

fn enter(socket: &UnixStream, job: &Job) -> Result<Made, SetupError> {
    unshare(CloneFlags::CLONE_NEWUSER).step(|| {
        "making a user namespace (see user.max_user_namespaces, kernel.unprivileged_userns_clone)".into()
    })?;
    fd::send(socket, &[message::UNMAPPED], None).step(|| "speaking to the parent".into())?;
    hear(socket, message::MAPPED)?;
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
        .step(|| "making namespaces".into())?;
    let taps = make_tap(&job.tap)?;
    if let Some(text) = &job.resolv_conf {
        resolv_conf::cover(text)?;
    }
    Ok(Made {
        taps,
        opener: start_opener(&job.tap),
    })
}

/// A child that opens sockets here, if that will be needed; without one published ports lead over the tap.
fn start_opener(plan: &TapPlan) -> Vec<UnixStream> {
    let us = getpid();
    let (near, far) = plan.opener_lines();
    if far.is_empty() {
        return near;
    }
    match process::fork() {
        Ok(Some(_)) => near,
        Ok(None) => opener::live(far, us),
        Err(_) => Vec::new(),
    }
}
