//! The guest's half of a scenario: frames of both families, right and wrong.
//!
//! They are made of the templates in `packets.rs` and `packets6.rs`; the bytes of the input decide.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU16;

use tapgate::buf::{LinkId, RxMeta};
use tapgate::flow::Turn;

use super::packets::v6::{self, Extension, Ipv6};
use super::packets::{self, GUEST_MAC, Ip, Ipv4, Segment};
use super::{Choices, GuestConnection, World, address, filled, port, remote_host, source, source6};

/// A packet behind a chain of extension headers.
fn extended(choices: &mut Choices<'_>, ip: Ipv6, payload: &[u8]) -> Vec<u8> {
    let unknown = [0xc0 & choices.byte() | 0x1e, 4, 1, 2, 3, 4];
    let route = [0, u8::from(choices.chance(8)), 0, 0, 0, 0];
    let offset = if choices.chance(8) { 1 } else { 0 };
    let atomic = [0, offset, 0, 0, 0, choices.byte()];
    let known = [
        Extension(v6::DESTINATION, v6::PADDING),
        Extension(v6::ROUTING, &route),
        Extension(v6::FRAGMENT, &atomic),
        Extension(v6::DESTINATION, &unknown),
        Extension(v6::HOP_BY_HOP, v6::PADDING),
    ];
    let mut chain = Vec::new();
    if choices.chance(2) {
        chain.push(known[4]);
    }
    for _ in 0..choices.byte() % 9 {
        let mostly = if choices.chance(8) { 5 } else { 3 };
        chain.push(choices.of(&known[..mostly]));
    }
    ip.extended_frame(&chain, payload)
}

/// The start of a segment that came to the guest.
fn quoted(connection: &GuestConnection) -> Vec<u8> {
    let mut ports = connection.remote.1.to_be_bytes().to_vec();
    ports.extend(connection.from.to_be_bytes());
    ports.extend([0; 16]);
    match connection.remote.0 {
        IpAddr::V4(src) => {
            let ip = Ipv4::new(packets::GUEST, packets::TCP);
            Ipv4 { src, ..ip }.packet(&ports)
        }
        IpAddr::V6(src) => {
            let ip = Ipv6::new(v6::GUEST, packets::TCP);
            Ipv6 { src, ..ip }.packet(&ports)
        }
    }
}

impl World {
    pub(super) fn frame(&mut self, bytes: &[u8], meta: RxMeta) {
        let mut turn = Turn {
            now: self.now,
            host: &mut self.host,
            tx: &mut self.tx,
        };
        self.stack.handle_frame(&mut turn, bytes, meta);
        self.frames += 1;
        self.last_frame.clear();
        self.last_frame.extend(bytes);
    }

    /// Sends a packet whole, behind extension headers, or in fragments that may be reversed, repeated,
    /// shifted or missing.
    fn packet(&mut self, choices: &mut Choices<'_>, ip: Ip, payload: &[u8]) {
        let plain = RxMeta::plain(LinkId(0));
        let style = choices.byte();
        let room = 65_535 - 20;
        let payload = &payload[..payload.len().min(room)];
        if style < 200 {
            let meta = RxMeta {
                checksum_verified: style & 1 == 1,
                udp_segment: NonZeroU16::new(if style & 14 == 14 { choices.word() } else { 0 }),
                ..plain
            };
            let frame = match ip {
                Ip::V6(ip) if style & 0x30 == 0x30 => extended(choices, ip, payload),
                Ip::V4(_) | Ip::V6(_) => ip.frame(payload),
            };
            return self.frame(&frame, meta);
        }
        let step = choices
            .of(&[8, 24, 552, 1480])
            .max((payload.len() / 64) & !7);
        let id = u16::from(choices.byte());
        let mut pieces = match ip {
            Ip::V4(ip) => Ipv4 { id, ..ip }.fragments(payload, step),
            Ip::V6(ip) => ip.fragments(id.into(), payload, step),
        };
        match style % 8 {
            0 | 1 => pieces.reverse(),
            2 => drop(pieces.pop()),
            3 => pieces.extend(pieces.first().cloned()),
            4 => {
                let offset = u16::from(choices.byte());
                let more = choices.chance(2);
                let odd = choices.take(24);
                let piece = match ip {
                    Ip::V4(ip) => {
                        let fragment = offset | if more { 0x2000 } else { 0 };
                        Ipv4 { id, fragment, ..ip }.frame(odd)
                    }
                    Ip::V6(ip) => ip.fragment(id.into(), (offset * 8, more), odd),
                };
                pieces.insert(pieces.len() / 2, piece);
            }
            _ => {}
        }
        for piece in pieces {
            self.frame(&piece, plain);
        }
    }

