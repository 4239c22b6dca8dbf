//! Row 10 with the real program: a guest that takes no frames for a minute, as the kernel of a namespace always does, but
//! a virtual machine at a socket (`--target-type=bess`) may not.
//!
//! In: a machine that goes on sending and does not read. Out: the memory that is held for it meanwhile, and what it hears
//! once it reads again.

use std::fs;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::thread::sleep;
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};

use crate::count;
use crate::packets::{self, ICMP, Ipv4, Received};
use crate::peer::{ACK, Peer, SYN};
use crate::rig::GATEWAY;
use crate::support::slirp4netns::Call;
use crate::support::sockets::Sockets;
use crate::support::world::World;
use crate::support::{LOOPBACK, at, serve};

/// Answers that are waited for by nobody, in a second.
const LOST: usize = 2_000;
/// The kernel holds some hundred frames for who does not read; we hold a batch.
const MOST_HELD: u64 = 4 << 10;

/// Resident memory that is not of a file, kilobytes.
fn anonymous(pid: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let number = line.unwrap().trim().split(' ').next();
    number.unwrap().parse().unwrap()
}

/// The packets of the next frame.
fn next(machine: &Socket) -> Vec<Received> {
    let mut frame = vec![0; 65_536];
    let length = (&mut &*machine).read(&mut frame).unwrap();
    frame.truncate(length);
    packets::read(&[frame]).unwrap()
}

#[test]
fn row_10_guest_that_does_not_read() {
    let world = World::new();
    let arguments = ["--target-type=bess", "-r", "3", "/mnt/vm.sock"];
    let mut slirp4netns = Call::new(&world, &arguments).ready_at(3);
    let machine = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
    let path = world.dir().join("vm.sock");
    machine.connect(&SockAddr::unix(path).unwrap()).unwrap();
    // What was lost is sent again a minute later, at the latest.
    let patience = Duration::from_secs(130);
    machine.set_read_timeout(Some(patience)).unwrap();
    let send = |frame: &[u8]| assert_eq!(machine.send(frame).unwrap(), frame.len());
    let listener = world.listen(at(LOOPBACK, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut peer = Peer::new(4000, SocketAddr::new(GATEWAY.into(), port));
    send(&peer.syn());
    let answer = loop {
        if let Some(answer) = peer.read(&next(&machine)).pop() {
            break answer;
        }
    };
    assert_eq!(answer.flags, SYN | ACK);
    peer.take(&answer);
    send(&peer.ack());
    let (mut outside, _) = serve::accept(&listener);
    // From now on it reads nothing.
    let echo = serve::udp_echo(world.udp(at(LOOPBACK, 0)).unwrap());
    let question = packets::udp_frame(
        5000,
        SocketAddr::new(GATEWAY.into(), echo.port()),
        &[7; 1000],
    );
    let seconds = count(1, 60);
    let mut before = None;
    for second in 0..seconds {
        (0..LOST).for_each(|_| send(&question));
        outside.write_all(b"for the deaf").unwrap();
        before.get_or_insert_with(|| anonymous(slirp4netns.pid()));
        if seconds > 1 {
            sleep(Duration::from_secs(1));
        }
        let held = anonymous(slirp4netns.pid()).saturating_sub(before.unwrap_or(0));
        assert!(held <= MOST_HELD, "{held} kB after {second} s");
    }
    assert_eq!(slirp4netns.try_status(), None);
    // It reads again: the gateway is there, and so is every byte.
    let ping = packets::icmp(8, 0, [7, 1], b"there?");
    let mut pinged = false;
    let mut heard: Vec<u8> = Vec::new();
    let expected = b"for the deaf".repeat(seconds);
    while !pinged || heard.len() < expected.len() {
        // The first ones meet a queue that is full still.
        if !pinged {
            send(&Ipv4::new(GATEWAY, ICMP).frame(&ping));
        }
        let packets = next(&machine);
        pinged |= packets.iter().any(|it| it.icmp() == Some((0, 0)));
        for segment in peer.read(&packets) {
            if segment.seq == peer.next.ack && !segment.data.is_empty() {
                heard.extend(&segment.data);
                peer.take(&segment);
            }
            send(&peer.ack());
        }
    }
    assert!(heard == expected);
    assert_eq!(slirp4netns.try_status(), None);
}
