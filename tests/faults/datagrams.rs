//! Rows 26 to 29: more flows than there are, ports that are used once, datagrams of no length and of any.
//!
//! In: datagrams and connections by the hundred thousand. Out: that each costs the same however many there
//! are, that limits refuse the newest and nobody else, and that sockets come back.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Instant;

use tapgate::config::Config;
use tapgate::host::QueuedError;
use tapgate::host::simulated::{ConnectAnswer, SocketId};
use tapgate::net::DropReason;
use tapgate::net::emit::IcmpError;

use crate::packets::{self, Ip, Ipv4, UDP};
use crate::peer::{Peer, RST};
use crate::rig::{OUTSIDE, RESOLVER, Rig, addr, pattern};
use crate::{count, frames};

/// Addresses of a guest whose subnet is large enough for more ports than one address has.
fn guest(nth: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 2, u8::try_from(100 + nth / 60_000).unwrap())
}

fn datagram(nth: usize, payload: &[u8]) -> Vec<u8> {
    let ip = Ipv4 {
        src: guest(nth),
        ..Ipv4::new(OUTSIDE, UDP)
    };
    ip.frame(&ip.udp(u16::try_from(1 + nth % 60_000).unwrap(), 7, payload))
}

fn request(nth: usize) -> Peer {
    let port = u16::try_from(1000 + nth % 60_000).unwrap();
    let to = u16::try_from(80 + nth / 60_000).unwrap();
    Peer::new(port, SocketAddr::new(OUTSIDE.into(), to))
}

#[test]
fn row_26_flow_count() {
    let (ports, connections) = (count(6_000, 100_000), count(3_000, 50_000));
    let limit = ports + connections + 1;
    let mut rig = Rig::with(Config {
        max_flows: u32::try_from(limit).unwrap(),
        max_udp_ports: u32::try_from(ports).unwrap(),
        ..Config::default()
    });
    rig.net.answer_all(ConnectAnswer::Accept);
    let mut one = rig.open(999, addr("192.0.2.1:443"));
    let alone = cost(&mut rig, &mut one);
    for nth in 0..connections {
        let mut peer = request(nth);
        rig.frame(&peer.syn());
        let answer = peer.read(&rig.received()).pop().unwrap();
        peer.take(&answer);
        rig.frame(&peer.ack());
        if nth % 100 == 0 {
            rig.millis(20);
        }
    }
    // Answered, so that they live for three minutes.
    for nth in 0..ports {
        let socket = SocketId(rig.net.datagram_sockets());
        rig.frame(&datagram(nth, b"x"));
        rig.net.deliver(socket, addr("192.0.2.1:7"), b"y");
        rig.turn();
        rig.take();
    }
    assert_eq!(rig.stack.flows(), limit);
    assert_eq!(rig.net.open_sockets(), limit);
    rig.stack.check().unwrap();
    // A segment finds its flow among all of them as fast as alone; a search would take thousands of times
    // as long. (Caches are colder, and machines are shared.)
    let crowded = cost(&mut rig, &mut one);
    assert!(crowded < alone * 8, "{alone} and {crowded} nanoseconds");
    // One more is refused, of either kind; the others go on.
    let mut more = request(connections);
    rig.take();
    rig.frame(&more.syn());
    assert_eq!(more.read(&rig.received())[0].flags & RST, RST);
    rig.frame(&datagram(ports, b"x"));
    assert_eq!(rig.received()[0].icmp(), Some((3, 13)));
    assert_eq!(rig.stack.flows(), limit);
    let (peer, id) = &mut one;
    rig.frame(&peer.data(b"still"));
    assert_eq!(rig.net.server_read(*id, 100), b"still");
    rig.secs(181);
    rig.recovers(0);
}

/// Where a guest may have so many ports.
fn few_ports(most: usize) -> Rig {
    Rig::with(Config {
        max_udp_ports: u32::try_from(most).unwrap(),
        ..Config::default()
    })
}

