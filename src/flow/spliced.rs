//! A TCP connection of a published port's client that goes past the link: two sockets of the host's
//! kernel, the second one inside the guest's namespace, and pipes between them.
//!
//! Comes in: what became possible at either socket. Goes out: calls on both, and what the stack is to do
//! next. While the inner connection is being made nothing is taken from the client, so that it can still go
//! over the link. How bytes move once there are both is `spliced/joint.rs`'s.

mod joint;

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use joint::Joint;

use super::tcp::Progress;
use crate::config::Timeouts;
use crate::host::{Event, Host, Pipe, TcpSocket, Token};
use crate::net::{Duration, Instant};

/// Set in the tokens of the inner socket, beside those of the flow.
const INSIDE: u64 = 1 << 62;

/// The token of a flow's inner socket.
#[must_use]
pub const fn inner(token: Token) -> Token {
    Token(token.0 | INSIDE)
}

/// The flow that an event's token names, and whether it is the inner socket's.
#[must_use]
pub const fn owner(token: Token) -> (Token, bool) {
    (Token(token.0 & !INSIDE), token.0 & INSIDE != 0)
}

/// Where the inner connection goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// To the guest's own address, which it then also comes from.
    Own,
    /// To the namespace's loopback.
    Loopback,
}

/// How far the inner connection has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    /// Not decided.
    Pending,
    /// Refused at the guest's address: its loopback is asked now.
    Loopback,
    /// There is one.
    Open,
    /// The guest refuses.
    Refused,
    /// It can't be told: the link is the way.
    OverLink,
}

/// A connection that goes past the link.
#[derive(Debug)]
pub struct SplicedFlow<S, P> {
    client: SocketAddr,
    guest: SocketAddr,
    /// It was said once that it waits.
    waits: bool,
    /// Bytes that went on, both ways, when it was last looked after.
    moved: usize,
    /// Until when the client may take what the other side has said before it failed.
    words_until: Option<Instant>,
    phase: Phase<S, P>,
}

#[derive(Debug)]
enum Phase<S, P> {
    Opening {
        socket: S,
        inside: Option<S>,
        target: Target,
    },
    Open(Box<Joint<S, P>>),
    Gone,
}

impl<S: TcpSocket, P: Pipe<S>> SplicedFlow<S, P> {
    /// A flow for a client that was accepted and is not watched yet.
    #[must_use]
    pub const fn new(socket: S, client: SocketAddr, guest: SocketAddr) -> Self {
        Self {
            client,
            guest,
            waits: false,
            moved: 0,
            words_until: None,
            phase: Phase::Opening {
                socket,
                inside: None,
                target: Target::Own,
            },
        }
    }

    /// Begins the inner connection, where it is not under way; `token` is the flow's.
    pub fn connect<H>(&mut self, host: &mut H, token: Token) -> Opening
    where
        H: Host<Tcp = S, Pipe = P>,
    {
        let (client, guest) = (self.client, self.guest);
        let Phase::Opening { inside, target, .. } = &mut self.phase else {
            return Opening::Pending;
        };
        let mut moved_on = false;
        while inside.is_none() {
            let to = match target {
                Target::Own => guest,
                Target::Loopback => SocketAddr::new(loopback(guest.ip()), guest.port()),
            };
            match host.tcp_connect_inside(inner(token), to) {
                Ok(socket) => *inside = Some(socket),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => {
                    let next = after_refusal(*target, client, &error);
                    if next != Opening::Loopback {
                        return next;
                    }
                    *target = Target::Loopback;
                    moved_on = true;
                }
            }
        }
        if moved_on {
            Opening::Loopback
        } else {
            Opening::Pending
        }
    }

    /// The inner socket has something to say while its connection is being made.
    pub fn proceed<H>(&mut self, host: &mut H, token: Token, event: Event) -> Opening
    where
        H: Host<Tcp = S, Pipe = P>,
    {
        let Phase::Opening { inside, target, .. } = &mut self.phase else {
            return Opening::Pending;
        };
        let Some(socket) = inside else {
            // There is no socket to be had, or one now.
            return match (event.error, *target) {
                (false, _) => self.connect(host, token),
                (true, Target::Own) => Opening::OverLink,
                (true, Target::Loopback) => Opening::Refused,
            };
        };
        if !event.writable {
            return Opening::Pending;
        }
        match socket.connect_outcome() {
            Ok(()) => Opening::Open,
            Err(error) => {
                let next = after_refusal(*target, self.client, &error);
                if next != Opening::Loopback {
                    return next;
                }
                *inside = None;
                *target = Target::Loopback;
                let begun = self.connect(host, token);
                if begun == Opening::Pending {
                    Opening::Loopback
                } else {
                    begun
                }
            }
        }
    }

    /// The time for the inner connection is over. True when nobody has given it a socket.
    pub fn give_up(&self) -> (Opening, bool) {
        match &self.phase {
            Phase::Opening { inside, target, .. } => {
                let next = match target {
                    Target::Own => Opening::OverLink,
                    Target::Loopback => Opening::Refused,
                };
                (next, inside.is_none())
            }
            Phase::Open(_) | Phase::Gone => (Opening::Pending, false),
        }
    }

