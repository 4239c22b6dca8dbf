//! The behaviour of Linux that tapgate relies on: one small test each, of the kernel alone, with
//! nothing of tapgate but its wrappers of system calls and a pure function or two.
//!
//! Comes in: the kernel under the tests. Goes out: where it behaves otherwise, the name of what is
//! not so. Each comment ends with the files (below `src/`) that rely on it, and the manual page or
//! kernel file that promises it. What needs a namespace, or a process that no other test disturbs,
//! runs this program once more for the one test: see [`in_guest`].

#![allow(
    clippy::disallowed_methods,
    unsafe_code,
    reason = "clocks and threads are banned from the core only; a child has no safe way to prepare itself"
)]

mod support;

use std::env;
use std::fs::{self, File};
use std::io::{self, IoSliceMut, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::net::if_::if_nametoindex;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrIn, recv, recvmsg, setsockopt, sockopt,
};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use socket2::Socket;

use support::guest::Guest;
use support::process::{Mark, Running, fail, run, wait_for_sleep, wait_until_gone};
use support::serve::{accept, readable};
use support::sockets::{LIMIT, Sockets, assert_errno, reset};
use support::sys::Plan;
use support::world::World;
use support::{LOOPBACK, NOWHERE, SOON, at, wait_until};
use tapgate::link::vnet;
use tapgate::net::checksum::Sum;
use tapgate::sys::netlink::{LinkChange, Netlink};
use tapgate::sys::process::{owning_user_namespace, pidfd};
use tapgate::sys::readiness::EventSet;
use tapgate::sys::socket::{discard, peek_from_next};
use tapgate::sys::{fd, memory, tap};

const IN: EpollFlags = EpollFlags::EPOLLIN;
const ENDED: EpollFlags = EpollFlags::EPOLLRDHUP;

// --- readiness -----------------------------------------------------------------------------------

/// A read that returns less than was asked for has emptied the socket: data that comes later, and
/// the end of the stream, are new edges. Nothing else is.
/// `flow/tcp.rs` (`to_guest`). epoll(7), questions 9 and 10.
#[test]
fn short_read_drains_a_stream_and_what_comes_later_is_a_new_edge() {
    let (mut ours, mut theirs) = tcp_pair();
    let set = watched(&ours);
    for word in [b"one", b"two"] {
        theirs.write_all(word).unwrap();
        assert!(next_event(&set).contains(IN));
        assert_eq!(taken(&set), None, "an edge is told once");
        assert_eq!(ours.read(&mut [0; 64]).unwrap(), 3);
        assert_eq!(taken(&set), None, "reading makes none");
    }
    theirs.shutdown(Shutdown::Write).unwrap();
    assert!(next_event(&set).contains(IN | ENDED));
    assert_eq!(ours.read(&mut [0; 64]).unwrap(), 0);
}

/// An end of the stream, or a reset, can share an edge with data. The edge says so by `EPOLLRDHUP` or
/// `EPOLLHUP`; nothing else tells of it behind a short read, and the data can still be read.
/// `flow/tcp_open.rs` (`hangup`), `host/kernel/mod.rs`. epoll_ctl(2), `tcp_poll` in net/ipv4/tcp.c.
#[test]
fn end_that_comes_with_data_is_told_by_that_edge_only() {
    let reset_by_peer = Err(Some(libc::ECONNRESET));
    let ends: [(fn(TcpStream), _, _); 2] = [
        (drop, ENDED, Ok(0)),
        (reset, ENDED | EpollFlags::EPOLLHUP, reset_by_peer),
    ];
    for (end, told, found) in ends {
        let (mut ours, mut theirs) = tcp_pair();
        let set = watched(&ours);
        theirs.write_all(b"last words").unwrap();
        end(theirs);
        wait_for(&ours, told);
        assert!(next_event(&set).contains(IN | told));
        assert_eq!(ours.read(&mut [0; 64]).unwrap(), 10);
        assert_eq!(taken(&set), None, "no edge tells of the end");
        let read = ours.read(&mut [0; 64]);
        assert_eq!(read.map_err(|error| error.raw_os_error()), found);
    }
}

