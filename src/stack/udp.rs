//! UDP between a guest and the host: one host socket for each guest endpoint (RFC 4787 REQ-1, REQ-8).
//!
//! Comes in: a guest's datagrams, readiness of host sockets. Goes out: datagrams both ways, and the
//! errors that the network reported, as ICMP. What the gateway serves itself goes elsewhere first.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::num::NonZeroU16;

use crate::flow::key::FlowKey;
use crate::flow::udp::{PublishedPeer, UdpFlow};
use crate::flow::{Flow, Turn};
use crate::host::{DatagramRole, Host, QueuedError, Token, UdpSocket};
use crate::net::emit::{self, Datagram, DatagramId, Ends, IcmpError};
use crate::net::parse::{Ip, UdpDatagram};
use crate::net::{DropReason, Wire};

use super::Stack;
use super::counters::Disposition;
use super::mapping::{self, Verdict};

/// Datagrams that one socket may deliver in one turn.
const BUDGET: usize = 64;

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
    known
        .into_iter()
        .find(|(kind, _)| *kind == error.kind())
        .map(|(_, said)| said)
}

/// A guest's datagram, or a train of them, on its way out.
#[derive(Debug, Clone, Copy)]
struct Outgoing<'a> {
    wire: Wire,
    guest: SocketAddr,
    payload: &'a [u8],
    segment: Option<NonZeroU16>,
}

impl<H: Host> Stack<H> {
    pub(super) fn guest_udp(
        &mut self,
        turn: &mut Turn<'_, H>,
        ip: &Ip<'_>,
        udp: &UdpDatagram<'_>,
    ) -> Disposition {
        let remote = SocketAddr::new(ip.dst, udp.dst_port);
        let outgoing = Outgoing {
            wire: ip.wire,
            guest: SocketAddr::new(ip.src, udp.src_port),
            payload: udp.payload,
            segment: ip.udp_segment,
        };
        let sent = match self.send_to_client(turn, outgoing, remote) {
            Some(sent) => sent,
            None => match mapping::verdict(&self.config, remote) {
                Verdict::Host(to) => self.send_to_host(turn, outgoing, to),
                Verdict::Resolver => {
                    return self.guest_query(turn, ip.wire, outgoing.guest, udp.payload);
                }
                Verdict::Refuse => Err(ErrorKind::ConnectionRefused.into()),
                Verdict::Unreachable(error) => {
                    self.tell(turn, ip, error);
                    return Disposition::Answered;
                }
                Verdict::Drop(reason) => return Disposition::Dropped(reason),
            },
        };
        match sent {
            Ok(()) => Disposition::Forwarded,
            Err(error) => match unreachable(&error) {
                Some(error) => {
                    self.tell(turn, ip, error);
                    Disposition::Answered
                }
                None => Disposition::Dropped(DropReason::HostBusy),
            },
        }
    }

    /// A datagram to a client of one of the guest's published ports; `None` where it is not one.
    fn send_to_client(
        &mut self,
        turn: &mut Turn<'_, H>,
        outgoing: Outgoing<'_>,
        remote: SocketAddr,
    ) -> Option<io::Result<()>> {
        if !self.published.has_udp() {
            return None;
        }
        let key = FlowKey::Peer {
            link: outgoing.wire.link,
            guest: outgoing.guest,
            remote,
        };
        let token = self.table.find(&key)?;
        let Some(Flow::Peer(peer)) = self.table.get(token) else {
            return None;
        };
        let peer = *peer;
        let socket = self.published.udp(peer.published)?;
        self.table
            .set_deadline(token, PublishedPeer::deadline(turn.now));
        Some(socket.send_from(peer.asked, peer.client, outgoing.payload, outgoing.segment))
    }