    /// Both connections are there: starts events for the client's, too.
    ///
    /// # Errors
    /// When the poller has no room.
    pub fn open<H>(&mut self, host: &mut H, token: Token) -> io::Result<()>
    where
        H: Host<Tcp = S, Pipe = P>,
    {
        match std::mem::replace(&mut self.phase, Phase::Gone) {
            Phase::Opening {
                socket,
                inside: Some(inside),
                ..
            } => match host.tcp_watch(token, &socket) {
                Ok(()) => self.phase = Phase::Open(Box::new(Joint::new(socket, inside))),
                Err(error) => {
                    socket.reset();
                    inside.reset();
                    return Err(error);
                }
            },
            same @ (Phase::Opening { .. } | Phase::Open(_) | Phase::Gone) => self.phase = same,
        }
        Ok(())
    }

    /// The namespace's loopback has been asked, which may take its time; before that, the wait is a short one, and an
    /// answer from whoever opens sockets inside would find nobody.
    #[must_use]
    pub const fn is_half_open(&self) -> bool {
        matches!(
            self.phase,
            Phase::Opening {
                inside: Some(_),
                target: Target::Loopback,
                ..
            }
        )
    }

    /// The same, and nobody has been told yet.
    pub const fn begins_to_wait(&mut self) -> bool {
        let begins = self.is_half_open() && !self.waits;
        self.waits |= begins;
        begins
    }

    /// Both sides have a connection.
    #[must_use]
    pub const fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Open(_))
    }

    /// The client's socket and who it is, where the inner connection has not come to be.
    #[must_use]
    pub fn into_client(self) -> Option<(S, SocketAddr, SocketAddr)> {
        match self.phase {
            Phase::Opening { socket, .. } => Some((socket, self.client, self.guest)),
            Phase::Open(_) | Phase::Gone => None,
        }
    }

    /// Something became possible at one of the open connections.
    pub fn ready(&mut self, event: Event, inside: bool) {
        if let Phase::Open(joint) = &mut self.phase {
            joint.sides[usize::from(inside)].ready(event);
        }
    }

    /// Moves bytes both ways.
    pub fn pump<H>(&mut self, host: &mut H) -> Progress
    where
        H: Host<Tcp = S, Pipe = P>,
    {
        let Phase::Open(joint) = &mut self.phase else {
            return Progress::Idle;
        };
        let pumped = joint.pump(host);
        self.moved = joint.moved;
        match pumped {
            Ok(Progress::Gone) => {}
            Ok(progress) => return progress,
            Err(error) => {
                tracing::debug!(client = %self.client, guest = %self.guest, %error, "connection failed");
                self.fail();
            }
        }
        Progress::Gone
    }

    /// Resets both connections.
    pub fn fail(&mut self) {
        if let Phase::Open(joint) = std::mem::replace(&mut self.phase, Phase::Gone) {
            for side in joint.sides {
                side.socket.reset();
            }
        }
    }

    /// Where one side has failed, and the other has not got all that came before: until when that may take. It is
    /// `until` where it was not asked before.
    pub fn last_words(&mut self, until: Instant) -> Option<Instant> {
        let failing = matches!(&self.phase, Phase::Open(joint) if joint.failed.is_some());
        failing.then(|| *self.words_until.get_or_insert(until))
    }

    /// Bytes that went on, both ways, when it was last looked after.
    #[must_use]
    pub const fn moved(&self) -> usize {
        self.moved
    }

    /// How long the guest's end may be silent before it is asked whether it is still there.
    #[must_use]
    pub fn ask_after(&self, timeouts: Timeouts) -> Duration {
        let seconds = match &self.phase {
            Phase::Open(joint) => joint.ask_after(timeouts),
            Phase::Opening { .. } | Phase::Gone => timeouts.ask_after(),
        };
        Duration::from_secs(seconds.into())
    }

    /// Has it asked by its kernel, after that time; few connections live to see it. Gives the time.
    pub fn have_asked(&mut self, timeouts: Timeouts) -> Duration {
        if let Phase::Open(joint) = &mut self.phase {
            joint.have_asked(timeouts);
        }
        self.ask_after(timeouts)
    }

    /// One of the streams has ended, and this was not asked before.
    pub fn begins_half_close(&mut self) -> bool {
        match &mut self.phase {
            Phase::Open(joint) => joint.begins_half_close(),
            Phase::Opening { .. } | Phase::Gone => false,
        }
    }

    /// No pipe was to be had: it waits for one.
    #[must_use]
    pub fn is_starved(&self) -> bool {
        matches!(&self.phase, Phase::Open(joint) if joint.starved)
    }
}

const fn loopback(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
    }
}

/// What a connect that failed means. Only a client of the host's loopback is let in to the guest's: to
/// strangers it must stay closed (CVE-2021-20199).
fn after_refusal(target: Target, client: SocketAddr, error: &io::Error) -> Opening {
    let refused = error.kind() == ErrorKind::ConnectionRefused;
    match target {
        Target::Own if refused && client.ip().is_loopback() => Opening::Loopback,
        Target::Own if refused => Opening::Refused,
        Target::Own => Opening::OverLink,
        Target::Loopback => Opening::Refused,
    }
}