/// Each look at a stream goes on where the last one ended and takes nothing; what is received, or discarded, moves the
/// place along; data that come later are a new edge, and the end is seen behind what was peeked at.
/// `flow/tcp_ahead.rs`, `sys/socket.rs`. socket(7), `SO_PEEK_OFF`; tcp(7), `MSG_TRUNC`.
#[test]
fn looks_at_a_stream_go_on_where_they_ended_and_leave_it() {
    let (ours, mut theirs) = tcp_pair();
    if let Err(error) = peek_from_next(ours.as_fd()) {
        assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
        return;
    }
    let set = watched(&ours);
    let look = |len: usize| {
        let mut bytes = vec![0; len];
        let looked = recv(ours.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK);
        looked.map(|len| String::from_utf8_lossy(&bytes[..len]).into_owned())
    };
    theirs.write_all(b"one two ").unwrap();
    assert!(next_event(&set).contains(IN));
    assert_eq!(look(4).as_deref(), Ok("one "));
    assert_eq!(look(64).as_deref(), Ok("two "));
    assert_eq!(look(64), Err(nix::errno::Errno::EAGAIN));
    theirs.write_all(b"three").unwrap();
    assert!(
        next_event(&set).contains(IN),
        "a new edge though nothing was taken"
    );
    assert_eq!(discard(ours.as_fd(), 4).unwrap(), 4);
    assert_eq!(look(64).as_deref(), Ok("three"));
    theirs.shutdown(Shutdown::Write).unwrap();
    assert!(next_event(&set).contains(ENDED));
    assert_eq!(look(64).as_deref(), Ok(""), "the end");
    // What was not discarded can be had once more.
    peek_from_next(ours.as_fd()).unwrap();
    assert_eq!(look(64).as_deref(), Ok("two three"));
    let mut rest = String::new();
    (&ours).read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "two three");
}

/// A send that takes less than it was offered has filled the buffer, and room is a new edge.
/// `flow/tcp.rs` (`to_host`). epoll(7), `SOCK_NOSPACE` in net/ipv4/tcp.c.
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
        sent += ours.write(&block[sent..]).unwrap();
    }
    drop(ours);
    assert_eq!(reading.join().unwrap().unwrap(), TOTAL as u64);
}

/// Closing the last descriptor takes a socket, and what it has to tell, out of every epoll set.
/// `sys/readiness.rs` (no way to remove), `host/mod.rs`. epoll(7), question 6.
#[test]
fn closed_descriptor_leaves_the_set() {
    // By itself: a fork by another test would hold the socket open for a moment.
    in_guest(|_| {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let set = watched(&ours);
        theirs.write_all(b"unread").unwrap();
        wait_for(&ours, IN);
        drop(ours);
        assert_eq!(taken(&set), None);
    });
}

/// An epoll set can be watched by another, edge-triggered: once fewer events were taken than asked
/// for, the next event inside is a new edge outside.
/// `host/kernel/mod.rs` (`poll_events`: tokio watches the private set). epoll(7), fs/eventpoll.c.
#[test]
fn emptied_epoll_set_gives_a_new_edge_to_the_one_above() {
    let (mut ours, mut theirs) = tcp_pair();
    let inner = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    let edge = EpollEvent::new(IN | EpollFlags::EPOLLET, 0);
    inner.add(&ours, edge).unwrap();
    let outer = watched(&inner.0);
    for word in [b"one", b"two"] {
        theirs.write_all(word).unwrap();
        next_event(&outer);
        let mut events = [EpollEvent::empty(); 2];
        assert_eq!(inner.wait(&mut events, 0_u8), Ok(1), "fewer than 2");
        assert_eq!(ours.read(&mut [0; 64]).unwrap(), 3);
        assert_eq!(taken(&outer), None);
    }
}

// --- sockets -------------------------------------------------------------------------------------

/// A close is a FIN. It is a reset with a zero linger time, and where data was not read.
/// `host/kernel/stream.rs` (`reset`), `flow/tcp.rs`. socket(7) `SO_LINGER`, `__tcp_close` in net/ipv4/tcp.c.
#[test]
fn zero_linger_time_or_unread_data_make_a_close_a_reset() {
    let (ours, mut theirs) = tcp_pair();
    drop(ours);
    assert_eq!(theirs.read(&mut [0; 8]).unwrap(), 0);
    for unread in [false, true] {
        let (ours, mut theirs) = tcp_pair();
        if unread {
            theirs.write_all(b"unread").unwrap();
            wait_for(&ours, IN);
            drop(ours);
        } else {
            reset(ours);
        }
        assert_errno(theirs.read(&mut [0; 8]), &[libc::ECONNRESET]);
    }
}

