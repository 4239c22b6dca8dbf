//! Ports of the host that lead to a guest.
//!
//! Owns the listening sockets; of several workers the first has those of TCP, and the list of all. Comes in:
//! connections and datagrams of the host's clients. Goes out: flows towards the guest whose source is the
//! client itself (a client on the host's loopback appears as the gateway, which the guest can answer); where
//! the rule lets it, a connection goes past the link instead ([`super::spliced`]). Who is served when [`line`] says. Bind errors are the caller's
//! to report.

mod datagrams;
mod handed;
mod line;

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;

use crate::config::{Protocol, Publish};
use crate::flow::key::{FlowKey, Kind};
use crate::flow::named_stream::Stream;
use crate::flow::table::BegunBy;
use crate::flow::tcp::TcpFlow;
use crate::flow::{Flow, Turn};
use crate::host::{Host, TcpSocket, Token};
use crate::net::emit::Ends;
use crate::net::{Duration, Instant};

use super::share::{Freed, Handed};
use super::{Stack, mapping, room, udp};
use line::{Left, Line};

/// Set in tokens of published ports, never in those of flows.
const LISTENER: u64 = 1 << 63;
/// Connections that one port may take in one turn.
const BUDGET: usize = 64;
/// The same for all ports together.
const ACCEPTS: usize = 256;
/// Attempts to find a source port that no other client of the gateway's address uses.
const PORT_ATTEMPTS: usize = 64;
/// The first deadline of a client's connection; its first turn sets another.
const SOON: Duration = Duration::from_millis(100);

/// `ENOMEM` and `ENOBUFS` of errno(3), the same numbers on all that we run on: like descriptors, they lack to all listeners.
const NO_MEMORY: [i32; 2] = [12, 105];

/// The published port that a token names, if it names one.
#[must_use]
pub fn listener_of(token: Token) -> Option<usize> {
    (token.0 & LISTENER != 0).then(|| usize::try_from(token.0 & !LISTENER).ok())?
}

const fn listener_token(id: usize) -> Token {
    Token(LISTENER | id as u64)
}

enum Socket<H: Host> {
    Tcp(H::Listener),
    Udp(H::Udp),
    /// Another worker has it.
    Elsewhere(usize),
}

struct Port<H: Host> {
    rule: Publish,
    socket: Socket<H>,
    /// In some place of the line.
    pending: bool,
}

/// All published ports.
pub struct Published<H: Host> {
    ports: BTreeMap<usize, Port<H>>,
    next_id: usize,
    /// How many UDP sockets are among them.
    udp_ports: usize,
    line: Line,
    /// They came first in this turn, or the last one until [`Published::are_first`], and left the batch full.
    have_filled: bool,
}

impl<H: Host> Default for Published<H> {
    fn default() -> Self {
        Self {
            ports: BTreeMap::new(),
            next_id: 1,
            udp_ports: 0,
            line: Line::default(),
            have_filled: false,
        }
    }
}

impl<H: Host> Published<H> {
    fn add(&mut self, id: usize, rule: Publish, socket: Socket<H>) {
        self.udp_ports += usize::from(matches!(socket, Socket::Udp(_)));
        let port = Port {
            rule,
            socket,
            pending: false,
        };
        self.ports.insert(id, port);
    }

    fn remove(&mut self, id: usize) -> Option<Port<H>> {
        let port = self.ports.remove(&id)?;
        self.udp_ports -= usize::from(matches!(port.socket, Socket::Udp(_)));
        if port.pending {
            self.line.remove(id);
        }
        Some(port)
    }

    /// Notes what was left at a port.
    fn note(&mut self, now: Instant, id: usize, left: Left) {
        if let Some(port) = self.ports.get_mut(&id) {
            port.pending = left != Left::Nothing;
            self.line.note(now, id, left);
        }
    }

