//! Rows 11, 12 and 48: a host whose network goes and comes back, whose address changes, whose clock jumps.
//!
//! In: what the host's calls report meanwhile. Out: what guests are told, that connections which are open
//! live through it, and that all is as before afterwards.

use tapgate::config::{Config, Outbound};
use tapgate::host::simulated::{ConnectAnswer, SocketId};

use crate::count;
use crate::packets::{ICMP, Ipv4, UDP, icmp};
use crate::peer::{Peer, SYN};
use crate::rig::{OUTSIDE, Rig, addr};

/// `EADDRNOTAVAIL`, `ENETDOWN`, `ENETUNREACH`, `EHOSTUNREACH` of errno(3).
const NO_ADDRESS: i32 = 99;
const NETWORK_DOWN: i32 = 100;
const NO_ROUTE: i32 = 101;
const NO_HOST: i32 = 113;

/// Takes the host's network away `times` times; each time a guest is told by `said`, at once.
fn away_and_back(rig: &mut Rig, times: usize, failures: &[(i32, (u8, u8))]) {
    let (mut peer, id) = rig.open(2000, addr("192.0.2.1:80"));
    let ip = Ipv4::new(OUTSIDE, UDP);
    let datagram = |from| ip.frame(&ip.udp(from, 7, b"x"));
    rig.frame(&datagram(2000));
    assert_eq!(rig.net.take_sent().len(), 1);
    for cycle in 0..times {
        let (errno, said) = failures[cycle % failures.len()];
        rig.net.answer_all(ConnectAnswer::Fail(errno));
        rig.net.fail_datagrams(Some(errno));
        rig.take();
        // A connect, a datagram of a port that was there, one of a port that was not.
        let from = 3000 + u16::try_from(cycle).unwrap();
        rig.frame(&Peer::new(from, addr("192.0.2.1:80")).syn());
        rig.frame(&datagram(2000));
        rig.frame(&datagram(from));
        let told = rig.received();
        assert_eq!(told.len(), 3, "{told:?}");
        assert!(told.iter().all(|it| it.icmp() == Some(said)), "{told:?}");
        // What is open waits, by its own timers: nothing is reset. The gateway is there.
        rig.frame(&peer.data(b"while away"));
        rig.secs(20);
        assert!(!rig.net.is_closed(id) && !rig.net.server_sees_reset(id));
        rig.is_alive();
        // It comes back, and everything works within a second.
        rig.net.answer_all(ConnectAnswer::Accept);
        rig.net.fail_datagrams(None);
        rig.take();
        rig.frame(&Peer::new(from, addr("192.0.2.1:80")).syn());
        rig.frame(&datagram(2000));
        assert_eq!(rig.received()[0].payload[13], SYN | 0x10);
        assert_eq!(rig.net.take_sent().len(), 1);
        assert_eq!(rig.net.server_read(id, 100), b"while away");
        carries(rig, &mut peer, id);
    }
    rig.frame(&peer.rst());
}

fn carries(rig: &mut Rig, peer: &mut Peer, id: SocketId) {
    assert_eq!(rig.net.server_write(id, b"back"), 4);
    rig.millis(5);
    let came = peer.read(&rig.received());
    assert!(came.iter().any(|it| it.data == b"back"), "{came:?}");
    peer.take_all(&came);
    rig.frame(&peer.ack());
}

#[test]
fn row_11_host_network_away_and_back() {
    let mut rig = Rig::new();
    rig.net.answer_all(ConnectAnswer::Accept);
    let failures = [
        (NO_ROUTE, (3, 0)),
        (NETWORK_DOWN, (3, 0)),
        (NO_HOST, (3, 1)),
    ];
    away_and_back(&mut rig, count(6, 50), &failures);
    rig.recovers(0);
}

