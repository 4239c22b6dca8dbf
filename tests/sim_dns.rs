//! Dialogues in virtual time for names and for published UDP ports.
//!
//! Resolvers and clients are played by the test. Each ends with [`Lab::rest`]: nothing is left.
#![allow(
    clippy::unwrap_used,
    reason = "a scenario that can not go on has failed"
)]

#[path = "sim/lab.rs"]
mod lab;
#[path = "sim/packets.rs"]
mod packets;
mod sim;

use lab::{FIRST, Lab, addr, filled, millis, secs};
use tapgate::config::{Config, Dns};
use tapgate::host::simulated::{Sent, SocketId};
use tapgate::host::{DatagramRole, QueuedError};
use tapgate::net::{DropReason, emit::IcmpError};

const NAMES: &str = "10.0.2.3:53";
const ONE: &str = "192.0.2.53:53";
const TWO: &str = "198.51.100.53:53";
const ID: u16 = 0x1234;

/// A query for a name, with identifier `id`.
fn query(id: u16) -> Vec<u8> {
    let mut query = id.to_be_bytes().to_vec();
    query.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    query.extend(b"\x07example\x03org\x00\x00\x01\x00\x01");
    query
}

/// What a resolver says to `query`.
fn answer(query: &[u8]) -> Vec<u8> {
    let mut answer = query.to_vec();
    answer[2] |= 0x80;
    answer.extend(b"the address");
    answer
}

fn with_resolvers(resolvers: &[&str]) -> Lab {
    let lab = Lab::new();
    let resolvers: Vec<_> = resolvers.iter().map(|text| addr(text)).collect();
    lab.0.net.set_resolvers(&resolvers);
    lab
}

/// The only query that was sent to a resolver since the last time.
fn asked(lab: &Lab) -> Sent {
    let mut sent = lab.sent();
    assert_eq!(sent.len(), 1, "{sent:?}");
    assert_eq!(
        lab.0.net.role(sent[0].socket),
        Some(DatagramRole::Connected(sent[0].to)),
        "others are not heard (RFC 5452)"
    );
    sent.remove(0)
}

/// The resolver that was asked answers.
fn answered(lab: &mut Lab, asked: &Sent) {
    let payload = answer(&asked.payload);
    lab.0.net.deliver(asked.socket, asked.to, &payload);
    lab.wait(millis(1));
}

/// The guest got the answer to its query `id`.
fn is_answered(lab: &mut Lab, id: u16) {
    let expected = answer(&query(id));
    assert_eq!(lab.reply().udp(), Some((addr(NAMES), 5000, &expected[..])));
}

/// The guest was told that no resolver answers.
fn has_failed(lab: &mut Lab, id: u16) {
    let reply = lab.reply();
    let (from, to, bytes) = reply.udp().unwrap();
    assert_eq!((from, to), (addr(NAMES), 5000));
    assert_eq!(bytes[..2], id.to_be_bytes());
    assert_eq!((bytes[2] & 0x80, bytes[3] & 0x0f), (0x80, 2), "a SERVFAIL");
    assert_eq!(bytes[12..], query(id)[12..], "the question comes back");
}

#[test]
fn an_answer_comes_back_with_the_guest_s_identifier() {
    let mut lab = with_resolvers(&[ONE]);
    lab.udp(5000, NAMES, &query(ID));
    let sent = asked(&lab);
    assert_eq!(sent.to, addr(ONE));
    assert_eq!(sent.payload[2..], query(ID)[2..], "the rest is untouched");
    answered(&mut lab, &sent);
    is_answered(&mut lab, ID);
    assert_eq!(lab.0.net.open_sockets(), 0);
    lab.rest();
}

#[test]
fn answers_of_any_size_pass() {
    let mut lab = with_resolvers(&[ONE]);
    lab.udp(5000, NAMES, &query(ID));
    let sent = asked(&lab);
    let mut long = answer(&sent.payload);
    long.extend(filled(4096));
    lab.0.net.deliver(sent.socket, sent.to, &long);
    lab.wait(millis(1));
    assert_eq!(lab.reply().udp().unwrap().2[2..], long[2..]);
    lab.rest();
}