    fn ip(&self, choices: &mut Choices<'_>, protocol: u8) -> Ip {
        let dst = remote_host(choices, self.six);
        let hops = if choices.chance(32) { 1 } else { 64 };
        match dst {
            IpAddr::V4(dst) => Ip::V4(Ipv4 {
                src: source(choices),
                ttl: hops,
                ..Ipv4::new(dst, protocol)
            }),
            IpAddr::V6(dst) => Ip::V6(Ipv6 {
                src: source6(choices),
                hop_limit: hops,
                ..Ipv6::new(dst, protocol)
            }),
        }
    }

    pub(super) fn arp(&mut self, choices: &mut Choices<'_>) {
        let target = remote_host(choices, false);
        let sender = source(choices);
        let op = choices.of(&[1, 1, 1, 2, 3]);
        if let IpAddr::V4(target) = target {
            let frame = packets::arp_frame(op, GUEST_MAC, sender, target);
            self.frame(&frame, RxMeta::plain(LinkId(0)));
        }
    }

    /// A message of neighbour discovery, mostly as it should be.
    pub(super) fn discovery(&mut self, choices: &mut Choices<'_>) {
        let IpAddr::V6(target) = remote_host(choices, true) else {
            return;
        };
        let kind = choices.byte();
        let src = if kind & 8 != 0 {
            Ipv6Addr::UNSPECIFIED
        } else {
            source6(choices)
        };
        let dst = match kind >> 4 & 3 {
            0 | 1 => v6::solicited_node(target),
            2 => target,
            _ => v6::ALL_ROUTERS,
        };
        let mut ip = Ipv6::discovery(src, dst);
        if kind & 0xc0 == 0xc0 {
            ip.hop_limit = choices.byte().max(1);
        }
        let option = match choices.byte() % 8 {
            0..3 => v6::link_address(1, GUEST_MAC),
            3 => v6::link_address(2, [2, 0, 0, 0, 0, choices.byte()]),
            4 => choices.take(16).to_vec(),
            _ => Vec::new(),
        };
        let message = match kind % 8 {
            0..4 => ip.solicitation(target, &option),
            4 | 5 => ip.router_solicitation(&option),
            6 => ip.advertisement(choices.byte(), target, &option),
            _ => ip.icmp([132 + kind % 6, 0], [0, 0], choices.take(32)),
        };
        self.frame(&ip.frame(&message), RxMeta::plain(LinkId(0)));
    }

    pub(super) fn tcp_syn(&mut self, choices: &mut Choices<'_>) {
        let from = 40_000 + u16::from(choices.byte() % 32);
        let ip = self.ip(choices, packets::TCP);
        let to = port(choices);
        let seq = if choices.chance(4) {
            u32::MAX - 3
        } else {
            1000
        };
        let fields = Segment {
            from,
            to,
            seq,
            flags: 2,
            window: choices.of(&[65_535, 0, 1, 1000]),
            ..Segment::default()
        };
        let raw: &[u8] = &[];
        let options = match choices.byte() % 6 {
            0 => raw,
            1 => &[2, 4, 5, 0xb4, 4, 2, 3, 3, 7, 1, 1, 1],
            2 => &[2, 4, 0, 0],
            3 => &[2, 4, 0, 1, 3, 3, 255, 1],
            4 => &[2, 4, 255, 255],
            _ => {
                let raw = choices.take(40);
                &raw[..raw.len() & !3]
            }
        };
        let segment = ip.tcp(&fields, options, &[]);
        self.packet(choices, ip, &segment);
    }

