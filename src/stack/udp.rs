//! UDP between a guest and the host: one host socket for each guest endpoint (RFC 4787 REQ-1, REQ-8).
//!
//! Comes in: a guest's datagrams, readiness of host sockets. Goes out: datagrams both ways, and the
//! errors that the network reported, as ICMP. What the gateway serves itself goes elsewhere first.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};

use crate::flow::key::FlowKey;
use crate::flow::table::BegunBy;
use crate::flow::udp::{PublishedPeer, UdpFlow};
use crate::flow::{Flow, Turn};
use crate::host::{DatagramRole, Host, PortWish, QueuedError, Received, Token, UdpSocket};
use crate::net::emit::{self, Ends, IcmpError};
use crate::net::parse::{Ip, UdpDatagram};
use crate::net::{DropReason, Instant, Marks, Wire};

use super::Stack;
use super::counters::Disposition;
use super::guest::Original;
use super::mapping::{self, Verdict};
use super::trains::{Departure, Exit, FromGuest};

/// Inboxes full of datagrams that one socket may deliver in one turn.
pub(super) const BUDGET: usize = 4;

/// Datagrams that come in one frame at most: as many as a kernel sends so (`UDP_MAX_SEGMENTS` of include/linux/udp.h).
const MOST_AT_ONCE: usize = 128;

/// Bytes of a payload that an error quotes at most.
pub(super) const MAX_QUOTED: usize = 1200;

/// What a router would say where `connect(2)` or `sendto(2)` reports this; `None` where it would say nothing.
pub(super) fn unreachable(error: &io::Error) -> Option<IcmpError> {
    let known = [
        (ErrorKind::NetworkUnreachable, IcmpError::NetUnreachable),
        (ErrorKind::NetworkDown, IcmpError::NetUnreachable),
        (ErrorKind::HostUnreachable, IcmpError::HostUnreachable),
        (ErrorKind::AddrNotAvailable, IcmpError::HostUnreachable),
        (ErrorKind::TimedOut, IcmpError::HostUnreachable),
        (
            ErrorKind::PermissionDenied,
            IcmpError::AdministrativelyProhibited,
        ),
        (ErrorKind::ConnectionRefused, IcmpError::PortUnreachable),
    ];
    // The host's kernel does not speak that family at all.
    if error.raw_os_error() == Some(NO_SUCH_FAMILY) {
        return Some(IcmpError::NetUnreachable);
    }
    known
        .into_iter()
        .find(|(kind, _)| *kind == error.kind())
        .map(|(_, said)| said)
}

/// What the guest is told where the host has no socket for what it sends.
pub(super) fn told_of_no_socket(error: &io::Error) -> IcmpError {
    match unreachable(error) {
        Some(IcmpError::NetUnreachable) => IcmpError::NetUnreachable,
        Some(_) | None => IcmpError::AdministrativelyProhibited,
    }
}

/// A datagram socket whose events have this token.
pub(super) fn open_datagram<H: Host>(
    host: &mut H,
    token: Token,
    role: DatagramRole,
) -> io::Result<H::Udp> {
    let socket = host.udp_open(role)?;
    host.udp_watch(token, &socket)?;
    Ok(socket)
}

/// Why a datagram did not leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unsent {
    /// A router would say this.
    Said(IcmpError),
    /// Nobody would say anything: the host is busy.
    Silent,
}

impl From<io::Error> for Unsent {
    fn from(error: io::Error) -> Self {
        unreachable(&error).map_or(Self::Silent, Self::Said)
    }
}

/// `EMSGSIZE` and `EAFNOSUPPORT` of errno(3), the same numbers on all that we run on.
const MESSAGE_TOO_LONG: i32 = 90;
const NO_SUCH_FAMILY: i32 = 97;

/// The socket found the datagram too long for the path's first link.
pub(super) fn is_too_big(error: &io::Error) -> bool {
    error.raw_os_error() == Some(MESSAGE_TOO_LONG)
}

/// How a datagram of the host looks to the guest: one hop further, unless it comes from the host
/// itself, which the gateway stands for.
pub(super) fn marks_inside(from: IpAddr, marks: Marks) -> Marks {
    if from.is_loopback() {
        return marks;
    }
    let after = marks.after_hop();
    Marks {
        hop_limit: after.hop_limit.max(1),
        ..after
    }
}

