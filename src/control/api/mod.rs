//! The API socket: slirp4netns's, one request a connection.
//!
//! Owns the listening socket and its clients. Comes in: connections. Goes out: [`Command`]s to the
//! loop and one answer to each client. A client has a time limit, and when there are too many the
//! oldest goes, so that silent ones keep neither descriptors nor anybody else waiting.
//! [`hostfwd`] is the language.

pub mod hostfwd;

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

use super::Command;
use crate::config::AddressPlan;
use crate::sys::fd;
use crate::sys::readiness::watch;
use crate::sys::reserve::Reserve;
use hostfwd::{MAX_REQUEST, Parsed, Refused, Request};

/// How long a client may take for its request, and again for its answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a client may go on talking after its answer.
const FAREWELL: Duration = Duration::from_secs(1);
/// Clients at once whose requests are read, and as many that are answered.
const MAX_CLIENTS: usize = 256;
/// What each of them has at least, however many wait.
const GRACE: Duration = Duration::from_millis(50);
/// How long nobody is let in when descriptors have run out, those of the reserve too.
const PAUSE: Duration = Duration::from_millis(100);

/// Tasks of which the oldest goes when there are too many.
struct Crowd<T> {
    tasks: JoinSet<T>,
    /// Since when, oldest first.
    in_order: VecDeque<(Instant, AbortHandle)>,
}

impl<T: Send + 'static> Crowd<T> {
    fn new() -> Self {
        Self {
            tasks: JoinSet::new(),
            in_order: VecDeque::new(),
        }
    }

    fn admit(&mut self, task: impl Future<Output = T> + Send + 'static) {
        if self.in_order.len() >= MAX_CLIENTS {
            self.let_oldest_go();
        }
        let task = self.tasks.spawn(task);
        self.in_order.push_back((Instant::now(), task));
    }

    fn let_oldest_go(&mut self) {
        if let Some((_, oldest)) = self.in_order.pop_front() {
            oldest.abort();
        }
    }

    /// When there is room: at once, where this is `None`, or when the oldest has had its time.
    fn room(&self) -> Option<Instant> {
        let full = self.in_order.len() >= MAX_CLIENTS;
        let oldest = self.in_order.front().filter(|_| full);
        oldest.map(|(since, _)| *since + GRACE)
    }

    /// The next that is done; `None` for one that had to go. Waits for ever where there is none.
    async fn done(&mut self) -> Option<T> {
        let Some(done) = self.tasks.join_next().await else {
            return std::future::pending().await;
        };
        self.in_order.retain(|(_, task)| !task.is_finished());
        done.ok()
    }
}

/// Serves clients of a listening, non-blocking socket for ever. Only who has not yet asked, or does not
/// listen, may have to go for others: what is asked for is carried out and answered.
///
/// # Errors
/// When the listener can't be watched.
pub async fn serve(
    listener: OwnedFd,
    commands: mpsc::Sender<Command>,
    (plan, reserve): (AddressPlan, Reserve),
) -> io::Result<()> {
    let listener = watch(listener)?;
    let mut asking = Crowd::new();
    let mut answered = Crowd::new();
    loop {
        let room = asking.room();
        tokio::select! {
            accepted = async {
                if let Some(room) = room {
                    tokio::time::sleep_until(room).await;
                }
                accept(&listener, reserve).await
            } => match accepted {
                Ok(stream) => asking.admit(listen_to(stream, plan)),
                Err(error) => {
                    tracing::debug!(%error, "no room for an API client");
                    asking.let_oldest_go();
                    tokio::time::sleep(PAUSE).await;
                }
            },
            asked = asking.done() => if let Some(Ok((stream, request))) = asked {
                let answer = match request {
                    Ok(request) => carry_out(request, &commands).await,
                    Err(refused) => hostfwd::refusal(&refused),
                };
                answered.admit(tell(stream, answer));
            },
            _ = answered.done() => {}
        }
    }
}

/// Waits for the next client; where descriptors have run out it gets one of the reserve.
async fn accept(listener: &AsyncFd<OwnedFd>, reserve: Reserve) -> io::Result<UnixStream> {
    loop {
        let mut guard = listener.readable().await?;
        let accepted = match fd::accept(listener.get_ref()) {
            // Said before anybody looks whether there is a client.
            Err(error) if error.raw_os_error() == Some(libc::EMFILE) => {
                reserve.open_last(|| fd::accept(listener.get_ref()))
            }
            accepted => accepted,
        };
        match accepted {
            Err(error) if error.kind() == ErrorKind::WouldBlock => guard.clear_ready(),
            accepted => return UnixStream::from_std(accepted?.into()),
        }
    }
}

/// A client and what it wants.
type Asking = (UnixStream, Result<Request, Refused>);

async fn listen_to(mut stream: UnixStream, plan: AddressPlan) -> io::Result<Asking> {
    let request = tokio::time::timeout(PATIENCE, read_request(&mut stream, &plan)).await??;
    Ok((stream, request))
}

async fn tell(mut stream: UnixStream, answer: String) {
    let told = async {
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await
    };
    match tokio::time::timeout(PATIENCE, told).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return tracing::debug!(%error, "API client gone"),
        Err(_) => return tracing::debug!("API client does not listen"),
    }
    // What is left unread when a socket is closed becomes an error at the other end, which may not
    // have read its answer yet.
    let mut rest = [0; 512];
    let farewell = async { while matches!(stream.read(&mut rest).await, Ok(1..)) {} };
    let _ = tokio::time::timeout(FAREWELL, farewell).await;
}

/// Reads until there is a whole request; clients need not close their half.
async fn read_request(
    stream: &mut UnixStream,
    plan: &AddressPlan,
) -> io::Result<Result<Request, Refused>> {
    let mut bytes = [0; MAX_REQUEST + 1];
    let mut len = 0;
    loop {
        let more = stream.read(&mut bytes[len..]).await?;
        len += more;
        match hostfwd::parse(&bytes[..len], plan) {
            Parsed::Whole(request) => return Ok(request),
            Parsed::Partial if more == 0 => return Ok(Err(hostfwd::not_json())),
            Parsed::Partial => {}
        }
    }
}

/// Has the loop do it; gives the answer.
async fn carry_out(request: Request, commands: &mpsc::Sender<Command>) -> String {
    match request {
        Request::Add(rule) => {
            let (reply, outcome) = oneshot::channel();
            match ask(commands, Command::Publish { rule, reply }, outcome).await {
                Ok(Ok(id)) => hostfwd::added(id),
                Ok(Err(error)) | Err(error) => hostfwd::refusal(&Refused::add_failed(&error)),
            }
        }
        Request::List => {
            let (reply, outcome) = oneshot::channel();
            let ports = ask(commands, Command::ListPublished { reply }, outcome).await;
            hostfwd::listed(&ports.unwrap_or_default())
        }
        Request::Remove(id) => {
            let (reply, outcome) = oneshot::channel();
            match ask(commands, Command::Unpublish { id, reply }, outcome).await {
                Ok(()) => hostfwd::removed(),
                Err(_) => hostfwd::refusal(&Refused::unknown_id()),
            }
        }
    }
}

async fn ask<T>(
    commands: &mpsc::Sender<Command>,
    command: Command,
    outcome: oneshot::Receiver<T>,
) -> io::Result<T> {
    let ended = || io::Error::new(ErrorKind::BrokenPipe, "the network has ended");
    commands.send(command).await.map_err(|_| ended())?;
    outcome.await.map_err(|_| ended())
}
