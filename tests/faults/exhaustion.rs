//! Rows 5 to 8: floods of connection requests, and a host that has no descriptors left.
//!
//! In: requests by the ten thousand, to who does not answer, to who does, to who refuses; a limit on open
//! sockets. Out: how many flows and sockets there are at the worst, who is refused and how, and whether
//! those that were there before, and those that come meanwhile, are served.

use std::net::{Ipv4Addr, SocketAddr};

use tapgate::buf::{LinkId, RxMeta};
use tapgate::host::simulated::{ConnectAnswer, SocketId};

use crate::packets::{self, Ipv4, UDP};
use crate::peer::{ACK, Peer, RST, SYN};
use crate::rig::{GATEWAY, OUTSIDE, RESOLVER, Rig, addr, echo};
use crate::{Random, count, frames};

/// Connections that may wait for an end of theirs (issue 6).
const HALF_OPEN: usize = 4096;
/// Requests of a millisecond: ten thousand a second.
const BURST: usize = 10;

/// A connection that was there before, and goes on.
struct Witness(Peer, SocketId);

impl Witness {
    fn new(rig: &mut Rig) -> Self {
        let (peer, id) = rig.open(3999, echo());
        Self(peer, id)
    }

    /// Bytes go both ways.
    fn goes_on(&mut self, rig: &mut Rig) {
        let Self(peer, id) = self;
        rig.keep();
        rig.take();
        rig.frame(&peer.data(b"still"));
        assert_eq!(rig.net.server_read(*id, 100), b"still");
        assert_eq!(rig.net.server_write(*id, b"there"), 5);
        rig.turn();
        let came = peer.read(&rig.received());
        assert!(came.iter().any(|it| it.data == b"there"), "{came:?}");
        peer.take_all(&came);
        rig.frame(&peer.ack());
    }

    fn ends(&mut self, rig: &mut Rig) {
        rig.frame(&self.0.rst());
        assert!(rig.net.server_sees_reset(self.1));
    }
}

/// A request that was not sent before: sixteen servers, any port.
fn request(number: usize, random: &mut Random) -> Vec<u8> {
    let port = u16::try_from(1 + number % 60_000).unwrap();
    let to = Ipv4Addr::new(192, 0, 2, u8::try_from(10 + number / 60_000).unwrap());
    let mut peer = Peer::new(port, SocketAddr::new(to.into(), 80));
    peer.next.seq = random.long();
    peer.syn()
}

#[test]
fn row_05_syn_flood_to_silent_addresses() {
    let mut rig = Rig::new();
    rig.net.answer_all(ConnectAnswer::Silent);
    let mut random = Random::new(5);
    let mut witness = Witness::new(&mut rig);
    let total = count(10_000, 100_000);
    let (mut most, mut slow) = ((0, 0), None);
    for number in (0..total).step_by(BURST) {
        let burst: Vec<Vec<u8>> = (number..number + BURST)
            .map(|number| request(number, &mut random))
            .collect();
        rig.batch(burst.iter().map(Vec::as_slice));
        rig.millis(1);
        most = (
            most.0.max(rig.stack.flows()),
            most.1.max(rig.net.open_sockets()),
        );
        // In the middle of it a new connection opens, and the old one lives.
        if number % 2000 == 0 {
            rig.is_alive();
            witness.goes_on(&mut rig);
            slow = Some(asks_slowly(&mut rig));
        }
        // So does one whose server takes a hundred milliseconds: those that are older go.
        if number % 2000 == 1000 {
            let (peer, id) = slow.take().unwrap();
            rig.take();
            rig.net.server_answers(id, None);
            rig.turn();
            assert_eq!(peer.read(&rig.received())[0].flags, SYN | ACK);
            rig.frame(&peer.rst());
        }
    }
    // The witness, and those that looked whether all is alive and are remembered for ten seconds.
    let others = 1 + total / 2000 + 1;
    assert!(
        most.0 >= HALF_OPEN && most.0 <= HALF_OPEN + others,
        "{most:?}"
    );
    assert!(most.1 <= HALF_OPEN + 2, "{most:?}");
    let abandoned = usize::try_from(rig.stack.counters().flows_abandoned).unwrap();
    assert!(
        abandoned >= total - HALF_OPEN,
        "the oldest went: {abandoned}"
    );
    assert_eq!(rig.stack.counters().flows_refused, 0);
    // The last of them are told in the end that nobody answers.
    rig.take();
    rig.secs(140);
    assert_eq!((rig.stack.flows(), rig.net.open_sockets()), (1, 1));
    witness.goes_on(&mut rig);
    witness.ends(&mut rig);
    rig.recovers(0);
}

