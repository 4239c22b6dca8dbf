//! The behaviour of Linux that tapgate relies on: one small test each, of the kernel alone, with
//! nothing of tapgate but its wrappers of system calls (`tapgate::sys`) and a few pure functions.
//!
//! Comes in: the kernel under the tests. Goes out: on a kernel that behaves otherwise, the name of
//! what is not so there; the comment says which files (below `src/`) rely on it, and which manual
//! page or kernel file promises it. How tapgate itself behaves is for the other tests.
//!
//! Sockets are the machine's own, on its loopback. What needs a namespace, or a process that no
//! other test disturbs, runs this program once more for the one test: see [`in_guest`], [`alone`].

#![allow(
    clippy::disallowed_methods,
    reason = "the bans on clocks and threads are for the core"
)]
#![allow(
    unsafe_code,
    reason = "what a child does to itself before exec has no safe interface"
)]

mod support;

use std::env;
use std::fs::{self, File};
use std::io::{self, ErrorKind, IoSliceMut, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::{self, Command};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::net::if_::if_nametoindex;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrLike, recvmsg, setsockopt, sockopt,
};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use socket2::{Domain, Socket, Type};

use support::guest::Guest;
use support::process::{Mark, Running, fail, run, wait_for_sleep, wait_until_gone};
use support::serve::{accept, readable};
use support::sockets::{LIMIT, Sockets, assert_errno, reset};
use support::sys::Plan;
use support::world::World;
use support::{LOOPBACK, NOWHERE, SOON, at, user, wait_until};
use tapgate::buf::{Offload, PartialChecksum};
use tapgate::link::vnet;
use tapgate::net::checksum::Sum;
use tapgate::net::emit::{Ends, quoted_udp};
use tapgate::sys::memory;
use tapgate::sys::netlink::{LinkChange, Netlink};
use tapgate::sys::readiness::EventSet;
use tapgate::sys::{fd, process as sys_process, tap};

/// Any address of a pair of hosts on a tap, and the other.
const HERE: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 1);
const THERE: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 2);

// --- readiness -----------------------------------------------------------------------------------

/// A read that returns less than was asked for has emptied the socket; data that comes later is a
/// new edge, and nothing else is.
///
/// `flow/tcp.rs` (`to_guest`) saves the read that would block. epoll(7), questions 9 and 10.
#[test]
fn short_read_drains_a_stream_and_more_data_is_a_new_edge() {
    let (mut ours, mut theirs) = tcp_pair();
    let set = watched(&ours);
    for word in [b"one", b"two"] {
        theirs.write_all(word).unwrap();
        assert!(next_event(&set).contains(EpollFlags::EPOLLIN));
        assert_eq!(taken(&set), None, "an edge is told once");
        assert_eq!(ours.read(&mut [0; 4096]).unwrap(), 3);
        assert_eq!(taken(&set), None, "and reading makes none");
    }
}

/// Data and the end of the stream can share one edge, which then has `EPOLLRDHUP`: the end behind
/// a short read is told by nothing else.
///
/// `flow/tcp.rs` (`hangup`), `host/kernel.rs`. epoll_ctl(2), `tcp_poll` in net/ipv4/tcp.c.
#[test]
fn end_that_comes_with_data_is_told_by_that_edge_only() {
    let (mut ours, mut theirs) = tcp_pair();
    let set = watched(&ours);
    theirs.write_all(b"last words").unwrap();
    theirs.shutdown(Shutdown::Write).unwrap();
    wait_for(&ours, EpollFlags::EPOLLRDHUP);
    assert!(next_event(&set).contains(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP));
    assert_eq!(ours.read(&mut [0; 4096]).unwrap(), 10);
    assert_eq!(taken(&set), None, "no edge tells of the end");
    assert_eq!(ours.read(&mut [0; 4096]).unwrap(), 0);
}

/// An end of the stream that comes after a short read is an edge of its own.
///
/// `flow/tcp.rs` (`to_guest`). epoll(7).
#[test]
fn end_after_a_short_read_is_a_new_edge() {
    let (mut ours, mut theirs) = tcp_pair();
    let set = watched(&ours);
    theirs.write_all(b"last words").unwrap();
    let event = next_event(&set);
    assert!(!event.contains(EpollFlags::EPOLLRDHUP));
    assert_eq!(ours.read(&mut [0; 4096]).unwrap(), 10);
    theirs.shutdown(Shutdown::Write).unwrap();
    assert!(next_event(&set).contains(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP));
    assert_eq!(ours.read(&mut [0; 4096]).unwrap(), 0);
}