    /// Each port that has something to take is in one line, once, and no other is.
    pub(super) fn check(&self) -> Result<(), String> {
        let pending = self.ports.iter().filter(|(_, port)| port.pending);
        self.line.check(pending.map(|(id, _)| *id))
    }

    /// Some have something to take at once.
    pub(super) fn have_more(&self) -> bool {
        !self.line.is_empty()
    }

    /// When ports that had to pause want to be served again.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.line.deadline()
    }

    /// They came first in this turn, and left the batch full.
    pub(super) const fn have_filled(&self) -> bool {
        self.have_filled
    }

    /// It is the turn of published ports before that of flows: who has filled the batch comes second in the next turn.
    pub(super) fn are_first(&mut self) -> bool {
        !std::mem::take(&mut self.have_filled)
    }

    const fn is_udp(port: &Port<H>) -> bool {
        matches!(port.socket, Socket::Udp(_))
    }

    /// A published port is there.
    pub(super) fn has(&self, id: usize) -> bool {
        self.ports.contains_key(&id)
    }

    /// Some UDP port is published.
    pub(super) const fn has_udp(&self) -> bool {
        self.udp_ports > 0
    }

    /// The socket of a published UDP port.
    pub(super) fn udp(&mut self, id: usize) -> Option<&mut H::Udp> {
        match &mut self.ports.get_mut(&id)?.socket {
            Socket::Udp(socket) => Some(socket),
            Socket::Tcp(_) | Socket::Elsewhere(_) => None,
        }
    }
}

/// One step of serving a published port.
enum Step {
    Taken,
    Empty,
    /// The transmit batch is full: in the next turn.
    Later,
    /// Out of descriptors: after a pause.
    Exhausted,
    /// An error that is about nothing in particular, and may be told again.
    Failed,
    /// An error that will be told again.
    Failing,
}

/// Says that a port is free, to who wants to know.
fn tell(freed: Option<Freed>) {
    if let Some(freed) = freed {
        freed();
    }
}

impl<H: Host> Stack<H> {
    /// Publishes a port; returns its number. For the first worker: it listens, and knows of every port.
    ///
    /// # Errors
    /// What binding reports: the address is in use, privileged, or not the host's.
    pub fn publish(&mut self, host: &mut H, rule: Publish) -> io::Result<usize> {
        let id = self.published.next_id;
        let token = listener_token(id);
        let socket = match rule.protocol {
            Protocol::Tcp => Socket::Tcp(host.tcp_listen(token, rule.host)?),
            Protocol::Udp => self.publish_udp(host, id, rule)?,
        };
        self.published.next_id += 1;
        self.published.add(id, rule, socket);
        Ok(id)
    }

    /// Takes a published port back; connections that came by it live on. Says so once it is free, which another worker
    /// may have to see to. False, and nothing said, when there is none.
    pub fn unpublish(&mut self, id: usize, freed: Option<Freed>) -> bool {
        let Some(port) = self.published.remove(id) else {
            return false;
        };
        if let Socket::Elsewhere(worker) = port.socket {
            self.share.hand(worker, Handed::Unpublish { id, freed });
        } else {
            drop(port);
            tell(freed);
        }
        true
    }

    /// The published ports, as the first worker knows them.
    pub fn published(&self) -> impl Iterator<Item = (usize, Publish)> {
        self.published
            .ports
            .iter()
            .map(|(id, port)| (*id, port.rule))
    }

    /// A published port has connections or datagrams.
    pub(super) fn published_ready(&mut self, now: Instant, id: usize) {
        let port = self.published.ports.get(&id);
        if port.is_some_and(|port| !port.pending) {
            self.published.note(now, id, Left::More);
        }
    }

