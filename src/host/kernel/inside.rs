//! Sockets inside the guest's namespace, from the process that stays there to open them
//! (`setup/opener.rs`): our end of the line, and a small stock.
//!
//! Comes in: sockets, some at a time. Goes out: one for each that asks, at once or with an event that says
//! when to ask again. Never waits. When the opener is gone or says nothing, there is no way inside any more;
//! whoever asks is told so and goes another way.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use crate::host::{Event, Token};
use crate::sys::fd;
use crate::sys::reserve::Reserve;

/// Sockets that are opened at one request.
pub const BATCH: usize = fd::MAX_DESCRIPTORS;
/// As few as this are left when the next ones are asked for.
const LOW: usize = BATCH / 2;

/// Names an address family in a request, and in the answer, with which the sockets come.
#[must_use]
pub const fn request(ipv6: bool) -> u8 {
    if ipv6 { 6 } else { 4 }
}

/// The way inside.
#[derive(Debug, Default)]
pub(super) struct Inside {
    line: Option<UnixStream>,
    ipv4: Stock,
    ipv6: Stock,
    buffer: Vec<u8>,
}

/// Sockets of one family, none of them bound or connected.
#[derive(Debug, Default)]
struct Stock {
    sockets: Vec<OwnedFd>,
    /// Some are on their way.
    asked: bool,
    /// Who asked in vain.
    waiting: Vec<Token>,
}

impl Inside {
    /// A way by this line.
    pub(super) fn new(line: UnixStream) -> Self {
        Self {
            line: Some(line),
            ..Self::default()
        }
    }

    /// What to watch.
    pub(super) fn line(&self) -> Option<BorrowedFd<'_>> {
        self.line.as_ref().map(AsFd::as_fd)
    }

    fn stock(&mut self, ipv6: bool) -> &mut Stock {
        if ipv6 { &mut self.ipv6 } else { &mut self.ipv4 }
    }

    /// A socket.
    ///
    /// # Errors
    /// `WouldBlock` when an event with this token will say how it goes on; `Unsupported` when there
    /// is no way.
    pub(super) fn take(&mut self, ipv6: bool, token: Token) -> io::Result<OwnedFd> {
        let stock = self.stock(ipv6);
        let socket = stock.sockets.pop();
        if socket.is_none() && self.line.is_none() {
            return Err(ErrorKind::Unsupported.into());
        }
        self.ask(ipv6);
        let stock = self.stock(ipv6);
        socket.ok_or_else(|| {
            stock.waiting.push(token);
            ErrorKind::WouldBlock.into()
        })
    }

    /// Asks for more, where few are left and none on their way.
    fn ask(&mut self, ipv6: bool) {
        let stock = if ipv6 { &mut self.ipv6 } else { &mut self.ipv4 };
        if let Some(line) = &self.line
            && !stock.asked
            && stock.sockets.len() < LOW
        {
            // What has come of it the line says: it is readable when the other end is gone.
            let _ = fd::send(line, &[request(ipv6)], None);
            stock.asked = true;
        }
    }

    /// Takes what has come; says so to those who wait. Of what is in the reserve no more is kept than they need.
    pub(super) fn collect(&mut self, reserve: Reserve, events: &mut Vec<Event>) {
        while let Some(line) = &self.line {
            let received = fd::try_receive_all(line, &mut self.buffer);
            match (received, self.buffer.first()) {
                (Ok(mut sockets), Some(&family)) => {
                    let ipv6 = family == request(true);
                    // Their numbers rise, so those of the reserve are the last.
                    let free = sockets.iter().filter(|socket| !reserve.holds(*socket));
                    sockets.truncate(free.count().max(self.stock(ipv6).waiting.len()));
                    self.stock_up(ipv6, sockets, events);
                }
                (Err(error), _) if error.kind() == ErrorKind::WouldBlock => break,
                (Err(error), _) if error.kind() == ErrorKind::Interrupted => {}
                (Ok(_), None) | (Err(_), _) => {
                    tracing::info!(
                        "nobody opens sockets inside: published ports lead over the tap"
                    );
                    self.give_up(events);
                }
            }
        }
    }

    fn stock_up(&mut self, ipv6: bool, sockets: Vec<OwnedFd>, events: &mut Vec<Event>) {
        let stock = self.stock(ipv6);
        stock.asked = false;
        let none = sockets.is_empty();
        stock.sockets.extend(sockets);
        let served = if none {
            stock.waiting.len()
        } else {
            stock.sockets.len().min(stock.waiting.len())
        };
        events.extend(stock.waiting.drain(..served).map(|token| told(token, none)));
        if !stock.waiting.is_empty() {
            self.ask(ipv6);
        }
    }

    /// There is no way from now on.
    pub(super) fn give_up(&mut self, events: &mut Vec<Event>) {
        self.line = None;
        for stock in [&mut self.ipv4, &mut self.ipv6] {
            stock.sockets.clear();
            events.extend(stock.waiting.drain(..).map(|token| told(token, true)));
        }
    }
}

/// A socket can be had now, or will never be.
fn told(token: Token, error: bool) -> Event {
    Event {
        token,
        readable: false,
        writable: true,
        hangup: false,
        error,
        urgent: false,
    }
}
