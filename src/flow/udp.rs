//! What a UDP flow remembers: the host socket of a guest's port, and clients of published ports.
//!
//! Idle times follow RFC 4787 REQ-5 where the issue of names does not ask for less; moving the
//! datagrams is done in `stack/udp.rs`, which knows what addresses mean.

use std::net::{IpAddr, SocketAddr};

use crate::config::DNS_PORT;
use crate::net::{Duration, Instant, Wire};

/// A port that only ever spoke to a DNS server is given up soon.
const DNS_IDLE: Duration = Duration::from_secs(10);
/// A port that was never answered.
const UNREPLIED_IDLE: Duration = Duration::from_secs(30);
/// A port in use both ways.
const IDLE: Duration = Duration::from_secs(180);

/// A guest's UDP endpoint and its host socket.
pub struct UdpFlow<S> {
    /// The host's socket.
    pub socket: S,
    /// The guest's endpoint.
    pub guest: SocketAddr,
    /// The way back to the guest.
    pub wire: Wire,
    replied: bool,
    only_dns: bool,
}

impl<S> UdpFlow<S> {
    /// A flow that has carried nothing yet.
    #[must_use]
    pub fn new(socket: S, guest: SocketAddr, wire: Wire) -> Self {
        Self {
            socket,
            guest,
            wire,
            replied: false,
            only_dns: true,
        }
    }

    /// Notes a datagram to `to`; returns the new deadline.
    pub fn sent(&mut self, now: Instant, to: SocketAddr) -> Instant {
        self.only_dns &= to.port() == DNS_PORT;
        now + self.idle()
    }

    /// Notes a datagram from the outside; returns the new deadline.
    pub fn received(&mut self, now: Instant) -> Instant {
        self.replied = true;
        now + self.idle()
    }

    const fn idle(&self) -> Duration {
        match (self.only_dns, self.replied) {
            (true, _) => DNS_IDLE,
            (false, false) => UNREPLIED_IDLE,
            (false, true) => IDLE,
        }
    }
}

/// A client of a published UDP port: remembers by which socket it came and who it really is, so
/// that the guest's answers find it even where its address was replaced by the gateway's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishedPeer {
    /// Which published port it came to.
    pub published: usize,
    /// The client's own address.
    pub client: SocketAddr,
    /// The address of the host that it asked, where answers must leave from it.
    pub asked: Option<IpAddr>,
}

impl PublishedPeer {
    /// The deadline after a datagram either way.
    #[must_use]
    pub fn deadline(now: Instant) -> Instant {
        now + IDLE
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buf::LinkId;
    use crate::net::Mac;

    #[test]
    fn idle_time_follows_use() {
        let wire = Wire {
            link: LinkId(0),
            src: Mac([0; 6]),
            dst: Mac([0; 6]),
        };
        let mut flow = UdpFlow::new((), "10.0.2.100:9".parse().unwrap(), wire);
        let now = Instant::from_secs(0);
        assert_eq!(flow.sent(now, "192.0.2.1:53".parse().unwrap()).secs(), 10);
        assert_eq!(flow.sent(now, "192.0.2.1:54".parse().unwrap()).secs(), 30);
        assert_eq!(flow.received(now).secs(), 180);
    }
}