/// A connect that is undecided gives no event (here the kernel asks for a neighbour that nobody is).
/// One that is refused begins alike, then becomes writable, and says why by `SO_ERROR`.
/// `host/kernel/stream.rs` (`connect_outcome`), `flow/tcp.rs` (`finish_connect`). connect(2).
#[test]
fn first_event_of_a_connect_means_that_so_error_has_the_outcome() {
    let world = World::new();
    // Bound, so that nobody else gets the port, but not listening.
    let closed = stream(&world);
    closed.bind(&at(LOOPBACK, 0).into()).unwrap();
    let nobody = at(Ipv4Addr::new(192, 0, 2, 77).into(), 80).into();
    let [undecided, refused] = [nobody, closed.local_addr().unwrap()].map(|to| {
        let socket = stream(&world);
        assert_errno(socket.connect(&to), &[libc::EINPROGRESS]);
        socket
    });
    assert_eq!(taken(&unasked(&undecided)), None);
    assert!(next_event(&unasked(&refused)).contains(EpollFlags::EPOLLOUT));
    let outcome = refused.take_error().unwrap().map_or(Ok(()), Err);
    assert_errno(outcome, &[libc::ECONNREFUSED]);
}

/// Without a route a connect or a datagram fails in the call itself.
/// `host/kernel/stream.rs` (`connect`), `stack/udp.rs` (`unreachable`). connect(2), ip(7).
#[test]
fn without_a_route_the_call_itself_fails() {
    let world = World::new();
    let target = at(NOWHERE, 80);
    let connected = stream(&world).connect(&target.into());
    assert_errno(connected, &[libc::ENETUNREACH]);
    let socket = world.udp(at(Ipv4Addr::UNSPECIFIED.into(), 0)).unwrap();
    assert_errno(socket.send_to(b"lost", target), &[libc::ENETUNREACH]);
}

/// With `IP_RECVERR` a port unreachable is an edge with `EPOLLERR`, and fails one call on a socket
/// that is not connected, a send (which sends nothing) or a receive. The error queue has the rest.
/// `host/kernel/error_queue.rs`, `stack/udp.rs`. ip(7), `sock_dequeue_err_skb` in net/core/skbuff.c.
#[test]
fn port_unreachable_fails_one_call_and_is_queued_with_details() {
    // Connected elsewhere: nobody else gets the port, and datagrams from us are unwanted there.
    let closed = udp();
    closed.connect("127.0.0.1:9").unwrap();
    let target = closed.local_addr().unwrap();
    let socket = udp();
    socket.set_nonblocking(true).unwrap();
    setsockopt(&socket, sockopt::Ipv4RecvErr, &true).unwrap();
    let set = watched(&socket);
    for by_sending in [true, false] {
        socket.send_to(b"datagram", target).unwrap();
        assert!(next_event(&set).contains(EpollFlags::EPOLLERR));
        let failed = match by_sending {
            true => socket.send_to(b"not sent", target),
            false => socket.recv(&mut [0; 8]),
        };
        assert_errno(failed, &[libc::ECONNREFUSED]);
        assert_errno(socket.recv(&mut [0; 8]), &[libc::EAGAIN]);
        let wanted = format!("datagram to {target}: ICMP 3/3 from 127.0.0.1");
        assert_eq!(queued_error(&socket), Ok(wanted));
        assert_eq!(queued_error(&socket), Err(nix::Error::EAGAIN));
    }
}

/// The first entry of the error queue, in words.
fn queued_error(socket: &UdpSocket) -> nix::Result<String> {
    let mut bytes = [0; 64];
    let mut space = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let (fd, flags) = (socket.as_raw_fd(), MsgFlags::MSG_ERRQUEUE);
    let message = recvmsg::<SockaddrIn>(fd, &mut parts, Some(&mut space), flags)?;
    let (detail, to, length) = (message.cmsgs()?.next(), message.address, message.bytes);
    let (Some(ControlMessageOwned::Ipv4RecvErr(error, Some(from))), Some(to)) = (detail, to) else {
        fail("no detail, reporter or destination");
    };
    assert_eq!(error.ee_origin, libc::SO_EE_ORIGIN_ICMP);
    let (kind, code) = (error.ee_type, error.ee_code);
    let from = Ipv4Addr::from(u32::from_be(from.sin_addr.s_addr));
    let payload = String::from_utf8_lossy(&bytes[..length]);
    Ok(format!("{payload} to {to}: ICMP {kind}/{code} from {from}"))
}

