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

/// Ports that are looked through at a time. One in use is passed over in less than a microsecond.
const WINDOW: u16 = 64;
/// How often: with one port in a hundred free, one is found but for once in 170 times.
const WINDOWS: u16 = 8;
/// With fewer ports than these all may be looked through.
const MANY: u16 = 2 * WINDOW * WINDOWS;
/// What took longer was a look through all of them: so the kernel does where a window is not in its own range.
const SLOW: Duration = Duration::from_millis(1);
/// For a connection to one server it is looked so long no more often than this: ten milliseconds, or twenty.
const SELDOM: Duration = Duration::from_millis(200);
/// For connections to so many servers in that time, whichever they are: the rest waits.
const LOOKS: usize = 2;

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
    /// None where all may be looked through.
    windows: u16,
    /// When it was looked long, a moment ago, and for which server.
    looked_for: Vec<(Instant, SocketAddr)>,
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

    /// Those of a namespace that nobody has told otherwise, as far as is known.
    pub(super) fn of_namespace() -> Self {
        Self::of(USUAL)
    }

    fn of([first, last]: [u16; 2]) -> Self {
        let count = last.saturating_sub(first).saturating_add(1);
        Self {
            first,
            windows: if count < MANY { 0 } else { count / WINDOW },
            looked_for: Vec::new(),
            order: RandomState::new(),
            tried: 0,
        }
    }

    /// The first and the last port of the next window; none where all ports may be looked through.
    fn next_window(&mut self) -> Option<[u16; 2]> {
        self.tried = self.tried.wrapping_add(1);
        let drawn = self.order.hash_one(self.tried);
        let drawn = drawn.checked_rem(u64::from(self.windows))?;
        let first = self.first + u16::try_from(drawn).ok()? * WINDOW;
        Some([first, first + (WINDOW - 1)])
    }

    /// Begins a connection; true when it is there already. Where no port is found, `probe` says what else may be the
    /// reason.
    ///
    /// # Errors
    /// `WouldBlock` where hardly a port is left, and there is no time to look for it; `ConnectionRefused` where it would
    /// be one with itself; what `probe` reports, and what connect(2) does.
    pub(super) fn connect(
        &mut self,
        socket: &Socket,
        remote: SocketAddr,
        probe: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<bool> {
        let since = clock();
        self.looked_for.retain(|(at, _)| since - *at < SELDOM);
        if self.looked_for.iter().any(|(_, server)| *server == remote) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        for _ in 0..WINDOWS {
            let Some(window) = self.next_window() else {
                return begin(socket, remote);
            };
            if limit_ports(socket.as_fd(), window).is_err() {
                // Not known before Linux 6.3.
                self.windows = 0;
                return begin(socket, remote);
            }
            match begin(socket, remote) {
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {}
                begun => return begun,
            }
            if clock() - since > SLOW {
                break;
            }
        }
        probe()?;
        if self.looked_for.len() >= LOOKS {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        limit_ports(socket.as_fd(), NO_LIMIT)?;
        let begun = begin(socket, remote);
        if clock() - since > SLOW {
            self.looked_for.push((since, remote));
        }
        begun
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "what connect(2) takes, not the time of the stack's"
)]
fn clock() -> Instant {
    Instant::now()
}

/// Begins a connection; true when it is there already.
fn begin(socket: &Socket, remote: SocketAddr) -> io::Result<bool> {
    let connected = is_there(socket.connect(&remote.into()))?;
    // Where nobody listens the kernel may give the socket the very port that it asks for: both ends of the connection
    // would be this one (RFC 9293 3.5, simultaneous open).
    if socket.local_addr()?.as_socket() == Some(remote) {
        // Nothing of it stays, or nobody could listen at that port for a while.
        socket.set_linger(Some(Duration::ZERO))?;
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    Ok(connected)
}

/// Whether there is a connection by now, of what connect(2) said.
pub(super) fn is_there(outcome: io::Result<()>) -> io::Result<bool> {
    let begun = [Some(libc::EINPROGRESS), Some(libc::EALREADY)];
    match outcome {
        Ok(()) => Ok(true),
        Err(error) if begun.contains(&error.raw_os_error()) => Ok(false),
        Err(error) => Err(error),
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
        ports.connect(&socket, to, || Ok(())).unwrap();
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
        for few in [
            [1024, 1024],
            [5, 2 + MANY],
            [9, 3],
            [65535 - MANY + 2, 65535],
        ] {
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
