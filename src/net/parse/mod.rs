//! The one parser of what a guest sends: every length is checked here, once.
//!
//! Comes in: a frame and what the link knows of it. Goes out: typed fields that borrow the frame,
//! or the [`DropReason`]. [`ip`] reads the headers of both families; [`transport`](mod@transport)
//! what they carry, apart, since a datagram may first have to be put together from fragments.

pub mod ip;
pub mod transport;

use std::net::Ipv4Addr;

use super::{DropReason, Mac, Wire};
use crate::buf::{ETHERNET_HEADER, RxMeta};

pub use ip::{Fragment, Ip, reassembled};
pub use transport::{
    Echo, SynOptions, TcpSegment, Transport, UdpDatagram, syn_options, tcp_flags, transport,
};

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IPV6: u16 = 0x86dd;

/// A frame whose lengths hold.
#[derive(Debug, Clone, Copy)]
pub struct Frame<'a> {
    /// Link and Ethernet addresses.
    pub wire: Wire,
    /// What it carries.
    pub packet: Packet<'a>,
}

/// What a frame carries.
#[derive(Debug, Clone, Copy)]
pub enum Packet<'a> {
    /// An address resolution packet.
    Arp(Arp),
    /// An IP packet.
    Ip(Ip<'a>),
}

/// ARP for IPv4 over Ethernet (RFC 826).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arp {
    /// A request; otherwise a reply.
    pub is_request: bool,
    /// Who asks, by Ethernet address.
    pub sender_mac: Mac,
    /// Who asks, by protocol address.
    pub sender: Ipv4Addr,
    /// Who is asked for.
    pub target: Ipv4Addr,
}

/// Parses a frame down to the IP payload.
///
/// # Errors
/// The reason for which the frame is dropped.
pub fn frame(bytes: &[u8], meta: RxMeta) -> Result<Frame<'_>, DropReason> {
    let (header, payload) = bytes
        .split_at_checked(ETHERNET_HEADER)
        .ok_or(DropReason::Truncated)?;
    let mac = |at: usize| Mac([0, 1, 2, 3, 4, 5].map(|i: usize| header[at + i]));
    let wire = Wire {
        link: meta.link,
        dst: mac(0),
        src: mac(6),
    };
    let packet = match u16::from_be_bytes([header[12], header[13]]) {
        ETHERTYPE_ARP => Packet::Arp(arp(payload)?),
        ETHERTYPE_IPV4 => Packet::Ip(ip::ipv4(payload, meta, wire)?),
        ETHERTYPE_IPV6 => Packet::Ip(ip::ipv6(payload, meta, wire)?),
        _ => return Err(DropReason::EtherType),
    };
    Ok(Frame { wire, packet })
}

fn arp(bytes: &[u8]) -> Result<Arp, DropReason> {
    let bytes: &[u8; 28] = bytes.first_chunk().ok_or(DropReason::Truncated)?;
    // Hardware type Ethernet, protocol type IPv4, lengths 6 and 4.
    if bytes[..6] != [0, 1, 8, 0, 6, 4] {
        return Err(DropReason::Malformed);
    }
    let is_request = match bytes[6..8] {
        [0, 1] => true,
        [0, 2] => false,
        _ => return Err(DropReason::Malformed),
    };
    let address = |at: usize| Ipv4Addr::new(bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]);
    let sender_mac = Mac([8, 9, 10, 11, 12, 13].map(|at: usize| bytes[at]));
    Ok(Arp {
        is_request,
        sender_mac,
        sender: address(14),
        target: address(24),
    })
}

#[cfg(test)]
mod tests {
    use super::super::emit;
    use super::*;
    use crate::buf::{LinkId, Offload, TxBatch};
    use crate::net::checksum::Sum;
    use proptest::prelude::*;
    use std::net::IpAddr;

    const META: RxMeta = RxMeta::plain(LinkId(0));

    fn wire() -> Wire {
        Wire {
            link: LinkId(0),
            src: Mac([2, 0, 0, 0, 0, 1]),
            dst: Mac([2, 0, 0, 0, 0, 2]),
        }
    }

    /// A well-formed UDP frame, as the emitter writes it.
    fn udp_frame(payload: &[u8]) -> Vec<u8> {
        let mut batch = TxBatch::new(4, 0);
        let ends = emit::Ends {
            src: "10.0.2.100:4000".parse().unwrap(),
            dst: "192.0.2.1:53".parse().unwrap(),
        };
        let datagram = emit::Datagram {
            ends,
            id: emit::DatagramId(1),
            marks: crate::net::Marks::default(),
            payload,
        };
        assert!(emit::udp(&mut batch, wire(), 65_520, datagram));
        batch.frames().next().unwrap().bytes().to_vec()
    }

