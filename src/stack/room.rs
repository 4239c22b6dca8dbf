//! Room for another flow: who gives way to it where there is none.
//!
//! Comes in: what is about to begin. Goes out: flows that end for it, those that have waited longest for their other
//! end or for an answer, else what has carried nothing for long; never a connection that is open.

use std::io::{self, ErrorKind};

use crate::flow::echo::EchoFlow;
use crate::flow::key::Kind;
use crate::flow::table::{BegunBy, Full, Wait};
use crate::flow::udp::PublishedPeer;
use crate::flow::{Flow, Turn};
use crate::host::{Host, TcpSocket, Token};
use crate::net::{DropReason, Duration, Instant};

use super::Stack;

/// A connection that has waited for its other end for less than this does not give way to a newer one,
/// unless too many wait: most are answered sooner.
const GRACE: Duration = Duration::from_millis(250);

/// `ENFILE` and `EMFILE` of errno(3), the same numbers on all that we run on.
const OUT_OF_DESCRIPTORS: [i32; 2] = [23, 24];

/// A port that was never answered gives way to a newer flow after this time, where there is no room.
const UNANSWERED: Duration = Duration::from_secs(1);

/// Anything that carries datagrams does after this time without any, where there is no room: a quarter of what RFC 4787
/// REQ-5 asks for where there is.
const IDLE: Duration = Duration::from_secs(30);

/// A client of a published UDP port gives way to a newer one after this time, where as many are known as may be.
const PEER_IDLE: Duration = Duration::from_secs(5);

/// There is no room for another, or no descriptor.
pub(super) fn is_exhaustion(error: &io::Error) -> bool {
    let number = error.raw_os_error();
    error.kind() == ErrorKind::QuotaExceeded
        || number.is_some_and(|number| OUT_OF_DESCRIPTORS.contains(&number))
}

fn is_half_open<H: Host>(flow: &Flow<H>) -> bool {
    match flow {
        Flow::Tcp(flow) => flow.is_half_open(),
        Flow::Spliced(flow) => flow.is_half_open(),
        Flow::Udp(_) | Flow::Peer(_) | Flow::Echo(_) | Flow::Query(_) => false,
    }
}

const fn is_query<H: Host>(flow: &Flow<H>) -> bool {
    matches!(flow, Flow::Query(_))
}

impl<H: Host> Stack<H> {
    /// Makes room for another connection that waits for its other end, where as many do as may.
    pub(super) fn limit_half_open(&mut self, turn: &mut Turn<'_, H>, begun: BegunBy) {
        if self.table.is_half_open_full(begun, is_half_open) {
            self.abandon_oldest(turn, &[begun], Duration::ZERO);
        }
    }

    /// The token for the socket of a new flow of this kind.
    ///
    /// # Errors
    /// `QuotaExceeded` where there is no room for one.
    pub(super) fn token(&mut self, kind: Kind) -> io::Result<Token> {
        let token = self.table.next_token(kind);
        Ok(token.map_err(|Full| ErrorKind::QuotaExceeded)?)
    }

    /// Begins a flow of this kind; where there is no room for it, or no descriptor, once more after something else has
    /// given way.
    ///
    /// # Errors
    /// What `begin` reports.
    pub(super) fn with_room<T>(
        &mut self,
        turn: &mut Turn<'_, H>,
        kind: Kind,
        begin: impl Fn(&mut Self, &mut H) -> io::Result<T>,
    ) -> io::Result<T> {
        match begin(self, turn.host) {
            Err(error) if is_exhaustion(&error) && self.make_way(turn, kind) => {
                begin(self, turn.host)
            }
            begun => begun,
        }
    }

    /// Ends something for a new flow of this kind, of the same one where that has all it may have: what has waited
    /// longest for the other end to speak up, a connection or a port, else what is idle. False where nothing
    /// is for long enough.
    fn make_way(&mut self, turn: &mut Turn<'_, H>, kind: Kind) -> bool {
        let same = self.table.is_share_used(kind);
        let streams = !same || kind == Kind::Stream;
        let datagrams = !same || kind == Kind::Datagrams;
        (streams && self.abandon_oldest(turn, &BegunBy::ENDS, GRACE))
            || (datagrams
                && (self.close_unanswered(turn.now, &BegunBy::ENDS, UNANSWERED)
                    || self.fail_oldest_query(turn, UNANSWERED)
                    || self.close_idle(turn.now, &BegunBy::ENDS, IDLE)))
    }

    /// Ends the connection that has waited longest for its other end, of those that one of `begun` began, if it
    /// has for `time`.
    fn abandon_oldest(
        &mut self,
        turn: &mut Turn<'_, H>,
        begun: &[BegunBy],
        time: Duration,
    ) -> bool {
        let latest = turn.now - time;
        let oldest = self
            .table
            .take_longest(Wait::OtherEnd, begun, latest, is_half_open);
        match oldest {
            Some(Flow::Tcp(flow)) => flow.abandon(turn.now, turn.tx, &mut self.engines),
            Some(Flow::Spliced(flow)) => {
                if let Some((client, ..)) = flow.into_client() {
                    client.reset();
                }
            }
            Some(Flow::Udp(_) | Flow::Peer(_) | Flow::Echo(_) | Flow::Query(_)) | None => {
                return false;
            }
        }
        self.counters.flows_abandoned += 1;
        true
    }

