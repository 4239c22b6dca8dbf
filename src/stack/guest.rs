//! What a frame of a guest is for: sorts it to the service or flow that it concerns.
//!
//! Comes in: a frame. Goes out: a [`Disposition`]. Checks that hold for all packets stand here: the
//! Ethernet destination, the source address (RFC 2827), fragments, the time to live.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::buf::RxMeta;
use crate::config::GATEWAY_LINK_LOCAL;
use crate::flow::Turn;
use crate::host::Host;
use crate::net::emit::{self, EchoReply, Ends, IcmpError};
use crate::net::parse::{self, Echo, Ip, Packet, Transport, UdpDatagram};
use crate::net::{DropReason, Instant, Marks, PROTOCOL_ICMPV6, Wire};

use super::counters::Disposition;
use super::{Stack, dhcp, dhcp6, mapping};

/// A packet of a guest's that an error is about.
#[derive(Debug, Clone, Copy)]
pub(super) struct Original<'a> {
    /// The way that it came.
    pub(super) wire: Wire,
    /// Its source.
    pub(super) src: IpAddr,
    /// Its destination.
    pub(super) dst: IpAddr,
    /// The packet, as far as it is to be quoted.
    pub(super) packet: &'a [u8],
}

impl<'a> Original<'a> {
    /// A packet that is still there.
    pub(super) const fn of(ip: &Ip<'a>) -> Self {
        Self {
            wire: ip.wire,
            src: ip.src,
            dst: ip.dst,
            packet: ip.bytes,
        }
    }
}

impl<H: Host> Stack<H> {
    pub(super) fn guest_frame(
        &mut self,
        turn: &mut Turn<'_, H>,
        bytes: &[u8],
        meta: RxMeta,
    ) -> Disposition {
        let frame = match parse::frame(bytes, meta) {
            Ok(frame) => frame,
            Err(reason) => return Disposition::Dropped(reason),
        };
        if !self.neighbours.is_ours(frame.wire.dst) {
            return Disposition::Dropped(DropReason::NotForUs);
        }
        match frame.packet {
            Packet::Arp(arp) => {
                self.neighbours
                    .handle_arp(&self.config.plan, turn.tx, frame.wire, arp)
            }
            Packet::Ip(ip) if ip.src.is_ipv6() && self.config.plan.subnet6().is_none() => {
                Disposition::Dropped(DropReason::Ipv6)
            }
            Packet::Ip(ip) => self.guest_packet(turn, &ip),
        }
    }

    fn guest_packet(&mut self, turn: &mut Turn<'_, H>, ip: &Ip<'_>) -> Disposition {
        if !self.config.plan.is_guest_side(ip.src) {
            return self.stranger(turn, ip);
        }
        self.neighbours.learn(ip.src, ip.wire.src);
        let Some(fragment) = ip.fragment else {
            return self.guest_datagram(turn, ip);
        };
        if let Some(elsewhere) = self.share.of_first() {
            return elsewhere;
        }
        match self.reassembly.add(turn.now, ip, fragment) {
            Ok((whole, evicted)) => {
                self.counters
                    .add_drops(DropReason::FragmentEvicted, evicted);
                let Some(whole) = whole else {
                    return Disposition::Forwarded;
                };
                match parse::reassembled(&whole, ip.wire) {
                    // A fragment of fragments: nobody sends that.
                    Ok(ip) if ip.fragment.is_some() => Disposition::Dropped(DropReason::Malformed),
                    // RFC 6980: neighbour discovery does not come in fragments.
                    Ok(ip) if is_discovery(&ip) => Disposition::Dropped(DropReason::NdpIgnored),
                    Ok(ip) => {
                        let disposition = self.guest_datagram(turn, &ip);
                        self.hand_whole(disposition, ip.wire, whole)
                    }
                    Err(reason) => Disposition::Dropped(reason),
                }
            }
            Err(reason) => Disposition::Dropped(reason),
        }
    }

    /// Drops datagrams whose fragments have not come in time, and says so about those that began
    /// (RFC 792, RFC 8200 4.5).
    pub(super) fn give_fragments_up(&mut self, turn: &mut Turn<'_, H>) {
        while let Some(expired) = self.reassembly.expire(turn.now) {
            self.counters.add_drops(DropReason::FragmentEvicted, 1);
            let path = self.path(expired.src);
            let gateway = self.config.plan.gateway_like(expired.src);
            if let (Some(original), Some(path), Some(from)) = (expired.beginning, path, gateway)
                && self.may_tell(turn.now)
            {
                let error = IcmpError::ReassemblyTimeExceeded;
                emit::icmp_error(turn.tx, path.wire, from, error, &original);
            }
        }
    }

