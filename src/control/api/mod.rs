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
use std::os::unix::net::UnixListener;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};

use super::Command;
use crate::config::AddressPlan;
use hostfwd::{MAX_REQUEST, Parsed, Refused, Request};

/// How long a client may take for its request and its answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Clients at once.
const MAX_CLIENTS: usize = 64;
/// How long nobody is let in when descriptors have run out.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves clients of a listening, non-blocking socket for ever.
///
/// # Errors
/// When the listener can't be watched.
pub async fn serve(
    listener: OwnedFd,
    commands: mpsc::Sender<Command>,
    plan: AddressPlan,
) -> io::Result<()> {
    let listener = tokio::net::UnixListener::from_std(UnixListener::from(listener))?;
    let mut clients = JoinSet::new();
    let mut in_order: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    if in_order.len() >= MAX_CLIENTS
                        && let Some(oldest) = in_order.pop_front()
                    {
                        oldest.abort();
                    }
                    in_order.push_back(clients.spawn(client(stream, commands.clone(), plan)));
                }
                Err(error) => {
                    tracing::debug!(%error, "API client lost");
                    tokio::time::sleep(PAUSE).await;
                }
            },
            Some(_) = clients.join_next() => in_order.retain(|client| !client.is_finished()),
        }
    }
}

async fn client(mut stream: UnixStream, commands: mpsc::Sender<Command>, plan: AddressPlan) {
    let served = async {
        let answer = match read_request(&mut stream, &plan).await? {
            Ok(request) => carry_out(request, &commands).await,
            Err(refused) => hostfwd::refusal(&refused),
        };
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await
    };
    match tokio::time::timeout(PATIENCE, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "API client gone"),
        Err(_) => tracing::debug!("API client too slow"),
    }
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
        if len > MAX_REQUEST {
            return Ok(Err(Refused::too_large()));
        }
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
                Ok(true) => hostfwd::removed(),
                Ok(false) | Err(_) => hostfwd::refusal(&Refused::unknown_id()),
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
