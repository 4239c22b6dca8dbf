//! Bulk transfers whose every byte is checked.
//!
//! A transfer is a stretch of one long pattern; the seed says where it begins, so two flows never
//! carry the same bytes at the same place. The pattern's length is a prime: a lost, doubled or
//! swapped piece of any usual size doesn't line up again.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::LazyLock;
use std::thread;

use super::serve::{self, Server};
use super::sockets::Sockets;

const PATTERN_LENGTH: usize = 1_048_573;

static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_be_bytes()[0]
    };
    (0..PATTERN_LENGTH).map(|_| next()).collect()
});

/// Which way the payload goes, seen from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Up,
    Down,
}

/// The host's half of [`transfer`].
pub(crate) fn server(listener: TcpListener) -> Server {
    serve::tcp(listener, |stream| {
        // The guest's half sees what went wrong: it counts what it gets.
        let _ = serve_one(stream);
    })
}

fn serve_one(mut stream: TcpStream) -> io::Result<()> {
    let mut header = [0; 17];
    stream.read_exact(&mut header)?;
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[at..at + 8]);
        u64::from_be_bytes(bytes)
    };
    let (seed, length) = (word(1), word(9));
    if header[0] == 1 {
        let received = receive(&mut stream, seed)?;
        stream.write_all(&received.to_be_bytes())
    } else {
        send(&mut stream, seed, length)?;
        stream.shutdown(Shutdown::Write)
    }
}

/// Moves `total` bytes over `flows` connections at once, and checks each byte at its receiver.
pub(crate) fn transfer(
    from: &(impl Sockets + Sync),
    to: SocketAddr,
    way: Way,
    (flows, total): (u64, u64),
) {
    let share = total / flows;
    thread::scope(|scope| {
        let workers: Vec<_> = (0..flows)
            .map(|flow| scope.spawn(move || (flow, transfer_one(from, to, way, (flow, share)))))
            .collect();
        for worker in workers {
            let (flow, moved) = worker.join().expect("a flow's thread doesn't fail");
            let moved = moved.map_err(|error| format!("{way:?}, flow {flow} of {flows}: {error}"));
            assert_eq!(moved, Ok(share), "{way:?}, flow {flow} of {flows}");
        }
    });
}

fn transfer_one(
    from: &impl Sockets,
    to: SocketAddr,
    way: Way,
    (flow, share): (u64, u64),
) -> io::Result<u64> {
    let mut stream = from.connect(to)?;
    let seed = flow * 104_729 + 1;
    let mut header = vec![u8::from(way == Way::Up)];
    header.extend(seed.to_be_bytes());
    header.extend(share.to_be_bytes());
    stream.write_all(&header)?;
    match way {
        Way::Up => {
            send(&mut stream, seed, share)?;
            stream.shutdown(Shutdown::Write)?;
            let mut count = [0; 8];
            stream.read_exact(&mut count)?;
            Ok(u64::from_be_bytes(count))
        }
        Way::Down => receive(&mut stream, seed),
    }
}

/// Writes `length` bytes of the pattern.
pub(crate) fn send(stream: &mut impl Write, seed: u64, length: u64) -> io::Result<()> {
    let mut place = start(seed);
    let mut left = length;
    while left > 0 {
        let most = usize::try_from(left.min(65536))
            .expect("small")
            .min(PATTERN_LENGTH - place);
        let wrote = stream.write(&PATTERN[place..place + most])?;
        place = (place + wrote) % PATTERN_LENGTH;
        left -= wrote as u64;
    }
    Ok(())
}

/// Reads to the end and compares; gives the number of bytes.
pub(crate) fn receive(stream: &mut impl Read, seed: u64) -> io::Result<u64> {
    let mut place = start(seed);
    let mut total = 0;
    let mut buffer = vec![0; 65536];
    loop {
        let most = buffer.len().min(PATTERN_LENGTH - place);
        let got = stream.read(&mut buffer[..most])?;
        if got == 0 {
            return Ok(total);
        }
        if buffer[..got] != PATTERN[place..place + got] {
            return Err(io::Error::other(format!("wrong bytes after {total}")));
        }
        place = (place + got) % PATTERN_LENGTH;
        total += got as u64;
    }
}

fn start(seed: u64) -> usize {
    usize::try_from(seed % PATTERN_LENGTH as u64).expect("below the pattern's length")
}