/// A socket that is not connected hears everybody, whomever it has sent to (RFC 4787 REQ-8); a
/// connected one hears its peer and nobody else, so an answer can't come from another address.
/// `host/kernel/mod.rs` (`udp_open`). udp(7), connect(2).
#[test]
fn datagram_socket_hears_its_peer_only_if_it_is_connected() {
    let (friend, stranger) = (udp(), udp());
    for connected in [false, true] {
        let socket = udp();
        let addr = socket.local_addr().unwrap();
        let peer = friend.local_addr().unwrap();
        socket.send_to(b"hello", peer).unwrap();
        if connected {
            socket.connect(peer).unwrap();
        }
        for sender in [&stranger, &friend] {
            sender.send_to(b"hello", addr).unwrap();
        }
        for heard in &[&stranger, &friend][usize::from(connected)..] {
            let (_, from) = socket.recv_from(&mut [0; 8]).unwrap();
            assert_eq!(from, heard.local_addr().unwrap());
        }
        assert!(!readable(&socket, Duration::ZERO), "nothing else came");
    }
}

/// A ping socket takes and gives ICMP header and data. The kernel fills in checksum and identifier,
/// the socket's "port". Who is not in `ping_group_range`, by default everybody, gets `EACCES`.
/// `host/kernel/echo.rs` (`KernelEcho`), `stack/echo.rs` (`hint`). icmp(7), net/ipv4/ping.c.
#[test]
fn ping_socket_moves_header_and_data_under_its_own_identifier() {
    const KIND: [i32; 3] = [libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP];
    let open = |world: World| world.socket(KIND[0], KIND[1], KIND[2]);
    assert_errno(open(World::without_ping_sockets()), &[libc::EACCES]);
    let socket = UdpSocket::from(open(World::new()).unwrap());
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let request = [8, 0, 0, 0, 0x12, 0x34, 0, 7, b'd', b'a', b't', b'a'];
    socket.send_to(&request, at(LOOPBACK, 0)).unwrap();
    let mut reply = [0; 64];
    assert_eq!(socket.recv(&mut reply).unwrap(), request.len());
    let ident = socket.local_addr().unwrap().port().to_be_bytes();
    assert_eq!(reply[..2], [0, 0], "an echo reply");
    assert_eq!((&reply[4..6], &reply[6..12]), (&ident[..], &request[6..]));
    let checksum = Sum::default().bytes(&reply[..12]).finish();
    assert_eq!(checksum, 0, "the checksum is right");
}

/// A tap with one queue.
fn open(name: &str, vnet_header: bool) -> std::io::Result<std::os::fd::OwnedFd> {
    let mode = tap::Mode {
        vnet_header,
        many_queues: false,
    };
    tap::open(name, mode)
}

// --- the tap -------------------------------------------------------------------------------------

/// Root of an unprivileged user namespace gets a tap with a vnet header of 12 bytes and all offloads,
/// that for UDP for both families or none. The tap tells its address whatever name is asked for.
/// `sys/tap.rs`, `link/tap.rs` (`negotiate`). Documentation/networking/tuntap.rst, drivers/net/tun.c.
#[test]
fn unprivileged_tap_has_vnet_header_and_offloads() {
    use tap::offload::{CSUM, TSO4, TSO6, USO4, USO6};
    in_guest(|_| {
        let tap = open("tap9", true).unwrap();
        assert!(tap::has_vnet_header(tap.as_fd()).unwrap());
        tap::set_vnet_header_len(tap.as_fd(), vnet::LEN).unwrap();
        let offload = |bits| tap::set_offload(tap.as_fd(), bits);
        for bits in [CSUM, CSUM | TSO4, CSUM | TSO4 | TSO6] {
            offload(bits).unwrap();
        }
        assert_errno(offload(CSUM | USO4), &[libc::EINVAL]);
        offload(CSUM | TSO4 | TSO6 | USO4 | USO6).expect("Linux 6.2");
        let mac = tap::hardware_address(tap.as_fd()).unwrap();
        let mut listed = nix::ifaddrs::getifaddrs().unwrap();
        let tap9 = listed.find(|it| it.interface_name == "tap9");
        let address = tap9.unwrap().address.unwrap();
        assert_eq!(address.as_link_addr().unwrap().addr(), Some(mac));
    });
}

