//! Datagrams: a guest's port, a published one, pings, queries.

use tapgate::host::simulated::{Call, SocketId};
use tapgate::host::{DatagramRole, QueuedError};
use tapgate::net::emit::IcmpError;

use crate::Script;
use crate::lab::{Lab, addr, filled, millis, secs};
use crate::packets;
use crate::world::{World, answer, ping, query};

const PEER: &str = "192.0.2.1:7";

/// The network complains about something that was sent there.
fn complain(lab: &mut Lab, socket: SocketId, to: &str, payload: &[u8]) {
    let error = QueuedError {
        error: IcmpError::PortUnreachable,
        reporter: None,
        destination: addr(to),
        quoted: 0,
    };
    lab.0.net.report_error(socket, error, payload);
    lab.wait(millis(1));
}

/// The payloads of the datagrams that came to the guest.
fn heard(lab: &mut Lab) -> Vec<Vec<u8>> {
    let came = lab.received().into_iter();
    let came = came.filter(|it| it.protocol == packets::UDP);
    came.map(|it| it.payload[8..].to_vec()).collect()
}

fn own_port(world: &mut World) {
    let lab = &mut world.lab;
    lab.udp(5000, PEER, b"first");
    // Three at once travel together.
    for payload in [&[1; 500], &[2; 500], &[3; 500]] {
        lab.udp_later(5000, PEER, payload);
    }
    lab.wait(millis(1));
    // One that is too long for the host's first link.
    lab.0.net.limit_datagrams(Some(1000));
    lab.udp(5000, PEER, &[4; 1200]);
    lab.0.net.limit_datagrams(None);
    let sent = lab.sent().len();
    lab.received();
    let outbound = |role: Option<DatagramRole>| matches!(role, Some(DatagramRole::Outbound(_)));
    let Some(socket) = world.datagram_socket(outbound) else {
        return;
    };
    let lab = &mut world.lab;
    lab.deliver(socket, PEER, b"answer");
    complain(lab, socket, PEER, b"first");
    for nth in 0..40 {
        lab.0.net.deliver(socket, addr(PEER), &filled(nth));
    }
    lab.wait(millis(1));
    let came = heard(lab);
    // The guest hears what was said, in order, once.
    let mut said = std::iter::once(b"answer".to_vec()).chain((0..40).map(filled));
    let in_order = came.iter().all(|it| said.any(|next| next == *it));
    assert!(in_order, "out of place: {came:?}");
    world.complete = sent == 4 && came.len() == 41;
    world.lab.udp(5000, PEER, b"last");
    world.lab.wait(secs(60));
}

#[test]
fn port_of_the_guest() {
    Script {
        name: "UDP",
        world: World::new,
        live: own_port,
        calls: &[
            Call::OpenUdp,
            Call::WatchUdp,
            Call::SendDatagram,
            Call::ReceiveDatagrams,
        ],
    }
    .fails_everywhere();
}

fn published_port(world: &mut World) {
    let client = "192.0.2.9:7000";
    let published = |role: Option<DatagramRole>| matches!(role, Some(DatagramRole::Published(_)));
    let socket = world.datagram_socket(published).unwrap();
    let lab = &mut world.lab;
    lab.deliver(socket, client, b"question");
    for nth in 0..70 {
        lab.0.net.deliver(socket, addr(client), &filled(nth));
    }
    lab.wait(secs(1));
    let came = heard(lab);
    lab.udp(5000, client, b"answer");
    let sent = lab.sent();
    assert!(
        sent.iter()
            .all(|it| it.socket == socket || it.to == addr(client))
    );
    complain(lab, socket, client, b"answer");
    lab.deliver(socket, client, b"again");
    // A host that fails is well again, and tells nobody: the port looks for itself.
    lab.wait(secs(60));
    world.heal();
    world.lab.wait(secs(1));
    world.lab.wait(millis(1));
    let lab = &mut world.lab;
    let again = heard(lab);
    assert!(again.iter().all(|it| came.len() < 71 || it == b"again"));
    let all = came.len() + again.len();
    world.complete = all == 72 && sent.len() == 1;
    let lost = 72 - all;
    // What one call has taken with it, at most.
    assert!(lost <= 32, "{lost} of 72 are lost");
    lab.deliver(socket, client, b"still there");
    assert!(
        heard(lab).contains(&b"still there".to_vec()),
        "it is served"
    );
}

#[test]
fn published_port_of_the_guest() {
    Script {
        name: "published UDP",
        world: World::published,
        live: published_port,
        calls: &[Call::SendDatagram, Call::ReceiveDatagrams],
    }
    .fails_everywhere();
}

fn pings(world: &mut World) {
    let to = "192.0.2.1";
    let lab = &mut world.lab;
    ping(lab, 77, to);
    let sent = lab.sent().len();
    lab.received();
    let Some(socket) = world.datagram_socket(|role| role.is_none()) else {
        return;
    };
    let lab = &mut world.lab;
    let from = to.parse().unwrap();
    for seq in 1..40 {
        lab.0.net.deliver_echo(socket, from, seq, b"ping");
    }
    lab.wait(millis(1));
    complain(lab, socket, "192.0.2.1:0", &[8, 0, 0, 0, 0, 0, 0, 1]);
    lab.0.net.deliver_echo(socket, from, 40, b"ping");
    lab.wait(millis(1));
    let came = lab.received();
    let replies = came.iter().filter(|it| it.icmp() == Some((0, 0))).count();
    world.complete = sent == 1 && replies == 40;
    ping(&mut world.lab, 77, to);
    world.lab.wait(secs(90));
}

#[test]
fn ping_of_the_guest() {
    Script {
        name: "ping",
        world: World::new,
        live: pings,
        calls: &[Call::OpenEcho, Call::SendEcho, Call::ReceiveEchoes],
    }
    .fails_everywhere();
}

fn queries(world: &mut World) {
    let lab = &mut world.lab;
    lab.udp(5001, "10.0.2.3:53", &query(1));
    for round in 0..8 {
        for sent in lab.sent() {
            // The first attempt stays without an answer, and the second gets a wrong one first.
            if round > 0 {
                let to = sent.to.to_string();
                lab.deliver(sent.socket, &to, b"no answer at all");
                let answer = answer(&sent.payload);
                lab.deliver(sent.socket, &to, &answer);
            }
        }
        lab.wait(secs(2));
    }
    let came = heard(lab);
    // An answer, be it that there is none; and one alone.
    assert_eq!(came.len(), 1, "{came:?}");
    assert_eq!(came[0][..2], [0, 1]);
    world.complete = came[0][3] & 15 == 0;
}

#[test]
fn query_of_the_guest() {
    Script {
        name: "DNS over UDP",
        world: World::new,
        live: queries,
        calls: &[
            Call::OpenUdp,
            Call::WatchUdp,
            Call::SendDatagram,
            Call::ReceiveDatagrams,
        ],
    }
    .fails_everywhere();
}