#[test]
fn row_26_most_ports_stay_the_hosts() {
    const MOST: usize = 500;
    let mut rig = few_ports(MOST);
    let ports = |rig: &Rig| rig.net.open_datagram_sockets().len();
    for nth in 0..MOST {
        rig.frame(&datagram(nth, b"x"));
    }
    assert_eq!((ports(&rig), rig.take().len()), (MOST, 0));
    // Nobody has had its time: the newest is refused, and nothing else is.
    rig.frame(&datagram(MOST, b"x"));
    assert_eq!(rig.received()[0].icmp(), Some((3, 13)));
    rig.is_alive();
    // After a second the oldest that was not answered goes, never who was.
    rig.net.deliver(SocketId(0), addr("192.0.2.1:7"), b"y");
    rig.secs(2);
    rig.take();
    for nth in MOST..2 * MOST - 1 {
        rig.frame(&datagram(nth, b"x"));
        assert_eq!((ports(&rig), rig.received().len()), (MOST, 0), "{nth}");
    }
    assert!(!rig.net.open_datagram_sockets().is_empty());
    assert_eq!(rig.net.open_datagram_sockets()[0], SocketId(0));
    rig.secs(181);
    rig.recovers(0);
}

/// A ping's identifier is one of the host's as well, and counts as a port.
#[test]
fn row_26_most_pings_stay_the_hosts() {
    const MOST: usize = 500;
    let mut rig = few_ports(MOST);
    let ping = |nth: usize| {
        let ip = Ipv4::new(OUTSIDE, packets::ICMP);
        let ident = u16::try_from(nth).unwrap();
        ip.frame(&packets::icmp(8, 0, [ident, 1], b"ping"))
    };
    for nth in 0..MOST {
        rig.frame(&ping(nth));
    }
    assert_eq!((rig.net.open_sockets(), rig.take().len()), (MOST, 0));
    for newest in [ping(MOST), datagram(0, b"x")] {
        rig.frame(&newest);
        assert_eq!(rig.received()[0].icmp(), Some((3, 13)));
    }
    rig.is_alive();
    // After a second those that were not answered give way, to ports as well.
    rig.secs(2);
    rig.take();
    for nth in 0..MOST {
        rig.frame(&datagram(nth, b"x"));
        assert_eq!((rig.net.open_sockets(), rig.received().len()), (MOST, 0));
    }
    rig.secs(181);
    rig.recovers(0);
}

/// Nanoseconds for a segment each way, of the best of many.
#[expect(
    clippy::disallowed_methods,
    reason = "what a segment takes on this machine is what is asked for"
)]
fn cost(rig: &mut Rig, (peer, id): &mut (Peer, SocketId)) -> u128 {
    rig.take();
    let mut best = u128::MAX;
    for _ in 0..200 {
        let frame = peer.data(b"how long");
        let start = Instant::now();
        rig.frame(&frame);
        best = best.min(start.elapsed().as_nanos());
        assert_eq!(rig.net.server_read(*id, 100), b"how long");
    }
    rig.take();
    best
}

#[test]
fn row_28_one_frame_is_no_flood() {
    let mut rig = Rig::new();
    let ip = Ipv4::new(OUTSIDE, UDP);
    let frame = ip.frame(&ip.udp(5000, 7, &[7; 1_200]));
    let mut sent = |size: u16| {
        rig.segmented(&frame, size);
        rig.net.take_sent().len()
    };
    // As many datagrams as a kernel puts into one, and no more.
    assert_eq!(sent(10), 120);
    assert_eq!(sent(9), 0);
    assert_eq!(sent(1), 0);
    assert_eq!(rig.dropped(DropReason::Malformed), 2);
}

#[test]
fn row_27_ports_used_once() {
    let total = count(20_000, 1_000_000);
    // 1,667 a second, each never answered; half of them to a name server, which is over sooner.
    let mut rig = Rig::new();
    let mut most = 0;
    for second in 0..total / 1_667 {
        for nth in 0..1_667 {
            let port = u16::try_from(1 + (second * 1_667 + nth) % 65_535).unwrap();
            let to = if nth % 2 == 0 { 7 } else { 53 };
            let ip = Ipv4::new(OUTSIDE, UDP);
            rig.frame(&ip.frame(&ip.udp(port, to, b"once")));
        }
        assert_eq!(rig.net.take_sent().len(), 1_667, "none is refused");
        rig.secs(1);
        most = most.max(rig.net.open_sockets());
    }
    // 30 seconds for one that was not answered, 10 for one that only spoke to port 53.
    let bound = 1_667 * 41 / 2;
    assert!(most <= bound, "{most} sockets, {bound} are enough");
    rig.secs(31);
    assert_eq!((rig.stack.flows(), rig.net.open_sockets()), (0, 0));
    oldest_gives_way();
    // RFC 4787 REQ-5: who was answered has two minutes at least.
    let socket = SocketId(rig.net.datagram_sockets());
    let ip = Ipv4::new(OUTSIDE, UDP);
    rig.frame(&ip.frame(&ip.udp(5000, 7, b"x")));
    rig.net.deliver(socket, addr("192.0.2.1:7"), b"y");
    rig.turn();
    rig.secs(121);
    assert_eq!(rig.stack.flows(), 1);
    rig.recovers(0);
}