/// A reset that shares an edge with data is told by `EPOLLHUP`; the data can still be read, and the
/// error comes behind it.
///
/// `flow/tcp.rs` (`hangup`), `host/kernel.rs` (`failed`). `tcp_reset` in net/ipv4/tcp_input.c.
#[test]
fn reset_behind_data_is_told_and_leaves_the_data() {
    let (mut ours, mut theirs) = tcp_pair();
    let set = watched(&ours);
    theirs.write_all(b"last words").unwrap();
    reset(theirs);
    wait_for(&ours, EpollFlags::EPOLLHUP);
    assert!(next_event(&set).contains(EpollFlags::EPOLLHUP));
    assert_eq!(ours.read(&mut [0; 4096]).unwrap(), 10);
    assert_errno(ours.read(&mut [0; 4096]), &[libc::ECONNRESET]);
}

/// A send that takes less than it was offered has filled the buffer, and room is a new edge:
/// nothing has to be tried in between.
///
/// `flow/tcp.rs` (`to_host`). epoll(7), `SOCK_NOSPACE` in net/ipv4/tcp.c and net/core/stream.c.
#[test]
fn partial_send_fills_the_buffer_and_room_is_a_new_edge() {
    const TOTAL: usize = 32 << 20;
    let (mut ours, mut theirs) = tcp_pair();
    let set = watched(&ours);
    let block = vec![0; TOTAL];
    let mut sent = ours.write(&block).unwrap();
    assert!(sent < TOTAL, "nobody reads");
    let reading = thread::spawn(move || io::copy(&mut theirs, &mut io::sink()));
    while sent < TOTAL {
        assert!(next_event(&set).contains(EpollFlags::EPOLLOUT));
        match ours.write(&block[sent..]) {
            Ok(length) => sent += length,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
    drop(ours);
    assert_eq!(reading.join().unwrap().unwrap(), TOTAL as u64);
}

/// Closing the last descriptor of a socket takes it out of every epoll set, and with it the events
/// that were not taken yet.
///
/// `sys/readiness.rs` (no way to remove), `host/mod.rs` (dropping is enough). epoll(7), question 6.
#[test]
fn closed_descriptor_leaves_the_set() {
    // Alone: a fork by another test would hold the socket open for a moment.
    alone(|_| {
        let (ours, mut theirs) = tcp_pair();
        let set = watched(&ours);
        theirs.write_all(b"unread").unwrap();
        wait_for(&ours, EpollFlags::EPOLLIN);
        drop(ours);
        assert_eq!(taken(&set), None);
    });
}

/// An epoll set can be watched by another one, edge-triggered. Once fewer events were taken than
/// asked for, the next event in the inner set is a new edge in the outer.
///
/// `host/kernel.rs` (`poll_events`: tokio watches the private set). epoll(7), fs/eventpoll.c.
#[test]
fn emptied_epoll_set_gives_a_new_edge_to_the_one_above() {
    let (mut ours, mut theirs) = tcp_pair();
    let edge = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
    let [outer, inner] = [(); 2].map(|()| Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap());
    inner.add(&ours, EpollEvent::new(edge, 0)).unwrap();
    outer.add(&inner.0, EpollEvent::new(edge, 0)).unwrap();
    let limit = EpollTimeout::try_from(SOON).unwrap();
    for word in [b"one", b"two"] {
        theirs.write_all(word).unwrap();
        let mut events = [EpollEvent::empty(); 2];
        assert_eq!(outer.wait(&mut events, limit), Ok(1));
        assert_eq!(inner.wait(&mut events, EpollTimeout::ZERO), Ok(1), "1 of 2");
        assert_eq!(ours.read(&mut [0; 4096]).unwrap(), 3);
        assert_eq!(outer.wait(&mut events, EpollTimeout::ZERO), Ok(0));
    }
}

// --- TCP -----------------------------------------------------------------------------------------

/// A close is a FIN. It is a reset with a zero linger time, and where data was not read.
///
/// `host/kernel.rs` (`reset`), `flow/tcp.rs`. socket(7) `SO_LINGER`, RFC 2525 2.17, `__tcp_close`
/// in net/ipv4/tcp.c.
#[test]
fn zero_linger_time_or_unread_data_make_a_close_a_reset() {
    let (ours, mut theirs) = tcp_pair();
    drop(ours);
    assert_eq!(theirs.read(&mut [0; 8]).unwrap(), 0);

    let (ours, mut theirs) = tcp_pair();
    reset(ours);
    assert_errno(theirs.read(&mut [0; 8]), &[libc::ECONNRESET]);

    let (ours, mut theirs) = tcp_pair();
    theirs.write_all(b"unread").unwrap();
    wait_for(&ours, EpollFlags::EPOLLIN);
    drop(ours);
    assert_errno(theirs.read(&mut [0; 8]), &[libc::ECONNRESET]);
}

/// A refused connect begins like any other, becomes writable, and says why by `SO_ERROR`, once.
///
/// `host/kernel.rs` (`tcp_connect`, `connect_outcome`). connect(2) `EINPROGRESS`.
#[test]
fn refused_connect_is_an_event_and_then_so_error() {
    // Bound, so that nobody else gets the port, but not listening.
    let closed = stream();
    closed.bind(&at(LOOPBACK, 0).into()).unwrap();
    let socket = stream();
    let begun = socket.connect(&closed.local_addr().unwrap());
    assert_errno(begun, &[libc::EINPROGRESS]);
    let set = EventSet::new().unwrap();
    set.add(&socket, 0).unwrap();
    assert!(next_event(&set).contains(EpollFlags::EPOLLOUT));
    let outcome = socket.take_error().unwrap().map_or(Ok(()), Err);
    assert_errno(outcome, &[libc::ECONNREFUSED]);
    assert!(socket.take_error().unwrap().is_none());
}

/// A socket whose connect is not decided gives no event: the first one means that it is, and
/// `SO_ERROR` zero then means connected.
///
/// `flow/tcp.rs` (`finish_connect`). connect(2), `tcp_poll` in net/ipv4/tcp.c.
#[test]
fn undecided_connect_gives_no_event() {
    let world = World::new();
    let socket = stream_of(&world);
    // A neighbour that nobody is: the kernel asks for it for some seconds.
    let neighbour = at(Ipv4Addr::new(192, 0, 2, 77).into(), 80);
    assert_errno(socket.connect(&neighbour.into()), &[libc::EINPROGRESS]);
    let set = EventSet::new().unwrap();
    set.add(&socket, 0).unwrap();
    assert_eq!(taken(&set), None);

    let listener = world.listen(at(LOOPBACK, 0)).unwrap();
    let socket = stream_of(&world);
    let begun = socket.connect(&listener.local_addr().unwrap().into());
    assert_errno(begun, &[libc::EINPROGRESS]);
    set.add(&socket, 0).unwrap();
    assert!(next_event(&set).contains(EpollFlags::EPOLLOUT));
    assert!(socket.take_error().unwrap().is_none());
}

/// Without a route a connect or a datagram fails by itself, in the call.
///
/// `host/kernel.rs` (`tcp_connect`), `stack/udp.rs` (`unreachable`). connect(2), ip(7).
#[test]
fn without_a_route_the_call_itself_fails() {
    let world = World::new();
    let target = at(NOWHERE, 80).into();
    assert_errno(stream_of(&world).connect(&target), &[libc::ENETUNREACH]);
    let datagrams = Socket::from(world.socket(libc::AF_INET, libc::SOCK_DGRAM, 0).unwrap());
    assert_errno(datagrams.send_to(b"lost", &target), &[libc::ENETUNREACH]);
}

// --- datagrams -----------------------------------------------------------------------------------

/// With `IP_RECVERR` a port unreachable is an edge with `EPOLLERR` and fails one call on an
/// unconnected socket, a send (which then sends nothing) or a receive. The error queue has the rest:
/// where the datagram was meant to go, its payload, the ICMP error and who reported it.
///
/// `host/datagram.rs`, `stack/udp.rs`. ip(7) `IP_RECVERR`, `sock_dequeue_err_skb` in
/// net/core/skbuff.c.
#[test]
fn port_unreachable_fails_one_call_and_is_queued_with_details() {
    // Connected elsewhere: nobody else gets the port, and datagrams from us are unwanted there.
    let closed = UdpSocket::bind("127.0.0.1:0").unwrap();
    closed.connect("127.0.0.1:9").unwrap();
    let target = closed.local_addr().unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_nonblocking(true).unwrap();
    setsockopt(&socket, sockopt::Ipv4RecvErr, &true).unwrap();
    let set = watched(&socket);
    for by_sending in [true, false] {
        socket.send_to(b"unwanted", target).unwrap();
        assert!(next_event(&set).contains(EpollFlags::EPOLLERR));
        let failed = if by_sending {
            socket.send_to(b"not sent", target)
        } else {
            socket.recv(&mut [0; 8])
        };
        assert_errno(failed, &[libc::ECONNREFUSED]);
        assert_errno(socket.recv(&mut [0; 8]), &[libc::EAGAIN]);
        let queued = queued_error(&socket).unwrap();
        assert_eq!(queued, (b"unwanted".into(), target, [3, 3], LOOPBACK));
        assert_eq!(queued_error(&socket), Err(nix::Error::EAGAIN), "one error");
    }
}

/// The entry at the head of the error queue: payload, destination, ICMP type and code, reporter.
fn queued_error(
    socket: &UdpSocket,
) -> nix::Result<(Vec<u8>, SocketAddr, [u8; 2], std::net::IpAddr)> {
    let mut payload = vec![0; 2048];
    let mut control = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in);
    let mut parts = [IoSliceMut::new(&mut payload)];
    let flags = MsgFlags::MSG_ERRQUEUE;
    let message = recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags)?;
    let details = message.cmsgs()?.find_map(|part| match part {
        ControlMessageOwned::Ipv4RecvErr(error, Some(reporter)) => {
            assert_eq!(error.ee_origin, libc::SO_EE_ORIGIN_ICMP);
            let reporter = Ipv4Addr::from(u32::from_be(reporter.sin_addr.s_addr));
            Some(([error.ee_type, error.ee_code], reporter.into()))
        }
        _ => None,
    });
    let (Some((icmp, reporter)), Some(to)) = (details, message.address) else {
        fail("an entry with details and a destination");
    };
    let length = message.bytes;
    payload.truncate(length);
    Ok((
        payload,
        SocketAddr::from((to.ip(), to.port())),
        icmp,
        reporter,
    ))
}

