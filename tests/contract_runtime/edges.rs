//! Edges other than a namespace by its name (contract 3.1, options): a tap that the caller has opened
//! (`--netns-type=tapfd`), and the socket of a virtual machine (`--target-type=bess`).

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::packets::{self, GATEWAY_MAC, GUEST, GUEST_MAC, ICMP, Ipv4, Received, Segment};
use crate::support::attached::pipe;
use crate::support::bulk::{self, Way};
use crate::support::guest::Guest;
use crate::support::process::fail;
use crate::support::serve;
use crate::support::slirp4netns::{Api, Call, Slirp4netns};
use crate::support::sockets::Sockets;
use crate::support::world::World;
use crate::support::{GATEWAY, LOOPBACK, SOON, at, wait_until};

/// Opens a tap where it runs and sends it to who listens at `/mnt/tap.sock`.
const SEND_TAP: &str = "
import fcntl, os, socket, struct, sys
tap = os.open('/dev/net/tun', os.O_RDWR)
fcntl.ioctl(tap, 0x400454ca, struct.pack('16sH22x', b'tap0', int(sys.argv[1], 16)))
client = socket.socket(socket.AF_UNIX)
client.connect('/mnt/tap.sock')
socket.send_fds(client, [b'tap'], [tap])
";

/// Gets a tap, puts it at descriptor 5 and becomes what the rest of its words say.
const RECEIVE_TAP: &str = "
import os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind('/mnt/tap.sock')
server.listen()
client, _ = server.accept()
tap = socket.recv_fds(client, 8, 1)[1][0]
os.dup2(tap, 5)
os.execvp(sys.argv[1], sys.argv[1:])
";

const IFF_TAP_NO_PI: u16 = 0x1002;
const IFF_VNET_HDR: u16 = 0x4000;

/// slirp4netns on a tap that was opened in the guest.
fn serve_opened_tap(world: &World, guest: &Guest, flags: u16, words: &[&str]) -> Slirp4netns {
    let (ready, write_end) = pipe();
    let arguments = ["--netns-type=tapfd", "-r", "3", "-a", "/mnt/api.sock"];
    let call = Call::new(world, &[&arguments[..], words].concat());
    let receive = ["/usr/bin/python3", "-I", "-S", "-c", RECEIVE_TAP];
    let running = call.by(&receive).pass(&write_end, 3).start();
    drop(write_end);
    wait_until("who wants a tap", SOON, || {
        world.dir().join("tap.sock").exists().then_some(())
    });
    let flags = format!("{flags:x}");
    wait_until("the tap to be taken", SOON, || {
        let sent = guest.run("/usr/bin/python3", &["-I", "-S", "-c", SEND_TAP, &flags]);
        // Between bind and listen nobody is let in yet.
        sent.status.success().then_some(())
    });
    Slirp4netns::when_ready(running, &ready)
}

/// Contract 3.1, options: `--netns-type=tapfd FD`, with a vnet header and without; the name may follow.
#[test]
fn tap_of_the_caller_is_served() {
    for (flags, words) in [
        (IFF_TAP_NO_PI, &["5"][..]),
        (IFF_TAP_NO_PI | IFF_VNET_HDR, &["5", "tap0"]),
    ] {
        let world = World::new();
        let guest = Guest::new(&world);
        let slirp4netns = serve_opened_tap(&world, &guest, flags, words);
        let script = "ip link set lo up; ip link set tap0 up
                      ip address add 10.0.2.100/24 dev tap0; ip route add default via 10.0.2.2";
        guest.run("sh", &["-ec", script]).output();
        let server = bulk::server(world.listen(at(LOOPBACK, 0)).unwrap());
        for way in [Way::Up, Way::Down] {
            bulk::transfer(&guest, at(GATEWAY, server.port()), way, (2, 1 << 20));
        }
        assert!(Api::new(&world, "api.sock").list().is_empty());
        slirp4netns.signal(Signal::SIGTERM);
        assert_eq!(slirp4netns.finish(SOON).code(), 0);
        assert!(!guest.run("ip", &["link", "show", "tap0"]).status.success());
    }
}

/// Contract 3.1, options: what is no tap is one line.
#[test]
fn descriptor_that_is_no_tap_is_one_line() {
    let world = World::new();
    let (_, write_end) = pipe();
    let call = Call::new(&world, &["--netns-type=tapfd", "5"]);
    let refused = call.pass(&write_end, 5).start().finish(SOON);
    refused.assert_runtime_error("tap");
    let call = Call::new(&world, &["--netns-type=tapfd", "9"]);
    call.start().finish(SOON).assert_runtime_error("9");
}

/// A machine at the other end of a socket: every message is a frame.
struct Machine {
    socket: Socket,
}

