//! Applications that say what they saw. Everyone who is asked, in a container or on the host, over
//! HTTP or in a datagram, answers "NAME saw ADDRESS say WORDS": so the answer that arrives shows what
//! both ends saw.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use socket2::{SockAddr, Socket};

use crate::host::Host;
use crate::support::serve::{self, Server};
use crate::support::sockets::Sockets;
use crate::support::{SOON, at, wait_until};

/// How long to wait for an answer that may have been lost, before asking again.
const PATIENCE: Duration = Duration::from_millis(300);
/// How long to wait for an answer that is on its way.
const LIMIT: Duration = Duration::from_secs(10);

/// What `name` answers when `seen` says `words`.
pub(crate) fn testimony(name: &str, seen: IpAddr, words: &str) -> String {
    format!("{name} saw {seen} say {words}\n")
}

/// A web server on the host, called "host". The words it hears are the path.
pub(crate) fn page(host: &Host, addr: SocketAddr) -> Server {
    let listener = host.listen(addr).expect("the address is the host's");
    serve::tcp(listener, |mut stream| {
        let _ = answer_request(&mut stream);
    })
}

fn answer_request(stream: &mut TcpStream) -> std::io::Result<()> {
    let seen = stream.peer_addr()?.ip();
    let mut request = Vec::new();
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte)? == 1 {
        request.extend(byte);
    }
    let request = String::from_utf8_lossy(&request).into_owned();
    let path = request.split(' ').nth(1).unwrap_or_default();
    let body = testimony("host", seen, path.trim_start_matches('/'));
    let length = body.len();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n");
    stream.write_all(format!("{head}\r\n{body}").as_bytes())
}

/// The same for datagrams.
pub(crate) fn answerer(host: &Host, addr: SocketAddr) -> Server {
    let socket = host.udp(addr).expect("the address is the host's");
    serve::udp(socket, |words, from| {
        let words = String::from_utf8_lossy(words).into_owned();
        Some(testimony("host", from.ip(), words.trim_end()).into_bytes())
    })
}

/// Asserts that who listens at `to`, over TCP, is `name`, and sees a client at `from` as `seen`.
/// The server may still be starting: an attempt without an answer is repeated.
#[track_caller]
pub(crate) fn assert_page(host: &Host, from: IpAddr, to: SocketAddr, name: &str, seen: IpAddr) {
    let words = format!("tcp-{from}");
    let answer = wait_until(&format!("a page of {name} at {to}"), SOON, || {
        fetch(host, from, to, &words)
    });
    assert_eq!(answer, testimony(name, seen, &words), "from {from} to {to}");
}

/// The same over UDP.
#[track_caller]
pub(crate) fn assert_answer(host: &Host, from: IpAddr, to: SocketAddr, name: &str, seen: IpAddr) {
    let words = format!("udp-{from}");
    let answer = wait_until(&format!("an answer of {name} at {to}"), SOON, || {
        ask(host, from, to, &words)
    });
    assert_eq!(answer, testimony(name, seen, &words), "from {from} to {to}");
}

/// Asserts that nobody listens at `to` any more: who did may still be ending.
#[track_caller]
pub(crate) fn assert_closed(host: &Host, to: SocketAddr) {
    wait_until(&format!("{to} to be closed"), SOON, || {
        let refused = host.connect(to).err()?.raw_os_error();
        (refused == Some(libc::ECONNREFUSED)).then_some(())
    });
}

/// What the page at `to` says to a client at `from`; none if it doesn't come whole.
fn fetch(host: &Host, from: IpAddr, to: SocketAddr, words: &str) -> Option<String> {
    let socket = Socket::from(host.socket(libc::AF_INET, libc::SOCK_STREAM, 0).ok()?);
    socket.bind(&SockAddr::from(at(from, 0))).ok()?;
    socket.connect_timeout(&SockAddr::from(to), LIMIT).ok()?;
    socket.set_read_timeout(Some(LIMIT)).ok()?;
    let mut stream = TcpStream::from(socket);
    let request = format!("GET /cgi-bin/who?{words} HTTP/1.0\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    head.contains(" 200 ").then(|| body.to_owned())
}

fn ask(host: &Host, from: IpAddr, to: SocketAddr, words: &str) -> Option<String> {
    let socket = host.udp(at(from, 0)).ok()?;
    socket.connect(to).ok()?;
    socket.set_read_timeout(Some(PATIENCE)).ok()?;
    socket.send(format!("{words}\n").as_bytes()).ok()?;
    let mut answer = [0; 512];
    let length = socket.recv(&mut answer).ok()?;
    Some(String::from_utf8_lossy(&answer[..length]).into_owned())
}