#[test]
fn a_silent_resolver_is_passed_over_and_the_one_that_answered_is_asked_first() {
    let mut lab = with_resolvers(&[ONE, TWO]);
    lab.udp(5000, NAMES, &query(ID));
    let first = asked(&lab);
    lab.wait(millis(990));
    assert_eq!(lab.sent(), []);
    lab.wait(millis(20));
    let second = asked(&lab);
    assert_eq!((first.to, second.to), (addr(ONE), addr(TWO)));
    answered(&mut lab, &second);
    is_answered(&mut lab, ID);
    lab.udp(5000, NAMES, &query(2));
    let next = asked(&lab);
    assert_eq!(next.to, addr(TWO));
    // It falls silent: the order of the list holds again.
    lab.wait(secs(1));
    let other = asked(&lab);
    assert_eq!(other.to, addr(ONE));
    answered(&mut lab, &other);
    is_answered(&mut lab, 2);
    lab.rest();
}

#[test]
fn a_resolver_that_is_not_there_is_passed_over_at_once() {
    let mut lab = with_resolvers(&[ONE, TWO]);
    lab.udp(5000, NAMES, &query(ID));
    let first = asked(&lab);
    let refused = QueuedError {
        error: IcmpError::PortUnreachable,
        reporter: Some(first.to.ip()),
        destination: first.to,
        quoted: 0,
    };
    lab.0
        .net
        .report_error(first.socket, refused, &first.payload);
    lab.wait(millis(1));
    let second = asked(&lab);
    assert_eq!(second.to, addr(TWO));
    answered(&mut lab, &second);
    is_answered(&mut lab, ID);
    lab.rest();
}

#[test]
fn every_attempt_has_a_socket_and_an_identifier_of_its_own_and_all_silent_is_a_failure() {
    let mut lab = with_resolvers(&[ONE, TWO]);
    lab.udp(5000, NAMES, &query(ID));
    let mut attempts = vec![asked(&lab)];
    for _ in 0..3 {
        lab.wait(secs(1));
        assert_eq!(lab.received(), []);
        assert_eq!(lab.0.net.open_sockets(), 1, "the last one is closed");
        attempts.push(asked(&lab));
    }
    let order: Vec<_> = attempts.iter().map(|sent| sent.to).collect();
    assert_eq!(order, [ONE, TWO, ONE, TWO].map(addr));
    for (nth, one) in attempts.iter().enumerate() {
        for other in &attempts[..nth] {
            assert_ne!(one.socket, other.socket);
            assert_ne!(one.payload[..2], other.payload[..2]);
        }
    }
    lab.wait(secs(1));
    lab.wait(millis(1));
    has_failed(&mut lab, ID);
    assert_eq!(lab.sent(), []);
    lab.rest();
}

#[test]
fn without_resolver_or_descriptor_a_query_fails_at_once() {
    let mut lab = with_resolvers(&[]);
    lab.udp(5000, NAMES, &query(ID));
    has_failed(&mut lab, ID);
    lab.0.net.set_resolvers(&[addr(ONE)]);
    lab.0.net.fail_open(Some(24));
    lab.udp(5000, NAMES, &query(ID));
    has_failed(&mut lab, ID);
    lab.0.net.fail_open(None);
    lab.udp(5000, NAMES, &query(ID));
    let sent = asked(&lab);
    answered(&mut lab, &sent);
    is_answered(&mut lab, ID);
    lab.rest();
}

#[test]
fn over_the_limit_on_flows_a_query_fails() {
    let mut lab = Lab::with(Config {
        max_flows: 1,
        ..Config::default()
    });
    lab.0.net.set_resolvers(&[addr(ONE)]);
    lab.udp(5000, "192.0.2.1:7", b"takes the place");
    assert_eq!(lab.sent().len(), 1);
    lab.udp(5000, NAMES, &query(ID));
    has_failed(&mut lab, ID);
    assert_eq!(lab.sent(), []);
    lab.rest();
}