impl Machine {
    fn connect(path: &Path) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
        socket.connect(&SockAddr::unix(path)?)?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        Ok(Self { socket })
    }

    fn send(&self, frame: &[u8]) {
        let sent = self.socket.send(frame).expect("it is connected");
        assert_eq!(sent, frame.len());
    }

    fn frame(&self) -> Vec<u8> {
        let mut frame = vec![0; 65536];
        let length = (&self.socket).read(&mut frame);
        let length = length.unwrap_or_else(|error| fail(&format!("no frame: {error}")));
        assert!(length > 0, "the socket is closed");
        frame.truncate(length);
        frame
    }

    /// The next IPv4 packet; who asks for our hardware address gets it.
    fn packet(&self) -> Received {
        loop {
            let frame = self.frame();
            if frame[12..14] == [8, 6] && frame[20..22] == [0, 1] {
                let gateway = Ipv4Addr::new(frame[28], frame[29], frame[30], frame[31]);
                self.send(&packets::arp_frame(2, GUEST_MAC, GUEST, gateway));
            }
            let read = packets::read(&[frame]);
            if let Some(packet) = read.unwrap_or_else(|error| fail(&error)).pop() {
                return packet;
            }
        }
    }
}

const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

/// Contract 3.1, options: `--target-type bess`, "exactly one positional (socket)". ARP, an echo, a
/// datagram there and back, and the end.
#[test]
fn machine_at_a_socket_is_served() {
    let world = World::new();
    let arguments = [
        "--target-type=bess",
        "-r",
        "3",
        "-a",
        "/mnt/api.sock",
        "/mnt/vm.sock",
    ];
    let slirp4netns = Call::new(&world, &arguments).ready_at(3);
    let path = world.dir().join("vm.sock");
    let metadata = fs::metadata(&path).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o600);
    let machine = Machine::connect(&path).unwrap();

    machine.send(&packets::arp_frame(1, GUEST_MAC, GUEST, GATEWAY_V4));
    let reply = machine.frame();
    assert_eq!(reply[..6], GUEST_MAC, "to the one that asked");
    assert_eq!(reply[12..14], [8, 6]);
    assert_eq!(reply[20..22], [0, 2], "a reply");
    assert_eq!(reply[22..28], GATEWAY_MAC);

    let echo = packets::icmp(8, 0, [7, 1], b"are you there");
    machine.send(&Ipv4::new(GATEWAY_V4, ICMP).frame(&echo));
    let answer = machine.packet();
    assert_eq!(answer.icmp(), Some((0, 0)));
    assert_eq!(answer.payload[8..], *b"are you there");

    let server = serve::udp_echo(world.udp(at(LOOPBACK, 0)).unwrap());
    let to = SocketAddr::new(GATEWAY_V4.into(), server.port());
    machine.send(&packets::udp_frame(4000, to, b"question"));
    assert_eq!(machine.packet().udp(), Some((to, 4000, &b"question"[..])));

    assert!(Api::new(&world, "api.sock").list().is_empty());
    drop(machine);
    assert_eq!(slirp4netns.finish(SOON).code(), 0, "its machine is gone");
    assert!(!path.exists(), "and the socket with it");
}

/// Contract 3.1, options: bess, a connection by hand-made segments to the host's server and its answer.
#[test]
fn machine_at_a_socket_opens_a_connection() {
    const SYN: u8 = 2;
    const ACK: u8 = 16;
    let world = World::new();
    let arguments = ["--target-type=bess", "-r", "3", "/mnt/vm.sock"];
    let slirp4netns = Call::new(&world, &arguments).ready_at(3);
    let machine = Machine::connect(&world.dir().join("vm.sock")).unwrap();
    let listener = world.listen(at(LOOPBACK, 0)).unwrap();
    let ip = Ipv4::new(GATEWAY_V4, packets::TCP);
    let segment = |seq, ack, flags, payload: &[u8]| {
        let fields = Segment {
            from: 4000,
            to: listener.local_addr().expect("it is bound").port(),
            seq,
            ack,
            flags,
            window: 60_000,
        };
        machine.send(&ip.frame(&ip.tcp(&fields, &[], payload)));
    };
    segment(1000, 0, SYN, b"");
    let answer = machine.packet();
    assert_eq!(answer.payload[13], SYN | ACK);
    let theirs = u32::from_be_bytes([4, 5, 6, 7].map(|at: usize| answer.payload[at]));
    segment(1001, theirs.wrapping_add(1), ACK, b"");
    segment(1001, theirs.wrapping_add(1), ACK | 8, b"question");
    let (mut outside, _) = serve::accept(&listener);
    let mut heard = [0; 8];
    outside.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"question");
    outside.write_all(b"answer").unwrap();
    loop {
        let packet = machine.packet();
        let header = usize::from(packet.payload[12] >> 4) * 4;
        if packet.payload.len() > header {
            assert_eq!(packet.payload[header..], *b"answer");
            break;
        }
    }
    slirp4netns.signal(Signal::SIGTERM);
    assert_eq!(slirp4netns.finish(SOON).code(), 0);
}
