//! The parser of frames: no input panics, and what it gives lies inside the frame.
//!
//! The first byte is what the link tells of the frame, the rest is the frame.

use std::num::NonZeroU16;

use tapgate::buf::{LinkId, RxMeta};
use tapgate::net::parse::{self, Ip, Packet, Transport};

/// Tries an input.
pub fn run(bytes: &[u8]) {
    let Some((&told, frame)) = bytes.split_first() else {
        return;
    };
    let meta = RxMeta {
        checksum_verified: told & 1 == 1,
        udp_segment: NonZeroU16::new(u16::from(told >> 1)),
        ..RxMeta::plain(LinkId(0))
    };
    let _ = parse::syn_options(frame);
    let Ok(parsed) = parse::frame(frame, meta) else {
        return;
    };
    let Packet::Ip(ip) = parsed.packet else {
        return;
    };
    assert!(
        frame.len() >= 14 + ip.bytes.len(),
        "the packet is of the frame"
    );
    assert!(
        ip.bytes.ends_with(ip.payload),
        "the payload is of the packet"
    );
    assert!(
        ip.protocol_at() < ip.header_len(),
        "the protocol is named in the headers"
    );
    assert!(
        ip.marks.hop_limit > 0,
        "a packet that has lived too long is dropped"
    );
    if let Some(fragment) = ip.fragment {
        assert!(fragment.offset <= 0x1fff * 8, "thirteen bits of eighths");
    }
    if ip.fragment.is_none() {
        assert_eq!(
            ip.bytes[ip.protocol_at()],
            ip.protocol,
            "where the headers say so"
        );
    }
    transport_holds(&ip);
}

/// What is found behind the IP headers lies there.
fn transport_holds(ip: &Ip<'_>) {
    match parse::transport(ip) {
        Ok(Transport::Tcp(tcp)) => {
            assert!(tcp.src_port != 0 && tcp.dst_port != 0, "ports are there");
            assert!(
                tcp.payload_len + 20 <= ip.payload.len(),
                "the header comes first"
            );
            assert!(
                parse::syn_options(ip.payload)
                    .window_scale
                    .is_none_or(|shift| shift <= 14)
            );
        }
        Ok(Transport::Udp(udp)) => {
            assert!(udp.dst_port != 0, "a port is there");
            assert!(
                udp.payload.len() + 8 <= ip.payload.len(),
                "the header comes first"
            );
        }
        Ok(Transport::Echo(echo)) => {
            assert_eq!(
                echo.data.len() + 8,
                ip.payload.len(),
                "all behind the header"
            );
        }
        Ok(Transport::Discovery(_)) => {
            assert_eq!(ip.marks.hop_limit, 255, "no router was on the way");
        }
        Ok(Transport::Undelivered(ends)) => {
            assert_eq!(ends.src.is_ipv6(), ends.dst.is_ipv6(), "both of one packet");
        }
        Err(_) => {}
    }
}
