//! Small servers on sockets of a world or a guest. Each ends when its handle is dropped; the thread
//! of a connection ends with the connection.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::sockets::LIMIT;

/// How often a server looks whether it is still wanted.
const GLANCE: Duration = Duration::from_millis(50);

/// A running server.
pub(crate) struct Server {
    pub(crate) addr: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn port(&self) -> u16 {
        self.addr.port()
    }

    fn start(addr: SocketAddr, serve: impl FnOnce(&AtomicBool) + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = thread::spawn(move || serve(&seen));
        Self {
            addr,
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Gives every connection to `handle`, in a thread of its own.
pub(crate) fn tcp(
    listener: TcpListener,
    handle: impl Fn(TcpStream) + Send + Sync + 'static,
) -> Server {
    let addr = listener.local_addr().expect("it is bound");
    let handle = Arc::new(handle);
    Server::start(addr, move |stop| {
        while !stop.load(Ordering::Relaxed) {
            if !readable(&listener, GLANCE) {
                continue;
            }
            if let Ok((stream, _)) = listener.accept() {
                let handle = Arc::clone(&handle);
                thread::spawn(move || handle(with_limits(stream)));
            }
        }
    })
}

/// Answers every datagram with what `answer` makes of it.
pub(crate) fn udp(
    socket: UdpSocket,
    answer: impl Fn(&[u8], SocketAddr) -> Option<Vec<u8>> + Send + 'static,
) -> Server {
    let addr = socket.local_addr().expect("it is bound");
    socket
        .set_read_timeout(Some(GLANCE))
        .expect("a socket of ours");
    Server::start(addr, move |stop| {
        let mut buffer = vec![0; 65536];
        while !stop.load(Ordering::Relaxed) {
            let Ok((length, from)) = socket.recv_from(&mut buffer) else {
                continue;
            };
            if let Some(answer) = answer(&buffer[..length], from) {
                let _ = socket.send_to(&answer, from);
            }
        }
    })
}

/// Sends every byte back until the peer ends, then ends as well.
pub(crate) fn tcp_echo(listener: TcpListener) -> Server {
    tcp(listener, |mut stream| {
        let mut reader = stream.try_clone().expect("a free descriptor");
        let _ = std::io::copy(&mut reader, &mut stream);
    })
}

/// Sends every datagram back.
pub(crate) fn udp_echo(socket: UdpSocket) -> Server {
    udp(socket, |datagram, _| Some(datagram.to_vec()))
}

/// An HTTP server of one page.
pub(crate) fn page(listener: TcpListener, body: &'static str) -> Server {
    tcp(listener, move |mut stream| {
        let mut request = Vec::new();
        let mut byte = [0];
        while !request.ends_with(b"\r\n\r\n") && matches!(stream.read(&mut byte), Ok(1)) {
            request.push(byte[0]);
        }
        let length = body.len();
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n");
        let _ = stream.write_all(format!("{head}\r\n{body}").as_bytes());
    })
}

/// The next connection, with a limit.
pub(crate) fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    assert!(readable(listener, LIMIT), "no connection in {LIMIT:?}");
    let (stream, peer) = listener.accept().expect("a connection is waiting");
    (with_limits(stream), peer)
}

/// Whether there is something to read or accept within `limit`.
pub(crate) fn readable(socket: &impl AsFd, limit: Duration) -> bool {
    let mut events = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    let limit = PollTimeout::try_from(limit).expect("a short time");
    poll(&mut events, limit).is_ok_and(|ready| ready > 0)
}

fn with_limits(stream: TcpStream) -> TcpStream {
    stream
        .set_read_timeout(Some(LIMIT))
        .expect("a limit is allowed");
    stream
        .set_write_timeout(Some(LIMIT))
        .expect("a limit is allowed");
    stream
}