/// A socket bound to no address hears everybody, whomever it has sent to (RFC 4787 REQ-8).
///
/// `host/kernel.rs` (`DatagramRole::Outbound`). udp(7).
#[test]
fn unconnected_datagram_socket_hears_everybody() {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let address = at(LOOPBACK, socket.local_addr().unwrap().port());
    let [friend, stranger] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
    socket
        .send_to(b"hello", friend.local_addr().unwrap())
        .unwrap();
    for sender in [stranger, friend] {
        sender.send_to(b"hello", address).unwrap();
        let (_, from) = socket.recv_from(&mut [0; 8]).unwrap();
        assert_eq!(from, sender.local_addr().unwrap());
    }
}

/// A connected socket hears its peer and nobody else.
///
/// `host/kernel.rs` (`DatagramRole::Connected`: a resolver's answer can't be forged from another
/// address). udp(7), connect(2).
#[test]
fn connected_datagram_socket_hears_its_peer_only() {
    let [friend, stranger] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket.connect(friend.local_addr().unwrap()).unwrap();
    let address = socket.local_addr().unwrap();
    for sender in [stranger, friend] {
        sender.send_to(b"hello", address).unwrap();
    }
    let (_, from) = socket.recv_from(&mut [0; 8]).unwrap();
    assert_eq!(from, socket.peer_addr().unwrap());
    assert!(
        !readable(&socket, Duration::ZERO),
        "and the first is not behind it"
    );
}

