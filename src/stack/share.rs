//! How several workers serve one network: which of them a packet is for, and what they hand to one
//! another.
//!
//! A worker is a whole [`Stack`] with a queue of the link of its own. Comes in: what arrived at this one.
//! Goes out: what is for another, which the event loop carries there. Nothing is shared:
//!
//! - a TCP connection is the worker's to which its SYN came, and there the kernel sends what follows, since it
//!   remembers by which queue the answers went; what comes elsewhere all the same goes from one worker to the
//!   next until it finds its flow;
//! - a guest's UDP port is one worker's by its hash, whatever it speaks to (RFC 4787 REQ-1);
//! - the first has what there is once: published ports' listeners, leases, names, pings, fragments.

use std::collections::VecDeque;
use std::hash::BuildHasher;
use std::net::{IpAddr, SocketAddr};

use crate::buf::RxMeta;
use crate::config::Publish;
use crate::flow::Turn;
use crate::flow::key::KeyedState;
use crate::host::Host;
use crate::net::{Mac, Wire, parse};

use super::counters::Disposition;
use super::{Stack, mapping};

/// The worker that has what there is once.
pub(super) const FIRST: usize = 0;

/// One of the workers of a network.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Its number, from 0.
    pub index: usize,
    /// How many there are.
    pub count: usize,
    /// The same for all of them.
    pub hash: KeyedState,
}

impl Place {
    /// The only worker.
    pub const ALONE: Self = Self {
        index: FIRST,
        count: 1,
        hash: KeyedState::new((0, 0)),
    };

    /// This worker's part of a limit that is for all of them together; at least one, so that there are to be no more
    /// workers than the least limit has room for.
    #[must_use]
    pub const fn part(self, limit: usize) -> usize {
        let rest = limit % self.count;
        let part = limit / self.count + (self.index < rest) as usize;
        if part == 0 { 1 } else { part }
    }

    pub(super) const fn is_first(self) -> bool {
        self.index == FIRST
    }

    const fn is_alone(self) -> bool {
        self.count == 1
    }

    fn home(self, of: impl std::hash::Hash) -> usize {
        // The remainder is smaller than a `usize`.
        let hash = usize::try_from(self.hash.hash_one(of) >> 33).unwrap_or(0);
        hash % self.count
    }

    /// The worker of a guest's UDP port.
    #[must_use]
    pub fn of_port(self, guest: SocketAddr) -> usize {
        self.home(guest)
    }

    /// The worker of a published port's client, by the endpoints that the guest sees.
    #[must_use]
    pub fn of_client(self, guest: SocketAddr, seen: SocketAddr) -> usize {
        self.home((guest, seen))
    }
}

/// Who is to look at a frame that is not this worker's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// That worker.
    Worker(usize),
    /// The others in turn: one of them may have the flow.
    Others,
}

/// What one worker hands to another.
pub enum Handed<H: Host> {
    /// A frame of the guest's.
    Frame {
        /// The frame.
        bytes: Vec<u8>,
        /// What the link said of it.
        meta: RxMeta,
        /// How many workers have looked for its flow.
        seen: usize,
    },
    /// A packet of the guest's that came in fragments.
    Whole {
        /// The packet, put together.
        bytes: Vec<u8>,
        /// The way that it came.
        wire: Wire,
        /// How many workers have looked for its flow.
        seen: usize,
    },
    /// Where a guest is on the link.
    Neighbour(IpAddr, Mac),
    /// A client of a published TCP port, whose events nobody hears yet.
    Client {
        /// Its connection.
        socket: H::Tcp,
        /// Its endpoint.
        client: SocketAddr,
        /// The port it asked for.
        rule: Publish,
    },
    /// A published UDP port, whose events nobody hears yet.
    Port {
        /// Its number.
        id: usize,
        /// What it is.
        rule: Publish,
        /// Its socket.
        socket: H::Udp,
    },
    /// A published UDP port that can not be served after all.
    PortLost {
        /// Its number.
        id: usize,
    },
    /// A published UDP port is taken back.
    Unpublish {
        /// Its number.
        id: usize,
        /// Who wants to know when it is free.
        freed: Option<Freed>,
    },
}

/// Is called once a port is free.
pub type Freed = Box<dyn FnOnce() + Send>;

/// A worker's side of the sharing.
pub(super) struct Share<H: Host> {
    pub(super) place: Place,
    /// Workers that have looked for the flow of the frame in hand before.
    seen: usize,
    outbox: VecDeque<(usize, Handed<H>)>,
}

impl<H: Host> Share<H> {
    pub(super) const fn new(place: Place) -> Self {
        Self {
            place,
            seen: 0,
            outbox: VecDeque::new(),
        }
    }

    /// What is the first worker's alone, when this is another.
    pub(super) const fn of_first(&self) -> Option<Disposition> {
        if self.place.is_first() {
            None
        } else {
            Some(Disposition::Elsewhere(Whose::Worker(FIRST)))
        }
    }

    /// What belongs to no flow here, while others have not looked at it. In the end it is back at the first who did: by
    /// whose queue an answer goes, by that the kernel sends what follows.
    pub(super) const fn of_others(&self) -> Option<Disposition> {
        if self.seen < self.place.count && !self.place.is_alone() {
            Some(Disposition::Elsewhere(Whose::Others))
        } else {
            None
        }
    }

