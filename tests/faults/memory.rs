//! Row 47: limits on memory, of address space and of a control group. A crowd of flows comes that would not
//! fit; what does not is refused, and nothing ends for it.
//!
//! In: limits that the real program begins under, and one that the simulated one is told. Out: that every connection
//! that was let in carries bytes, that who is over the limit is refused, and that the process is the same.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;

use nix::unistd::chown;
use tapgate::config::Config;
use tapgate::flow::tcp_engine::RING;
use tapgate::host::simulated::ConnectAnswer;

use crate::count;
use crate::packets::{Ipv4, UDP};
use crate::peer::{ACK, Peer, RST};
use crate::rig::{Rig, addr};
use crate::support::attached::Attached;
use crate::support::guest::Guest;
use crate::support::sockets::Sockets;
use crate::support::sys::raise_descriptor_limit;
use crate::support::world::World;
use crate::support::{GATEWAY, LOOPBACK, at, serve, user};

/// Engines that have room in what the simulated program is told.
const ENGINES: usize = 8;

#[test]
fn row_47_engines_go_round() {
    let mut rig = Rig::with(Config {
        ring_space: ENGINES * 2 * RING,
        ..Config::default()
    });
    rig.net.answer_all(ConnectAnswer::Accept);
    // Many more than there are engines, at one moment: each is there and carries bytes.
    let mut flows: Vec<_> = (0..count(300, 5_000))
        .map(|nth| rig.open(u16::try_from(1000 + nth).unwrap(), addr("192.0.2.1:80")))
        .collect();
    for (peer, id) in &mut flows {
        rig.take();
        rig.frame(&peer.data(b"question"));
        assert_eq!(rig.net.server_read(*id, 100), b"question");
        assert_eq!(rig.net.server_write(*id, b"answer"), 6);
        rig.turn();
        let came = peer.read(&rig.received());
        assert!(came.iter().any(|it| it.data == b"answer"), "{came:?}");
        peer.take_all(&came);
        rig.frame(&peer.ack());
        assert!(rig.stack.buffers().1 <= ENGINES);
    }
    // Where all have something under way a new one is refused; the others lose nothing by it.
    for (_, id) in &flows[..ENGINES] {
        assert_eq!(rig.net.server_write(*id, b"not acknowledged"), 16);
        rig.turn();
    }
    rig.take();
    let newcomer = |rig: &mut Rig| {
        let mut peer = Peer::new(999, addr("192.0.2.1:80"));
        rig.frame(&peer.syn());
        peer.read(&rig.received()).pop().unwrap().flags
    };
    assert_eq!(newcomer(&mut rig), RST | ACK);
    let (peer, id) = &mut flows[ENGINES];
    let later = peer.data(b"later");
    rig.frame(&later);
    assert_eq!(rig.net.server_read(*id, 100), b"");
    for (peer, _) in &mut flows[..ENGINES] {
        peer.next.ack = peer.next.ack.wrapping_add(16);
        rig.frame(&peer.ack());
    }
    rig.frame(&later);
    assert_eq!(rig.net.server_read(flows[ENGINES].1, 100), b"later");
    assert_ne!(newcomer(&mut rig), RST | ACK);
    for (peer, _) in &flows {
        rig.frame(&peer.rst());
    }
    rig.recovers(0);
}

/// One byte there and back.
fn echoes(mut stream: &TcpStream) {
    stream.write_all(b"!").unwrap();
    let mut byte = [0];
    stream.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"!");
}

/// A crowd of connections and of ports comes to a program that `wrapper` starts under a limit.
fn crowd(world: &World, wrapper: &[&str], tcp: usize, udp: usize) {
    raise_descriptor_limit().unwrap();
    let server = serve::tcp_echo(world.listen(at(LOOPBACK, 0)).unwrap());
    let guest = Guest::new(world);
    let pid = guest.pid().to_string();
    let mut tapgate = Attached::start_by(world, wrapper, &[&pid, "tap0"]);
    let witness = guest.connect(at(GATEWAY, server.port())).unwrap();
    let mut open = Vec::new();
    for _ in 0..tcp {
        if let Ok(stream) = guest.connect(at(GATEWAY, server.port())) {
            echoes(&stream);
            open.push(stream);
        }
    }
    assert!(open.len() > tcp / 6, "{} of {tcp}", open.len());
    let ip = Ipv4 {
        src: Ipv4Addr::new(10, 0, 2, 50),
        ..Ipv4::new(Ipv4Addr::new(10, 0, 2, 2), UDP)
    };
    let ports: Vec<usize> = (0..udp).collect();
    for some in ports.chunks(500) {
        let frames = some.iter().map(|port| {
            let port = u16::try_from(1000 + port).unwrap();
            ip.frame(&ip.udp(port, server.port(), b"x"))
        });
        guest.send_frames(&frames.collect::<Vec<_>>());
        echoes(&witness);
    }
    open.iter().for_each(echoes);
    assert_eq!(tapgate.try_status(), None, "{}", tapgate.log());
}

#[test]
fn row_47_limit_on_address_space() {
    let world = World::new();
    let wrapper = ["prlimit", "--as=33554432"];
    crowd(&world, &wrapper, count(300, 6_000), count(2_000, 14_000));
}

/// A control group of the first version that the test user may enter, with a limit of 64 MiB.
struct Group(PathBuf);

impl Group {
    /// None where the machine has none, or does not let us.
    fn new() -> Option<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        let memory = own.lines().find_map(|line| line.split_once(":memory:"))?.1;
        let name = format!("tapgate-test-{}", std::process::id());
        let path = PathBuf::from(format!("/sys/fs/cgroup/memory{memory}/{name}"));
        fs::create_dir(&path).ok()?;
        let group = Self(path);
        fs::write(group.0.join("memory.limit_in_bytes"), "67108864").ok()?;
        let (uid, gid) = user::ids();
        chown(&group.0.join("cgroup.procs"), Some(uid), Some(gid)).ok()?;
        Some(group)
    }

    /// Processes that were killed for it.
    fn killed(&self) -> u64 {
        let text = fs::read_to_string(self.0.join("memory.oom_control")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        line.unwrap().parse().unwrap()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn row_47_limit_of_a_control_group() {
    let Some(group) = Group::new() else {
        return println!("skipped: no memory control group of version 1 can be made here");
    };
    let world = World::new();
    let enter = format!(
        "echo $$ > {}/cgroup.procs && exec \"$@\"",
        group.0.display()
    );
    let wrapper = ["sh", "-c", &enter, "sh"];
    crowd(&world, &wrapper, count(300, 6_000), count(4_000, 14_000));
    assert_eq!(group.killed(), 0);
}