    fn send_to_host(
        &mut self,
        turn: &mut Turn<'_, H>,
        outgoing: Outgoing<'_>,
        to: SocketAddr,
    ) -> io::Result<()> {
        let Outgoing { wire, guest, .. } = outgoing;
        let loopback = self.config.outbound.is_some() && to.ip().is_loopback();
        let key = FlowKey::Udp {
            link: wire.link,
            guest,
            loopback,
        };
        let token = match self.table.find(&key) {
            Some(token) => token,
            None => self.open_udp(turn, wire, key, guest)?,
        };
        let Some(Flow::Udp(flow)) = self.table.get_mut(token) else {
            return Ok(());
        };
        let deadline = flow.sent(turn.now, to);
        let sent = flow.socket.send_to(to, outgoing.payload, outgoing.segment);
        self.table.set_deadline(token, deadline);
        sent
    }

    fn open_udp(
        &mut self,
        turn: &mut Turn<'_, H>,
        wire: Wire,
        key: FlowKey,
        guest: SocketAddr,
    ) -> io::Result<Token> {
        let refused = |counters: &mut super::Counters| {
            counters.flows_refused += 1;
            // The guest hears "administratively prohibited".
            io::Error::from(ErrorKind::PermissionDenied)
        };
        let Ok(token) = self.table.next_token() else {
            return Err(refused(&mut self.counters));
        };
        let role = if matches!(key, FlowKey::Udp { loopback: true, .. }) {
            DatagramRole::Loopback
        } else {
            DatagramRole::Outbound {
                ipv6: guest.is_ipv6(),
            }
        };
        let socket = turn.host.udp_open(token, role).map_err(|error| {
            tracing::debug!(%guest, %error, "no UDP socket");
            refused(&mut self.counters)
        })?;
        let flow = UdpFlow::new(socket, guest, self.back(wire));
        let deadline = turn.now;
        self.admit(token, key, Flow::Udp(flow), deadline);
        Ok(token)
    }

    /// A guest's host socket has datagrams or errors.
    pub(super) fn udp_ready(&mut self, turn: &mut Turn<'_, H>, token: Token) {
        for _ in 0..BUDGET {
            if !turn.tx.has_room() {
                self.make_ready(token);
                return;
            }
            let Some(Flow::Udp(flow)) = self.table.get_mut(token) else {
                return;
            };
            match flow.socket.recv_from(&mut self.scratch) {
                Ok((len, from)) => self.deliver(turn, token, from, len),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    let queued = flow.socket.queued_error(&mut self.scratch);
                    match queued {
                        Some(queued) => self.report(turn, token, &queued),
                        None if error.kind() == ErrorKind::WouldBlock => return,
                        None => {}
                    }
                }
            }
        }
        self.make_ready(token);
    }

    /// Hands a datagram in the scratch memory to the guest.
    fn deliver(&mut self, turn: &mut Turn<'_, H>, token: Token, from: SocketAddr, len: usize) {
        let Some(Flow::Udp(flow)) = self.table.get_mut(token) else {
            return;
        };
        if from.ip().is_loopback() && !self.config.host_loopback {
            return;
        }
        let ends = Ends {
            src: mapping::seen_inside(&self.config, from),
            dst: flow.guest,
        };
        let (deadline, wire) = (flow.received(turn.now), flow.wire);
        let id = DatagramId(self.secrets.next_u16());
        let datagram = Datagram {
            ends,
            id,
            payload: &self.scratch[..len],
        };
        if !emit::udp(turn.tx, wire, self.config.mtu, datagram) {
            tracing::trace!(%from, "datagram lost: transmit batch full");
        }
        self.table.set_deadline(token, deadline);
    }

    /// Passes an error on to the guest, from the router that reported it.
    fn report(&mut self, turn: &mut Turn<'_, H>, token: Token, queued: &QueuedError) {
        let Some(Flow::Udp(flow)) = self.table.get(token) else {
            return;
        };
        let remote = mapping::seen_inside(&self.config, queued.destination);
        let quoted = &self.scratch[..queued.quoted.min(512)];
        let Some(original) = emit::quoted_udp(
            Ends {
                src: flow.guest,
                dst: remote,
            },
            quoted,
        ) else {
            return;
        };
        let reporter = queued
            .reporter
            .map(|ip| mapping::seen_inside(&self.config, SocketAddr::new(ip, 0)).ip());
        let from = reporter.unwrap_or_else(|| self.config.plan.gateway().into());
        emit::icmp_error(turn.tx, flow.wire, from, queued.error, &original);
    }
}