/// A tap without multi-queue has one opener, and goes when that one closes it.
/// `setup/guest.rs` (`make_tap`), `setup/run.rs` (nothing to clean up). drivers/net/tun.c.
#[test]
fn tap_has_one_opener_and_goes_with_it() {
    in_guest(|_| {
        let tap = open("tap9", true).unwrap();
        assert_errno(open("tap9", true), &[libc::EBUSY]);
        drop(tap);
        assert!(if_nametoindex("tap9").is_err());
    });
}

/// A tap with several queues sends a flow's frames to the one that a frame of that flow last came by, whatever it
/// would have chosen by itself. `stack/share.rs`. `tun_flow_update` in drivers/net/tun.c.
#[test]
fn tap_answers_by_the_queue_that_spoke_last() {
    in_guest(|_| {
        let mode = tap::Mode {
            vnet_header: false,
            many_queues: true,
        };
        let queues: Vec<File> = (0..2)
            .map(|_| tap::open("tap9", mode).unwrap().into())
            .collect();
        let mac = tap::hardware_address(queues[0].as_fd()).unwrap();
        let script = "ip addr add 192.0.2.1/24 dev tap9 && ip link set tap9 up && \
                      ip neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev tap9";
        run(Command::new("sh").args(["-c", script])).output();
        let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
        socket.connect("192.0.2.2:9").unwrap();
        let came_by = || {
            socket.send(b"?").unwrap();
            wait_until("the datagram", SOON, || {
                (0..2).find_map(|queue| Some((queue, next_datagram(&queues[queue])?)))
            })
        };
        for _ in 0..4 {
            let (queue, frame) = came_by();
            let answer = answer_to(&frame, mac);
            assert_eq!((&queues[1 - queue]).write(&answer).unwrap(), answer.len());
            assert_eq!(came_by().0, 1 - queue);
        }
    });
}

/// The next UDP datagram that a queue has, if there is one.
fn next_datagram(mut queue: &File) -> Option<Vec<u8>> {
    let mut frame = vec![0; 2048];
    while let Ok(len) = queue.read(&mut frame) {
        if frame[12..14] == [8, 0] && frame[23] == 17 {
            frame.truncate(len);
            return Some(frame);
        }
    }
    None
}

/// The same datagram the other way.
fn answer_to(frame: &[u8], mac: [u8; 6]) -> Vec<u8> {
    let mut answer = frame.to_vec();
    answer[..6].copy_from_slice(&mac);
    answer[6..12].copy_from_slice(&frame[..6]);
    for (there, back, len) in [(26, 30, 4), (34, 36, 2)] {
        answer[back..back + len].copy_from_slice(&frame[there..there + len]);
        answer[there..there + len].copy_from_slice(&frame[back..back + len]);
    }
    answer
}

/// A frame for an interface that is down is refused with `EIO`, and the tap lives on. One whose
/// interface was deleted wakes who waits for it, and gives `EBADFD` from then on.
/// `link/tap.rs` (`is_fatal`), `event_loop.rs` (`LinkGone`). drivers/net/tun.c.
#[test]
fn tap_outlives_its_interface_being_down_but_not_its_end() {
    const FRAME: [u8; 60] = [0xff; 60];
    in_guest(|_| {
        let device = File::from(open("tap9", false).unwrap());
        assert_errno((&device).write(&FRAME), &[libc::EIO]);
        let index = if_nametoindex("tap9").unwrap();
        let mut netlink = Netlink::open().unwrap();
        netlink.set_up(index, LinkChange::default()).unwrap();
        assert_eq!((&device).write(&FRAME).unwrap(), FRAME.len());

        let device = File::from(open("tap8", false).unwrap());
        let set = watched(&device);
        run(Command::new("ip").args(["link", "delete", "tap8"])).output();
        assert!(next_event(&set).contains(EpollFlags::EPOLLERR));
        assert_errno((&device).read(&mut [0; 64]), &[libc::EBADFD]);
        assert_errno((&device).write(&FRAME), &[libc::EBADFD]);
    });
}