    /// Serves the ports that have something to take; with `first` before all flows.
    pub(super) fn serve_published(&mut self, turn: &mut Turn<'_, H>, first: bool) {
        let waiting = self.published.line.take(turn.now);
        if waiting.is_empty() {
            return;
        }
        let mut kept = VecDeque::new();
        let (mut exhausted, mut accepts) = (None, ACCEPTS);
        // Each port once, so that a busy one can't keep the others waiting.
        for id in waiting {
            let udp = self.published.ports.get(&id).is_some_and(Published::is_udp);
            let is_full = if udp {
                !(self.inbox.is_empty() && turn.tx.has_room())
            } else {
                accepts == 0
            };
            // The one that filled the turn is last in line now: the next leads the next turn.
            if is_full {
                kept.push_back(id);
                continue;
            }
            let left = self.serve_port(turn, id, &mut accepts);
            if left == Left::Exhausted {
                exhausted = Some(id);
            } else {
                self.published.note(turn.now, id, left);
            }
        }
        // The next descriptor is another's.
        if let Some(id) = exhausted {
            self.published.note(turn.now, id, Left::Exhausted);
        }
        self.published.line.lead(kept);
        self.published.have_filled = first && !turn.tx.has_room();
    }

    /// Takes what a port has, as far as its budget goes.
    fn serve_port(&mut self, turn: &mut Turn<'_, H>, id: usize, accepts: &mut usize) -> Left {
        let paused = self.published.line.is_paused();
        let mut failed = 0;
        let udp = self.published.ports.get(&id).is_some_and(Published::is_udp);
        let budget = if udp {
            udp::BUDGET
        } else {
            BUDGET.min(*accepts)
        };
        for _ in 0..budget {
            *accepts -= usize::from(!udp);
            let step = match self.published.ports.get(&id).map(|port| &port.socket) {
                // Another has found the descriptors used up.
                Some(Socket::Tcp(_)) if paused => return Left::Starving,
                Some(Socket::Tcp(_)) => self.take_connection(turn, id),
                Some(Socket::Udp(_)) => self.take_datagrams(turn, id),
                Some(Socket::Elsewhere(_)) | None => return Left::Nothing,
            };
            match step {
                Step::Taken => {}
                Step::Failed => failed += 1,
                Step::Empty => return Left::Nothing,
                Step::Later => return Left::More,
                Step::Failing => return Left::Failing,
                Step::Exhausted => {
                    self.published.line.pause(turn.now);
                    return Left::Exhausted;
                }
            }
        }
        if failed < budget {
            Left::More
        } else {
            Left::Failing
        }
    }

    fn take_connection(&mut self, turn: &mut Turn<'_, H>, id: usize) -> Step {
        let Some(Port {
            rule,
            socket: Socket::Tcp(listener),
            ..
        }) = self.published.ports.get(&id)
        else {
            return Step::Empty;
        };
        let rule = *rule;
        let (socket, client) = match turn.host.tcp_accept(listener) {
            Ok(accepted) => accepted,
            Err(error) => return after_accept(&error),
        };
        // Clients that look alike to the guest are one worker's, who tells them apart.
        let place = self.share.place;
        let home = place.of_client(rule.guest, self.client_inside(client, rule.guest));
        if home == place.index {
            self.take_client(turn, socket, client, rule);
        } else {
            let handed = Handed::Client {
                socket,
                client,
                rule,
            };
            self.share.hand(home, handed);
        }
        Step::Taken
    }

    /// Leads a client to the guest.
    pub(super) fn take_client(
        &mut self,
        turn: &mut Turn<'_, H>,
        mut socket: H::Tcp,
        client: SocketAddr,
        rule: Publish,
    ) {
        let guest = rule.guest;
        if rule.splice.takes(client.ip()) {
            socket = match self.splice(turn, socket, client, guest) {
                Ok(()) => return,
                Err(socket) => socket,
            };
        }
        if let Err(error) = self.connect_guest(turn, socket, client, guest) {
            tracing::debug!(%client, %guest, %error, "published connection refused");
        }
    }