#[test]
fn what_is_no_answer_is_not_passed_on() {
    let mut lab = with_resolvers(&[ONE]);
    lab.udp(5000, NAMES, &query(ID));
    let sent = asked(&lab);
    let mut wrong_id = answer(&sent.payload);
    wrong_id[0] ^= 1;
    let answer_to_guest = answer(&query(ID));
    for wrong in [
        &wrong_id[..],
        &sent.payload,
        &sent.payload[..2],
        &[],
        &answer_to_guest,
    ] {
        lab.0.net.deliver(sent.socket, sent.to, wrong);
        lab.wait(millis(1));
        assert_eq!(lab.received(), [], "{wrong:?}");
    }
    assert_eq!(lab.dropped(DropReason::DnsUnasked), 5);
    // From elsewhere, even with the right identifier.
    lab.0
        .net
        .deliver(sent.socket, addr(TWO), &answer(&sent.payload));
    lab.wait(millis(1));
    assert_eq!(lab.received(), []);
    answered(&mut lab, &sent);
    is_answered(&mut lab, ID);
    // What a guest sends must be a query.
    lab.udp(5000, NAMES, &answer(&query(ID)));
    assert_eq!((lab.sent(), lab.received()), (vec![], vec![]));
    lab.rest();
}

#[test]
fn a_query_that_can_t_be_read_is_a_format_error() {
    let mut lab = with_resolvers(&[ONE]);
    for len in [0, 1, 2, 11, 14] {
        lab.udp(5000, NAMES, &query(ID)[..len]);
        assert_eq!(lab.sent(), vec![], "{len} bytes go nowhere");
        let received = lab.received();
        let (_, _, answer) = received[0].udp().unwrap();
        assert_eq!(
            (answer.len(), answer[2] & 0x80, answer[3] & 0xf),
            (12, 0x80, 1)
        );
        if len >= 2 {
            assert_eq!(answer[..2], ID.to_be_bytes());
        }
    }
    lab.rest();
}

#[test]
fn a_repeated_query_is_one_query() {
    let mut lab = with_resolvers(&[ONE]);
    for _ in 0..3 {
        lab.udp(5000, NAMES, &query(ID));
    }
    let sent = asked(&lab);
    answered(&mut lab, &sent);
    is_answered(&mut lab, ID);
    lab.udp(5000, NAMES, &query(ID));
    let again = asked(&lab);
    assert_ne!(again.socket, sent.socket);
    answered(&mut lab, &again);
    is_answered(&mut lab, ID);
    lab.rest();
}

#[test]
fn resolvers_that_change_count_from_the_next_query_on() {
    let mut lab = with_resolvers(&[ONE]);
    lab.udp(5000, NAMES, &query(ID));
    let sent = asked(&lab);
    answered(&mut lab, &sent);
    is_answered(&mut lab, ID);
    lab.0.net.set_resolvers(&[addr(TWO)]);
    lab.udp(5000, NAMES, &query(2));
    assert_eq!(asked(&lab).to, addr(TWO));
    // While a query is under way the list may even become empty.
    lab.0.net.set_resolvers(&[]);
    lab.wait(secs(1));
    lab.wait(millis(1));
    has_failed(&mut lab, 2);
    lab.rest();
}

#[test]
fn with_dns_off_nobody_is_there() {
    let mut lab = Lab::with(Config {
        dns: Dns::Off,
        ..Config::default()
    });
    lab.0.net.set_resolvers(&[addr(ONE)]);
    lab.udp(5000, NAMES, &query(ID));
    assert_eq!(lab.icmp_error(), (3, 3));
    assert_eq!(lab.sent(), []);
    lab.rest();
}

// --- published UDP ports -------------------------------------------------------------------------