/// A filter of the tap drops frames before they are queued, by whatever queue it was set, and gives way to the next one,
/// by whatever queue that is. `link/thinning.rs`. `tun_net_xmit` and `tun_attach_filter` in drivers/net/tun.c.
#[test]
fn tap_filter_drops_frames_before_they_are_queued() {
    in_guest(|_| {
        let mode = tap::Mode {
            vnet_header: false,
            many_queues: true,
        };
        let [tap, other] = [0, 1].map(|_| File::from(tap::open("tap9", mode).unwrap()));
        let script = "ip addr add 192.0.2.1/24 dev tap9 && ip link set tap9 up";
        run(Command::new("sh").args(["-c", script])).output();
        let read = |frame: &mut [u8]| (&tap).read(frame).or_else(|_| (&other).read(frame));
        let socket = std::net::UdpSocket::bind("192.0.2.1:0").unwrap();
        socket.set_broadcast(true).unwrap();
        let sends = |count| {
            while read(&mut [0; 2048]).is_ok() {}
            for _ in 0..count {
                socket.send_to(b"to all", "192.0.2.255:9").unwrap();
            }
            // What the kernel says by itself, of IPv6, is not counted.
            let next = || {
                let mut frame = [0; 2048];
                let len = read(&mut frame).ok()?;
                Some(frame[..len].ends_with(b"to all"))
            };
            std::iter::from_fn(next).filter(|ours| *ours).count()
        };
        let answer = |k| libc::sock_filter {
            code: 0x06,
            jt: 0,
            jf: 0,
            k,
        };
        assert_eq!(sends(5), 5);
        tap::set_filter(tap.as_fd(), &mut [answer(0)]).unwrap();
        assert_eq!(sends(5), 0);
        tap::set_filter(other.as_fd(), &mut [answer(u32::MAX)]).unwrap();
        assert_eq!(sends(5), 5);
        tap::set_filter(other.as_fd(), &mut [answer(0)]).unwrap();
        assert_eq!(sends(5), 0);
        tap::clear_filter(tap.as_fd()).unwrap();
        assert_eq!(sends(5), 5);
        let nonsense = libc::sock_filter {
            code: 0xff,
            ..answer(0)
        };
        assert_errno(
            tap::set_filter(tap.as_fd(), &mut [nonsense]),
            &[libc::EINVAL],
        );
    });
}

// --- namespaces, processes, memory ---------------------------------------------------------------

/// A network namespace knows the user namespace that owns it, unless that is above the asker's.
/// `setup/attach.rs` (`Namespaces::open`). ioctl_ns(2), `ns_get_owner` in kernel/user_namespace.c.
#[test]
fn network_namespace_names_its_owner_unless_it_is_an_ancestor() {
    if let Some(number) = inside() {
        let above = fd::adopt(number.parse().unwrap()).unwrap();
        return assert_errno(owning_user_namespace(above.as_fd()), &[libc::EPERM]);
    }
    let world = World::new();
    let guest = Guest::new(&world);
    let open = |kind| File::open(format!("/proc/{}/ns/{kind}", guest.pid())).unwrap();
    let identity = |file: File| file.metadata().map(|it| (it.dev(), it.ino())).unwrap();
    let owner = owning_user_namespace(open("net").as_fd()).unwrap();
    assert_eq!(identity(owner.into()), identity(open("user")));

    let above = Arc::new(OwnedFd::from(File::open("/proc/self/ns/net").unwrap()));
    let number = above.as_raw_fd().to_string();
    once_more(&number, |program| inheriting(guest.command(program), above));
}

/// Entering the user namespace that one is in gives `EINVAL`.
/// `setup/attach.rs` (`Namespaces::enter`). setns(2).
#[test]
fn entering_the_own_user_namespace_is_an_invalid_argument() {
    let world = World::new();
    let mut plan = world.plan().clone();
    plan.enter.extend_from_within(..1);
    assert_errno(world.command_with("true", plan).spawn(), &[libc::EINVAL]);
}

