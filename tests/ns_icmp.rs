//! Echo requests, and frames that no well-behaved kernel sends, on a real kernel as an unprivileged
//! user: what the gateway answers itself, what goes on over ping sockets, and what must never reach
//! the host's loopback.

mod support;

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use support::attached::Net;
use support::serve;
use support::sockets::Sockets;
use support::world::World;
use support::{GATEWAY, GUEST, at};

const ANY: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

fn ping(net: &Net, arguments: &[&str]) -> support::process::Finished {
    net.guest
        .run("ping", &[&["-c2", "-i0.2", "-W3"], arguments].concat())
}

#[test]
fn gateway_and_resolver_answer_echo_requests() {
    let net = Net::up(&[]);
    for addr in ["10.0.2.2", "10.0.2.3"] {
        let shown = ping(&net, &[addr]).output();
        assert!(shown.contains(" 0% packet loss"), "{shown}");
    }
    let long = ping(&net, &["-s", "8000", "10.0.2.2"]).output();
    assert!(long.contains(" 0% packet loss"), "in fragments: {long}");
}

#[test]
fn address_of_nobody_in_the_guests_network_does_not_answer() {
    let net = Net::up(&[]);
    let finished = net.guest.run("ping", &["-c1", "-W1", "10.0.2.77"]);
    assert!(
        !finished.status.success(),
        "ARP is answered for the gateway only: {finished:?}"
    );
}

#[test]
fn host_address_answers_over_a_ping_socket() {
    let net = Net::up(&[]);
    for addr in ["192.0.2.1", "198.51.100.1"] {
        let shown = ping(&net, &[addr]).output();
        assert!(shown.contains(" 0% packet loss"), "{shown}");
    }
}

#[test]
fn address_without_a_route_is_unreachable() {
    let net = Net::up(&[]);
    let finished = ping(&net, &["203.0.113.9"]);
    assert!(finished.stdout.contains("nreachable"), "{finished:?}");
}

#[test]
fn forbidden_ping_sockets_are_hinted_at_once() {
    let net = Net::up_in(World::without_ping_sockets(), &[]);
    for _ in 0..2 {
        assert!(
            !net.guest
                .run("ping", &["-c1", "-W1", "192.0.2.1"])
                .status
                .success()
        );
    }
    let shown = ping(&net, &["10.0.2.2"]).output();
    assert!(
        shown.contains(" 0% packet loss"),
        "the gateway still answers: {shown}"
    );
    let log = net.tapgate.log();
    let hints = log
        .lines()
        .filter(|line| line.contains("ping_group_range"))
        .count();
    assert_eq!(hints, 1, "{log}");
}

/// Every destination that would mean the host itself, or nobody, to the host's kernel.
const FORBIDDEN: [Ipv4Addr; 8] = [
    Ipv4Addr::LOCALHOST,
    Ipv4Addr::new(127, 0, 0, 53),
    Ipv4Addr::new(127, 255, 255, 254),
    Ipv4Addr::UNSPECIFIED,
    Ipv4Addr::new(0, 0, 0, 1),
    Ipv4Addr::new(224, 0, 0, 1),
    Ipv4Addr::new(240, 0, 0, 1),
    Ipv4Addr::BROADCAST,
];

#[test]
fn datagrams_in_frames_to_loopback_do_not_reach_the_host() {
    let net = Net::up(&[]);
    let server = net.world.udp(at(ANY, 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    let gateway = net.guest.gateway_mac();
    let frames: Vec<_> = FORBIDDEN
        .iter()
        .map(|addr| udp_frame(gateway, *addr, port, b"forbidden"))
        .collect();
    net.guest.send_frames(&frames);
    // Frames are taken in order: when this one has arrived, the others were dropped.
    let allowed = Ipv4Addr::new(10, 0, 2, 2);
    net.guest
        .send_frames(&[udp_frame(gateway, allowed, port, b"allowed")]);
    let mut heard = [0; 64];
    let (length, _) = server.recv_from(&mut heard).unwrap();
    assert_eq!(
        &heard[..length],
        b"allowed",
        "the harness's frames are right, and only this came"
    );
    assert!(!serve::readable(&server, Duration::from_millis(100)));
}

#[test]
fn connections_in_frames_to_loopback_do_not_reach_the_host() {
    let net = Net::up(&[]);
    let listener = net.world.listen(at(ANY, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let gateway = net.guest.gateway_mac();
    let frames: Vec<_> = FORBIDDEN
        .iter()
        .map(|addr| syn_frame(gateway, *addr, port))
        .collect();
    net.guest.send_frames(&frames);
    let mut allowed = net.guest.connect(at(GATEWAY, port)).unwrap();
    std::io::Write::write_all(&mut allowed, b"allowed").unwrap();
    let (mut stream, _) = serve::accept(&listener);
    let mut heard = [0; 7];
    std::io::Read::read_exact(&mut stream, &mut heard).unwrap();
    assert_eq!(&heard, b"allowed");
    assert!(
        !serve::readable(&listener, Duration::from_millis(100)),
        "only this connection"
    );
}

fn udp_frame(gateway: [u8; 6], to: Ipv4Addr, port: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).expect("small");
    let mut datagram = [40000_u16, port, length, 0].map(u16::to_be_bytes).concat();
    datagram.extend(payload);
    frame(gateway, to, 17, datagram, 6)
}

fn syn_frame(gateway: [u8; 6], to: Ipv4Addr, port: u16) -> Vec<u8> {
    let mut segment = [40001_u16, port, 0, 1, 0, 0, 0x5002, 64240, 0, 0]
        .map(u16::to_be_bytes)
        .concat();
    segment.truncate(20);
    frame(gateway, to, 6, segment, 16)
}

/// An Ethernet frame from the guest's address, with both checksums right. `sum_at` is where the
/// segment or datagram keeps its own.
fn frame(
    gateway: [u8; 6],
    to: Ipv4Addr,
    protocol: u8,
    mut body: Vec<u8>,
    sum_at: usize,
) -> Vec<u8> {
    let IpAddr::V4(from) = GUEST else {
        return Vec::new();
    };
    let length = u16::try_from(body.len()).expect("small");
    let pseudo = [
        &from.octets()[..],
        &to.octets(),
        &[0, protocol],
        &length.to_be_bytes(),
    ]
    .concat();
    let sum = checksum(&[pseudo, body.clone()].concat());
    body[sum_at..sum_at + 2].copy_from_slice(&sum.to_be_bytes());

    let mut header = vec![0x45, 0];
    header.extend((length + 20).to_be_bytes());
    header.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    header.extend(from.octets());
    header.extend(to.octets());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    [&gateway[..], &[2, 0, 0, 0, 0, 1], &[8, 0], &header, &body].concat()
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("small")
}