#[test]
fn row_12_host_address_changes() {
    let mut rig = Rig::new();
    rig.net.answer_all(ConnectAnswer::Accept);
    // What bind(2) and connect(2) say where `--outbound` names an address that the host has no more.
    away_and_back(&mut rig, count(3, 20), &[(NO_ADDRESS, (3, 1))]);
    // A socket can't even be opened: a port is told at once, too.
    rig.net.fail_open(Some(NO_ADDRESS));
    let ip = Ipv4::new(OUTSIDE, UDP);
    rig.take();
    rig.frame(&ip.frame(&ip.udp(9000, 7, b"x")));
    rig.frame(&Peer::new(9000, addr("192.0.2.1:80")).syn());
    let told: Vec<_> = rig.received().iter().map(|it| it.icmp()).collect();
    assert_eq!(told, [Some((3, 13)), Some((3, 1))]);
    rig.net.fail_open(None);
    rig.recovers(0);
}

/// A port that goes on sending is bound to what is there now, not to what was there when it began.
#[test]
fn row_12_ports_are_bound_anew() {
    // ENODEV, EADDRNOTAVAIL, EINVAL: what send(2) says of a socket whose interface or address has gone.
    for errno in [19, 99, 22] {
        let mut rig = Rig::with(Config {
            outbound: Some(Outbound::Interface("eth0".into())),
            ..Config::default()
        });
        let ip = Ipv4::new(OUTSIDE, UDP);
        let send = |rig: &mut Rig| {
            rig.frame(&ip.frame(&ip.udp(9000, 7, b"x")));
            rig.secs(20);
            rig.net.take_sent().pop().map(|sent| sent.socket)
        };
        assert_eq!(send(&mut rig), Some(SocketId(0)));
        assert_eq!(send(&mut rig), Some(SocketId(0)), "as long as all is well");
        rig.net.fail_datagrams(Some(errno));
        assert_eq!(send(&mut rig), None);
        rig.net.fail_datagrams(None);
        assert_eq!(send(&mut rig), Some(SocketId(1)), "{errno}");
        let ip = Ipv4::new(OUTSIDE, ICMP);
        let ping = |rig: &mut Rig| {
            rig.frame(&ip.frame(&icmp(8, 0, [7, 1], b"x")));
            rig.secs(20);
            rig.net.take_sent().pop().map(|sent| sent.socket)
        };
        let first = ping(&mut rig);
        assert!(first.is_some() && ping(&mut rig) == first);
        rig.net.fail_datagrams(Some(errno));
        assert_eq!(ping(&mut rig), None);
        rig.net.fail_datagrams(None);
        let next = ping(&mut rig);
        assert!(next.is_some() && next != first, "{errno}: {next:?}");
        rig.recovers(0);
    }
}

#[test]
fn row_48_clock_jumps() {
    let mut rig = Rig::new();
    rig.net.answer_all(ConnectAnswer::Accept);
    for cycle in 0..count(3, 10) {
        // A connection, a port, a query, fragments and a silent host are under way.
        let from = 2000 + u16::try_from(cycle).unwrap();
        let (_, id) = rig.open(from, addr("192.0.2.1:80"));
        rig.net.answer_all(ConnectAnswer::Silent);
        rig.frame(&Peer::new(from, addr("192.0.2.2:80")).syn());
        rig.net.answer_all(ConnectAnswer::Accept);
        let ip = Ipv4::new(OUTSIDE, UDP);
        rig.frame(&ip.frame(&ip.udp(from, 7, b"x")));
        rig.flood([ip.fragments(&[7; 64], 32)[0].as_slice()]);
        // No turn for two days and a bit: what a machine that was stopped looks like.
        rig.jump(2 * 86_400 + 7 * cycle as u64);
        rig.is_alive();
        // What was open is asked whether it is still there, and has its ten minutes to answer.
        assert!(!rig.net.is_closed(id));
        rig.take();
        rig.secs(3600);
        assert!(rig.net.is_closed(id));
        assert_eq!((rig.stack.flows(), rig.net.open_sockets()), (0, 0));
    }
    rig.recovers(0);
}