impl<H: Host> Stack<H> {
    pub(super) fn guest_udp(
        &mut self,
        turn: &mut Turn<'_, H>,
        ip: &Ip<'_>,
        udp: &UdpDatagram<'_>,
    ) -> Disposition {
        if ip
            .udp_segment
            .is_some_and(|size| udp.payload.len() > MOST_AT_ONCE * usize::from(size.get()))
        {
            return Disposition::Dropped(DropReason::Malformed);
        }
        let remote = SocketAddr::new(ip.dst, udp.dst_port);
        let guest = SocketAddr::new(ip.src, udp.src_port);
        if let Some(elsewhere) = self.port_elsewhere(guest, remote) {
            return elsewhere;
        }
        let way = match self.client_of(turn.now, ip.wire, guest, remote) {
            Some(peer) => Ok((Exit::Published(peer), peer.client)),
            None => match mapping::verdict(&self.config, remote) {
                Verdict::Host(to) => self
                    .own_port(turn, ip.wire, guest, to)
                    .map(|token| (Exit::Flow(token), to)),
                Verdict::Resolver => return self.guest_queries(turn, ip, guest, udp.payload),
                Verdict::Refuse => Err(Unsent::Said(IcmpError::PortUnreachable)),
                Verdict::Unreachable(error) => Err(Unsent::Said(error)),
                Verdict::Drop(reason) => return Disposition::Dropped(reason),
            },
        };
        let sent = way.and_then(|(exit, to)| {
            let departure = Departure {
                exit,
                to,
                marks: self.marks_outside(ip),
                wire: ip.wire,
                guest,
                asked: ip.dst,
            };
            let datagram = FromGuest {
                packet: ip.bytes,
                payload: udp.payload,
                segment: ip.udp_segment,
            };
            self.depart(turn, departure, datagram)
        });
        self.after_sending(turn, Original::of(ip), sent)
    }

    /// How a guest's packet leaves: one hop further, unless it is for the gateway itself.
    pub(super) fn marks_outside(&self, ip: &Ip<'_>) -> Marks {
        if self.config.plan.is_gateway_side(ip.dst) {
            ip.marks
        } else {
            ip.marks.after_hop()
        }
    }

    /// What became of a guest's packet that was to leave; the guest is told where a router would.
    pub(super) fn after_sending(
        &mut self,
        turn: &mut Turn<'_, H>,
        original: Original<'_>,
        sent: Result<(), Unsent>,
    ) -> Disposition {
        match sent {
            Ok(()) => Disposition::Forwarded,
            Err(Unsent::Said(error)) => self.tell_of(turn, original, error),
            Err(Unsent::Silent) => Disposition::Dropped(DropReason::HostBusy),
        }
    }

    /// The client of one of the guest's published ports that a datagram is for, if it is for one.
    fn client_of(
        &mut self,
        now: Instant,
        wire: Wire,
        guest: SocketAddr,
        remote: SocketAddr,
    ) -> Option<PublishedPeer> {
        if !self.published.has_udp() {
            return None;
        }
        let key = FlowKey::Peer {
            link: wire.link,
            guest,
            remote,
        };
        let token = self.table.find(&key)?;
        let Some(Flow::Peer(peer)) = self.table.get(token) else {
            return None;
        };
        let peer = PublishedPeer {
            answered: true,
            ..*peer
        };
        self.published.udp(peer.published)?;
        if let Some(Flow::Peer(known)) = self.table.get_mut(token) {
            *known = peer;
        }
        self.table
            .set_deadline(token, PublishedPeer::deadline(now, self.config.timeouts));
        Some(peer)
    }

    /// The flow of a guest's own port, opened where there is none, that is about to send to `to`.
    fn own_port(
        &mut self,
        turn: &mut Turn<'_, H>,
        wire: Wire,
        guest: SocketAddr,
        to: SocketAddr,
    ) -> Result<Token, Unsent> {
        let key = FlowKey::Udp {
            link: wire.link,
            guest,
            loopback: self.config.outbound_of(guest.is_ipv6()).is_some() && to.ip().is_loopback(),
        };
        let token = match self.table.find(&key) {
            Some(token) => token,
            None => self.open_udp(turn, wire, key, guest)?,
        };
        let back = self.back(wire);
        if let Some(Flow::Udp(flow)) = self.table.get_mut(token) {
            // The guest may have another Ethernet address by now.
            flow.wire = back;
            let deadline = flow.sent(turn.now, to);
            self.table.set_deadline(token, deadline);
        }
        Ok(token)
    }