#[test]
fn a_published_port_shows_its_clients_and_answers_find_them() {
    for host_loopback in [true, false] {
        let mut lab = Lab::with(Config {
            host_loopback,
            ..Config::default()
        });
        let id = lab.publish();
        for (client, seen) in [
            ("192.0.2.9:4000", "192.0.2.9:4000"),
            ("127.0.0.1:4001", "10.0.2.2:4001"),
            ("10.0.2.100:4002", "10.0.2.2:4002"),
        ] {
            lab.deliver(FIRST, client, b"question");
            assert_eq!(
                lab.reply().udp(),
                Some((addr(seen), 5000, &b"question"[..])),
                "{client}"
            );
            lab.udp(5000, seen, b"answer");
            let sent = lab.sent();
            assert_eq!(sent.len(), 1);
            assert_eq!((sent[0].socket, sent[0].to), (FIRST, addr(client)));
            assert_eq!(sent[0].payload, b"answer");
        }
        assert_eq!(lab.received(), []);
        assert!(lab.0.stack.unpublish(id, None));
        lab.rest();
    }
}

#[test]
fn a_client_is_remembered_for_180_seconds() {
    let mut lab = Lab::new();
    let id = lab.publish();
    lab.deliver(FIRST, "127.0.0.1:4001", b"question");
    lab.wait(secs(170));
    lab.udp(5000, "10.0.2.2:4001", b"late answer");
    assert_eq!(lab.sent()[0].socket, FIRST);
    lab.wait(secs(179));
    assert_eq!(lab.0.stack.flows(), 1);
    lab.wait(secs(2));
    assert_eq!(lab.0.stack.flows(), 0);
    lab.udp(5000, "10.0.2.2:4001", b"too late");
    let sent = lab.sent();
    assert_eq!(sent[0].to, addr("127.0.0.1:4001"));
    assert_ne!(sent[0].socket, FIRST, "now it is the guest that begins");
    assert!(lab.0.stack.unpublish(id, None));
    lab.rest();
}

#[test]
fn a_port_that_is_taken_back_is_closed() {
    let mut lab = Lab::new();
    let id = lab.publish();
    lab.deliver(FIRST, "192.0.2.9:4000", b"question");
    assert_eq!(lab.received().len(), 1);
    lab.0
        .net
        .deliver(FIRST, addr("192.0.2.9:4000"), b"on its way");
    assert!(lab.0.stack.unpublish(id, None));
    assert!(!lab.0.stack.unpublish(id, None));
    assert_eq!(lab.0.net.open_sockets(), 0);
    lab.wait(millis(1));
    lab.deliver(FIRST, "192.0.2.9:4000", b"too late");
    assert_eq!(lab.received(), []);
    lab.udp(5000, "192.0.2.9:4000", b"answer");
    assert_ne!(lab.sent()[0].socket, FIRST);
    lab.rest();
}

#[test]
fn a_burst_at_a_published_port_arrives_whole() {
    let mut lab = Lab::new();
    let id = lab.publish();
    for _ in 0..500 {
        lab.0
            .net
            .deliver(FIRST, addr("192.0.2.9:4000"), &filled(1400));
    }
    lab.wait(secs(1));
    assert_eq!(lab.received().len(), 500);
    assert!(lab.0.stack.unpublish(id, None));
    lab.rest();
}

#[test]
fn clients_over_the_limit_are_not_heard() {
    let mut lab = Lab::with(Config {
        max_flows: 1,
        ..Config::default()
    });
    let id = lab.publish();
    // Whom the guest has not answered gives way, whom it has does not.
    lab.deliver(FIRST, "192.0.2.9:3999", b"forgotten");
    lab.deliver(FIRST, "192.0.2.9:4000", b"first");
    lab.udp(5000, "192.0.2.9:4000", b"answer");
    assert_eq!(lab.sent().len(), 1);
    lab.deliver(FIRST, "192.0.2.9:4001", b"second");
    assert_eq!(lab.received().len(), 2);
    assert_eq!(lab.0.stack.counters().flows_refused, 1);
    assert!(lab.0.stack.unpublish(id, None));
    lab.rest();
}

#[test]
fn sockets_are_named_in_order() {
    // What the tests above take for granted of the simulated host.
    let mut lab = Lab::new();
    lab.udp(5000, "192.0.2.1:7", b"x");
    lab.udp(5001, "192.0.2.1:7", b"x");
    let sockets: Vec<SocketId> = lab.sent().iter().map(|sent| sent.socket).collect();
    assert_eq!(sockets, [FIRST, SocketId(1)]);
    lab.rest();
}