    #[test]
    fn a_udp_frame_parses_to_its_fields() {
        let bytes = udp_frame(b"hello");
        let parsed = frame(&bytes, META).unwrap();
        let Packet::Ip(ip) = parsed.packet else {
            panic!("IP expected")
        };
        assert_eq!(ip.dst, "192.0.2.1".parse::<IpAddr>().unwrap());
        let Transport::Udp(udp) = transport(&ip).unwrap() else {
            panic!("UDP expected")
        };
        assert_eq!(
            (udp.src_port, udp.dst_port, udp.payload),
            (4000, 53, &b"hello"[..])
        );
    }

    #[test]
    fn every_truncation_is_dropped() {
        let bytes = udp_frame(b"hello, world");
        for len in 0..bytes.len() {
            let short = &bytes[..len];
            let dropped = match frame(short, META) {
                Err(_) => true,
                Ok(Frame {
                    packet: Packet::Ip(ip),
                    ..
                }) => transport(&ip).is_err(),
                Ok(Frame {
                    packet: Packet::Arp(_),
                    ..
                }) => false,
            };
            assert!(dropped, "{len} bytes");
        }
    }

    #[test]
    fn a_flipped_bit_fails_a_checksum_unless_the_link_vouches() {
        let mut bytes = udp_frame(b"hello");
        *bytes.last_mut().unwrap() ^= 1;
        let Packet::Ip(ip) = frame(&bytes, META).unwrap().packet else {
            panic!("IP expected")
        };
        assert_eq!(transport(&ip).unwrap_err(), DropReason::Checksum);
        let vouched = Ip {
            checksum_verified: true,
            ..ip
        };
        assert!(transport(&vouched).is_ok());
    }

    #[test]
    fn syn_options_survive_nonsense() {
        let mut segment = vec![0; 20];
        segment[12] = 0xf0;
        // MSS 1460, then an option whose length is zero.
        segment.extend([2, 4, 5, 0xb4, 8, 0]);
        segment.resize(60, 0);
        assert_eq!(syn_options(&segment).mss, Some(1460));
        assert_eq!(syn_options(&segment).window_scale, None);
        assert_eq!(syn_options(&[]), SynOptions::default());
    }

    #[test]
    fn arp_of_another_kind_is_malformed() {
        let mut bytes = vec![0xff; 12];
        bytes.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        bytes.extend([0; 20]);
        assert!(matches!(
            frame(&bytes, META).unwrap().packet,
            Packet::Arp(_)
        ));
        for at in 14..20 {
            let mut other = bytes.clone();
            other[at] ^= 0x40;
            assert_eq!(
                frame(&other, META).unwrap_err(),
                DropReason::Malformed,
                "byte {at}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), verified: bool) {
            let meta = RxMeta { checksum_verified: verified, ..META };
            if let Ok(Frame { packet: Packet::Ip(ip), .. }) = frame(&bytes, meta) {
                let _ = transport(&ip);
            }
        }

        #[test]
        fn mutated_frames_do_not_panic(
            payload in proptest::collection::vec(any::<u8>(), 0..64),
            at in 0_usize..100, value: u8, protocol in prop_oneof![Just(1_u8), Just(6), Just(17)],
        ) {
            let mut bytes = udp_frame(&payload);
            bytes[23] = protocol;
            let at = at % bytes.len();
            bytes[at] = value;
            // A right header checksum, so that the fields behind it are reached.
            bytes[24..26].fill(0);
            let header_len = (usize::from(bytes[14] & 0xf) * 4).clamp(20, bytes.len() - 14);
            let sum = Sum::default().bytes(&bytes[14..14 + header_len]).finish();
            bytes[24..26].copy_from_slice(&sum.to_be_bytes());
            let meta = RxMeta { checksum_verified: true, ..META };
            if let Ok(Frame { packet: Packet::Ip(ip), .. }) = frame(&bytes, meta) {
                let _ = transport(&ip);
                let _ = syn_options(ip.payload);
            }
        }
    }

    #[test]
    fn offload_none_is_the_default() {
        assert_eq!(Offload::default(), Offload::NONE);
    }
}