    /// Begins another port of the guest's, whose socket `open` makes for a token.
    ///
    /// # Errors
    /// `ResourceBusy` where there are as many as may be and none gives way; what `open` reports.
    pub(super) fn begin_port<T>(
        &mut self,
        turn: &mut Turn<'_, H>,
        open: impl Fn(&mut H, Token) -> io::Result<T>,
    ) -> io::Result<(Token, T)> {
        self.limit_ports(turn.now);
        self.with_room(turn, Kind::Datagrams, |stack, host| {
            if stack.table.are_ports_used() {
                return Err(ErrorKind::ResourceBusy.into());
            }
            let token = stack.token(Kind::Datagrams)?;
            Ok((token, open(host, token)?))
        })
    }

    /// Makes room for another port of the guest's, where there are as many as may be.
    fn limit_ports(&mut self, now: Instant) {
        /// What is idle need be no port.
        const LOOKS: usize = 16;
        if self.table.are_ports_used() && !self.close_unanswered(now, &[BegunBy::Guest], UNANSWERED)
        {
            for _ in 0..LOOKS {
                if !self.table.are_ports_used() || !self.close_idle(now, &[BegunBy::Guest], IDLE) {
                    break;
                }
            }
        }
    }

    /// The token for another client of a published UDP port. Where as many are known as may be, the oldest that the guest has
    /// not answered goes first, however young: whoever reaches the host makes them, and those who are served stay.
    ///
    /// # Errors
    /// `QuotaExceeded` where there is no room for one.
    pub(super) fn room_for_peer(&mut self, turn: &mut Turn<'_, H>) -> io::Result<Token> {
        let clients = [BegunBy::Client];
        if self.table.are_peers_used()
            && !self.close_unanswered(turn.now, &clients, Duration::ZERO)
            && !self.close_idle(turn.now, &clients, PEER_IDLE)
        {
            return Err(ErrorKind::QuotaExceeded.into());
        }
        self.with_room(turn, Kind::Datagrams, |stack, _| {
            stack.token(Kind::Datagrams)
        })
    }

    /// Makes room for another query, where as many wait for the resolver as may.
    pub(super) fn limit_queries(&mut self, turn: &mut Turn<'_, H>) {
        if self.table.is_half_open_full(BegunBy::Asker, is_query) {
            self.fail_oldest_query(turn, Duration::ZERO);
        }
    }

    /// Gives up on the query that has waited longest for the resolver, if it has for `time`.
    fn fail_oldest_query(&mut self, turn: &mut Turn<'_, H>, time: Duration) -> bool {
        let latest = turn.now - time;
        let oldest = self
            .table
            .take_longest(Wait::OtherEnd, &[BegunBy::Asker], latest, is_query);
        let Some(Flow::Query(query)) = oldest else {
            return false;
        };
        if turn.tx.has_room() {
            self.fail_query(turn, query.wire, query.guest, &query.bytes);
        } else {
            self.counters.add_drops(DropReason::TransmitFull, 1);
        }
        self.counters.flows_abandoned += 1;
        true
    }

    /// Closes the port, or the client of a published one, that came longest ago and was never answered, if it has had
    /// its time.
    fn close_unanswered(&mut self, now: Instant, begun: &[BegunBy], time: Duration) -> bool {
        let waits = |flow: &Flow<H>| match flow {
            Flow::Udp(flow) => flow.is_unanswered(),
            Flow::Peer(peer) => !peer.answered,
            Flow::Echo(flow) => !flow.answered,
            Flow::Tcp(_) | Flow::Spliced(_) | Flow::Query(_) => false,
        };
        let oldest = self
            .table
            .take_longest(Wait::Answer, begun, now - time, waits);
        self.counters.flows_abandoned += u64::from(oldest.is_some());
        oldest.is_some()
    }

    /// Closes one of the ports, pings and clients of published ports that have carried nothing for so long.
    fn close_idle(&mut self, now: Instant, begun: &[BegunBy], time: Duration) -> bool {
        let timeouts = self.config.timeouts;
        let seen = |flow: &Flow<H>, deadline| match flow {
            Flow::Udp(flow) => Some(flow.active_at(deadline)),
            Flow::Echo(_) => Some(EchoFlow::<H::Echo>::active_at(deadline)),
            Flow::Peer(_) => Some(PublishedPeer::active_at(deadline, timeouts)),
            Flow::Tcp(_) | Flow::Spliced(_) | Flow::Query(_) => None,
        };
        let oldest = self.table.take_idle(begun, now - time, seen);
        self.counters.flows_abandoned += u64::from(oldest.is_some());
        oldest.is_some()
    }
}