    /// An error that no frame of this turn has earned may be told: of many a part is.
    pub(super) fn may_tell(&mut self, now: Instant) -> bool {
        let may = self.errors.take(now);
        if !may {
            self.counters.add_drops(DropReason::ErrorRate, 1);
        }
        may
    }

    /// A packet whose source is no guest's: only who has no address yet may send one, to ask for it.
    fn stranger(&mut self, turn: &mut Turn<'_, H>, ip: &Ip<'_>) -> Disposition {
        let asks = ip.src.is_unspecified() && ip.fragment.is_none();
        match parse::transport(ip) {
            Ok(Transport::Udp(udp)) if asks && self.is_for_dhcp(ip, &udp) => {
                self.guest_dhcp(turn, ip, &udp)
            }
            Ok(Transport::Discovery(discovery)) if asks => {
                self.guest_discovery(turn, ip, discovery)
            }
            Ok(_) => Disposition::Dropped(DropReason::Source),
            Err(reason) => Disposition::Dropped(reason),
        }
    }

    pub(super) fn guest_datagram(&mut self, turn: &mut Turn<'_, H>, ip: &Ip<'_>) -> Disposition {
        // RFC 1122 3.2.2, RFC 4443 2.4 e: what was sent to all on the link is not answered by errors.
        let to_all = ip.wire.dst.is_group() || mapping::is_forbidden(&self.config, ip.dst);
        let to_gateway = self.config.plan.is_gateway_side(ip.dst);
        match parse::transport(ip) {
            Ok(Transport::Discovery(discovery)) => self.guest_discovery(turn, ip, discovery),
            Ok(Transport::Udp(udp)) if self.is_for_dhcp(ip, &udp) => {
                self.guest_dhcp(turn, ip, &udp)
            }
            Ok(Transport::Udp(udp)) if self.is_for_dhcp6(ip, &udp) => {
                self.guest_dhcp6(turn, ip, &udp)
            }
            Ok(_) if to_all => Disposition::Dropped(DropReason::Destination),
            Err(DropReason::Protocol) if !to_all => self.tell(turn, ip, unknown_protocol(ip)),
            Err(reason) => Disposition::Dropped(reason),
            // No error is answered by an error (RFC 1122 3.2.2, RFC 4443 2.4 e).
            Ok(Transport::Undelivered(ends)) => self.guest_refuses(ip.wire, ends),
            Ok(_) if ip.marks.hop_limit == 1 && !to_gateway => {
                self.tell(turn, ip, IcmpError::TimeExceeded)
            }
            // RFC 4291 2.5.6: a link-local source goes no further than the link.
            Ok(_) if is_link_local(ip.src) && !to_gateway => {
                self.tell(turn, ip, IcmpError::BeyondScope)
            }
            Ok(Transport::Tcp(segment)) => self.guest_tcp(turn, ip, &segment),
            Ok(Transport::Udp(udp)) => self.guest_udp(turn, ip, &udp),
            Ok(Transport::Echo(echo)) if to_gateway => self.answer_echo(turn, ip, &echo),
            Ok(Transport::Echo(echo)) => self.guest_echo(turn, ip, &echo),
        }
    }

    fn is_for_dhcp(&self, ip: &Ip<'_>, udp: &UdpDatagram<'_>) -> bool {
        udp.dst_port == dhcp::SERVER_PORT
            && (ip.dst == Ipv4Addr::BROADCAST || ip.dst == self.config.plan.gateway())
    }

    fn is_for_dhcp6(&self, ip: &Ip<'_>, udp: &UdpDatagram<'_>) -> bool {
        udp.dst_port == dhcp6::SERVER_PORT && ip.dst == dhcp6::SERVERS
    }

    /// Answers a ping of one of the gateway's own addresses.
    fn answer_echo(&mut self, turn: &mut Turn<'_, H>, ip: &Ip<'_>, echo: &Echo<'_>) -> Disposition {
        if turn.tx.is_half_full() {
            return Disposition::Dropped(DropReason::TransmitFull);
        }
        let reply = EchoReply {
            src: ip.dst,
            dst: ip.src,
            ident: echo.ident,
            seq: echo.seq,
            marks: Marks::default(),
            data: echo.data,
        };
        let id = self.datagram_id();
        let sent = emit::echo_reply(turn.tx, self.back(ip.wire), self.config.mtu, reply, id);
        answered(sent)
    }

