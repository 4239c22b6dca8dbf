//! The least that a process between two connections can do: a relay that reads from one and writes to the other.
//!
//! In: ports to listen at, and those of the servers behind. Out: the word "ready" when it listens, and what either side
//! sends, at the other. It ends when standard input does. One epoll set, one thread, one buffer: no frames, no checks, no
//! limits. Whoever carries bytes between sockets by copying has at least this to do, so its figures say what can be had
//! that way on a machine.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;

use anyhow::{Context as _, Result};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use crate::number;
use crate::serve::{self, listen};

/// Bytes that are read at once.
const CHUNK: usize = 256 * 1024;
/// Events taken at once.
const EVENTS: usize = 256;
/// What the epoll set says for standard input, and what is set in what it says for listeners; everything else is twice
/// the number of a pair, and one more for its server's side.
const INPUT: u64 = u64::MAX;
const LISTENER: u64 = 1 << 62;

/// Relays between ports of one address until standard input ends. `ports` are of three words each: the first port to
/// listen at, the first of the servers', how many of both.
pub(crate) fn relay(address: IpAddr, ports: &[String]) -> Result<()> {
    let mut relay = Relay {
        epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
        listeners: Vec::new(),
        pairs: Vec::new(),
        bytes: vec![0; CHUNK],
    };
    for ports in ports.chunks(3) {
        let (first, server, count): (u16, u16, u16) =
            (number(ports, 0)?, number(ports, 1)?, number(ports, 2)?);
        for offset in 0..count {
            let at = SocketAddr::new(address, first + offset);
            let listener = listen(at).with_context(|| format!("TCP {at}"))?;
            let place = relay.listeners.len() as u64;
            watch(&relay.epoll, &listener, LISTENER | place)?;
            let behind = SocketAddr::new(address, server + offset);
            relay.listeners.push((listener, behind));
        }
    }
    watch(&relay.epoll, &io::stdin(), INPUT).context("standard input")?;
    println!("ready");
    relay.run()
}

fn watch(epoll: &Epoll, what: &impl AsFd, data: u64) -> Result<()> {
    Ok(epoll.add(what, EpollEvent::new(EpollFlags::EPOLLIN, data))?)
}

/// One side of a pair.
struct Side {
    stream: TcpStream,
    /// What the other side has sent and this one has not taken yet.
    owed: Vec<u8>,
    /// It sends nothing more.
    ended: bool,
    /// What is waited for at it.
    waits: EpollFlags,
}

impl Side {
    const fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            owed: Vec::new(),
            ended: false,
            waits: EpollFlags::EPOLLIN,
        }
    }
}

struct Relay {
    epoll: Epoll,
    listeners: Vec<(TcpListener, SocketAddr)>,
    /// The client's side first.
    pairs: Vec<Option<[Side; 2]>>,
    bytes: Vec<u8>,
}

impl Relay {
    fn run(&mut self) -> Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            let count = serve::wait(&self.epoll, &mut events)?;
            for event in &events[..count] {
                match event.data() {
                    INPUT => return Ok(()),
                    data if data & LISTENER != 0 => self.accept(index(data & !LISTENER)?)?,
                    data => self.carry(index(data / 2)?, index(data % 2)?)?,
                }
            }
        }
    }

    fn accept(&mut self, listener: usize) -> Result<()> {
        let (listener, server) = &self.listeners[listener];
        let client = match listener.accept() {
            Ok((client, _)) => client,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error).context("accept"),
        };
        let streams = [client, TcpStream::connect(server).context("connect")?];
        for (stream, data) in streams.iter().zip(2 * self.pairs.len() as u64..) {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            watch(&self.epoll, stream, data)?;
        }
        self.pairs.push(Some(streams.map(Side::new)));
        Ok(())
    }

    /// Something came at one side of a pair, or it takes what it is owed.
    fn carry(&mut self, pair: usize, side: usize) -> Result<()> {
        let Some([client, server]) = &mut self.pairs[pair] else {
            return Ok(());
        };
        let (here, there) = match side {
            0 => (&mut *client, &mut *server),
            _ => (&mut *server, &mut *client),
        };
        let moved = if here.owed.is_empty() {
            pass_on(here, there, &mut self.bytes)
        } else {
            pay(here)
        };
        let over = [&*client, &*server]
            .iter()
            .all(|side| side.ended && side.owed.is_empty());
        if moved.is_err() || over {
            // Closing them takes them out of the epoll set.
            self.pairs[pair] = None;
            return Ok(());
        }
        let data = 2 * pair as u64;
        wait(&self.epoll, client, server, data)?;
        wait(&self.epoll, server, client, data + 1)
    }
}

fn index(data: u64) -> Result<usize> {
    Ok(usize::try_from(data)?)
}

/// Has the epoll set wait for what a side is to do next: nothing is taken from it that the other has no room for.
fn wait(epoll: &Epoll, side: &mut Side, other: &Side, data: u64) -> Result<()> {
    let mut wanted = EpollFlags::empty();
    wanted.set(EpollFlags::EPOLLIN, !side.ended && other.owed.is_empty());
    wanted.set(EpollFlags::EPOLLOUT, !side.owed.is_empty());
    if side.waits != wanted {
        epoll.modify(&side.stream, &mut EpollEvent::new(wanted, data))?;
        side.waits = wanted;
    }
    Ok(())
}

/// What one side has sent goes to the other, as far as that takes it.
fn pass_on(from: &mut Side, to: &mut Side, bytes: &mut [u8]) -> io::Result<()> {
    if !to.owed.is_empty() {
        return Ok(());
    }
    let Some(len) = unless_blocked(from.stream.read(bytes))? else {
        return Ok(());
    };
    if len == 0 {
        from.ended = true;
        return to.stream.shutdown(Shutdown::Write);
    }
    let taken = unless_blocked(to.stream.write(&bytes[..len]))?.unwrap_or(0);
    to.owed.extend_from_slice(&bytes[taken..len]);
    Ok(())
}

/// A side gets more of what it is owed.
fn pay(side: &mut Side) -> io::Result<()> {
    let taken = unless_blocked(side.stream.write(&side.owed))?.unwrap_or(0);
    side.owed.drain(..taken);
    Ok(())
}

fn unless_blocked(done: io::Result<usize>) -> io::Result<Option<usize>> {
    match done {
        Ok(len) => Ok(Some(len)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}