/// A pidfd becomes readable when its process ends, before anybody has waited for it.
/// `control/lifecycle.rs` (`gone`), `sys/process.rs`. pidfd_open(2).
#[test]
fn pidfd_is_readable_once_its_process_has_ended() {
    let process = Running::start(Command::new("sleep").arg("600"));
    let pidfd = pidfd(Pid::from_raw(process.pid())).unwrap();
    assert!(!readable(&pidfd, Duration::ZERO));
    process.signal(Signal::SIGKILL);
    assert!(readable(&pidfd, SOON));
}

/// `PR_SET_PDEATHSIG` outlasts exec, so a program that knows nothing of it ends with its parent.
/// `setup/keeper.rs` (`become_command`). prctl(2).
#[test]
fn signal_for_the_parents_death_outlasts_exec() {
    if let Some(mark) = inside() {
        let mut child = prepared("sleep", || prctl::set_pdeathsig(Signal::SIGKILL));
        child.arg(mark).status().unwrap();
        return;
    }
    let (world, mark) = (World::new(), Mark::new());
    let guest = Guest::new(&world);
    let parent = Running::start(&mut again(&mark, |program| guest.command(program)));
    wait_for_sleep(&mark);
    parent.signal(Signal::SIGKILL);
    parent.finish(SOON);
    wait_until_gone(&mark);
}

/// An orphan is adopted by the nearest subreaper above it, and after that one's end by the next.
/// `setup/keeper.rs` (the line of us, keeper and command), `setup/run.rs`. prctl(2).
#[test]
fn orphan_is_adopted_by_the_nearest_subreaper() {
    in_guest(|mark| {
        prctl::set_child_subreaper(true).unwrap();
        let mut keeper = prepared("sh", || prctl::set_child_subreaper(true));
        // The inner shell ends at once; the outer becomes a program that waits for nobody.
        let script = format!("sh -c 'sleep {mark} &'; exec sleep 1{mark}");
        let keeper = Running::start(keeper.args(["-c", &script]));
        let orphan = Pid::from_raw(wait_for_sleep(mark));
        let parent = format!("PPid:\t{}\n", keeper.pid());
        let status = || fs::read_to_string(format!("/proc/{orphan}/status")).unwrap();
        let adopted = || status().contains(&parent).then_some(());
        wait_until("the nearest to adopt", SOON, adopted);
        keeper.signal(Signal::SIGKILL);
        keeper.finish(SOON);
        kill(orphan, Signal::SIGKILL).unwrap();
        waitpid(orphan, None).expect("it is our child now");
    });
}

/// Zeroed memory of a mebibyte is not there until it is written, also when such blocks were written
/// and freed before (which teaches glibc otherwise), and those go back to the kernel.
/// `flow/tcp_engine.rs` (`RING`), `sys/memory.rs`. mallopt(3) `M_MMAP_THRESHOLD`, mmap(2).
#[test]
fn large_zeroed_allocations_cost_nothing_until_written() {
    const RING: usize = 1 << 20;
    const LITTLE: usize = 10 << 20;
    in_guest(|_| {
        memory::map_large_allocations();
        let rings = |count| -> Vec<_> { (0..count).map(|_| vec![0_u8; RING]).collect() };
        let (at_first, mut kept) = (resident(), Vec::new());
        for _ in 0..2 {
            let mut used = rings(50);
            used.iter_mut().for_each(|ring| ring.fill(1));
            assert!(resident() > at_first + 50 * RING - LITTLE, "written");
            // In a heap, the last one would keep all others from going back.
            kept.extend(used.pop());
        }
        assert!(resident() < at_first + LITTLE, "given back");
        let untouched = rings(200);
        assert!(resident() < at_first + LITTLE, "there, but not written");
        assert!(untouched.iter().all(|ring| ring[RING / 2] == 0));
    });
}

/// Bytes of this process in memory, by its page tables: /proc/self/statm may lag behind.
fn resident() -> usize {
    let text = fs::read_to_string("/proc/self/smaps_rollup").expect("/proc is there");
    let mut words = text.split_ascii_whitespace();
    words.find(|word| *word == "Rss:").expect("a line for it");
    let kibibytes = words.next().map(str::parse::<usize>);
    kibibytes.expect("a size").expect("a number") * 1024
}

