//! The DNS forwarder: a guest's query goes to the host's resolvers, the answer comes back untouched.
//!
//! The few names that the gateway itself knows are answered here (`names.rs`). Of every other query
//! nothing is touched but the identifier, so EDNS, DNSSEC and whatever comes next pass. Each
//! attempt has a fresh socket and identifier (RFC 5452); a silent resolver is passed over for the
//! next; when all have been silent the guest gets SERVFAIL rather than nothing.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::ops::Range;

use crate::config::DNS_PORT;
use crate::flow::key::{FlowKey, Kind};
use crate::flow::query::{ATTEMPT, Query, ROUNDS};
use crate::flow::table::BegunBy;
use crate::flow::{Flow, Turn};
use crate::host::{DatagramRole, Host, Outgoing, Token, UdpSocket};
use crate::net::dns::{HEADER, flags};
use crate::net::emit::Ends;
use crate::net::parse::Ip;
use crate::net::{DropReason, Wire};

use super::counters::Disposition;
use super::names::{self, Lookup};
use super::{Stack, udp};

/// Inboxes full of answers that one query may look through in one turn: who fills its socket with forged
/// ones must not keep the others waiting.
const BUDGET: usize = 4;

/// Queries that are taken of one frame, whose others are lost: each costs as much as a datagram that came alone.
const AT_ONCE: usize = 8;

/// Response code of a server that failed, with "recursion available".
const SERVFAIL: u8 = 0x82;

/// An attempt under way.
struct Attempt<S> {
    socket: S,
    id: u16,
    resolver: SocketAddr,
    /// Attempts so far.
    number: usize,
}

fn is_answer(bytes: &[u8], id: u16) -> bool {
    bytes.len() >= HEADER && bytes[2] & flags::RESPONSE != 0 && bytes[..2] == id.to_be_bytes()
}

impl<H: Host> Stack<H> {
    /// What a frame holds for the resolver: a query, or several of one size.
    pub(super) fn guest_queries(
        &mut self,
        turn: &mut Turn<'_, H>,
        ip: &Ip<'_>,
        guest: SocketAddr,
        payload: &[u8],
    ) -> Disposition {
        let Some(size) = ip.udp_segment else {
            return self.guest_query(turn, ip.wire, guest, payload);
        };
        let mut whole = None;
        let mut queries = payload.chunks(usize::from(size.get()));
        for query in queries.by_ref().take(AT_ONCE) {
            let mut each = Some(self.guest_query(turn, ip.wire, guest, query));
            // The frame counts as what became of the best of them.
            if matches!(whole, None | Some(Disposition::Dropped(_))) {
                std::mem::swap(&mut whole, &mut each);
            }
            if let Some(Disposition::Dropped(reason)) = each {
                self.counters.add_drops(reason, 1);
            }
        }
        self.counters
            .add_drops(DropReason::NoRoom, queries.len() as u64);
        whole.unwrap_or(Disposition::Dropped(DropReason::DnsMalformed))
    }

    fn guest_query(
        &mut self,
        turn: &mut Turn<'_, H>,
        wire: Wire,
        guest: SocketAddr,
        bytes: &[u8],
    ) -> Disposition {
        match names::lookup(&self.config, bytes) {
            // Long enough for a header.
            Lookup::Pass => {}
            Lookup::Answer(_) | Lookup::FormErr(_) if turn.tx.is_half_full() => {
                return Disposition::Dropped(DropReason::TransmitFull);
            }
            Lookup::Answer(answer) | Lookup::FormErr(answer) => {
                self.answer_query(turn, self.back(wire), guest, &answer);
                return Disposition::Answered;
            }
            Lookup::Ignore => return Disposition::Dropped(DropReason::DnsMalformed),
        }
        let id = u16::from_be_bytes([bytes[0], bytes[1]]);
        let key = FlowKey::Query {
            link: wire.link,
            guest,
            id,
        };
        if let Some(token) = self.table.find(&key) {
            match self.table.get(token) {
                // Repeated while it is under way: the answer to the first serves both.
                Some(Flow::Query(query)) if query.bytes == bytes => return Disposition::Forwarded,
                // Another question with the same number: the guest has given the first up.
                _ => self.table.remove(token),
            };
        }
        let back = self.back(wire);
        // The one that answered last is asked first.
        let resolvers = turn.host.resolvers();
        let first = self
            .resolver
            .and_then(|last| resolvers.iter().position(|addr| *addr == last))
            .unwrap_or(0);
        self.limit_queries(turn);
        let asked = self.with_room(turn, Kind::Datagrams, |stack, host| {
            let token = stack.token(Kind::Datagrams)?;
            Ok((token, stack.ask(host, token, bytes, first..first)?))
        });
        let (token, attempt) = match asked {
            Ok(asked) => asked,
            Err(error) => {
                tracing::debug!(%guest, %error, "no resolver can be asked");
                self.counters.flows_refused += 1;
                self.fail_query(turn, back, guest, bytes);
                return Disposition::Answered;
            }
        };
        let query = Query {
            socket: attempt.socket,
            guest,
            id,
            attempt_id: attempt.id,
            bytes: bytes.to_vec(),
            resolver: attempt.resolver,
            first,
            attempts: attempt.number,
            wire: back,
        };
        self.admit(token, key, Flow::Query(query), turn.now + ATTEMPT);
        self.table.set_half_open(turn.now, token, BegunBy::Asker);
        Disposition::Forwarded
    }