/// Where no more sockets can be had, a port that nobody has answered for a second is closed for a newer
/// one, or for a connection; who was answered stays.
fn oldest_gives_way() {
    let mut rig = Rig::new();
    rig.net.answer_all(ConnectAnswer::Accept);
    rig.net.limit_open(Some(1_000));
    let ip = Ipv4::new(OUTSIDE, UDP);
    let from = |port| ip.frame(&ip.udp(port, 7, b"once"));
    rig.frame(&from(65_000));
    rig.net.deliver(SocketId(0), addr("192.0.2.1:7"), b"yes");
    rig.turn();
    for port in 1..1_500 {
        rig.frame(&from(port));
    }
    // All within a moment: the newest are refused.
    assert_eq!(rig.net.take_sent().len(), 1_000);
    rig.secs(1);
    rig.take();
    for port in 2_000..2_500 {
        rig.frame(&from(port));
    }
    let sent = rig.net.take_sent();
    assert_eq!((sent.len(), rig.received().len()), (500, 0));
    assert_eq!(rig.net.open_sockets(), 1_000);
    rig.is_alive();
    rig.frame(&from(65_000));
    assert_eq!(
        rig.net.take_sent()[0].socket,
        SocketId(0),
        "it was answered"
    );
    rig.recovers(0);
}

/// Ports, pings and queries of which a guest makes as many as it likes leave room for connections; connections leave
/// room for them; and of those that carry nothing the idlest goes.
#[test]
fn row_26_floods_leave_room() {
    const MOST: usize = 800;
    /// What either kind may have: all places but an eighth.
    const SHARE: usize = 700;
    let mut rig = Rig::with(Config {
        max_flows: u32::try_from(MOST).unwrap(),
        ..Config::default()
    });
    rig.net.answer_all(ConnectAnswer::Accept);
    rig.net.set_resolvers(&[addr("192.0.2.53:53")]);
    let mut witness = rig.open(999, addr("192.0.2.1:443"));
    // Ports that are answered, and so are no victims for half a minute.
    let answered = |rig: &mut Rig, nth: usize| {
        let socket = SocketId(rig.net.datagram_sockets());
        rig.frame(&datagram(nth, b"x"));
        if rig.net.datagram_sockets() > socket.0 {
            rig.net.deliver(socket, addr("192.0.2.1:7"), b"y");
            rig.turn();
        }
        rig.received().pop().and_then(|it| it.icmp())
    };
    for nth in 0..SHARE {
        assert_eq!(answered(&mut rig, nth), None);
    }
    rig.secs(2);
    rig.take();
    // The newest of each kind of datagrams' flows is refused; connections are not.
    assert_eq!(answered(&mut rig, SHARE), Some((3, 13)));
    let ping = |ident: u16| {
        let ip = Ipv4::new(OUTSIDE, packets::ICMP);
        ip.frame(&packets::icmp(8, 0, [ident, 1], b"ping"))
    };
    rig.frame(&ping(1));
    assert_eq!(rig.received()[0].icmp(), Some((3, 13)));
    let ip = Ipv4::new(RESOLVER, UDP);
    rig.frame(&ip.frame(&ip.udp(5000, 53, &frames::query(7))));
    assert_eq!(rig.received()[0].payload[8 + 3] & 15, 2, "SERVFAIL");
    rig.is_alive();
    // One that goes on is no victim, however many there are: the idlest goes.
    rig.secs(20);
    rig.take();
    assert_eq!(answered(&mut rig, 3), None);
    rig.secs(15);
    rig.take();
    for nth in 0..50 {
        assert_eq!(answered(&mut rig, SHARE + 1 + nth), None);
        rig.frame(&ping(u16::try_from(nth).unwrap()));
    }
    rig.frame(&ip.frame(&ip.udp(5000, 53, &frames::query(7))));
    let before = rig.net.datagram_sockets();
    rig.frame(&datagram(3, b"still"));
    assert_eq!(
        rig.net.datagram_sockets(),
        before,
        "it has its socket still"
    );
    let connections = open_all(&mut rig, SHARE);
    assert_eq!(answered(&mut rig, 5), None);
    let (peer, id) = &mut witness;
    rig.frame(&peer.data(b"still"));
    assert_eq!(rig.net.server_read(*id, 100), b"still");
    for peer in connections {
        rig.frame(&peer.rst());
    }
    rig.recovers(0);
}

