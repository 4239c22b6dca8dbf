//! How deep a connection's receive queue may grow.
//!
//! Comes in: how many bytes were taken from it. Goes out: a buffer that grows no more. The kernel lets the buffer
//! grow while bytes come faster than they are taken, up to what `tcp_rmem` allows (tcp(7); 32 MiB since Linux 6.16), which
//! a far peer needs: it has that much under way. Of a near one all of it lies in the queue, and has left the caches
//! by the time that it is taken.

use std::io;
use std::os::fd::AsFd;

use socket2::Socket;

use crate::sys::socket::{keep_receive_buffer, least_round_trip};

/// A buffer of so many bytes is deep enough for a near peer. Measured on two cores with 2 MiB of second level cache each
/// (Linux 6.18), throughput of one stream to the guest over that with 32 MiB, medians of four: 0.85 with 3 MiB, 1.07 with 4,
/// 1.17 with 6, 1.13 with 8, 1.05 with 12.
const DEEP: usize = 4 << 20;
/// More than this is too deep.
const TOO_DEEP: usize = 8 << 20;
/// What is too deep becomes this.
const RIGHT: usize = 6 << 20;
/// A peer is near whose answer has taken no longer, microseconds: at 150 Gbit/s it has [`DEEP`] under way.
const NEAR: u32 = 200;
/// Bytes between two looks at the buffer.
const BETWEEN: u32 = 64 << 10;
/// A buffer that has not grown after so many looks does not need to.
const LOOKS: u16 = 512;

/// What is known of a connection's receive buffer.
#[derive(Debug, Default)]
pub(super) struct Depth {
    since: u32,
    looks: u16,
}

impl Depth {
    /// So many bytes were taken from the socket's queue.
    pub(super) fn taken(&mut self, socket: &Socket, len: usize) {
        if self.looks >= LOOKS {
            return;
        }
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        self.since = self.since.saturating_add(len);
        if self.since < BETWEEN {
            return;
        }
        (self.since, self.looks) = (0, self.looks + 1);
        let Ok(buffer @ DEEP..) = socket.recv_buffer_size() else {
            return;
        };
        self.looks = LOOKS;
        if least_round_trip(socket.as_fd()).is_ok_and(|time| time <= NEAR)
            && let Err(error) = limit(socket, buffer)
        {
            tracing::debug!(%error, buffer, "receive buffer may grow");
        }
    }
}

/// Has the buffer grow no more. How much a process may ask for the system limits (`net.core.rmem_max`), but not what the
/// buffer grows to: where that limit is low, it grows again.
fn limit(socket: &Socket, buffer: usize) -> io::Result<()> {
    let mut keep = true;
    if buffer > TOO_DEEP {
        // The kernel doubles what is asked for.
        socket.set_recv_buffer_size(RIGHT / 2)?;
        keep = socket.recv_buffer_size()? >= DEEP;
    }
    keep_receive_buffer(socket.as_fd(), keep)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use socket2::{Domain, Type};

    use super::*;
    use crate::sys::socket::keeps_receive_buffer;

    /// As large as the system allows, but so that it may grow.
    fn grown(socket: &Socket) -> usize {
        // More than `net.core.rmem_max` is as much as that.
        socket.set_recv_buffer_size(TOO_DEEP / 2).unwrap();
        keep_receive_buffer(socket.as_fd(), false).unwrap();
        socket.recv_buffer_size().unwrap()
    }

    fn is_kept(socket: &Socket) -> bool {
        keeps_receive_buffer(socket.as_fd()).unwrap()
    }

    #[test]
    fn near_peer_fills_no_more_once_that_is_deep() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, _) = listener.accept().unwrap();
        let socket = Socket::from(stream);
        let (mut depth, mut deep) = (Depth::default(), false);
        for _ in 0..LOOKS / 2 {
            depth.taken(&socket, BETWEEN as usize / 2);
            assert!(!is_kept(&socket), "there is little");
        }
        let size = grown(&socket);
        for _ in 0..2 {
            depth.taken(&socket, BETWEEN as usize / 2);
            deep |= is_kept(&socket);
        }
        assert_eq!(deep, size >= DEEP, "{size}");
        assert_eq!(socket.recv_buffer_size().unwrap(), size);
    }

    #[test]
    fn far_peer_may_fill_more() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        grown(&socket);
        Depth::default().taken(&socket, BETWEEN as usize);
        assert_eq!(least_round_trip(socket.as_fd()).unwrap(), u32::MAX);
        assert!(!is_kept(&socket));
    }

    #[test]
    fn too_deep_a_buffer_becomes_right_or_grows_again() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        limit(&socket, TOO_DEEP + 1).unwrap();
        let size = socket.recv_buffer_size().unwrap();
        assert!(size <= RIGHT, "{size}");
        assert_eq!(is_kept(&socket), size == RIGHT, "{size}");
    }
}
