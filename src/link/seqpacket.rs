//! A socket as a [`Link`]: one message is one frame (`SOCK_SEQPACKET`, what User Mode Linux calls
//! "bess").
//!
//! Owns the socket, which listens until somebody connects and then serves this one. There are no
//! offloads: every frame comes and goes whole, with its checksums, and no longer than the MTU allows.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Sleep, sleep};

use super::{Link, Look};
use crate::buf::{HEADROOM, LinkId, RxBatch, RxMeta, TxBatch};
use crate::sys::fd;
use crate::sys::readiness::Watched;
use crate::sys::socket::lacks_means;

/// How long nobody is accepted after the system had no means to.
const PAUSE: Duration = Duration::from_millis(100);

/// A socket that listens, then is connected.
#[derive(Debug)]
pub struct SeqpacketLink {
    id: LinkId,
    socket: Watched<File>,
    connected: bool,
    /// Nobody is accepted before this is over.
    pause: Option<Pin<Box<Sleep>>>,
    lost: u64,
}

impl SeqpacketLink {
    /// Takes over a listening, non-blocking socket. Needs a tokio runtime.
    ///
    /// # Errors
    /// When the runtime has no room.
    pub fn new(id: LinkId, socket: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            id,
            socket: Watched::new(File::from(socket))?,
            connected: false,
            pause: None,
            lost: 0,
        })
    }

    /// Takes the first client; true once there is one.
    fn try_accept(&mut self) -> io::Result<bool> {
        if self.connected {
            return Ok(true);
        }
        if self.pause.as_ref().is_some_and(|pause| !pause.is_elapsed()) {
            return Ok(false);
        }
        self.pause = None;
        let accepted = self.socket.try_read(Look::WhenTold, fd::accept);
        // One that can't be watched is gone; the next may be.
        match accepted.and_then(|socket| Watched::new(File::from(socket))) {
            Ok(socket) => {
                self.socket = socket;
                self.connected = true;
                Ok(true)
            }
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::ConnectionAborted
                ) =>
            {
                Ok(false)
            }
            // Who waits is still there when there are means again; who was accepted has to come again.
            Err(error) if lacks_means(&error) => {
                tracing::warn!(%error, "nobody can be accepted for now");
                self.pause = Some(Box::pin(sleep(PAUSE)));
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

impl Link for SeqpacketLink {
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(cx));
        }
        self.socket.poll_readable(cx)
    }

    fn leave(&mut self) {
        self.socket.leave();
    }

    fn settle(&mut self) -> io::Result<()> {
        self.socket.settle()
    }

    fn receive(&mut self, batch: &mut RxBatch, look: Look) -> io::Result<bool> {
        if !self.try_accept()? {
            return Ok(false);
        }
        while let Some(spare) = batch.spare() {
            let read = self.socket.try_read(look, |mut socket| socket.read(spare));
            match read {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(len) => batch.push(0..len, RxMeta::plain(self.id)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn transmit(&mut self, batch: &mut TxBatch) -> io::Result<()> {
        if !self.connected {
            batch.clear();
            return Ok(());
        }
        let mut socket = self.socket.get();
        let mut gone = None;
        for frame in batch.frames() {
            match socket.write(&frame.with_headroom[HEADROOM..]) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::BrokenPipe => gone = Some(error),
                Err(error) => {
                    self.lost += 1;
                    tracing::debug!(%error, lost = self.lost, "frame lost at the socket");
                }
            }
        }
        batch.clear();
        gone.map_or(Ok(()), Err)
    }
}
