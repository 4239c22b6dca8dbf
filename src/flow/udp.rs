//! What a UDP flow remembers: the host socket of a guest's port, and clients of published ports.
//!
//! Idle times follow RFC 4787 REQ-5 where the issue of names does not ask for less; moving the
//! datagrams is done in `stack/udp.rs`, which knows what addresses mean.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};

use crate::config::{DNS_PORT, Timeouts, UdpFiltering};
use crate::net::{Duration, Instant, Wire};

/// Endpoints that a port may have sent to and still be answered by, where filtering is strict; the
/// oldest give way.
const MAX_CORRESPONDENTS: usize = 128;

/// Whom a guest's port has sent to, as far as filtering needs to know (RFC 4787 section 5).
struct Correspondents {
    filtering: UdpFiltering,
    /// The latest at the end.
    sent_to: VecDeque<SocketAddr>,
}

impl Correspondents {
    /// What of an endpoint counts.
    fn relevant(&self, remote: SocketAddr) -> Option<SocketAddr> {
        match self.filtering {
            UdpFiltering::Open => None,
            UdpFiltering::Address => Some(SocketAddr::new(remote.ip(), 0)),
            UdpFiltering::Endpoint => Some(SocketAddr::new(remote.ip(), remote.port())),
        }
    }

    fn note(&mut self, remote: SocketAddr) {
        let Some(remote) = self.relevant(remote) else {
            return;
        };
        if self.sent_to.back() == Some(&remote) {
            return;
        }
        self.sent_to.retain(|known| *known != remote);
        if self.sent_to.len() >= MAX_CORRESPONDENTS {
            self.sent_to.pop_front();
        }
        self.sent_to.push_back(remote);
    }

    fn admit(&self, remote: SocketAddr) -> bool {
        self.relevant(remote)
            .is_none_or(|remote| self.sent_to.iter().rev().any(|known| *known == remote))
    }
}

/// A guest's UDP endpoint and its host socket.
pub struct UdpFlow<S> {
    /// The host's socket.
    pub socket: S,
    /// The guest's endpoint.
    pub guest: SocketAddr,
    /// The way back to the guest.
    pub wire: Wire,
    /// The socket's error queue has something to tell.
    pub failed: bool,
    timeouts: Timeouts,
    replied: bool,
    only_dns: bool,
    correspondents: Correspondents,
}

impl<S> UdpFlow<S> {
    /// A flow that has carried nothing yet.
    #[must_use]
    pub fn new(
        socket: S,
        guest: SocketAddr,
        wire: Wire,
        (filtering, timeouts): (UdpFiltering, Timeouts),
    ) -> Self {
        Self {
            socket,
            guest,
            wire,
            failed: false,
            timeouts,
            replied: false,
            only_dns: true,
            correspondents: Correspondents {
                filtering,
                sent_to: VecDeque::new(),
            },
        }
    }

    /// `from` may send to this port.
    #[must_use]
    pub fn admits(&self, from: SocketAddr) -> bool {
        self.correspondents.admit(from)
    }

    /// Nobody has ever sent to this port.
    #[must_use]
    pub const fn is_unanswered(&self) -> bool {
        !self.replied
    }

    /// Notes a datagram to `to`; returns the new deadline.
    pub fn sent(&mut self, now: Instant, to: SocketAddr) -> Instant {
        self.only_dns &= to.port() == DNS_PORT;
        self.correspondents.note(to);
        now + self.idle()
    }

    /// Notes a datagram from the outside; returns the new deadline.
    pub fn received(&mut self, now: Instant) -> Instant {
        self.replied = true;
        now + self.idle()
    }

    /// When it last carried a datagram, by its deadline.
    #[must_use]
    pub fn active_at(&self, deadline: Instant) -> Instant {
        deadline - self.idle()
    }

    fn idle(&self) -> Duration {
        let seconds = self.timeouts.udp(self.replied, self.only_dns);
        Duration::from_secs(seconds.into())
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
    /// The guest has sent something to it.
    pub answered: bool,
}

impl PublishedPeer {
    /// Both are the same client, of the same port, whom the guest has answered or not.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        let answered = other.answered;
        Self { answered, ..*self } == *other
    }

    /// The deadline after a datagram either way.
    #[must_use]
    pub fn deadline(now: Instant, timeouts: Timeouts) -> Instant {
        now + Duration::from_secs(timeouts.udp_idle.into())
    }

    /// When it last was one, by its deadline.
    #[must_use]
    pub fn active_at(deadline: Instant, timeouts: Timeouts) -> Instant {
        deadline - Duration::from_secs(timeouts.udp_idle.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buf::LinkId;
    use crate::net::Mac;

    fn flow(filtering: UdpFiltering) -> UdpFlow<()> {
        let wire = Wire {
            link: LinkId(0),
            src: Mac([0; 6]),
            dst: Mac([0; 6]),
        };
        let options = (filtering, Timeouts::default());
        UdpFlow::new((), "10.0.2.100:9".parse().unwrap(), wire, options)
    }

    #[test]
    fn filtering_is_as_strict_as_asked_for() {
        for (filtering, same_address, stranger) in [
            (UdpFiltering::Open, true, true),
            (UdpFiltering::Address, true, false),
            (UdpFiltering::Endpoint, false, false),
        ] {
            let mut flow = flow(filtering);
            let now = Instant::from_secs(0);
            flow.sent(now, "192.0.2.1:7".parse().unwrap());
            for number in 1..=MAX_CORRESPONDENTS - 1 {
                let port = u16::try_from(number).unwrap();
                flow.sent(now, SocketAddr::from(([192, 0, 2, 2], port)));
            }
            assert!(flow.admits("192.0.2.1:7".parse().unwrap()));
            assert_eq!(flow.admits("192.0.2.1:8".parse().unwrap()), same_address);
            assert_eq!(flow.admits("192.0.2.3:7".parse().unwrap()), stranger);
            assert!(flow.correspondents.sent_to.len() <= MAX_CORRESPONDENTS);
        }
    }

    #[test]
    fn idle_time_follows_use() {
        let mut flow = flow(UdpFiltering::Open);
        let now = Instant::from_secs(0);
        assert_eq!(flow.sent(now, "192.0.2.1:53".parse().unwrap()).secs(), 10);
        assert_eq!(flow.sent(now, "192.0.2.1:54".parse().unwrap()).secs(), 30);
        assert_eq!(flow.received(now).secs(), 180);
    }
}
