//! Neighbour discovery (RFC 4861): solicitations and advertisements of a guest, right and wrong.
//!
//! What must hold: only the gateway's own addresses are answered for, by advertisements that are well-formed;
//! no message of discovery opens a socket or a flow, and afterwards the gateway is where it was.

use std::net::{IpAddr, Ipv6Addr};

use crate::lab::{Lab, millis};
use crate::packets::v6::{self, Ipv6};
use crate::packets::{self, ICMPV6};

const ADDRESSES: [&str; 12] = [
    "fd00::2",
    "fd00::3",
    "fe80::2",
    "fd00::100",
    "fe80::100",
    "::",
    "ff02::1",
    "ff02::2",
    "ff02::1:ff00:2",
    "2001:db8::1",
    "::1",
    "fd00::77",
];

/// Messages of one input.
const MAX_STEPS: usize = 60;

fn address(byte: u8) -> Ipv6Addr {
    let text = ADDRESSES[usize::from(byte) % ADDRESSES.len()];
    text.parse().unwrap_or(Ipv6Addr::UNSPECIFIED)
}

/// A message that is mostly right: type and target by the input, the options as they stand there.
fn message(ip: &Ipv6, kind: u8, target: u8, options: &[u8]) -> Vec<u8> {
    let target = address(target);
    match kind % 8 {
        0..3 => ip.solicitation(target, options),
        3 | 4 => ip.router_solicitation(options),
        5 => ip.advertisement(kind, target, options),
        6 => ip.icmp([133 + (kind >> 3) % 5, 0], [0, 0], options),
        _ => ip.solicitation(target, &v6::link_address(1, packets::GUEST_MAC)),
    }
}

fn look(lab: &mut Lab) {
    let own = [address(0), address(1), address(2)].map(IpAddr::V6);
    for came in lab.received() {
        assert_eq!((came.protocol, came.hop_limit), (ICMPV6, 255), "{came:?}");
        match came.icmp() {
            Some((v6::NEIGHBOUR_ADVERTISEMENT, 0)) => {
                let target = <[u8; 16]>::try_from(&came.payload[8..24]).unwrap_or_default();
                let target = IpAddr::V6(target.into());
                assert!(own.contains(&target), "an answer for {target}");
                assert_eq!(came.src, target);
            }
            Some((v6::ROUTER_ADVERTISEMENT, 0)) => assert_eq!(came.src, own[2]),
            other => unreachable!("{other:?}: {came:?}"),
        }
    }
    assert_eq!((lab.0.flows(), lab.0.net.open_sockets()), (0, 0));
}

/// Tries an input.
pub fn run(bytes: &[u8]) {
    let mut lab = Lab::new();
    let mut rest = bytes;
    for _ in 0..MAX_STEPS {
        let [kind, ends, target, hops, len, tail @ ..] = rest else {
            break;
        };
        let (options, tail) = tail.split_at(usize::from(len % 64).min(tail.len()));
        rest = tail;
        let mut ip = Ipv6::discovery(address(ends >> 4), address(*ends));
        if hops & 0xf0 == 0xf0 {
            ip.hop_limit = *hops | 1;
        }
        let message = message(&ip, *kind, *target, options);
        if hops & 0x0f == 0x0f {
            lab.wait(millis(1 << (kind % 18)));
        }
        lab.send(ip.frame(&message));
        look(&mut lab);
    }
    // The gateway is where it was, and knows where the guest is.
    let ip = Ipv6::new(address(0), ICMPV6);
    lab.0.received.clear();
    lab.send(ip.frame(&ip.icmp([128, 0], [7, 7], b"ping")));
    let came = lab.received();
    let replies = came.iter().filter(|it| it.icmp() == Some((129, 0))).count();
    assert_eq!(replies, 1, "the gateway answers a ping: {came:?}");
}