    fn guest_dhcp(
        &mut self,
        turn: &mut Turn<'_, H>,
        ip: &Ip<'_>,
        udp: &UdpDatagram<'_>,
    ) -> Disposition {
        if let Some(elsewhere) = self.share.of_first() {
            return elsewhere;
        }
        // Who has an address already uses it, though nobody says so again.
        for addr in self.config.plan.lease_pool() {
            let addr = Ipv4Addr::from(addr).into();
            if let Some(mac) = self.neighbours.heard(addr) {
                self.dhcp.note_use(addr, mac);
            }
        }
        let Some(reply) = self
            .dhcp
            .answer(turn.now, &self.config, ip.src, udp.payload)
        else {
            return Disposition::Dropped(DropReason::DhcpIgnored);
        };
        let back = Wire {
            dst: reply.mac,
            ..self.back(ip.wire)
        };
        self.serve(turn, back, reply.ends, &reply.payload)
    }

    fn guest_dhcp6(
        &mut self,
        turn: &mut Turn<'_, H>,
        ip: &Ip<'_>,
        udp: &UdpDatagram<'_>,
    ) -> Disposition {
        let server_mac = self.neighbours.gateway_mac();
        let Some(reply) = dhcp6::answer(&self.config, server_mac, udp.payload) else {
            return Disposition::Dropped(DropReason::DhcpIgnored);
        };
        let ends = Ends {
            src: SocketAddr::new(GATEWAY_LINK_LOCAL.into(), dhcp6::SERVER_PORT),
            dst: SocketAddr::new(ip.src, udp.src_port),
        };
        self.serve(turn, self.back(ip.wire), ends, &reply)
    }

    /// Sends a datagram of one of the gateway's own services.
    pub(super) fn serve(
        &mut self,
        turn: &mut Turn<'_, H>,
        wire: Wire,
        ends: Ends,
        payload: &[u8],
    ) -> Disposition {
        let datagram = emit::Datagram {
            ends,
            id: self.datagram_id(),
            marks: Marks::default(),
            payload,
        };
        answered(emit::udp(turn.tx, wire, self.config.mtu, datagram))
    }

    /// An identification that was not used lately.
    pub(super) fn datagram_id(&mut self) -> emit::DatagramId {
        emit::DatagramId(self.secrets.next_u32())
    }

    /// The way back to the sender of a frame.
    pub(super) fn back(&self, wire: Wire) -> Wire {
        Wire {
            link: wire.link,
            src: self.neighbours.gateway_mac(),
            dst: wire.src,
        }
    }

    /// Tells a guest what a router would say about its packet.
    pub(super) fn tell(
        &mut self,
        turn: &mut Turn<'_, H>,
        ip: &Ip<'_>,
        error: IcmpError,
    ) -> Disposition {
        self.tell_of(turn, Original::of(ip), error)
    }

    /// The same about a packet that is gone, of which this is left. Where the gateway's own addresses
    /// were addressed, they say it themselves.
    pub(super) fn tell_of(
        &mut self,
        turn: &mut Turn<'_, H>,
        original: Original<'_>,
        error: IcmpError,
    ) -> Disposition {
        let Original {
            wire,
            src,
            dst,
            packet,
        } = original;
        if !self.errors.take(turn.now) {
            return Disposition::Dropped(DropReason::ErrorRate);
        }
        let plan = &self.config.plan;
        let from = if plan.is_gateway_side(dst) {
            Some(dst)
        } else {
            plan.gateway_like(src)
        };
        let back = self.back(wire);
        answered(from.is_some_and(|from| emit::icmp_error(turn.tx, back, from, error, packet)))
    }
}

/// Nobody speaks the protocol; ICMPv6 points at where it stands (RFC 8200 section 4).
fn unknown_protocol(ip: &Ip<'_>) -> IcmpError {
    match u32::try_from(ip.protocol_at()) {
        Ok(at) if ip.src.is_ipv6() => IcmpError::Raw(4, 1, at),
        Ok(_) | Err(_) => IcmpError::ProtocolUnreachable,
    }
}

fn is_discovery(ip: &Ip<'_>) -> bool {
    ip.protocol == PROTOCOL_ICMPV6 && matches!(parse::transport(ip), Ok(Transport::Discovery(_)))
}

const fn is_link_local(addr: IpAddr) -> bool {
    matches!(addr, IpAddr::V6(addr) if addr.is_unicast_link_local())
}

const fn answered(sent: bool) -> Disposition {
    if sent {
        Disposition::Answered
    } else {
        Disposition::Dropped(DropReason::TransmitFull)
    }
}