    /// What a socket's error queue says about something that was too long; what else it holds is about
    /// earlier ones, and is passed on by `report`.
    pub(super) fn too_long(
        &mut self,
        turn: &mut Turn<'_, H>,
        next: impl Fn(&mut Self) -> Option<QueuedError>,
        report: impl Fn(&mut Self, &mut Turn<'_, H>, &QueuedError),
    ) -> Unsent {
        let mut said = Unsent::Silent;
        while let Some(queued) = next(self) {
            if matches!(queued.error, IcmpError::TooBig(_)) {
                said = Unsent::Said(queued.error);
            } else {
                report(self, turn, &queued);
            }
        }
        said
    }

    fn open_udp(
        &mut self,
        turn: &mut Turn<'_, H>,
        wire: Wire,
        key: FlowKey,
        guest: SocketAddr,
    ) -> Result<Token, Unsent> {
        let wish = PortWish {
            ipv6: guest.is_ipv6(),
            port: guest.port(),
            spare: self.secrets.next_u16(),
        };
        let role = if matches!(key, FlowKey::Udp { loopback: true, .. }) {
            DatagramRole::Loopback(wish)
        } else {
            DatagramRole::Outbound(wish)
        };
        let opened = self.begin_port(turn, |host, token| open_datagram(host, token, role));
        let (token, socket) = opened.map_err(|error| {
            tracing::debug!(%guest, %error, "no UDP socket");
            self.counters.flows_refused += 1;
            Unsent::Said(told_of_no_socket(&error))
        })?;
        let flow = UdpFlow::new(
            socket,
            guest,
            self.back(wire),
            (self.config.udp_filtering, self.config.timeouts),
        );
        let deadline = turn.now;
        self.admit(token, key, Flow::Udp(flow), deadline);
        self.table.set_unanswered(turn.now, token, BegunBy::Guest);
        Ok(token)
    }

    /// A guest's host socket has datagrams or errors.
    pub(super) fn udp_ready(&mut self, turn: &mut Turn<'_, H>, token: Token) {
        let mut unexplained = 0;
        for _ in 0..BUDGET {
            if !self.deliver_inbox(turn) {
                break;
            }
            let Some(Flow::Udp(flow)) = self.table.get_mut(token) else {
                return;
            };
            match flow.socket.recv(&mut self.inbox) {
                Ok(()) => {
                    self.inbox_owner = token;
                    // Fewer than there is room for were all; the next edge tells of more.
                    let more = self.inbox.is_full() || flow.failed;
                    if !self.deliver_inbox(turn) {
                        break;
                    }
                    if !more {
                        return;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock && !flow.failed => return,
                Err(error) => {
                    let queued = flow.socket.queued_error(&mut self.scratch);
                    match queued {
                        Some(queued) => self.report_udp(turn, token, &queued),
                        None if error.kind() == ErrorKind::WouldBlock => {
                            flow.failed = false;
                            return;
                        }
                        None => unexplained += 1,
                    }
                }
            }
        }
        // A socket that fails without end is asked again when something comes.
        if unexplained < BUDGET {
            self.make_ready(token);
        }
    }

    /// Hands the first datagram of the inbox to the guest, and those that go along; gives their number.
    pub(super) fn deliver_udp(
        &mut self,
        turn: &mut Turn<'_, H>,
        token: Token,
        first: Received,
    ) -> usize {
        let Some(Flow::Udp(flow)) = self.table.get_mut(token) else {
            return 1;
        };
        let from = first.from;
        if (from.ip().is_loopback() && !self.config.host_loopback) || !flow.admits(from) {
            self.counters.add_drops(DropReason::Filtered, 1);
            return 1;
        }
        let ends = Ends {
            src: mapping::seen_inside(&self.config, from, flow.guest.ip()),
            dst: flow.guest,
        };
        let (deadline, wire) = (flow.received(turn.now), flow.wire);
        self.table.set_deadline(token, deadline);
        let id = self.datagram_id();
        let marks = marks_inside(from.ip(), first.marks);
        self.send_inside(turn, wire, ends, (id, marks))
    }

    /// Passes an error on to the guest whose port it concerns.
    pub(super) fn report_udp(
        &mut self,
        turn: &mut Turn<'_, H>,
        token: Token,
        queued: &QueuedError,
    ) {
        let Some(Flow::Udp(flow)) = self.table.get(token) else {
            return;
        };
        let remote = mapping::seen_inside(&self.config, queued.destination, flow.guest.ip());
        let ends = Ends {
            src: flow.guest,
            dst: remote,
        };
        let quoted = &self.scratch[..queued.quoted.min(MAX_QUOTED)];
        if let Some(original) = emit::quoted_udp(ends, quoted) {
            self.pass_on(turn, flow.wire, queued, &original);
        }
    }

    /// Passes an error about a guest's packet on, from the router that reported it.
    pub(super) fn pass_on(
        &mut self,
        turn: &mut Turn<'_, H>,
        wire: Wire,
        queued: &QueuedError,
        original: &[u8],
    ) {
        let ipv6 = original.first().is_some_and(|first| first >> 4 == 6);
        let plan = &self.config.plan;
        let gateway = if ipv6 {
            plan.gateway6().map(IpAddr::from)
        } else {
            Some(plan.gateway().into())
        };
        let Some(gateway) = gateway else { return };
        if !self.may_tell(turn.now) {
            return;
        }
        let from = queued.reporter.map_or(gateway, |reporter| {
            let reporter = SocketAddr::new(reporter, 0);
            mapping::seen_inside(&self.config, reporter, gateway).ip()
        });
        emit::icmp_error(turn.tx, wire, from, queued.error, original);
    }
}