/// A ping socket takes and gives ICMP header and data, without the IP header. The kernel fills in
/// checksum and an identifier of its own, the socket's "port".
///
/// `host/datagram.rs` (`KernelEcho`). icmp(7), net/ipv4/ping.c.
#[test]
fn ping_socket_moves_header_and_data_under_its_own_identifier() {
    let world = World::new();
    let socket = world.socket(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP);
    let socket = Socket::from(socket.unwrap());
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let request = [8, 0, 0, 0, 0x12, 0x34, 0, 7, b'd', b'a', b't', b'a'];
    socket.send_to(&request, &at(LOOPBACK, 0).into()).unwrap();
    let mut reply = [0; 64];
    assert_eq!((&socket).read(&mut reply).unwrap(), request.len());
    let ident = socket.local_addr().unwrap().as_socket().unwrap().port();
    assert_eq!(reply[..2], [0, 0], "an echo reply");
    assert_eq!(reply[4..6], ident.to_be_bytes());
    assert_eq!(reply[6..12], request[6..]);
    assert_eq!(
        Sum::default().bytes(&reply[..12]).finish(),
        0,
        "a right checksum"
    );
}

/// Who is not in `net.ipv4.ping_group_range` gets `EACCES`, and by default that is everybody.
///
/// `stack/echo.rs` (the hint). icmp(7).
#[test]
fn ping_socket_outside_the_group_range_is_forbidden() {
    let world = World::without_ping_sockets();
    let socket = world.socket(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP);
    assert_errno(socket, &[libc::EACCES]);
}

