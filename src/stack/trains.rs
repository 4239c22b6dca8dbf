//! Datagrams that travel together: several that look alike leave as one, both ways.
//!
//! Comes in: a guest's datagrams one by one, and what a socket of the host's received, in the
//! [`Inbox`]. Goes out: trains for the host's sockets (udp(7), `UDP_SEGMENT`) and
//! for the link. A datagram waits for others no longer than until the batch that it came in is over.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;

use crate::flow::udp::PublishedPeer;
use crate::flow::{Flow, Turn};
use crate::host::{Host, Inbox, Outgoing, QueuedError, Received, Token, UdpSocket};
use crate::net::emit::{self, Datagram, DatagramId, Ends};
use crate::net::{DropReason, Marks, Wire};

use super::counters::Disposition;
use super::guest::Original;
use super::udp::{Unsent, is_too_big};
use super::{Stack, publish};

/// Bytes of payload up to which a datagram waits for others: above that, a train would be over most
/// paths' MTU, and little is saved.
const MAX_WAITING: usize = 9_000;

/// Bytes of a packet that are kept for an error to quote: as much as one over IPv6 does (RFC 4443 2.4 c).
const QUOTED: usize = 1_232;

/// `ENODEV` of errno(3), the same number on all that we run on.
const NO_SUCH_DEVICE: i32 = 19;

/// The socket that a guest's datagram leaves by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exit {
    /// That of the guest's own port.
    Flow(Token),
    /// That of a published port, as an answer to this client.
    Published(PublishedPeer),
}

/// What the datagrams of a train have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Departure {
    /// The socket.
    pub(super) exit: Exit,
    /// Where they go on the host's network.
    pub(super) to: SocketAddr,
    /// How they are to look there.
    pub(super) marks: Marks,
    /// The way that they came.
    pub(super) wire: Wire,
    /// The guest's endpoint.
    pub(super) guest: SocketAddr,
    /// Where the guest sent them to.
    pub(super) asked: IpAddr,
}

/// A datagram of a guest's, or a train that it made itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct FromGuest<'a> {
    /// Its packet, for an error to quote.
    pub(super) packet: &'a [u8],
    /// Its payload.
    pub(super) payload: &'a [u8],
    /// Bytes of each datagram, where it is a train.
    pub(super) segment: Option<NonZeroU16>,
}

/// Datagrams that did not leave.
struct Lost {
    why: Unsent,
    count: usize,
}

/// Datagrams of a guest that wait to leave together.
#[derive(Default)]
pub(super) struct Train {
    departure: Option<Departure>,
    payload: Vec<u8>,
    count: usize,
    /// Payload of each but the last.
    size: u16,
    /// The first one's packet, as far as an error would quote it.
    packet: Vec<u8>,
}

impl Train {
    /// A datagram with a payload of that length may go with those that are there.
    fn takes(&self, departure: &Departure, len: usize) -> bool {
        let size = usize::from(self.size);
        self.departure.as_ref() == Some(departure)
            && (1..=size).contains(&len)
            // A shorter one is the last.
            && self.payload.len() == self.count * size
            && self.count < emit::MAX_TRAIN_DATAGRAMS
            && self.payload.len() + len <= emit::MAX_TRAIN
    }

    fn add(&mut self, payload: &[u8]) {
        self.payload.extend(payload);
        self.count += 1;
    }

    fn begin(&mut self, departure: Departure, size: u16, packet: &[u8]) {
        self.departure = Some(departure);
        self.size = size;
        self.count = 0;
        self.payload.clear();
        self.packet.clear();
        self.packet.extend(&packet[..packet.len().min(QUOTED)]);
    }
}

impl<H: Host> Stack<H> {
    /// Sends a guest's datagram: with others, soon, or at once.
    pub(super) fn depart(
        &mut self,
        turn: &mut Turn<'_, H>,
        departure: Departure,
        datagram: FromGuest<'_>,
    ) -> Result<(), Unsent> {
        let len = datagram.payload.len();
        if datagram.segment.is_none() && self.train.takes(&departure, len) {
            self.train.add(datagram.payload);
            return Ok(());
        }
        self.send_train(turn);
        match u16::try_from(len) {
            Ok(size) if datagram.segment.is_none() && len <= MAX_WAITING => {
                self.train.begin(departure, size, datagram.packet);
                self.train.add(datagram.payload);
                Ok(())
            }
            Ok(_) | Err(_) => self
                .send(turn, &departure, datagram.payload, datagram.segment)
                .map_err(|lost| lost.why),
        }
    }

    /// Sends the datagrams that wait. The guest is told where a router would.
    pub(super) fn send_train(&mut self, turn: &mut Turn<'_, H>) {
        let Some(departure) = self.train.departure.take() else {
            return;
        };
        let train = std::mem::take(&mut self.train);
        let segment = NonZeroU16::new(train.size).filter(|_| train.count > 1);
        if let Err(Lost { why, count }) = self.send(turn, &departure, &train.payload, segment) {
            let original = Original {
                wire: departure.wire,
                src: departure.guest.ip(),
                dst: departure.asked,
                packet: &train.packet,
            };
            if let Disposition::Dropped(reason) = self.after_sending(turn, original, Err(why)) {
                self.counters.add_drops(reason, count as u64);
            }
        }
        self.train = train;
    }