    pub(super) fn hand(&mut self, to: usize, handed: Handed<H>) {
        self.outbox.push_back((to, handed));
    }

    /// Who is to look at the frame in hand next, and how many have then.
    const fn next(&self, whose: Whose) -> (usize, usize) {
        match whose {
            // Nobody has looked for a flow of it here.
            Whose::Worker(index) => (index, self.seen),
            Whose::Others => ((self.place.index + 1) % self.place.count, self.seen + 1),
        }
    }
}

impl<H: Host> Stack<H> {
    /// A datagram of the guest's port to `remote`, when it is another's.
    pub(super) fn port_elsewhere(
        &self,
        guest: SocketAddr,
        remote: SocketAddr,
    ) -> Option<Disposition> {
        let place = self.share.place;
        if place.is_alone() {
            return None;
        }
        if mapping::is_for_resolver(&self.config, remote) {
            return self.share.of_first();
        }
        let home = place.of_port(guest);
        (home != place.index).then_some(Disposition::Elsewhere(Whose::Worker(home)))
    }

    /// A segment to `remote` of no connection here, when it may be another's.
    pub(super) fn segment_elsewhere(
        &self,
        remote: SocketAddr,
        is_connect: bool,
    ) -> Option<Disposition> {
        if mapping::is_for_resolver(&self.config, remote) {
            self.share.of_first()
        } else if is_connect {
            None
        } else {
            self.share.of_others()
        }
    }

    /// What is for another worker, and which; ask until there is nothing.
    pub fn next_handed(&mut self) -> Option<(usize, Handed<H>)> {
        self.share.outbox.pop_front()
    }

    /// Takes what another worker has handed over.
    pub fn handle_handed(&mut self, turn: &mut Turn<'_, H>, handed: Handed<H>) {
        match handed {
            Handed::Frame { bytes, meta, seen } => {
                self.share.seen = seen;
                self.handle_frame(turn, &bytes, meta);
                self.share.seen = 0;
            }
            Handed::Whole { bytes, wire, seen } => {
                self.share.seen = seen;
                self.handle_whole(turn, wire, bytes);
                self.share.seen = 0;
            }
            Handed::Neighbour(addr, mac) => {
                self.neighbours.note(addr, mac);
                self.dhcp.note_use(addr, mac);
            }
            Handed::Client {
                socket,
                client,
                rule,
            } => self.take_client(turn, socket, client, rule),
            Handed::Port { id, rule, socket } => self.take_port(turn.host, id, rule, socket),
            Handed::PortLost { id } => self.give_port_up(id, None),
            Handed::Unpublish { id, freed } => self.give_port_up(id, freed),
        }
    }

    /// Takes back what another worker has no room for: it is busy, so frames are lost as on any wire, and
    /// clients are served here.
    pub fn handle_refused(&mut self, turn: &mut Turn<'_, H>, handed: Handed<H>) {
        match handed {
            Handed::Frame { .. } | Handed::Whole { .. } => self.counters.lose_handed(),
            Handed::Neighbour(addr, mac) => self.neighbours.tell_again(addr, mac),
            Handed::Client { .. } => self.handle_handed(turn, handed),
            Handed::Port { id, rule, .. } => {
                tracing::warn!(port = %rule.host, "no worker serves the published port");
                self.give_port_up(id, None);
            }
            Handed::PortLost { id } => self.give_port_up(id, None),
            Handed::Unpublish { id, .. } => {
                tracing::warn!(id, "no worker gives the published port up");
            }
        }
    }

    /// Hands a frame on, if it is another's, behind what was learned from it: so nobody learns the same from it and tells
    /// all anew.
    pub(super) fn hand_on(&mut self, disposition: Disposition, bytes: &[u8], meta: RxMeta) {
        let Place { index, count, .. } = self.share.place;
        for (addr, mac) in self.neighbours.take_news() {
            self.dhcp.note_use(addr, mac);
            for other in (0..count).filter(|other| *other != index) {
                self.share.hand(other, Handed::Neighbour(addr, mac));
            }
        }
        if let Disposition::Elsewhere(whose) = disposition {
            let (to, seen) = self.share.next(whose);
            let bytes = bytes.to_vec();
            self.share.hand(to, Handed::Frame { bytes, meta, seen });
        }
    }

    /// Hands a packet on that was put together out of fragments, if it is another's; it went on then.
    pub(super) fn hand_whole(
        &mut self,
        disposition: Disposition,
        wire: Wire,
        whole: Vec<u8>,
    ) -> Disposition {
        let Disposition::Elsewhere(whose) = disposition else {
            return disposition;
        };
        let (to, seen) = self.share.next(whose);
        let bytes = whole;
        self.share.hand(to, Handed::Whole { bytes, wire, seen });
        Disposition::Forwarded
    }

    /// A packet that another worker has put together out of fragments.
    fn handle_whole(&mut self, turn: &mut Turn<'_, H>, wire: Wire, bytes: Vec<u8>) {
        let len = bytes.len();
        let disposition = match parse::reassembled(&bytes, wire) {
            Ok(ip) => self.guest_datagram(turn, &ip),
            Err(reason) => Disposition::Dropped(reason),
        };
        let disposition = self.hand_whole(disposition, wire, bytes);
        self.counters.count(disposition, len);
    }
}