/// Connections that are open fill their share, and no more; the other kind has room.
fn open_all(rig: &mut Rig, share: usize) -> Vec<Peer> {
    let mut connections = Vec::new();
    for nth in 0..share + 50 {
        let mut peer = request(nth);
        rig.take();
        rig.frame(&peer.syn());
        let answer = peer.read(&rig.received()).pop().unwrap();
        peer.take(&answer);
        rig.frame(&peer.ack());
        if answer.flags & RST == 0 {
            connections.push(peer);
        }
        rig.secs(1);
    }
    let open = connections.len();
    assert!(open <= share && open > share - 20, "{open}");
    rig.take();
    connections
}

#[test]
fn row_28_empty_datagrams_and_errors() {
    let total = count(5_000, 100_000);
    let mut rig = Rig::new();
    let ip = Ipv4::new(OUTSIDE, UDP);
    let empty = ip.frame(&ip.udp(5000, 7, &[]));
    let socket = SocketId(0);
    let refused = QueuedError {
        error: IcmpError::PortUnreachable,
        reporter: Some(OUTSIDE.into()),
        destination: addr("192.0.2.1:7"),
        quoted: 0,
    };
    for nth in 0..total {
        // Each is passed on as it is; the socket is read until nothing is left, or this would not end.
        rig.frame(&empty);
        let sent = rig.net.take_sent();
        assert!(sent.len() == 1 && sent[0].payload.is_empty());
        rig.net.deliver(socket, addr("192.0.2.1:7"), b"");
        if nth % 3 == 0 {
            rig.net.report_error(socket, refused, b"");
        }
        if nth % 5 == 0 {
            rig.net.deliver(socket, addr("192.0.2.1:7"), b"");
        }
        rig.turn();
        let got = rig.received();
        let errors = got.iter().filter(|it| it.icmp() == Some((3, 3))).count();
        let datagrams = got.iter().filter_map(|it| it.udp().map(|udp| udp.2));
        assert_eq!(datagrams.clone().count(), 1 + usize::from(nth % 5 == 0));
        assert!(datagrams.into_iter().all(<[u8]>::is_empty));
        assert_eq!(errors, usize::from(nth % 3 == 0));
        // An event that leads to nothing costs one look.
        rig.turn();
        assert!(rig.take().is_empty());
        // Errors are told, a thousand a second.
        rig.millis(1);
    }
    rig.secs(200);
    rig.recovers(0);
}

#[test]
fn row_29_oversized_datagrams() {
    let total = count(25, 10_000);
    let mut rig = Rig::new();
    let outside: [IpAddr; 2] = [
        OUTSIDE.into(),
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(),
    ];
    let longest = pattern(65_507);
    for to in outside {
        for nth in 0..total {
            // The longest there is, one above the MTU, and one at it.
            let len = [65_507, 1473, 1453, 1472][nth % 4];
            let ip = Ip::new(to, UDP);
            let payload = &longest[..len];
            let fragments = match ip {
                Ip::V4(ip) => Ipv4 {
                    id: u16::try_from(nth % 65_536).unwrap(),
                    ..ip
                }
                .fragments(&ip.udp(5000, 7, payload), 1480),
                Ip::V6(ip) => {
                    let id = u32::try_from(nth).unwrap();
                    ip.fragments(id, &ip.udp(5000, 7, payload), 1448)
                }
            };
            rig.flood(fragments.iter().map(Vec::as_slice));
            let sent = rig.net.take_sent();
            assert!(
                sent.len() == 1 && sent[0].payload == payload,
                "whole to the host"
            );
            rig.net
                .deliver(sent[0].socket, SocketAddr::new(to, 7), payload);
            rig.turn();
            assert!(rig.fits(1500), "no packet above the MTU");
            let got = rig.received();
            let got: Vec<_> = got.iter().filter_map(|it| it.udp()).collect();
            assert!(got.len() == 1 && got[0].2 == payload, "whole to the guest");
        }
    }
    rig.secs(200);
    rig.recovers(0);
}