    fn send(
        &mut self,
        turn: &mut Turn<'_, H>,
        departure: &Departure,
        payload: &[u8],
        segment: Option<NonZeroU16>,
    ) -> Result<(), Lost> {
        let from = match departure.exit {
            Exit::Flow(_) => None,
            Exit::Published(peer) => peer.asked,
        };
        let outgoing = Outgoing {
            to: departure.to,
            from,
            payload,
            segment,
            marks: Some(departure.marks),
        };
        let Some(socket) = self.exit(departure.exit) else {
            // It gave way to another before its datagrams left.
            return Err(Lost {
                why: Unsent::Silent,
                count: outgoing.count(),
            });
        };
        socket.send(&outgoing).map_err(|failure| Lost {
            why: self.explain(turn, departure, failure.error),
            count: failure.lost,
        })
    }

    /// What a guest is to hear of its datagrams that did not leave.
    fn explain(
        &mut self,
        turn: &mut Turn<'_, H>,
        departure: &Departure,
        error: io::Error,
    ) -> Unsent {
        if let Exit::Flow(token) = departure.exit
            && self.has_lost_its_address(departure.guest.is_ipv6(), &error)
        {
            self.table.remove(token);
        }
        if !is_too_big(&error) {
            return error.into();
        }
        self.too_long(
            turn,
            |stack| stack.queued_error(departure.exit),
            |stack, turn, queued| match departure.exit {
                Exit::Flow(token) => stack.report_udp(turn, token, queued),
                Exit::Published(_) => stack.report_answer(turn, departure.guest, queued),
            },
        )
    }

    /// A socket that is bound to an address or interface says that it is not there: it may be back as another, to
    /// which the socket of the next datagram, or ping, will be bound.
    pub(super) fn has_lost_its_address(&self, ipv6: bool, error: &io::Error) -> bool {
        // That there is no route may be the destination's fault.
        let gone = matches!(
            error.kind(),
            ErrorKind::AddrNotAvailable | ErrorKind::InvalidInput
        ) || error.raw_os_error() == Some(NO_SUCH_DEVICE);
        self.config.outbound_of(ipv6).is_some() && gone
    }

    fn exit(&mut self, exit: Exit) -> Option<&mut H::Udp> {
        match exit {
            Exit::Flow(token) => match self.table.get_mut(token) {
                Some(Flow::Udp(flow)) => Some(&mut flow.socket),
                _ => None,
            },
            Exit::Published(peer) => self.published.udp(peer.published),
        }
    }

    fn queued_error(&mut self, exit: Exit) -> Option<QueuedError> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let queued = self
            .exit(exit)
            .and_then(|socket| socket.queued_error(&mut scratch));
        self.scratch = scratch;
        queued
    }

    /// Hands on what is in the inbox; false where the batch is full before that is done. To be called
    /// before the inbox is filled anew.
    pub(super) fn deliver_inbox(&mut self, turn: &mut Turn<'_, H>) -> bool {
        let owner = self.inbox_owner;
        while let Some(first) = self.inbox.first() {
            if !turn.tx.has_room() {
                return false;
            }
            let passed = match (publish::listener_of(owner), self.table.get(owner)) {
                (Some(id), _) => self.deliver_to_published(turn, id, first),
                (None, Some(Flow::Udp(_))) => self.deliver_udp(turn, owner, first),
                (None, Some(Flow::Echo(_))) => self.deliver_echo(turn, owner, first),
                // A query takes its answer at once. Who is gone has nothing to receive.
                (
                    None,
                    Some(Flow::Query(_) | Flow::Tcp(_) | Flow::Spliced(_) | Flow::Peer(_)) | None,
                ) => {
                    let count = self.inbox.datagrams().count();
                    self.counters.add_drops(DropReason::FlowGone, count as u64);
                    count
                }
            };
            self.inbox.pass(passed);
        }
        true
    }

    /// Sends the first datagram of the inbox to the guest, with those behind it that may go along; gives
    /// their number.
    pub(super) fn send_inside(
        &mut self,
        turn: &mut Turn<'_, H>,
        wire: Wire,
        ends: Ends,
        (id, marks): (DatagramId, Marks),
    ) -> usize {
        let mtu = self.config.mtu;
        let count = if self.link.capabilities.uso {
            train_length(&self.inbox, ends, mtu)
        } else {
            1
        };
        let mut payloads = self.inbox.datagrams().map(|(_, payload)| payload);
        let payload = payloads.next().unwrap_or_default();
        let datagram = Datagram {
            ends,
            id,
            marks,
            payload,
        };
        let size = u16::try_from(payload.len()).ok().and_then(NonZeroU16::new);
        let sent = match size.filter(|_| count > 1) {
            Some(size) => {
                let payloads = self.inbox.datagrams().map(|(_, payload)| payload);
                emit::udp_train(turn.tx, wire, datagram, size, payloads.take(count))
            }
            None => emit::udp(turn.tx, wire, mtu, datagram),
        };
        if !sent {
            self.counters
                .add_drops(DropReason::TransmitFull, count as u64);
        }
        count
    }
}

/// How many datagrams of the inbox, from the first, may travel as one: from one sender, alike, of one size
/// but for the last.
fn train_length(inbox: &Inbox, ends: Ends, mtu: u16) -> usize {
    let mut datagrams = inbox.datagrams();
    let Some((first, payload)) = datagrams.next() else {
        return 0;
    };
    let size = payload.len();
    if size == 0 || !emit::fits(ends, mtu, size) {
        return 1;
    }
    let (mut count, mut total, mut open) = (1, size, true);
    let goes = |(received, payload): (Received, &[u8])| {
        let len = payload.len();
        let goes = open
            && received == first
            && (1..=size).contains(&len)
            && total + len <= emit::MAX_TRAIN;
        total += len;
        open = len == size;
        goes
    };
    count += datagrams.map(goes).take_while(|goes| *goes).count();
    count.min(emit::MAX_TRAIN_DATAGRAMS)
}