// --- the tap -------------------------------------------------------------------------------------

/// Root of an unprivileged user namespace gets a tap with a vnet header of 12 bytes and with every
/// offload that is asked for; UDP segmentation since Linux 6.2, and for both families or none.
///
/// `sys/tap.rs`, `link/tap.rs` (`negotiate`). Documentation/networking/tuntap.rst, `set_offload`
/// in drivers/net/tun.c.
#[test]
fn unprivileged_tap_has_vnet_header_and_offloads() {
    use tap::offload::{CSUM, TSO4, TSO6, USO4, USO6};
    in_guest(|| {
        let tap = tap::open("tap9", true).unwrap();
        assert!(tap::has_vnet_header(tap.as_fd()).unwrap());
        tap::set_vnet_header_len(tap.as_fd(), vnet::LEN).unwrap();
        for offloads in [CSUM, CSUM | TSO4, CSUM | TSO4 | TSO6] {
            tap::set_offload(tap.as_fd(), offloads).unwrap();
        }
        let udp = tap::set_offload(tap.as_fd(), CSUM | TSO4 | TSO6 | USO4 | USO6);
        if kernel_version() >= (6, 2) {
            udp.unwrap();
        } else {
            assert_errno(udp, &[libc::EINVAL]);
        }
        let one_family = tap::set_offload(tap.as_fd(), CSUM | USO4);
        assert_errno(one_family, &[libc::EINVAL]);
    });
}

/// A tap with a vnet header finishes a checksum that was left to it, whatever `TUNSETOFFLOAD` said:
/// that is about the other direction. Without the mark in the header the datagram is a broken one.
///
/// `link/tap.rs` (`Granted::transmit`), `link/vnet.rs`. `tun_get_user` in drivers/net/tun.c,
/// include/linux/virtio_net.h.
#[test]
fn tap_takes_partial_checksums_without_being_asked_for_offloads() {
    in_guest(|| {
        let device = File::from(tap::open("tap9", true).unwrap());
        tap::set_vnet_header_len(device.as_fd(), vnet::LEN).unwrap();
        let mac = tap::hardware_address(device.as_fd()).unwrap();
        set_up("tap9");
        let socket = UdpSocket::bind((HERE, 0)).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        let left = Offload {
            checksum: Some(PartialChecksum {
                start: 34,
                offset: 6,
            }),
            segment: None,
        };
        for (offload, payload) in [(Offload::default(), b"broken"), (left, b"marked")] {
            let packet = with_partial_checksum(socket.local_addr().unwrap(), payload);
            let header = vnet::encode(offload);
            let frame = [&header[..], &mac, &[2, 0, 0, 0, 0, 1, 8, 0], &packet].concat();
            assert_eq!((&device).write(&frame).unwrap(), frame.len());
        }
        let mut heard = [0; 64];
        let length = socket.recv(&mut heard).unwrap();
        assert_eq!(&heard[..length], b"marked");
    });
}

