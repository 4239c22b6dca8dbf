//! Sockets inside the guest's namespace, from the process that stays there to open them
//! (`setup/opener.rs`): our end of the line, and a small stock.
//!
//! Comes in: sockets, some at a time. Goes out: one for each that asks, at once or with an event that says
//! when to ask again. Never waits. When the opener is gone, there is no way inside any more, and while it says nothing there is
//! none for the time being; whoever asks is told so and goes another way.

use std::collections::VecDeque;
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
    /// The other end has let somebody wait in vain, and said nothing since.
    silent: bool,
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
    /// Who asked in vain, the first in front.
    waiting: VecDeque<Token>,
    /// Who was told that there is one now: as many sockets are theirs, until they have had their turn.
    told: Vec<Token>,
}

impl Stock {
    /// A socket that is nobody else's.
    fn take(&mut self, token: Token) -> Option<OwnedFd> {
        if let Some(place) = self.told.iter().position(|told| *told == token) {
            self.told.swap_remove(place);
        } else if self.sockets.len() <= self.told.len() || !self.waiting.is_empty() {
            return None;
        }
        self.sockets.pop()
    }

    /// Says to those who came first that there is one for each now.
    fn tell(&mut self, events: &mut Vec<Event>) {
        let free = self.sockets.len().saturating_sub(self.told.len());
        for token in self.waiting.drain(..free.min(self.waiting.len())) {
            events.push(told(token, false));
            self.told.push(token);
        }
    }
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
        let socket = self.stock(ipv6).take(token);
        if socket.is_none() {
            if self.line.is_none() || self.silent {
                return Err(ErrorKind::Unsupported.into());
            }
            self.stock(ipv6).waiting.push_back(token);
        }
        self.ask(ipv6);
        socket.ok_or_else(|| ErrorKind::WouldBlock.into())
    }

    /// Asks for more, where few are left and none on their way.
    fn ask(&mut self, ipv6: bool) {
        let stock = if ipv6 { &mut self.ipv6 } else { &mut self.ipv4 };
        if let Some(line) = &self.line
            && !stock.asked
            && (stock.sockets.len() < LOW || !stock.waiting.is_empty())
        {
            // That the other end is gone the line says, which is readable then; for all else it is asked again.
            stock.asked = fd::send(line, &[request(ipv6)], None).is_ok();
        }
    }

    /// Begins a turn: who was told in the last one has asked again, or is gone and leaves its socket to the next.
    pub(super) fn begin_turn(&mut self, events: &mut Vec<Event>) {
        for stock in [&mut self.ipv4, &mut self.ipv6] {
            stock.told.clear();
            stock.tell(events);
        }
    }

    /// Takes what has come; says so to those who wait, in the order in which they came. Of what is in the reserve no more is kept than they need.
    pub(super) fn collect(&mut self, reserve: Reserve, events: &mut Vec<Event>) {
        while let Some(line) = &self.line {
            let received = fd::try_receive_all(line, &mut self.buffer);
            match (received, self.buffer.first()) {
                (Ok(mut sockets), Some(&family)) => {
                    if std::mem::take(&mut self.silent) {
                        tracing::info!("sockets are opened inside again");
                    }
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
        if sockets.is_empty() {
            events.extend(stock.waiting.drain(..).map(|token| told(token, true)));
        }
        stock.sockets.extend(sockets);
        stock.tell(events);
        if !stock.waiting.is_empty() {
            self.ask(ipv6);
        }
    }

    /// There is no way until the other end says something; whoever waits is told so.
    pub(super) fn pass_over(&mut self, events: &mut Vec<Event>) {
        // Who could not be asked owes no answer.
        let asked = self.line.is_some() && (self.ipv4.asked || self.ipv6.asked);
        if asked && !std::mem::replace(&mut self.silent, true) {
            tracing::warn!("nobody answers inside: published ports lead over the tap meanwhile");
        }
        for stock in [&mut self.ipv4, &mut self.ipv6] {
            events.extend(stock.waiting.drain(..).map(|token| told(token, true)));
        }
    }

    /// There is no way from now on.
    pub(super) fn give_up(&mut self, events: &mut Vec<Event>) {
        self.line = None;
        for stock in [&mut self.ipv4, &mut self.ipv6] {
            stock.sockets.clear();
            stock.told.clear();
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

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn answer(line: &UnixStream, count: usize) {
        let sockets: Vec<OwnedFd> = (0..count)
            .map(|_| File::open("/dev/null").unwrap().into())
            .collect();
        fd::send_all(line, &[request(false)], &sockets).unwrap();
    }

    fn told_now(inside: &mut Inside) -> Vec<u64> {
        let mut events = Vec::new();
        inside.begin_turn(&mut events);
        inside.collect(Reserve::of(1 << 20), &mut events);
        assert!(events.iter().all(|event| event.writable && !event.error));
        events.iter().map(|event| event.token.0).collect()
    }

    #[test]
    fn who_waits_is_served_before_who_comes() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut inside = Inside::new(ours);
        let asks = |inside: &mut Inside, number| match inside.take(false, Token(number)) {
            Ok(_) => true,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                false
            }
        };
        for first in 1..=3 {
            assert!(!asks(&mut inside, first));
        }
        answer(&theirs, 2);
        assert_eq!(told_now(&mut inside), [1, 2]);
        // Newcomers come before those who were told have asked again.
        assert!(!asks(&mut inside, 4));
        assert!(asks(&mut inside, 1) && asks(&mut inside, 2));
        answer(&theirs, 3);
        assert_eq!(told_now(&mut inside), [3, 4]);
        assert!(asks(&mut inside, 5) && !asks(&mut inside, 6));
        // One who was told and is gone leaves its socket to the next.
        assert!(asks(&mut inside, 4));
        assert_eq!(told_now(&mut inside), [6]);
        assert!(asks(&mut inside, 6));
    }
}
