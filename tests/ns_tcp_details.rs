//! TCP to the letter, as a real kernel inside sees it: what was agreed on, urgent data, keep-alive, a
//! listener without room. How connections begin and end is in `ns_tcp.rs`.

#![allow(
    clippy::disallowed_methods,
    reason = "the bans on clocks and threads are for the core"
)]

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{SockAddr, Socket};

use support::attached::Net;
use support::serve::accept;
use support::sockets::Sockets;
use support::{GATEWAY, LOOPBACK, SOON, at, wait_until};

/// The gateway and what it stands for, in both families.
const WAYS: [(IpAddr, IpAddr); 2] = [
    (GATEWAY, LOOPBACK),
    (
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2)),
        IpAddr::V6(Ipv6Addr::LOCALHOST),
    ),
];

/// A connection through tapgate: the guest's end and the host's.
fn connection(net: &Net, (gateway, host): (IpAddr, IpAddr)) -> (TcpStream, TcpStream) {
    let listener = net.world.listen(at(host, 0)).expect("a free port");
    let port = listener.local_addr().expect("it is bound").port();
    let guest = net.guest.connect(at(gateway, port));
    (
        guest.expect("tapgate takes the connection"),
        accept(&listener).0,
    )
}

/// Connects to ADDR PORT and prints what was agreed on: `tcpi_options` of linux/tcp.h, and the MSS.
const AGREED: &str = "
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as stream:
    info = stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)
    print(info[5], stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG))
";

#[test]
fn ends_agree_on_everything_that_linux_offers() {
    /// `TCPI_OPT_TIMESTAMPS`, `_SACK` and `_WSCALE`.
    const OPTIONS: u8 = 1 | 2 | 4;
    /// Bytes of timestamps in each segment.
    const TIMESTAMPS: u16 = 12;
    for (mtu, mss) in [
        (1500, [1460, 1440]),
        (1280, [1240, 1220]),
        (9000, [8960, 8940]),
    ] {
        let net = Net::up(&["--mtu", &mtu.to_string()]);
        for ((gateway, host), mss) in WAYS.into_iter().zip(mss) {
            let listener = net.world.listen(at(host, 0)).unwrap();
            let port = listener.local_addr().unwrap().port().to_string();
            let words = ["-c", AGREED, &gateway.to_string(), &port];
            let said = net.guest.run("/usr/bin/python3", &words).output();
            let expected = format!("{OPTIONS} {}", mss - TIMESTAMPS);
            assert_eq!(said.trim(), expected, "by {gateway}, MTU {mtu}");
        }
    }
}

#[test]
fn urgent_data_stay_in_the_stream() {
    let net = Net::up(&[]);
    for way in WAYS {
        let (guest, host) = connection(&net, way);
        for (mut from, mut to) in [
            (guest.try_clone().unwrap(), host.try_clone().unwrap()),
            (host, guest),
        ] {
            from.write_all(b"before").unwrap();
            Socket::from(from.try_clone().unwrap())
                .send_out_of_band(b"!")
                .unwrap();
            from.write_all(b"after").unwrap();
            // It need not end for that to arrive.
            let mut heard = [0; 12];
            to.read_exact(&mut heard).unwrap();
            assert_eq!(
                String::from_utf8_lossy(&heard),
                "before!after",
                "by {}",
                way.0
            );
        }
    }
}

/// Bulk to the guest goes another way, by which the host's socket is peeked at.
#[test]
fn urgent_data_do_not_end_bulk() {
    const PIECE: usize = 64 * 1024;
    let net = Net::up(&[]);
    for way in WAYS {
        let (mut guest, mut host) = connection(&net, way);
        let sender = std::thread::spawn(move || {
            for number in 0..200 {
                host.write_all(&vec![number; PIECE]).unwrap();
                let marked = Socket::from(host.try_clone().unwrap());
                marked.send_out_of_band(b"!").unwrap();
            }
            host
        });
        let mut piece = vec![0; PIECE + 1];
        for number in 0..200 {
            guest.read_exact(&mut piece).unwrap();
            let (mark, rest) = piece.split_last().unwrap();
            assert!(*mark == b'!' && rest.iter().all(|it| *it == number));
        }
        drop(sender.join().unwrap());
    }
}

#[test]
fn keep_alive_probes_are_answered() {
    const PROBES: u64 = 4;
    let net = Net::up(&[]);
    for way in WAYS {
        let (mut guest, mut host) = connection(&net, way);
        let before = keep_alive_probes(&net);
        let fd = guest.as_fd();
        // Two probes without an answer would end it.
        setsockopt(&fd, sockopt::KeepAlive, &true).unwrap();
        setsockopt(&fd, sockopt::TcpKeepIdle, &1).unwrap();
        setsockopt(&fd, sockopt::TcpKeepInterval, &1).unwrap();
        setsockopt(&fd, sockopt::TcpKeepCount, &2).unwrap();
        wait_until("probes", SOON, || {
            (keep_alive_probes(&net) >= before + PROBES).then_some(())
        });
        guest.write_all(b"x").unwrap();
        assert_eq!(host.read(&mut [0; 8]).unwrap(), 1);
    }
}

