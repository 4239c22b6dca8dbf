//! The echo server: one epoll set for every TCP connection, one thread for the datagrams.
//!
//! In: the address, the first port and how many. Out: the word "ready" when all of them listen. It
//! ends when standard input does, so it never outlives the program that measures.
//!
//! Connections block, but a read follows readiness and an echo is short enough for the socket's
//! buffer: the clients here read what they are owed before they send more.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::{Domain, Socket, Type};

/// Connections that wait to be accepted; the kernel cuts this to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;
/// What the epoll set says for standard input; everything else is an index.
const INPUT: u64 = u64::MAX;
/// Events taken at once.
const EVENTS: usize = 256;

/// Serves until standard input ends.
pub(crate) fn serve(first: SocketAddr, ports: u16) -> Result<()> {
    let udp = UdpSocket::bind(first).with_context(|| format!("UDP {first}"))?;
    thread::spawn(move || echo_datagrams(&udp));
    let mut server = Server {
        epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
        places: Vec::new(),
        free: Vec::new(),
    };
    for offset in 0..ports {
        let address = SocketAddr::new(first.ip(), first.port() + offset);
        let listener = listen(address).with_context(|| format!("TCP {address}"))?;
        server.add(Place::Listener(listener))?;
    }
    let input = EpollEvent::new(EpollFlags::EPOLLIN, INPUT);
    match server.epoll.add(io::stdin(), input) {
        // A plain file or /dev/null never ends: then the server is ended from outside.
        Ok(()) | Err(Errno::EPERM) => {}
        Err(error) => return Err(error).context("standard input"),
    }
    println!("ready");
    server.run()
}

/// A listener that does not block.
pub(crate) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// How many events there are, once there are some, or a signal came.
pub(crate) fn wait(epoll: &Epoll, events: &mut [EpollEvent]) -> Result<usize> {
    match epoll.wait(events, EpollTimeout::NONE) {
        Ok(count) => Ok(count),
        Err(Errno::EINTR) => Ok(0),
        Err(error) => Err(error).context("epoll"),
    }
}

fn echo_datagrams(socket: &UdpSocket) {
    let mut bytes = [0; 65536];
    loop {
        // An error is a complaint about an earlier datagram, whose client has gone.
        if let Ok((length, from)) = socket.recv_from(&mut bytes) {
            let _ = socket.send_to(&bytes[..length], from);
        }
    }
}

enum Place {
    Listener(TcpListener),
    Connection(TcpStream),
    Free,
}

struct Server {
    epoll: Epoll,
    places: Vec<Place>,
    free: Vec<usize>,
}

impl Server {
    fn run(&mut self) -> Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            let count = wait(&self.epoll, &mut events)?;
            for event in &events[..count] {
                if event.data() == INPUT {
                    return Ok(());
                }
                self.handle(usize::try_from(event.data())?)?;
            }
        }
    }

    fn handle(&mut self, index: usize) -> Result<()> {
        match &mut self.places[index] {
            Place::Listener(_) => self.accept(index),
            Place::Connection(stream) => {
                if !echo(stream) {
                    // Closing it takes it out of the epoll set.
                    self.places[index] = Place::Free;
                    self.free.push(index);
                }
                Ok(())
            }
            Place::Free => Ok(()),
        }
    }

    fn accept(&mut self, index: usize) -> Result<()> {
        while let Place::Listener(listener) = &self.places[index] {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nodelay(true)?;
                    self.add(Place::Connection(stream))?;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                // The client has given up in the meantime.
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                Err(error) => return Err(error).context("accept"),
            }
        }
        Ok(())
    }

    fn add(&mut self, place: Place) -> Result<()> {
        let index = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place::Free);
            self.places.len() - 1
        });
        let event = EpollEvent::new(EpollFlags::EPOLLIN, index as u64);
        match &place {
            Place::Listener(listener) => self.epoll.add(listener, event)?,
            Place::Connection(stream) => self.epoll.add(stream, event)?,
            Place::Free => {}
        }
        self.places[index] = place;
        Ok(())
    }
}

/// Gives back what came; whether the connection goes on.
fn echo(stream: &mut TcpStream) -> bool {
    let mut bytes = [0; 4096];
    match stream.read(&mut bytes) {
        Ok(0) | Err(_) => false,
        Ok(length) => stream.write_all(&bytes[..length]).is_ok(),
    }
}
