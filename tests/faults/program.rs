//! Rows 8, 10 and 13 with the real program: a limit on descriptors, a tap that goes down, a resolv.conf that
//! changes and grows.
//!
//! In: a world, a guest and tapgate between them, and what is done to each. Out: what connections and
//! queries of the guest's saw of it, and that the same process serves them afterwards.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use crate::count;
use crate::frames::query;
use crate::support::attached::{Attached, Net};
use crate::support::dns::Resolver;
use crate::support::guest::Guest;
use crate::support::slirp4netns::{Api, descriptors};
use crate::support::sockets::Sockets;
use crate::support::sys::raise_descriptor_limit;
use crate::support::world::World;
use crate::support::{
    ANY, GATEWAY, GUEST, LOOPBACK, RESOLVER, SOON, WORLD_A, at, serve, timed, wait_until,
};

/// A connection carries bytes both ways.
fn echoes(mut stream: &TcpStream) {
    stream.write_all(b"still there?").unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"still there?");
}

#[test]
fn row_08_descriptors_of_the_program_run_out() {
    raise_descriptor_limit().unwrap();
    let runs = [(64, 150), (1024, 5_000)];
    for (limit, total) in runs.into_iter().take(count(1, 2)) {
        let world = World::new();
        let echo = serve::tcp_echo(world.listen(at(LOOPBACK, 0)).unwrap());
        let server = at(GATEWAY, echo.port());
        let guest = Guest::new(&world);
        let pid = guest.pid().to_string();
        let nofile = format!("--nofile={limit}:{limit}");
        // Without the sandbox its descriptors can be counted by whoever runs the test.
        let options = ["--sandbox", "off", &pid, "tap0"];
        let mut tapgate = Attached::start_by(&world, &["prlimit", &nofile], &options);
        let witness = guest.connect(server).unwrap();
        echoes(&witness);
        let before = descriptors(tapgate.pid()).len();
        let (mut opened, mut refused) = (Vec::new(), 0);
        for _ in 0..total {
            let (took, answer) = timed(|| guest.connect(server));
            match answer {
                Ok(stream) => opened.push(stream),
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED), "{error}");
                    assert!(took < Duration::from_secs(1), "refused at once: {took:?}");
                    refused += 1;
                }
            }
        }
        // Each worker has a few descriptors of its own.
        assert!(
            opened.len() > limit / 3 && refused > total - limit,
            "{refused}"
        );
        echoes(&witness);
        echoes(&opened[opened.len() / 2]);
        guest.run("ping", &["-c1", "-W5", "10.0.2.2"]).output();
        // One that goes makes room for one; when all have gone all is as before.
        opened.clear();
        let stream = wait_until("a new connection", SOON, || guest.connect(server).ok());
        echoes(&stream);
        drop(stream);
        wait_until("descriptors to come back", SOON, || {
            (descriptors(tapgate.pid()).len() <= before).then_some(())
        });
        echoes(&witness);
        assert_eq!(tapgate.try_status(), None, "{}", tapgate.log());
    }
}

#[test]
fn row_08_some_descriptors_are_kept_from_the_guest() {
    let world = World::new();
    let echo = serve::tcp_echo(world.listen(at(LOOPBACK, 0)).unwrap());
    let server = at(GATEWAY, echo.port());
    let guest = Guest::new(&world);
    let inside = guest.listen(at(ANY, 80)).unwrap();
    let pid = guest.pid().to_string();
    let options = [
        "--api-socket",
        "/mnt/api.sock",
        "-p",
        "8080:80",
        &pid,
        "tap0",
    ];
    let mut tapgate = Attached::start_by(&world, &["prlimit", "--nofile=64:64"], &options);
    let api = Api::new(&world, "api.sock");
    let (mut held, refused) = take_all(&guest, server);
    assert!(held.len() > 10 && refused.raw_os_error() == Some(libc::ECONNREFUSED));
    // Clients of the published port are served, past the tap and over it, and so is the API.
    let called = |to, port| {
        let outside = world.connect(at(to, port)).unwrap();
        let (inside, peer) = serve::accept(&inside);
        (&outside).write_all(b"question").unwrap();
        let mut heard = [0; 8];
        (&inside).read_exact(&mut heard).unwrap();
        ((outside, inside), peer.ip())
    };
    for _ in 0..5 {
        for (to, seen) in [(LOOPBACK, GUEST), (WORLD_A, WORLD_A)] {
            assert_eq!(called(to, 8080).1, seen);
        }
        let id = api.publish("tcp", 8081, 80);
        drop(called(LOOPBACK, 8081));
        assert_eq!(api.list().len(), 2);
        api.remove(id);
        let (more, _) = take_all(&guest, server);
        held.extend(more);
    }
    // Not even they can keep the API waiting, and all get through once there is room.
    let clients: Vec<_> = (0..30)
        .map(|_| world.connect(at(WORLD_A, 8080)).unwrap())
        .collect();
    let echo_inside = serve::tcp_echo(inside.try_clone().unwrap());
    for _ in 0..10 {
        assert_eq!(api.list().len(), 1);
    }
    held.clear();
    clients.iter().for_each(echoes);
    drop(echo_inside);
    drop(clients);
    let freed = wait_until("descriptors to come back", SOON, || {
        guest.connect(server).ok()
    });
    assert_eq!(called(LOOPBACK, 8080).1, GUEST);
    // The end of the target is noticed when the guest holds everything.
    let (held, _) = take_all(&guest, server);
    drop((guest, freed));
    let ended = wait_until("the end of the target", SOON, || tapgate.try_status());
    assert!(ended.success(), "{}", tapgate.log());
    drop(held);
}