    /// A segment of a connection under way: near what is expected.
    pub(super) fn tcp_segment(&mut self, choices: &mut Choices<'_>) {
        if self.connections.is_empty() {
            return self.tcp_syn(choices);
        }
        let nth = choices.below(self.connections.len());
        let kind = choices.byte();
        let flags =
            [0x10, 0x10, 0x18, 0x11, 0x14, 0x04, 0x02, 0x12, 0x31, 0xff][usize::from(kind % 10)];
        let len = if kind & 0x40 == 0 { choices.len() } else { 0 };
        let (seq_off, ack_off) = if kind & 0x80 == 0 {
            (0, 0)
        } else {
            (
                i32::from(choices.word().cast_signed()),
                i32::from(choices.word().cast_signed()),
            )
        };
        let window = choices.of(&[65_535, 65_535, 0, 1, 500]);
        let connection = &self.connections[nth];
        let ip = Ip::new(connection.remote.0, packets::TCP);
        let fields = Segment {
            from: connection.from,
            to: connection.remote.1,
            seq: connection.seq.wrapping_add_signed(seq_off),
            ack: connection.ack.wrapping_add_signed(ack_off),
            flags,
            window,
        };
        let segment = ip.tcp(&fields, &[], &filled(len));
        self.packet(choices, ip, &segment);
    }

    pub(super) fn tcp_stranger(&mut self, choices: &mut Choices<'_>) {
        let ip = self.ip(choices, packets::TCP);
        let fields = Segment {
            from: 40_000 + u16::from(choices.byte()),
            to: port(choices),
            seq: u32::from(choices.word()),
            ack: u32::from(choices.word()),
            flags: choices.byte(),
            window: choices.word(),
        };
        let segment = ip.tcp(&fields, &[], choices.take(8));
        self.packet(choices, ip, &segment);
    }

    pub(super) fn udp(&mut self, choices: &mut Choices<'_>) {
        let ip = self.ip(choices, packets::UDP);
        let from = choices.of(&[5000, 5001, 5002, 80, 68, 0]);
        let to = port(choices);
        let len = choices.len();
        let mut datagram = ip.udp(from, to, &filled(len));
        if choices.chance(16) {
            datagram[6..8].fill(0);
        }
        if choices.chance(32) {
            datagram[4..6].copy_from_slice(&choices.word().to_be_bytes());
        }
        self.packet(choices, ip, &datagram);
    }

    pub(super) fn dns(&mut self, choices: &mut Choices<'_>) {
        let resolver = address(if self.six { "fd00::3" } else { "10.0.2.3" });
        let ip = Ip::new(resolver, packets::UDP);
        let mut query = vec![
            0,
            choices.byte(),
            choices.byte() & 0x81,
            0,
            0,
            1,
            0,
            0,
            0,
            0,
            0,
            0,
        ];
        query.extend(choices.take(8));
        query.truncate(if choices.chance(16) {
            choices.below(13)
        } else {
            20
        });
        let datagram = ip.udp(choices.of(&[5000, 5001]), 53, &query);
        self.packet(choices, ip, &datagram);
    }

    pub(super) fn icmp(&mut self, choices: &mut Choices<'_>) {
        let protocol = if self.six {
            packets::ICMPV6
        } else {
            packets::ICMP
        };
        let ip = self.ip(choices, protocol);
        let kind = if self.six {
            choices.of(&[128, 128, 128, 128, 129, 1, 2])
        } else {
            choices.of(&[8, 8, 8, 8, 0, 3, 13])
        };
        let words = [u16::from(choices.byte() % 4), u16::from(choices.byte())];
        // "Unreachable" is mostly about a segment of a connection.
        let complains = kind == 1 || kind == 3;
        let data = match self.connections.last() {
            Some(connection) if complains && !choices.chance(4) => quoted(connection),
            Some(_) | None => filled(choices.len()),
        };
        let message = ip.icmp([kind, words[0].to_be_bytes()[1]], words, &data);
        self.packet(choices, ip, &message);
    }

