//! How deep a connection's receive queue may grow.
//!
//! Comes in: how many bytes were taken from it. Goes out: a buffer that grows no more. The kernel lets the buffer
//! grow while bytes come faster than they are taken, up to what `tcp_rmem` allows (tcp(7); 32 MiB since Linux 6.16), which
//! a far peer needs: it has that much under way. Of a near one all of it lies in the queue, and has left the caches
//! by the time that it is taken.

use std::io;
use std::os::fd::AsFd;

use socket2::{Domain, Socket, Type};

use crate::sys::socket::{clamp_window, least_round_trip};

/// What is deep enough for a near peer, bytes. Measured on two cores with 2 MiB of second level cache each (Linux 6.18),
/// throughput of one stream to the guest over that with 32 MiB, medians of four: 0.85 with 3 MiB, 1.07 with 4, 1.17 with
/// 6, 1.13 with 8, 1.05 with 12.
const DEEP: usize = 6 << 20;
/// A buffer of more than this has begun to grow: there is bulk.
const GROWS: usize = 256 << 10;
/// A peer is near whose answer has taken no longer, microseconds: at 80 Gbit/s it has less than a third of [`DEEP`] under
/// way, and the kernel counts up to two bytes for each.
const NEAR: u32 = 200;
/// Bytes between two looks at the buffer.
const BETWEEN: u32 = 64 << 10;

/// What is known of a connection's receive buffer.
#[derive(Debug, Default)]
pub(super) struct Depth {
    since: u32,
    settled: bool,
}

impl Depth {
    /// So many bytes were taken from the socket's queue.
    pub(super) fn taken(&mut self, socket: &Socket, len: usize) {
        if self.settled {
            return;
        }
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        self.since = self.since.saturating_add(len);
        if self.since < BETWEEN {
            return;
        }
        self.since = 0;
        let Ok(buffer @ GROWS..) = socket.recv_buffer_size() else {
            return;
        };
        self.settled = true;
        // What has grown further is not cut: what was promised to the sender would be lost.
        if buffer < DEEP
            && least_round_trip(socket.as_fd()).is_ok_and(|time| time <= NEAR)
            && let Err(error) = settle(socket)
        {
            tracing::debug!(%error, buffer, "receive buffer may grow");
        }
    }
}

/// Gives a connection the buffer that is deep enough, which then grows no more, where the system lets a process ask for
/// so much (`net.core.rmem_max`, 4 MiB since Linux 6.18); else nothing changes.
fn settle(socket: &Socket) -> io::Result<()> {
    // The kernel doubles what is asked for.
    let asked = DEEP / 2;
    let other = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    other.set_recv_buffer_size(asked)?;
    if other.recv_buffer_size()? < DEEP {
        return Ok(());
    }
    socket.set_recv_buffer_size(asked)?;
    // Of a buffer that was asked for no more than this is made a window; until then it followed the buffer.
    clamp_window(socket.as_fd(), DEEP)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// How far a process may go on this system.
    fn allowed() -> usize {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(DEEP / 2).unwrap();
        socket.recv_buffer_size().unwrap()
    }

    /// As much as fits, and from the other end what has come of it.
    fn carry(from: &mut TcpStream, to: &mut Socket, piece: &mut [u8]) -> usize {
        from.set_nonblocking(true).unwrap();
        while from.write(&[0; 1 << 17]).is_ok() {}
        to.read(piece).unwrap()
    }

    fn joined() -> (Socket, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut socket = Socket::from(listener.accept().unwrap().0);
        // The least of several answers: the first may have waited for a processor.
        for _ in 0..8 {
            socket.write_all(b"x").unwrap();
            peer.read_exact(&mut [0]).unwrap();
        }
        (socket, peer)
    }

    #[test]
    fn near_peer_s_bulk_gets_what_is_deep_enough_and_no_more() {
        let (mut socket, mut peer) = joined();
        let first = socket.recv_buffer_size().unwrap();
        let mut depth = Depth::default();
        depth.taken(&socket, BETWEEN as usize);
        assert_eq!(socket.recv_buffer_size().unwrap(), first, "no bulk");
        let mut piece = vec![0; 8 << 20];
        for _ in 0..1000 {
            let len = carry(&mut peer, &mut socket, &mut piece);
            depth.taken(&socket, len);
        }
        assert!(depth.settled, "it grows");
        let size = socket.recv_buffer_size().unwrap();
        // It may have grown beyond in one step, which stays.
        let wrong = if allowed() == DEEP { ..DEEP } else { ..GROWS };
        assert!(!wrong.contains(&size), "{size}");
    }

    #[test]
    fn nobody_gets_less_than_before() {
        let (socket, _peer) = joined();
        let before = socket.recv_buffer_size().unwrap();
        settle(&socket).unwrap();
        let after = socket.recv_buffer_size().unwrap();
        let expected = if allowed() == DEEP { DEEP } else { before };
        assert_eq!(after, expected);
    }

    #[test]
    fn who_has_not_answered_is_not_near() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        assert_eq!(least_round_trip(socket.as_fd()).unwrap(), u32::MAX);
        let (near, _peer) = joined();
        assert!(least_round_trip(near.as_fd()).unwrap() <= NEAR);
    }
}