    pub(super) fn connect_guest(
        &mut self,
        turn: &mut Turn<'_, H>,
        socket: H::Tcp,
        client: SocketAddr,
        guest: SocketAddr,
    ) -> io::Result<()> {
        self.limit_half_open(turn, BegunBy::Client);
        let seen = self.client_inside(client, guest);
        let (Some(seen), Ok(token), Some(path)) = (
            self.free_endpoint(guest, seen),
            self.with_room(turn, Kind::Stream, |stack, _| stack.token(Kind::Stream)),
            self.path(guest.ip()),
        ) else {
            self.counters.flows_refused += 1;
            socket.reset();
            return Err(ErrorKind::QuotaExceeded.into());
        };
        if let Err(error) = turn.host.tcp_watch(token, &socket) {
            socket.reset();
            return Err(error);
        }
        let seed = self.secrets.next_u64();
        self.free_an_engine(turn.now);
        let Some(engine) = self.engines.engine(turn.now, path, seen.ip(), seed) else {
            self.counters.flows_refused += 1;
            socket.reset();
            return Err(ErrorKind::OutOfMemory.into());
        };
        let ends = Ends {
            src: guest,
            dst: seen,
        };
        let socket = Stream::Plain(socket);
        let flow = TcpFlow::published(ends, path, socket, engine, turn.now)
            .ok_or(ErrorKind::InvalidInput)?;
        let key = FlowKey::Tcp {
            link: self.link.id,
            guest,
            remote: seen,
        };
        self.admit(token, key, Flow::Tcp(flow), turn.now + SOON);
        self.table.set_half_open(turn.now, token, BegunBy::Client);
        self.make_ready(token);
        Ok(())
    }

    /// What a client is called inside: the gateway stands for it where the guest knows no way to it.
    fn client_inside(&self, client: SocketAddr, guest: SocketAddr) -> SocketAddr {
        let seen = mapping::seen_inside(&self.config, client, guest.ip());
        let gateway = self.config.plan.gateway_like(seen.ip());
        match gateway {
            Some(gateway) if !self.advertiser.routes(seen.ip()) => {
                SocketAddr::new(gateway, seen.port())
            }
            Some(_) | None => seen,
        }
    }

    /// The client's endpoint as the guest sees it, with another port where a client with the same
    /// appearance is connected already.
    fn free_endpoint(&mut self, guest: SocketAddr, seen: SocketAddr) -> Option<SocketAddr> {
        let (link, place) = (self.link.id, self.share.place);
        let mut candidate = seen;
        for _ in 0..PORT_ATTEMPTS {
            let key = FlowKey::Tcp {
                link,
                guest,
                remote: candidate,
            };
            let over = match self.table.find(&key) {
                None => true,
                Some(token) => {
                    matches!(self.table.get(token), Some(Flow::Tcp(flow)) if flow.is_over())
                }
            };
            // What another worker may give to a client of its own is not ours to give.
            let ours = place.of_client(guest, candidate) == place.index;
            if over && ours {
                if let Some(token) = self.table.find(&key) {
                    self.table.remove(token);
                }
                return Some(candidate);
            }
            candidate.set_port(self.secrets.next_port());
        }
        None
    }
}

/// Nothing left, out of descriptors, or a client that is gone again already.
fn after_accept(error: &io::Error) -> Step {
    let kind = error.kind();
    // accept(2): network errors of the new connection are reported here, and concern it alone. That
    // something is forbidden is about us, and said again.
    let passes = kind == ErrorKind::Interrupted
        || kind == ErrorKind::ConnectionAborted
        || (kind != ErrorKind::PermissionDenied && udp::unreachable(error).is_some());
    if kind == ErrorKind::WouldBlock {
        Step::Empty
    } else if passes {
        Step::Taken
    } else {
        tracing::warn!(%error, "published port pauses");
        let number = error.raw_os_error();
        if room::is_exhaustion(error) || number.is_some_and(|it| NO_MEMORY.contains(&it)) {
            Step::Exhausted
        } else {
            Step::Failing
        }
    }
}
