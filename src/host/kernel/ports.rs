//! The ports that connections are made from.
//!
//! connect(2) looks for a free one through all that there are. Where thousands of connections to one server are open, or
//! ended less than a minute ago and keep their ports (TIME-WAIT, RFC 9293 3.6.1), that takes milliseconds, in which nobody
//! else is served. So it is given a few to look through at a time, and a few times, and seldom all of them. Comes in: a
//! socket, and where it is to be connected. Goes out: what connect(2) says, or that there was no time to find a port.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use socket2::Socket;

use crate::sys::socket::limit_ports;

/// Ports that are looked through at a time. One in use is passed over in a third of a microsecond.
const WINDOW: u16 = 64;
/// How often: with one port in a hundred free, one is found but for once in 170 times.
const WINDOWS: u16 = 8;
/// With fewer ports than these all may be looked through.
const MANY: u16 = 2 * WINDOW * WINDOWS;
/// All are looked through no more often than this: it takes up to ten milliseconds.
const SELDOM: Duration = Duration::from_millis(200);

/// Where the kernel keeps the first and the last port (ip(7), `ip_local_port_range`).
const FILE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
/// What a network namespace begins with (`inet_init_net` in net/ipv4/af_inet.c).
const USUAL: [u16; 2] = [32768, 60999];

/// All that there are.
const NO_LIMIT: [u16; 2] = [0, 0];

/// Ports of a network namespace.
#[derive(Debug)]
pub(super) struct Ports {
    first: u16,
    windows: u16,
    /// All were looked through last.
    looked_at: Option<Instant>,
    /// Which window is next is nobody's to know (RFC 6056 3.3.1).
    order: RandomState,
    tried: u64,
}

impl Ports {
    /// Those of the host, as they are now.
    pub(super) fn of_host() -> Self {
        let text = std::fs::read_to_string(FILE).unwrap_or_default();
        Self::of(range(&text).unwrap_or(USUAL))
    }

    /// Those of a namespace that nobody has told otherwise. Where somebody has, the kernel passes over what is
    /// not in its range, and looks through all of them.
    pub(super) fn of_namespace() -> Self {
        Self::of(USUAL)
    }

    fn of([first, last]: [u16; 2]) -> Self {
        let count = last.saturating_sub(first).saturating_add(1);
        Self {
            first,
            windows: if count < MANY { 0 } else { count / WINDOW },
            looked_at: None,
            order: RandomState::new(),
            tried: 0,
        }
    }

    /// The first and the last port of the next window; none where all ports may be looked through.
    fn next_window(&mut self) -> Option<[u16; 2]> {
        self.tried = self.tried.wrapping_add(1);
        let drawn = self.order.hash_one(self.tried) % u64::from(self.windows.max(1));
        let drawn = u16::try_from(drawn).unwrap_or(0);
        let first = self.first + drawn * WINDOW;
        (self.windows > 0).then_some([first, first + (WINDOW - 1)])
    }

    /// Begins a connection.
    ///
    /// # Errors
    /// `WouldBlock` where hardly a port is left, and nobody has time to look for it; else what connect(2) reports,
    /// `EINPROGRESS` among it.
    pub(super) fn connect(&mut self, socket: &Socket, remote: SocketAddr) -> io::Result<()> {
        let remote = remote.into();
        for _ in 0..WINDOWS {
            let Some(window) = self.next_window() else {
                return socket.connect(&remote);
            };
            if limit_ports(socket.as_fd(), window).is_err() {
                // Not known before Linux 6.3.
                self.windows = 0;
                return socket.connect(&remote);
            }
            match socket.connect(&remote) {
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {}
                outcome => return outcome,
            }
        }
        let now = Instant::now();
        if self.looked_at.is_some_and(|last| now - last < SELDOM) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.looked_at = Some(now);
        // It may be something else that is not there.
        limit_ports(socket.as_fd(), NO_LIMIT)?;
        socket.connect(&remote)
    }
}

/// The first and the last port that a line tells of.
fn range(line: &str) -> Option<[u16; 2]> {
    let mut words = line.split_ascii_whitespace().map(str::parse);
    match (words.next(), words.next()) {
        (Some(Ok(first)), Some(Ok(last))) if first <= last => Some([first, last]),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn windows_are_of_the_range_and_reach_all_of_it() {
        for all in [USUAL, [1, 65535], [65535 - MANY + 1, 65535], [40000, 41100]] {
            let mut ports = Ports::of(all);
            let windows: BTreeSet<_> = (0..20_000).filter_map(|_| ports.next_window()).collect();
            let [first, last] = all;
            assert!(
                windows
                    .iter()
                    .all(|[from, to]| first <= *from && *to <= last)
            );
            assert_eq!(windows.len(), usize::from((last - first + 1) / WINDOW));
        }
    }

    #[test]
    fn a_connection_comes_from_a_window() {
        let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut ports = Ports::of_host();
        let order = ports.order.clone();
        let socket = Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        let to = server.local_addr().unwrap();
        ports.connect(&socket, to).unwrap();
        // Where the kernel is older or has few ports, any will do.
        let mut same = Ports {
            order,
            tried: 0,
            ..ports
        };
        if let Some([first, last]) = same.next_window() {
            let from = socket.local_addr().unwrap().as_socket().unwrap().port();
            assert!((first..=last).contains(&from), "{first} {from} {last}");
        }
    }

    #[test]
    fn few_ports_are_looked_through_at_once() {
        for few in [[1024, 1024], [5, 2 + MANY], [9, 3]] {
            assert_eq!(Ports::of(few).next_window(), None);
        }
    }

    #[test]
    fn a_range_is_read_as_the_kernel_writes_it() {
        assert_eq!(range("32768\t60999\n"), Some(USUAL));
        for other in ["", "32768", "9 3", "a b", "70000 80000"] {
            assert_eq!(range(other), None, "{other}");
        }
    }
}
