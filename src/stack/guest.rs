//! What a frame of a guest is for: sorts it to the service or flow that it concerns.
//!
//! Comes in: a frame. Goes out: a [`Disposition`]. Checks that hold for all packets stand here: the
//! Ethernet destination, the source address (RFC 2827), fragments, the time to live.

use std::net::Ipv4Addr;

use crate::buf::RxMeta;
use crate::flow::Turn;
use crate::host::Host;
use crate::net::emit::{self, EchoReply, IcmpError};
use crate::net::parse::{self, Echo, Ip, Packet, Transport, UdpDatagram};
use crate::net::{DropReason, Mac, PROTOCOL_UDP, Wire};

use super::counters::Disposition;
use super::{Stack, dhcp, mapping};

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
        match self.reassembly.add(turn.now, ip, fragment) {
            Ok((whole, evicted)) => {
                self.counters
                    .add_drops(DropReason::FragmentEvicted, evicted);
                let Some(whole) = whole else {
                    return Disposition::Forwarded;
                };
                let payload = &whole.bytes[whole.header_len..];
                let ip = Ip {
                    bytes: &whole.bytes,
                    payload,
                    checksum_verified: false,
                    fragment: None,
                    ..*ip
                };
                self.guest_datagram(turn, &ip)
            }
            Err(reason) => Disposition::Dropped(reason),
        }
    }

    /// A packet whose source is no guest's: only a DHCP client without an address may send one.
    fn stranger(&mut self, turn: &mut Turn<'_, H>, ip: &Ip<'_>) -> Disposition {
        let asks =
            ip.src == Ipv4Addr::UNSPECIFIED && ip.protocol == PROTOCOL_UDP && ip.fragment.is_none();
        match parse::transport(ip) {
            Ok(Transport::Udp(udp)) if asks && udp.dst_port == dhcp::SERVER_PORT => {
                self.guest_dhcp(turn, ip, &udp)
            }
            Ok(_) => Disposition::Dropped(DropReason::Source),
            Err(reason) => Disposition::Dropped(reason),
        }
    }

    fn guest_datagram(&mut self, turn: &mut Turn<'_, H>, ip: &Ip<'_>) -> Disposition {
        // RFC 1122 3.2.2: what was sent to all on the link is not answered by errors.
        let to_all = ip.wire.dst == Mac::BROADCAST || mapping::is_forbidden(&self.config, ip.dst);
        let to_gateway = self.config.plan.is_gateway_side(ip.dst);
        match parse::transport(ip) {
            Ok(Transport::Udp(udp)) if self.is_for_dhcp(ip, &udp) => {
                self.guest_dhcp(turn, ip, &udp)
            }
            Ok(_) if to_all => Disposition::Dropped(DropReason::Destination),
            Err(DropReason::Protocol) if !to_all => {
                self.tell(turn, ip, IcmpError::ProtocolUnreachable);
                Disposition::Answered
            }
            Err(reason) => Disposition::Dropped(reason),
            Ok(_) if ip.hop_limit == 1 && !to_gateway => {
                self.tell(turn, ip, IcmpError::TimeExceeded);
                Disposition::Answered
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

    /// Answers a ping of one of the gateway's own addresses.
    fn answer_echo(&mut self, turn: &mut Turn<'_, H>, ip: &Ip<'_>, echo: &Echo<'_>) -> Disposition {
        let id = emit::DatagramId(self.secrets.next_u16());
        let reply = EchoReply {
            src: ip.dst,
            dst: ip.src,
            ident: echo.ident,
            seq: echo.seq,
            data: echo.data,
        };
        if emit::echo_reply(turn.tx, self.back(ip.wire), self.config.mtu, reply, id) {
            Disposition::Answered
        } else {
            Disposition::Dropped(DropReason::TransmitFull)
        }
    }

    fn guest_dhcp(
        &mut self,
        turn: &mut Turn<'_, H>,
        ip: &Ip<'_>,
        udp: &UdpDatagram<'_>,
    ) -> Disposition {
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
        let id = emit::DatagramId(self.secrets.next_u16());
        let datagram = emit::Datagram {
            ends: reply.ends,
            id,
            payload: &reply.payload,
        };
        if emit::udp(turn.tx, back, self.config.mtu, datagram) {
            Disposition::Answered
        } else {
            Disposition::Dropped(DropReason::TransmitFull)
        }
    }

    /// The way back to the sender of a frame.
    pub(super) fn back(&self, wire: Wire) -> Wire {
        Wire {
            link: wire.link,
            src: self.neighbours.gateway_mac(),
            dst: wire.src,
        }
    }

    /// Tells a guest what a router would say about its packet. Where the gateway's own addresses
    /// were addressed, they say it themselves.
    pub(super) fn tell(&self, turn: &mut Turn<'_, H>, ip: &Ip<'_>, error: IcmpError) -> bool {
        let plan = &self.config.plan;
        let from = if plan.is_gateway_side(ip.dst) {
            ip.dst
        } else {
            plan.gateway().into()
        };
        emit::icmp_error(turn.tx, self.back(ip.wire), from, error, ip.bytes)
    }
}