    /// A message of DHCPv6 (RFC 8415) with some of the options that a client sends.
    pub(super) fn dhcp6(&mut self, choices: &mut Choices<'_>) {
        let mut message = vec![choices.byte() % 14, 1, 2, choices.byte()];
        let parts = choices.byte();
        let server = [&[0, 3, 0, 1], &packets::GATEWAY_MAC[..]].concat();
        let address = [&v6::GUEST.octets()[..], &[0; 8]].concat();
        let identity = [
            &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 24],
            &address[..],
        ]
        .concat();
        let options: [(u16, &[u8]); 6] = [
            (1, &[0, 3, 0, 1, 2, 0, 0, 0, 0, 100]),
            (2, &server),
            (
                3,
                if parts & 64 == 0 {
                    &identity
                } else {
                    &identity[..12]
                },
            ),
            (6, &[0, 23, 0, 24, 0, 32]),
            (14, &[]),
            (choices.word() % 64, choices.take(20)),
        ];
        for (nth, (code, data)) in options.into_iter().enumerate() {
            if parts >> nth & 1 == u8::from(nth > 2) {
                message.extend(code.to_be_bytes());
                message.extend(u16::try_from(data.len()).unwrap_or(0).to_be_bytes());
                message.extend(data);
            }
        }
        if parts & 0x80 != 0 {
            message.truncate(usize::from(choices.byte()) + 1);
        }
        let ip = Ipv6 {
            src: v6::GUEST_LOCAL,
            ..Ipv6::new(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2), packets::UDP)
        };
        let datagram = ip.udp(546, 547, &message);
        self.frame(&ip.frame(&datagram), RxMeta::plain(LinkId(0)));
    }

    pub(super) fn dhcp(&mut self, choices: &mut Choices<'_>) {
        let mac = [2, 0, 0, 0, 1, choices.byte() % 24];
        let kind = [choices.byte() % 10];
        let asked = [10, 0, 2, choices.byte()];
        let server = [10, 0, 2, choices.of(&[2, 2, 9])];
        let known = if choices.chance(4) {
            Ipv4Addr::from(asked)
        } else {
            Ipv4Addr::UNSPECIFIED
        };
        let mut options: Vec<(u8, &[u8])> = vec![(53, &kind)];
        let parts = choices.byte();
        if parts & 1 != 0 {
            options.push((50, &asked));
        }
        if parts & 2 != 0 {
            options.push((54, &server));
        }
        if parts & 4 != 0 {
            options.push((choices.byte(), choices.take(6)));
        }
        let mut message = packets::dhcp(mac, known, &options);
        if parts & 0xc0 == 0xc0 {
            message.truncate(usize::from(choices.word()) % message.len());
        }
        let ip = Ipv4 {
            src: known,
            ..Ipv4::new(Ipv4Addr::BROADCAST, packets::UDP)
        };
        let datagram = ip.udp(68, 67, &message);
        let frame = packets::ethernet(
            packets::BROADCAST_MAC,
            packets::ETHERTYPE_IPV4,
            &ip.packet(&datagram),
        );
        self.frame(&frame, RxMeta::plain(LinkId(0)));
    }

    pub(super) fn raw(&mut self, choices: &mut Choices<'_>) {
        let len = choices.below(80);
        let bytes = choices.take(len);
        let frame = match choices.byte() % 4 {
            0 => bytes.to_vec(),
            1 => packets::ethernet(packets::GATEWAY_MAC, choices.word(), bytes),
            2 if self.six => {
                packets::ethernet(packets::GATEWAY_MAC, packets::ETHERTYPE_IPV6, bytes)
            }
            2 => packets::ethernet(packets::GATEWAY_MAC, packets::ETHERTYPE_IPV4, bytes),
            _ => {
                let protocol = choices.byte();
                let ip = self.ip(choices, protocol);
                ip.frame(bytes)
            }
        };
        self.frame(&frame, RxMeta::plain(LinkId(0)));
    }

    /// The last frame again, with some bytes changed; the header's checksum may be put right.
    pub(super) fn mutated(&mut self, choices: &mut Choices<'_>) {
        let mut frame = std::mem::take(&mut self.last_frame);
        if frame.is_empty() {
            return;
        }
        for _ in 0..=choices.below(4) {
            let at = usize::from(choices.byte()) % frame.len();
            frame[at] = choices.byte();
        }
        if choices.chance(4) {
            frame.truncate(usize::from(choices.word()) % frame.len() + 1);
        }
        if frame.len() >= 34 && frame[12..14] == [8, 0] && !choices.chance(8) {
            let end = (14 + usize::from(frame[14] & 15) * 4).clamp(34, frame.len());
            frame[24..26].fill(0);
            let sum = packets::checksum(&[&frame[14..end]]);
            frame[24..26].copy_from_slice(&sum.to_be_bytes());
        }
        let meta = RxMeta {
            checksum_verified: !choices.chance(4),
            ..RxMeta::plain(LinkId(0))
        };
        self.frame(&frame, meta);
    }
}