/// All connections that a guest gets, and what the next one hears.
fn take_all(guest: &Guest, server: SocketAddr) -> (Vec<TcpStream>, std::io::Error) {
    let mut held = Vec::new();
    loop {
        match guest.connect(server) {
            Ok(stream) => held.push(stream),
            Err(error) => return (held, error),
        }
    }
}

#[test]
fn row_10_tap_down_and_up() {
    // What is lost is told to who asks for that much.
    let mut net = Net::up(&["-vv"]);
    let listener = net.world.listen(at(LOOPBACK, 0)).unwrap();
    let server = at(GATEWAY, listener.local_addr().unwrap().port());
    let inside = net.guest.connect(server).unwrap();
    let (outside, _) = serve::accept(&listener);
    let pid = net.tapgate.pid();
    let lost = |net: &Net| net.tapgate.log().matches("frames lost").count();
    for _ in 0..count(1, 100) {
        let before = lost(&net);
        let set = |state| {
            net.guest
                .run("ip", &["link", "set", "tap0", state])
                .output()
        };
        set("down");
        // What the host sends meets a tap that takes nothing (EIO), and is repeated later.
        (&outside).write_all(b"while it was down").unwrap();
        wait_until("a frame to be lost", SOON, || {
            (lost(&net) > before).then_some(())
        });
        set("up");
        let mut came = [0; 17];
        (&inside).read_exact(&mut came).unwrap();
        assert_eq!(&came, b"while it was down");
        for (from, to) in [(&inside, &outside), (&outside, &inside)] {
            (&mut { from }).write_all(b"and up").unwrap();
            let mut came = [0; 6];
            (&mut { to }).read_exact(&mut came).unwrap();
            assert_eq!(&came, b"and up");
        }
        let another = net.guest.connect(server).unwrap();
        let (accepted, _) = serve::accept(&listener);
        drop((another, accepted));
    }
    assert_eq!((net.tapgate.pid(), net.tapgate.try_status()), (pid, None));
}

/// Whether the guest gets an answer to a query.
fn resolves(socket: &UdpSocket, id: u16) -> bool {
    socket.send(&query(id)).unwrap();
    let mut answer = [0; 512];
    let len = socket.recv(&mut answer).unwrap();
    let good = answer[..2] == id.to_be_bytes() && answer[3] & 15 == 0;
    good && len > query(id).len()
}

#[test]
fn row_13_resolv_conf_that_changes() {
    let world = World::new();
    let place = |last| SocketAddr::new(Ipv4Addr::new(127, 0, 0, last).into(), 53);
    let first = Resolver::start(&world, place(1), Ipv4Addr::new(192, 0, 2, 1));
    let second = Resolver::start(&world, place(2), Ipv4Addr::new(192, 0, 2, 2));
    let net = Net::up_in(world, &[]);
    let socket = net.guest.udp_to(at(RESOLVER, 53)).unwrap();
    let mut id = 0;
    let mut ask = || {
        id += 1;
        assert!(resolves(&socket, id), "query {id}");
    };
    let mut expected = (0, 0);
    for round in 0..count(30, 1_000) {
        // Replaced, emptied (127.0.0.1 it is then), full of what is no server, a thousand servers of
        // which eight count, ten mebibytes of which a part is read: a query meets what is there now.
        let text = match round % 5 {
            0 => "nameserver 127.0.0.2\n".to_owned(),
            1 => String::new(),
            2 => format!("{}nameserver 127.0.0.2\n", "nonsense \u{0} \n".repeat(100)),
            3 => "nameserver 127.0.0.1\n".repeat(1000),
            _ if round % 50 == 4 => format!("nameserver 127.0.0.2\n{}", "#".repeat(10 << 20)),
            _ => "search a.example\nnameserver 127.0.0.2\n".to_owned(),
        };
        net.world.set_resolv_conf(&text);
        ask();
        if matches!(round % 5, 1 | 3) {
            expected.0 += 1;
        } else {
            expected.1 += 1;
        }
        // A file that is gone for a moment is no reason to forget what it said, nor to end.
        if round % 7 == 6 {
            net.world.link_resolv_conf("/nowhere");
            ask();
            expected.0 += 1;
        }
    }
    let asked = (first.questions().len(), second.questions().len());
    assert_eq!(asked, expected, "each went where the file said");
}