#[test]
fn row_05_requests_that_are_taken_back_leave_nothing_in_line() {
    let mut rig = Rig::new();
    rig.net.answer_all(ConnectAnswer::Silent);
    for round in 0..count(20, 200) {
        let mut frames = Vec::new();
        for nth in 0..100_u32 {
            let mut peer = Peer::new(3000, addr("192.0.2.1:81"));
            peer.next.seq = u32::try_from(round).unwrap() << 20 | nth << 10;
            frames.push(peer.syn());
            frames.push(peer.rst());
        }
        // Taken one by one in a turn: the line of those with something to do grows no longer than they are many,
        // which the check of the stack's holds.
        rig.with_stack(|stack, turn| {
            for frame in &frames {
                stack.handle_frame(turn, frame, RxMeta::plain(LinkId(0)));
                stack.check().unwrap();
            }
        });
    }
    assert!(rig.stack.flows() <= 1);
}

/// A request to a server that has not answered yet.
fn asks_slowly(rig: &mut Rig) -> (Peer, SocketId) {
    let port = rig.port();
    let mut peer = Peer::new(port, addr("192.0.2.200:80"));
    let id = SocketId(rig.net.connections().len());
    rig.frame(&peer.syn());
    (peer, id)
}

#[test]
fn row_06_syn_flood_to_an_open_port() {
    let mut rig = Rig::new();
    rig.net.answer_all(ConnectAnswer::Silent);
    let mut random = Random::new(6);
    let mut witness = Witness::new(&mut rig);
    // Nothing is said to the guest before the host's connection is there.
    let mut early = Peer::new(2999, addr("192.0.2.1:81"));
    rig.frame(&early.syn());
    rig.secs(2);
    assert_eq!(early.read(&rig.received()), []);
    let id = *rig.net.connections().last().unwrap();
    rig.net.server_answers(id, None);
    rig.turn();
    assert_eq!(early.read(&rig.received())[0].flags, SYN | ACK);
    // From then on the guest has 75 seconds to answer; then both ends are reset.
    rig.secs(74);
    assert!(!rig.net.server_sees_reset(id));
    rig.take();
    rig.secs(2);
    assert!(rig.net.server_sees_reset(id) && rig.net.is_closed(id));
    assert!(
        early
            .read(&rig.received())
            .iter()
            .any(|it| it.flags & RST != 0)
    );
    // A flood of such: the oldest are reset for the newest, never who has answered.
    rig.net.answer_all(ConnectAnswer::Accept);
    let total = count(6_000, 20_000);
    for number in (0..total).step_by(BURST) {
        let burst: Vec<Vec<u8>> = (number..number + BURST)
            .map(|number| request(number, &mut random))
            .collect();
        rig.batch(burst.iter().map(Vec::as_slice));
        rig.millis(1);
        assert!(rig.net.open_sockets() <= HALF_OPEN + 2);
        if number % 2000 == 0 {
            rig.is_alive();
            witness.goes_on(&mut rig);
        }
        rig.take();
    }
    let ids = rig.net.connections();
    let reset = ids.iter().filter(|id| rig.net.server_sees_reset(**id));
    assert!(reset.count() >= total - HALF_OPEN, "reset, not closed");
    rig.only_count();
    rig.secs(80);
    assert_eq!((rig.stack.flows(), rig.net.open_sockets()), (1, 1));
    witness.goes_on(&mut rig);
    witness.ends(&mut rig);
    rig.recovers(0);
}