/// A UDP packet whose checksum field has the sum of the pseudo-header only.
fn with_partial_checksum(to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let from = at(THERE.into(), 4000);
    let length = u16::try_from(8 + payload.len()).expect("small");
    let sum = Sum::pseudo_header(from.ip(), to.ip(), 17, length).fold();
    let mut packet = quoted_udp(Ends { src: from, dst: to }, payload).expect("addresses of IPv4");
    packet[26..28].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// The tap answers for its interface's hardware address, whatever name the request has.
///
/// `sys/tap.rs` (`hardware_address`). netdevice(7), `__tun_chr_ioctl` in drivers/net/tun.c.
#[test]
fn tap_tells_its_hardware_address_under_any_name() {
    in_guest(|| {
        let tap = tap::open("tap9", true).unwrap();
        let listed = nix::ifaddrs::getifaddrs().unwrap();
        let macs = listed
            .filter(|interface| interface.interface_name == "tap9")
            .filter_map(|interface| interface.address?.as_link_addr()?.addr());
        let told = tap::hardware_address(tap.as_fd()).unwrap();
        assert_eq!(macs.collect::<Vec<_>>(), [told]);
    });
}

/// A tap without multi-queue has one opener, and goes when that one closes it.
///
/// `setup/guest.rs` (the hint), `setup/run.rs` (nothing is cleaned up). drivers/net/tun.c.
#[test]
fn tap_has_one_opener_and_goes_with_it() {
    in_guest(|| {
        let tap = tap::open("tap9", true).unwrap();
        assert_errno(tap::open("tap9", true), &[libc::EBUSY]);
        drop(tap);
        assert!(
            if_nametoindex("tap9").is_err(),
            "it was not made to persist"
        );
    });
}

/// A frame for an interface that is down is refused with `EIO`, and the tap lives on.
///
/// `link/tap.rs` (`is_fatal`). `tun_get_user` in drivers/net/tun.c.
#[test]
fn tap_whose_interface_is_down_refuses_frames_and_lives_on() {
    const FRAME: [u8; 60] = [0xff; 60];
    in_guest(|| {
        let device = File::from(tap::open("tap9", false).unwrap());
        assert_errno((&device).write(&FRAME), &[libc::EIO]);
        set_up("tap9");
        assert_eq!((&device).write(&FRAME).unwrap(), FRAME.len());
    });
}

/// A tap whose interface was deleted wakes who waits for it, and gives `EBADFD` from then on.
///
/// `link/tap.rs` (`is_fatal`), `event_loop.rs` (`Ended::LinkGone`). `tun_chr_poll`, `tun_get` in
/// drivers/net/tun.c.
#[test]
fn tap_whose_interface_is_gone_wakes_its_reader_and_fails() {
    in_guest(|| {
        let device = File::from(tap::open("tap9", false).unwrap());
        assert_errno((&device).read(&mut [0; 64]), &[libc::EAGAIN]);
        let set = watched(&device);
        run(Command::new("ip").args(["link", "delete", "tap9"])).output();
        assert!(next_event(&set).contains(EpollFlags::EPOLLERR));
        assert_errno((&device).read(&mut [0; 64]), &[libc::EBADFD]);
        assert_errno((&device).write(&[0; 64]), &[libc::EBADFD]);
    });
}

// --- namespaces and processes --------------------------------------------------------------------

/// A network namespace knows the user namespace that owns it, unless that is above the asker's.
///
/// `setup/attach.rs` (`Namespaces::open`). ioctl_ns(2), kernel/user_namespace.c (`ns_get_owner`).
#[test]
fn network_namespace_names_its_owner_unless_it_is_an_ancestor() {
    if let Some(mark) = inside() {
        let above = fd::adopt(mark.parse().unwrap()).unwrap();
        let owner = sys_process::owning_user_namespace(above.as_fd());
        return assert_errno(owner, &[libc::EPERM]);
    }
    let world = World::new();
    let guest = Guest::new(&world);
    let namespace = |kind| File::open(format!("/proc/{}/ns/{kind}", guest.pid())).unwrap();
    let owner = sys_process::owning_user_namespace(namespace("net").as_fd()).unwrap();
    let found = File::from(owner).metadata().unwrap();
    let user = namespace("user").metadata().unwrap();
    assert_eq!((found.dev(), found.ino()), (user.dev(), user.ino()));

    let above = Arc::new(OwnedFd::from(File::open("/proc/self/ns/net").unwrap()));
    let number = above.as_raw_fd().to_string();
    once_more(&number, vec![above], |program| guest.command(program));
}

/// Entering the user namespace that one is in gives `EINVAL`.
///
/// `setup/attach.rs` (`Namespaces::enter`: taken for success). setns(2).
#[test]
fn entering_the_own_user_namespace_is_an_invalid_argument() {
    let world = World::new();
    let mut plan = world.plan().clone();
    plan.enter.truncate(1);
    plan.enter.extend(plan.enter.clone());
    assert_errno(world.command_with("true", plan).spawn(), &[libc::EINVAL]);
}

/// A pidfd becomes readable when its process ends, before anybody has waited for it.
///
/// `control/lifecycle.rs` (`gone`), `sys/process.rs`. pidfd_open(2).
#[test]
fn pidfd_is_readable_once_its_process_has_ended() {
    let process = Running::start(Command::new("sleep").arg("600"));
    let pidfd = sys_process::pidfd(Pid::from_raw(process.pid())).unwrap();
    assert!(!readable(&pidfd, Duration::ZERO));
    process.signal(Signal::SIGKILL);
    assert!(readable(&pidfd, SOON));
}

/// `PR_SET_PDEATHSIG` outlasts exec, so a program that knows nothing of it ends with its parent.
///
/// `setup/keeper.rs` (`become_command`). prctl(2).
#[test]
fn signal_for_the_parents_death_outlasts_exec() {
    if let Some(mark) = inside() {
        let mut child = prepared("sleep", || prctl::set_pdeathsig(Signal::SIGKILL));
        child.arg(mark).status().unwrap();
        return;
    }
    let mark = Mark::new();
    let parent = Running::start(&mut again(&mark, Vec::new(), unprivileged));
    wait_for_sleep(&mark);
    parent.signal(Signal::SIGKILL);
    parent.finish(SOON);
    wait_until_gone(&mark);
}

/// An orphan is adopted by the nearest subreaper above it, and after that one's end by the next.
///
/// `setup/keeper.rs` (the line of us, keeper and command), `setup/run.rs`. prctl(2)
/// `PR_SET_CHILD_SUBREAPER`.
#[test]
fn orphan_is_adopted_by_the_nearest_subreaper() {
    alone(|mark| {
        prctl::set_child_subreaper(true).unwrap();
        let mut keeper = prepared("sh", || prctl::set_child_subreaper(true));
        // The inner shell ends at once; the outer becomes a program that waits for nobody.
        let script = format!("sh -c 'sleep {mark} &'; exec sleep 1{mark}");
        let keeper = Running::start(keeper.args(["-c", &script]));
        let orphan = wait_for_sleep(mark);
        wait_until("the nearest to adopt", SOON, || {
            (parent_of(orphan) == Some(keeper.pid())).then_some(())
        });
        keeper.signal(Signal::SIGKILL);
        keeper.finish(SOON);
        let us = i32::try_from(process::id()).unwrap();
        assert_eq!(parent_of(orphan), Some(us));
        kill(Pid::from_raw(orphan), Signal::SIGKILL).unwrap();
        waitpid(Pid::from_raw(orphan), None).unwrap();
    });
}

// --- memory and entropy --------------------------------------------------------------------------

/// Zeroed memory of a mebibyte is not there until it is written, also when such blocks were written
/// and freed before (which teaches glibc otherwise), and those go back to the kernel.
///
/// `flow/tcp_engine.rs` (`RING`), `sys/memory.rs`. mallopt(3) `M_MMAP_THRESHOLD`, mmap(2).
#[test]
fn large_zeroed_allocations_cost_nothing_until_written() {
    const RING: usize = 1 << 20;
    const LITTLE: usize = 10 << 20;
    alone(|_| {
        memory::map_large_allocations();
        let rings = |count| -> Vec<Vec<u8>> {
            std::hint::black_box((0..count).map(|_| vec![0; RING]).collect())
        };
        let at_first = resident();
        let mut used = rings(50);
        used.iter_mut().for_each(|ring| ring.fill(1));
        assert!(
            resident() > at_first + 50 * RING - LITTLE,
            "written, so there"
        );
        drop(used);
        assert!(resident() < at_first + LITTLE, "given back");
        let untouched = rings(200);
        assert!(
            resident() < at_first + LITTLE,
            "{} of 200",
            resident() / RING
        );
        assert!(untouched.iter().all(|ring| ring[RING / 2] == 0));
    });
}

/// Bytes of this process in memory. By walking the page tables: /proc/self/statm may lag behind.
fn resident() -> usize {
    let text = fs::read_to_string("/proc/self/smaps_rollup").expect("/proc is there");
    let line = text.lines().find_map(|line| line.strip_prefix("Rss:"));
    let kibibytes = line.and_then(|line| line.split_ascii_whitespace().next()?.parse().ok());
    let kibibytes: usize = kibibytes.unwrap_or_else(|| fail(&format!("no size in {text}")));
    kibibytes * 1024
}

/// The system's entropy is another each time.
///
/// `sys/memory.rs` (`entropy`), `stack/secrets.rs` (hash keys, sequence numbers). getrandom(2).
#[test]
fn entropy_differs_from_call_to_call() {
    let [one, other] = [(); 2].map(|()| memory::entropy().unwrap());
    assert!(one.iter().all(|number| !other.contains(number)));
}

// --- the second run ------------------------------------------------------------------------------

/// Set in the environment of the second run of a test, to what the first one has to tell it.
const INSIDE: &str = "TAPGATE_TEST_INSIDE";

/// What the first run said, where this is the second.
fn inside() -> Option<String> {
    env::var(INSIDE).ok()
}

/// Does `act` as root of a namespace without a network, in a process of its own.
fn in_guest(act: impl FnOnce()) {
    if inside().is_some() {
        return act();
    }
    let world = World::new();
    let guest = Guest::new(&world);
    once_more("guest", Vec::new(), |program| guest.command(program));
}

/// Does `act` in a process of its own. What that leaves behind with the mark in its command line
/// does not outlive the test.
fn alone(act: impl FnOnce(&str)) {
    if let Some(mark) = inside() {
        return act(&mark);
    }
    let mark = Mark::new();
    once_more(&mark, Vec::new(), unprivileged);
}

/// Runs the present test a second time, to its end.
fn once_more(told: &str, inherit: Vec<Arc<OwnedFd>>, start: impl FnOnce(&str) -> Command) {
    let output = run(&mut again(told, inherit, start)).output();
    assert!(output.contains("1 passed"), "it did not run: {output}");
}

/// The present test in a process that `start` makes. The program is passed by descriptor: its path
/// need not be there, or be allowed, where the process is going to live.
fn again(
    told: &str,
    mut inherit: Vec<Arc<OwnedFd>>,
    start: impl FnOnce(&str) -> Command,
) -> Command {
    let program = Arc::new(OwnedFd::from(
        File::open("/proc/self/exe").expect("it runs"),
    ));
    let mut command = start(&format!("/proc/self/fd/{}", program.as_raw_fd()));
    inherit.push(program);
    let plan = Plan {
        inherit,
        ..Plan::default()
    };
    plan.attach_to(&mut command);
    let test = thread::current();
    let test = test.name().expect("a test's thread has the test's name");
    command
        .args(["--exact", "--nocapture", test])
        .env(INSIDE, told);
    command
}

/// A command for the test user.
fn unprivileged(program: &str) -> Command {
    let mut command = Command::new(program);
    user::plain_environment(&mut command);
    user::plan().attach_to(&mut command);
    command
}

/// A command that does something to itself between fork and exec.
fn prepared(program: &str, act: fn() -> nix::Result<()>) -> Command {
    let mut command = Command::new(program);
    // SAFETY: each `act` here is one system call, on no memory but its arguments.
    unsafe { command.pre_exec(move || Ok(act()?)) };
    command
}

/// The parent of a process, by proc_pid_stat(5).
fn parent_of(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(1)?.parse().ok()
}

fn kernel_version() -> (u32, u32) {
    let names = nix::sys::utsname::uname().expect("it always works");
    let release = names.release().to_string_lossy().into_owned();
    let mut numbers = release
        .split(['.', '-'])
        .map_while(|number| number.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Brings an interface up and gives it the address [`HERE`].
fn set_up(name: &str) {
    let index = if_nametoindex(name).expect("it was made");
    let mut netlink = Netlink::open().expect("a free descriptor");
    netlink
        .set_up(index, LinkChange::default())
        .expect("we are root here");
    netlink
        .add_address(index, HERE.into(), 24)
        .expect("we are root here");
}

// --- sockets and events --------------------------------------------------------------------------

/// Both ends of a connection over the loopback. Ours is non-blocking, as all of tapgate's.
fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let ours = TcpStream::connect(listener.local_addr().expect("it is bound"));
    let ours = ours.expect("the backlog has room");
    ours.set_nonblocking(true).expect("a socket of ours");
    (ours, accept(&listener).0)
}

fn stream() -> Socket {
    Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), None).expect("a free descriptor")
}

