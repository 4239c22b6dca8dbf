//! Sockets of another network namespace, for the test's own threads.
//!
//! Every stream and datagram socket gives up after [`LIMIT`], so that a lost segment fails a test
//! and doesn't hang it.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::Duration;

use socket2::{SockAddr, Socket};

use super::at;

/// How long a socket of the tests waits for its peer.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// Whoever can make sockets in a namespace.
pub(crate) trait Sockets {
    /// A plain socket, as in socket(2).
    fn socket(&self, domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd>;

    /// Listens on `addr`; port 0 for a free one.
    fn listen(&self, addr: SocketAddr) -> io::Result<TcpListener> {
        let socket = Socket::from(self.socket(domain_of(addr), libc::SOCK_STREAM, 0)?);
        socket.set_reuse_address(true)?;
        socket.bind(&SockAddr::from(addr))?;
        socket.listen(1024)?;
        Ok(socket.into())
    }

    /// Connects to `addr`; what the peer or the network answers comes back as the kernel's error.
    fn connect(&self, addr: SocketAddr) -> io::Result<TcpStream> {
        let socket = Socket::from(self.socket(domain_of(addr), libc::SOCK_STREAM, 0)?);
        socket.connect_timeout(&SockAddr::from(addr), LIMIT)?;
        socket.set_read_timeout(Some(LIMIT))?;
        socket.set_write_timeout(Some(LIMIT))?;
        Ok(socket.into())
    }

    /// A datagram socket on `addr`; port 0 for a free one.
    fn udp(&self, addr: SocketAddr) -> io::Result<UdpSocket> {
        let socket = Socket::from(self.socket(domain_of(addr), libc::SOCK_DGRAM, 0)?);
        socket.bind(&SockAddr::from(addr))?;
        socket.set_read_timeout(Some(LIMIT))?;
        Ok(socket.into())
    }

    /// A datagram socket on any address and port, that talks to `peer` only.
    fn udp_to(&self, peer: SocketAddr) -> io::Result<UdpSocket> {
        let any = if peer.is_ipv4() {
            super::ANY
        } else {
            super::ANY6
        };
        let socket = self.udp(at(any, 0))?;
        socket.connect(peer)?;
        Ok(socket)
    }
}

/// Asserts that a client hears what a server says before it closes with more to be read: one that goes on sending, and one
/// that waits.
#[track_caller]
pub(crate) fn assert_answer_is_heard(mut client: TcpStream, mut server: TcpStream, goes_on: bool) {
    let mut serve = move || {
        server.read_exact(&mut [0; 1000]).expect("an upload");
        server.write_all(b"too much").expect("the client is there");
    };
    if goes_on {
        let serving = thread::spawn(serve);
        while client.write(&[7; 65_536]).is_ok() {}
        serving.join().expect("the server does not fail");
    } else {
        client.set_nonblocking(true).expect("a socket");
        while client.write(&[7; 65_536]).is_ok() {}
        client.set_nonblocking(false).expect("a socket");
        serve();
        // Its end is the server's.
        drop(serve);
    }
    let mut heard = Vec::new();
    let end = client.read_to_end(&mut heard);
    assert_eq!(String::from_utf8_lossy(&heard), "too much");
    // The kernel tells of a reset once, and who went on sending has heard of it.
    if !goes_on {
        assert_errno(end, &[libc::ECONNRESET]);
    }
}

/// Makes the end of `stream` a reset, not a FIN.
pub(crate) fn reset(stream: TcpStream) {
    let socket = Socket::from(stream);
    socket
        .set_linger(Some(Duration::ZERO))
        .expect("a socket of ours");
}

/// A port that nothing listens on: one that was free a moment ago.
pub(crate) fn closed_port(namespace: &impl Sockets) -> u16 {
    let listener = namespace
        .listen(at(super::LOOPBACK, 0))
        .expect("a free port");
    listener.local_addr().expect("it is bound").port()
}

/// A script that leaves a namespace these ports alone to give away by itself (ip(7), `ip_local_port_range`).
pub(crate) fn ports_to_give(first: u16, last: u16) -> String {
    format!("echo {first} {last} > /proc/sys/net/ipv4/ip_local_port_range")
}

/// Asserts the error number of a failed call.
#[track_caller]
pub(crate) fn assert_errno<T: std::fmt::Debug>(result: io::Result<T>, accepted: &[i32]) {
    let error = result.expect_err("the call has to fail");
    let number = error.raw_os_error();
    assert!(
        accepted.iter().any(|one| number == Some(*one)),
        "{error} is none of {accepted:?}"
    );
}

fn domain_of(addr: SocketAddr) -> i32 {
    if addr.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    }
}