#[test]
fn row_07_port_scan() {
    let mut rig = Rig::new();
    // One service on the host's loopback, one outside; the resolver at 10.0.2.3 is the gateway's own.
    rig.net
        .answer(addr("127.0.0.1:8080"), ConnectAnswer::Accept);
    rig.net.answer(addr("192.0.2.1:443"), ConnectAnswer::Accept);
    rig.net.answer(addr("192.0.2.53:53"), ConnectAnswer::Accept);
    rig.net.set_resolvers(&[addr("192.0.2.53:53")]);
    let step = count(31, 1);
    for (host, open) in [(GATEWAY, 8080), (RESOLVER, 53), (OUTSIDE, 443)] {
        let ports = (1..=u16::MAX).filter(|port| usize::from(*port) % step == 1 || *port == open);
        for port in ports {
            let mut peer = Peer::new(port, SocketAddr::new(host.into(), port));
            let asked_at = rig.now;
            rig.frame(&peer.syn());
            let answers = peer.read(&rig.received());
            assert_eq!(answers.len(), 1, "{host}:{port}");
            assert_eq!(rig.now, asked_at, "at once");
            if port == open {
                assert_eq!(answers[0].flags, SYN | ACK, "{host}:{port}");
                rig.frame(&peer.rst());
            } else {
                assert_eq!(answers[0].flags, RST | ACK, "{host}:{port}");
                assert_eq!(answers[0].ack, peer.next.seq, "{host}:{port}");
            }
        }
    }
    // Nobody outside was asked for a port of the resolver's address but for names.
    let asked: Vec<_> = rig.net.connections().into_iter().collect();
    let asked = asked.iter().filter_map(|id| rig.net.remote(*id));
    assert_eq!(
        asked
            .filter(|to| to.ip() == addr("192.0.2.53:53").ip())
            .count(),
        1
    );
    rig.recovers(0);
}

#[test]
fn row_08_descriptors_run_out() {
    for (most, total) in [(64, 150), (1024, count(1_500, 5_000))] {
        let mut rig = Rig::new();
        rig.net.answer_all(ConnectAnswer::Accept);
        rig.net.limit_open(Some(most));
        let mut opened = Vec::new();
        let mut refused = 0;
        for number in 0..total {
            let from = u16::try_from(1000 + number).unwrap();
            let mut peer = Peer::new(from, SocketAddr::new(OUTSIDE.into(), 80));
            let id = SocketId(rig.net.connections().len());
            rig.frame(&peer.syn());
            let answer = peer.read(&rig.received()).pop().unwrap();
            if answer.flags == SYN | ACK {
                peer.take(&answer);
                rig.frame(&peer.ack());
                opened.push(Witness(peer, id));
            } else {
                assert_eq!((answer.flags, answer.ack), (RST | ACK, peer.next.seq));
                refused += 1;
            }
        }
        assert_eq!((opened.len(), refused), (most, total - most));
        // Everything else that takes a descriptor is refused at once, too, and the gateway answers.
        let ip = Ipv4::new(OUTSIDE, UDP);
        rig.frame(&ip.frame(&ip.udp(5000, 7, b"x")));
        assert_eq!(rig.received()[0].icmp(), Some((3, 13)));
        rig.net.set_resolvers(&[addr("192.0.2.53:53")]);
        let ip = Ipv4::new(RESOLVER, UDP);
        rig.frame(&ip.frame(&ip.udp(5000, 53, &frames::query(7))));
        assert_eq!(rig.received()[0].payload[8 + 3] & 15, 2, "SERVFAIL");
        let ip = Ipv4::new(OUTSIDE, packets::ICMP);
        rig.frame(&ip.frame(&packets::icmp(8, 0, [1, 2], b"ping")));
        assert_eq!(rig.received()[0].icmp(), Some((3, 13)));
        rig.secs(60);
        for witness in &mut opened {
            witness.goes_on(&mut rig);
        }
        // One that goes makes room for one.
        opened.pop().unwrap().ends(&mut rig);
        rig.is_alive();
        for mut witness in opened {
            witness.ends(&mut rig);
        }
        assert_eq!(rig.net.open_sockets(), 0);
        rig.recovers(0);
    }
    held_by_who_does_not_answer();
}

/// Connections to nobody hold all descriptors: after a moment they give way.
fn held_by_who_does_not_answer() {
    let mut rig = Rig::new();
    rig.net.answer_all(ConnectAnswer::Silent);
    rig.net.limit_open(Some(64));
    let mut random = Random::new(8);
    for number in 0..150 {
        rig.frame(&request(number, &mut random));
    }
    assert_eq!(rig.net.open_sockets(), 64);
    rig.millis(300);
    rig.is_alive();
    rig.recovers(0);
}