    /// Asks the resolvers in turn until one takes the query. `places.start` is the place in the list
    /// that the query began at, `places.end` the one that is to be asked now.
    ///
    /// # Errors
    /// Why the last of them could not be asked; `NotFound` where there is none left.
    fn ask(
        &mut self,
        host: &mut H,
        token: Token,
        bytes: &[u8],
        places: Range<usize>,
    ) -> io::Result<Attempt<H::Udp>> {
        let mut reason = ErrorKind::NotFound.into();
        let count = host.resolvers().len();
        for number in places.len()..count * ROUNDS {
            let Some(&resolver) = host.resolvers().get((places.start + number) % count) else {
                break;
            };
            let role = DatagramRole::Connected(resolver);
            let mut socket = match udp::open_datagram(host, token, role) {
                Ok(socket) => socket,
                Err(error) => {
                    reason = error;
                    continue;
                }
            };
            let id = self.secrets.next_u16();
            let mut query = bytes.to_vec();
            query[..2].copy_from_slice(&id.to_be_bytes());
            match socket.send(&Outgoing::plain(resolver, &query)) {
                Ok(()) => {
                    return Ok(Attempt {
                        socket,
                        id,
                        resolver,
                        number: number + 1,
                    });
                }
                Err(failure) => reason = failure.error,
            }
        }
        Err(reason)
    }

    /// Tells the guest that no resolver answered.
    pub(super) fn fail_query(
        &mut self,
        turn: &mut Turn<'_, H>,
        wire: Wire,
        guest: SocketAddr,
        bytes: &[u8],
    ) {
        let mut answer = bytes.to_vec();
        answer[2] |= flags::RESPONSE;
        answer[3] = SERVFAIL;
        self.answer_query(turn, wire, guest, &answer);
    }

    fn answer_query(
        &mut self,
        turn: &mut Turn<'_, H>,
        wire: Wire,
        guest: SocketAddr,
        answer: &[u8],
    ) {
        if let Some(resolver) = self.config.plan.resolver_like(guest.ip()) {
            let ends = Ends {
                src: SocketAddr::new(resolver, DNS_PORT),
                dst: guest,
            };
            self.serve(turn, wire, ends, answer);
        }
    }

    /// The socket of a query has an answer, or an error.
    pub(super) fn query_ready(&mut self, turn: &mut Turn<'_, H>, token: Token) {
        for _ in 0..BUDGET {
            if !self.deliver_inbox(turn) || !turn.tx.has_room() {
                break;
            }
            let Some(Flow::Query(query)) = self.table.get_mut(token) else {
                return;
            };
            match query.socket.recv(&mut self.inbox) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return self.query_timed_out(turn, token),
            }
            // Something else from the resolver's address is no answer to this attempt.
            let mut received = self.inbox.datagrams().map(|(_, bytes)| bytes);
            let answer = received
                .find(|bytes| is_answer(bytes, query.attempt_id))
                .map(<[u8]>::to_vec);
            drop(received);
            let others = self.inbox.datagrams().count() - usize::from(answer.is_some());
            self.counters
                .add_drops(DropReason::DnsUnasked, others as u64);
            self.inbox.clear();
            if let Some(mut answer) = answer {
                let (guest, wire) = (query.guest, query.wire);
                self.resolver = Some(query.resolver);
                answer[..2].copy_from_slice(&query.id.to_be_bytes());
                self.table.remove(token);
                return self.answer_query(turn, wire, guest, &answer);
            }
        }
        self.make_ready(token);
    }

    /// The resolver was silent or is not there: the next is asked.
    pub(super) fn query_timed_out(&mut self, turn: &mut Turn<'_, H>, token: Token) {
        let Some(Flow::Query(query)) = self.table.get_mut(token) else {
            return;
        };
        let (bytes, places) = (
            std::mem::take(&mut query.bytes),
            query.first..query.first + query.attempts,
        );
        if self.resolver == Some(query.resolver) {
            // It does not answer any longer: the order of the list holds again.
            self.resolver = None;
        }
        let attempt = self.ask(turn.host, token, &bytes, places);
        let Some(Flow::Query(query)) = self.table.get_mut(token) else {
            return;
        };
        if let Ok(attempt) = attempt {
            query.socket = attempt.socket;
            query.attempt_id = attempt.id;
            query.resolver = attempt.resolver;
            query.attempts = attempt.number;
            query.bytes = bytes;
            self.table.set_deadline(token, turn.now + ATTEMPT);
            return;
        }
        let (guest, wire) = (query.guest, query.wire);
        self.table.remove(token);
        self.fail_query(turn, wire, guest, &bytes);
    }
}
