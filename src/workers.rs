//! The threads beside the first, each of which carries the loop of a worker where that is worth it.
//!
//! Comes in: what a thread runs. Goes out: word of a thread that has ended, which is the end of all: its flows can't be
//! served any more. Threads are started once everything but system calls is given up, since what they inherit nobody can
//! give up for them.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc as answers;
use std::thread;

use anyhow::{Context, Result};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;

use crate::carrier::Carrier;
use crate::event_loop::Ended;
use crate::link::Link;

/// The runtime of one worker, the first included.
///
/// # Errors
/// When no descriptors are left.
pub fn runtime() -> Result<Runtime> {
    Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .context("starting the runtime")
}

/// All workers but the first.
pub struct Crew {
    ended: mpsc::Receiver<io::Result<Ended>>,
    /// How they say that they have; keeps it open where there are none.
    end: mpsc::Sender<io::Result<Ended>>,
}

impl Default for Crew {
    fn default() -> Self {
        // The first to end is the end of all.
        let (end, ended) = mpsc::channel(1);
        Self { ended, end }
    }
}

impl Crew {
    /// Starts a thread with a name; returns when it has all that it needs to carry packets.
    ///
    /// # Errors
    /// When no thread can be started, or it has no descriptors left.
    pub fn start<L: Link + Send + 'static>(&self, name: String, carrier: Carrier<L>) -> Result<()> {
        let (answer, answered) = answers::channel();
        let end = self.end.clone();
        let work = move || {
            let runtime = match runtime() {
                Ok(runtime) => runtime,
                Err(error) => {
                    let _ = answer.send(Err(error));
                    return;
                }
            };
            let _ = answer.send(Ok(()));
            // Whatever state a panic leaves behind is not looked at again.
            let run = AssertUnwindSafe(|| runtime.block_on(carrier.run()));
            let ended = catch_unwind(run);
            // The log has told where, and of what.
            let ended = ended.unwrap_or_else(|_| Err(io::Error::other("a worker panicked")));
            let _ = end.try_send(ended);
            // What a thread does at its end the filter has no calls for; the process ends soon.
            loop {
                thread::park();
            }
        };
        let builder = thread::Builder::new().name(name);
        builder.spawn(work).context("starting a thread")?;
        answered.recv().context("a worker ended early")?
    }

    /// Waits until a thread has ended; for ever where there are none.
    ///
    /// # Errors
    /// Why it could not go on.
    pub async fn ended(&mut self) -> io::Result<Ended> {
        match self.ended.recv().await {
            Some(ended) => ended,
            None => std::future::pending().await,
        }
    }
}