/// A reader that falls behind and catches up again: the window closes at odd places and opens, and the guest has
/// no reason to send anything twice.
#[test]
fn slow_reader_makes_the_guest_repeat_nothing() {
    const LENGTH: usize = 48 << 20;
    let net = Net::up(&[]);
    for way in WAYS {
        let (mut guest, mut host) = connection(&net, way);
        let writer = thread::spawn(move || {
            guest.write_all(&vec![7; LENGTH])?;
            guest.shutdown(Shutdown::Write)
        });
        let mut buffer = vec![0; 1 << 20];
        let (mut received, mut turn) = (0, 0);
        loop {
            // Many little pieces, then as much as there is.
            let size = if turn % 20_064 < 20_000 {
                97
            } else {
                buffer.len()
            };
            turn += 1;
            match host.read(&mut buffer[..size]).expect("it is connected") {
                0 => break,
                len => received += len,
            }
        }
        assert_eq!(received, LENGTH);
        writer.join().expect("no panic").expect("it is connected");
    }
    for counter in ["TcpExtTCPFastRetrans", "TcpExtTCPSACKDiscard"] {
        assert_eq!(count(&net, counter), 0, "{counter}");
    }
}

/// Probes that the guest's kernel has sent.
fn keep_alive_probes(net: &Net) -> u64 {
    count(net, "TcpExtTCPKeepAlive")
}

/// A counter of the guest's kernel.
fn count(net: &Net, counter: &str) -> u64 {
    let said = net.guest.run("nstat", &["-saz", counter]);
    let said = said.output();
    let mut words = said.split_whitespace().skip_while(|word| *word != counter);
    let count = words.nth(1).and_then(|count| count.parse().ok());
    count.expect("nstat names the counter and its value")
}

#[test]
fn gateway_is_no_hop_to_itself() {
    let net = Net::up(&[]);
    for (gateway, host) in WAYS {
        let listener = net.world.listen(at(host, 0)).unwrap();
        let socket = stream_of(&net.guest, gateway);
        match gateway {
            IpAddr::V4(_) => socket.set_ttl_v4(1).unwrap(),
            IpAddr::V6(_) => socket.set_unicast_hops_v6(1).unwrap(),
        }
        let target = at(gateway, listener.local_addr().unwrap().port());
        socket
            .connect_timeout(&SockAddr::from(target), SOON)
            .unwrap();
    }
}

#[test]
fn full_listener_looks_full() {
    let net = Net::up(&[]);
    for (gateway, host) in WAYS {
        let listener = narrow_listener(&net, host);
        let addr = listener.local_addr().unwrap();
        let waiting = fill(&net, addr);
        let (tell, told) = channel();
        let guest = stream_of(&net.guest, gateway);
        let connecting = thread::spawn(move || {
            let target = SockAddr::from(at(gateway, addr.port()));
            let connected = guest.connect_timeout(&target, SOON);
            tell.send(connected.is_ok()).unwrap();
            guest
        });
        // Neither accepted nor refused for as long as nobody takes the others.
        assert_eq!(
            told.recv_timeout(Duration::from_millis(500)),
            Err(RecvTimeoutError::Timeout)
        );
        let taken: Vec<_> = (0..waiting.len()).map(|_| accept(&listener)).collect();
        assert!(told.recv().unwrap(), "connected once there was room");
        drop((connecting.join(), taken));
    }
}

/// A stream socket of the world's, in the family of `addr`.
fn stream(net: &Net, addr: IpAddr) -> Socket {
    stream_of(&net.world, addr)
}

fn stream_of(namespace: &impl Sockets, addr: IpAddr) -> Socket {
    let domain = if addr.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let socket = namespace.socket(domain, libc::SOCK_STREAM, 0);
    socket.expect("a free descriptor").into()
}

/// A listener with room for one connection or two.
fn narrow_listener(net: &Net, host: IpAddr) -> TcpListener {
    let socket = stream(net, host);
    socket
        .bind(&SockAddr::from(at(host, 0)))
        .expect("a free port");
    socket.listen(0).expect("a bound socket");
    socket.into()
}

/// Connects from the host until nobody is let in any more; the connections that wait.
fn fill(net: &Net, addr: SocketAddr) -> Vec<Socket> {
    let mut waiting = Vec::new();
    loop {
        let socket = stream(net, addr.ip());
        match socket.connect_timeout(&SockAddr::from(addr), Duration::from_millis(200)) {
            Ok(()) => waiting.push(socket),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::TimedOut, "filling a listener");
                return waiting;
            }
        }
        assert!(waiting.len() < 8, "a backlog that has no end");
    }
}
