//! Datagrams of the host's clients at published UDP ports, and what the network says of the answers.
//!
//! Comes in: what is at the sockets of such ports. Goes out: datagrams to the guest, whose source is the client as
//! it is known inside. Who that is the flow table remembers, so that the guest's answer finds its way.

use std::io::ErrorKind;
use std::net::SocketAddr;

use super::{Port, Socket, Step, listener_token};
use crate::flow::key::FlowKey;
use crate::flow::table::BegunBy;
use crate::flow::udp::PublishedPeer;
use crate::flow::{Flow, Turn};
use crate::host::{Host, QueuedError, Received, Token, UdpSocket};
use crate::net::DropReason;
use crate::net::emit::{self, Ends};
use crate::stack::{Stack, udp};

/// Ports that a client of a published UDP port may appear with inside.
const PEER_ATTEMPTS: u16 = 8;

impl<H: Host> Stack<H> {
    pub(super) fn take_datagrams(&mut self, turn: &mut Turn<'_, H>, id: usize) -> Step {
        if !self.deliver_inbox(turn) {
            return Step::Later;
        }
        let Some(Port {
            rule,
            socket: Socket::Udp(socket),
            ..
        }) = self.published.ports.get_mut(&id)
        else {
            return Step::Empty;
        };
        let guest = rule.guest;
        match socket.recv(&mut self.inbox) {
            Ok(()) => {
                self.inbox_owner = listener_token(id);
                if self.deliver_inbox(turn) {
                    Step::Taken
                } else {
                    Step::Later
                }
            }
            Err(error) => match socket.queued_error(&mut self.scratch) {
                Some(queued) => {
                    self.report_answer(turn, guest, &queued);
                    Step::Taken
                }
                None if error.kind() == ErrorKind::WouldBlock => Step::Empty,
                // One about an earlier answer is told once, with or without more about it.
                None => Step::Failed,
            },
        }
    }

    /// Hands the first datagram of the inbox to the guest of a published port, and those that go along;
    /// gives their number.
    pub(in crate::stack) fn deliver_to_published(
        &mut self,
        turn: &mut Turn<'_, H>,
        id: usize,
        first: Received,
    ) -> usize {
        let Some(guest) = self.published.ports.get(&id).map(|port| port.rule.guest) else {
            return 1;
        };
        let peer = PublishedPeer {
            published: id,
            client: first.from,
            asked: first.asked,
            answered: false,
        };
        let Some(seen) = self.note_peer(turn, guest, peer) else {
            self.counters.flows_refused += 1;
            self.counters.add_drops(DropReason::NoRoom, 1);
            return 1;
        };
        let Some(path) = self.path(guest.ip()) else {
            self.counters.add_drops(DropReason::NoNeighbour, 1);
            return 1;
        };
        let ends = Ends {
            src: seen,
            dst: guest,
        };
        let id = self.datagram_id();
        let marks = udp::marks_inside(first.from.ip(), first.marks);
        self.send_inside(turn, path.wire, ends, (id, marks))
    }

    /// Passes an error on that the guest's answer to a client earned.
    pub(in crate::stack) fn report_answer(
        &mut self,
        turn: &mut Turn<'_, H>,
        guest: SocketAddr,
        queued: &QueuedError,
    ) {
        let client = queued.destination;
        let seen = self.peer_endpoints(guest, client).find(|seen| {
            let key = FlowKey::Peer {
                link: self.link.id,
                guest,
                remote: *seen,
            };
            let peer = self
                .table
                .find(&key)
                .and_then(|token| self.table.get(token));
            matches!(peer, Some(Flow::Peer(peer)) if peer.client == client)
        });
        let (Some(seen), Some(path)) = (seen, self.path(guest.ip())) else {
            return;
        };
        let ends = Ends {
            src: guest,
            dst: seen,
        };
        let quoted = &self.scratch[..queued.quoted.min(udp::MAX_QUOTED)];
        if let Some(original) = emit::quoted_udp(ends, quoted) {
            self.pass_on(turn, path.wire, queued, &original);
        }
    }

    /// Remembers a client of a published UDP port; gives its endpoint as the guest sees it. Two
    /// clients that look alike inside (both on the host's loopback, with one port) get two ports,
    /// the same ones each time.
    fn note_peer(
        &mut self,
        turn: &mut Turn<'_, H>,
        guest: SocketAddr,
        peer: PublishedPeer,
    ) -> Option<SocketAddr> {
        let now = turn.now;
        let deadline = PublishedPeer::deadline(now, self.config.timeouts);
        let mut free = None;
        for seen in self.peer_endpoints(guest, peer.client) {
            let key = FlowKey::Peer {
                link: self.link.id,
                guest,
                remote: seen,
            };
            let known = self
                .table
                .find(&key)
                .filter(|&token| !self.forget_stale(token));
            let Some(token) = known else {
                free = free.or(Some((key, seen)));
                continue;
            };
            if matches!(self.table.get(token), Some(Flow::Peer(known)) if known.is_same(&peer)) {
                self.table.set_deadline(token, deadline);
                return Some(seen);
            }
        }
        let (key, seen) = free?;
        let token = self.room_for_peer(turn).ok()?;
        self.admit(token, key, Flow::Peer(peer), deadline);
        self.table.set_unanswered(now, token, BegunBy::Client);
        Some(seen)
    }

    /// Forgets a client that came by a port which is no longer published; true when it did.
    fn forget_stale(&mut self, token: Token) -> bool {
        let stale = matches!(self.table.get(token), Some(Flow::Peer(known)) if !self.published.has(known.published));
        if stale {
            self.table.remove(token);
        }
        stale
    }

    /// The endpoints that a client may have as the guest sees it, best first.
    fn peer_endpoints(
        &self,
        guest: SocketAddr,
        client: SocketAddr,
    ) -> impl Iterator<Item = SocketAddr> + use<H> {
        let seen = self.client_inside(client, guest);
        let other_port = self.secrets.fingerprint(&(guest, client));
        let others = (0..PEER_ATTEMPTS - 1).map(move |attempt| {
            let port = 49152 | (other_port.wrapping_add(attempt) & 0x3fff);
            SocketAddr::new(seen.ip(), port)
        });
        std::iter::once(seen).chain(others)
    }
}