fn stream_of(world: &World) -> Socket {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK;
    Socket::from(
        world
            .socket(libc::AF_INET, kind, 0)
            .expect("a free descriptor"),
    )
}

/// A set like tapgate's with one descriptor, whose state at first has been told.
fn watched(descriptor: &impl AsFd) -> EventSet {
    let set = EventSet::new().expect("a free descriptor");
    set.add(descriptor, 0).expect("it can be watched");
    let _ = taken(&set);
    set
}

/// What the set tells now.
fn taken(set: &EventSet) -> Option<EpollFlags> {
    let mut events = [EpollEvent::empty(); 8];
    let count = set.take(&mut events).expect("a set of ours");
    events[..count]
        .iter()
        .map(EpollEvent::events)
        .reduce(EpollFlags::union)
}

/// What the set tells next.
fn next_event(set: &EventSet) -> EpollFlags {
    wait_until("an event", SOON, || taken(set))
}

/// Waits for a state of a descriptor, beside any other set that it is in.
fn wait_for(descriptor: &impl AsFd, state: EpollFlags) {
    let set = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("a free descriptor");
    set.add(descriptor, EpollEvent::new(state, 0))
        .expect("it can be watched");
    let limit = EpollTimeout::try_from(SOON).expect("a short time");
    assert_eq!(
        set.wait(&mut [EpollEvent::empty()], limit),
        Ok(1),
        "{state:?}"
    );
}