/// The system's entropy is another each time.
/// `sys/memory.rs` (`entropy`), `stack/secrets.rs`. getrandom(2).
#[test]
fn entropy_differs_from_call_to_call() {
    let (one, other) = (memory::entropy().unwrap(), memory::entropy().unwrap());
    assert!(one.iter().all(|number| !other.contains(number)));
}

// --- the second run ------------------------------------------------------------------------------

/// Set in the environment of the second run of a test, to what the first one has to tell it.
const INSIDE: &str = "TAPGATE_TEST_INSIDE";

/// What the first run said, where this is the second.
fn inside() -> Option<String> {
    env::var(INSIDE).ok()
}

/// Does `act` as root of a namespace without a network, in a process of its own, which no other test
/// disturbs. What it leaves behind with the mark in its command line is killed.
fn in_guest(act: impl FnOnce(&str)) {
    if let Some(mark) = inside() {
        return act(&mark);
    }
    let world = World::new();
    let guest = Guest::new(&world);
    once_more(&Mark::new(), |program| guest.command(program));
}

/// Runs the present test again, to its end.
fn once_more(told: &str, start: impl FnOnce(&str) -> Command) {
    let output = run(&mut again(told, start)).output();
    assert!(output.contains("1 passed"), "it did not run: {output}");
}

/// The present test in a process that `start` makes. The program is passed by descriptor: its path
/// need not be there, or be allowed, where the process is going to live.
fn again(told: &str, start: impl FnOnce(&str) -> Command) -> Command {
    let program = File::open("/proc/self/exe").expect("it runs");
    let path = format!("/proc/self/fd/{}", program.as_raw_fd());
    let mut command = inheriting(start(&path), Arc::new(program.into()));
    let test = thread::current();
    let test = test.name().expect("a test's thread has its name");
    command.args(["--exact", "--nocapture", test]);
    command.env(INSIDE, told);
    command
}

fn inheriting(mut command: Command, descriptor: Arc<OwnedFd>) -> Command {
    let mut plan = Plan::default();
    plan.inherit.push(descriptor);
    plan.attach_to(&mut command);
    command
}

/// A command that does something to itself between fork and exec.
fn prepared(program: &str, act: fn() -> nix::Result<()>) -> Command {
    let mut command = Command::new(program);
    // SAFETY: each `act` here is one system call, on no memory but its arguments.
    unsafe { command.pre_exec(move || Ok(act()?)) };
    command
}

// --- sockets and events --------------------------------------------------------------------------

/// Both ends of a connection over the loopback. Ours is non-blocking, as all of tapgate's.
fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = listener.local_addr().expect("it is bound");
    let ours = TcpStream::connect(addr).expect("the backlog has room");
    ours.set_nonblocking(true).expect("a socket of ours");
    (ours, accept(&listener).0)
}

/// A datagram socket on the loopback.
fn udp() -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a free port");
    socket.set_read_timeout(Some(LIMIT)).expect("it is allowed");
    socket
}

/// A non-blocking stream socket that has done nothing yet.
fn stream(world: &World) -> Socket {
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK;
    let socket = world.socket(libc::AF_INET, kind, 0);
    socket.expect("a free descriptor").into()
}

/// A set like tapgate's with one descriptor, that has told nothing yet.
fn unasked(descriptor: &impl AsFd) -> EventSet {
    let set = EventSet::new().expect("a free descriptor");
    set.add(descriptor, 0).expect("it can be watched");
    set
}

/// The same, when it has told how the descriptor is at first.
fn watched(descriptor: &impl AsFd) -> EventSet {
    let set = unasked(descriptor);
    let _ = taken(&set);
    set
}

/// What the set tells now.
fn taken(set: &EventSet) -> Option<EpollFlags> {
    let mut events = [EpollEvent::empty(); 8];
    let count = set.take(&mut events).expect("a set of ours");
    let flags = events[..count].iter().map(EpollEvent::events);
    flags.reduce(EpollFlags::union)
}

/// What the set tells next.
fn next_event(set: &EventSet) -> EpollFlags {
    wait_until("an event", SOON, || taken(set))
}

/// Waits for a state of a descriptor, without a word to the other sets that it is in.
fn wait_for(descriptor: &impl AsFd, state: EpollFlags) {
    let there = || taken(&unasked(descriptor)).is_some_and(|now| now.contains(state));
    wait_until("a state", SOON, || there().then_some(()));
}
