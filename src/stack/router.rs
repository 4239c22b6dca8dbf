//! The gateway as a router of the IPv6 link: answers neighbour discovery, and advertises itself
//! (RFC 4861 section 6.2).
//!
//! Comes in: questions of guests, the time. Goes out: neighbour advertisements for our own addresses
//! alone, so that a guest's probe for its own (RFC 4862 5.4) stays unanswered; router advertisements
//! when asked for, at the beginning, every few minutes, and soon after the host has got a way to global IPv6 addresses. Where it
//! has none the gateway is no default router, so that nobody waits for what can't be reached.

use std::net::{IpAddr, Ipv6Addr};

use crate::buf::TxBatch;
use crate::config::{Config, Dns, GATEWAY_LINK_LOCAL, SLAAC_PREFIX};
use crate::flow::Turn;
use crate::host::Host;
use crate::net::ndp::{self, ALL_NODES, Discovery, NeighbourAdvertisement, RouterAdvertisement};
use crate::net::parse::Ip;
use crate::net::{DropReason, Duration, Instant, Wire};

use super::Stack;
use super::counters::Disposition;

/// The first advertisements come soon one after the other (RFC 4861 6.2.4).
const INITIAL: u32 = 3;
const INITIAL_INTERVAL: Duration = Duration::from_secs(16);
/// Bounds of the interval between later ones (`MinRtrAdvInterval`, `MaxRtrAdvInterval`).
const MIN_INTERVAL: u64 = 200;
const MAX_INTERVAL: u64 = 600;
/// `AdvDefaultLifetime`: three times the longest interval.
const ROUTER_LIFETIME: Duration = Duration::from_secs(3 * MAX_INTERVAL);
/// How often the host is asked whether it has a way by now, where it had none: whoever got a network late should not
/// wait for the next advertisement.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// The host's routes are looked at no more often than this.
const ASK_INTERVAL: Duration = Duration::from_millis(20);
/// How long prefix, resolver and search list hold without another advertisement.
const VALIDITY: Duration = Duration::from_secs(86_400);

/// When the gateway advertises itself unasked.
#[derive(Debug)]
pub struct Advertiser {
    /// When all are told, where there is a subnet to advertise.
    due: Option<Instant>,
    sent: u32,
    /// What guests were told last: the gateway is their way to global addresses.
    routes: bool,
    /// When the host was asked for that.
    asked: Option<Instant>,
}

impl Advertiser {
    /// Begins at once, where there is a subnet to advertise.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self {
            due: config.plan.subnet6().map(|_| Instant::ZERO),
            sent: 0,
            // Until the first advertisement, which asks the host, comes at once.
            routes: true,
            asked: None,
        }
    }

    /// Guests know a way to an address beyond their link.
    #[must_use]
    pub const fn routes(&self, beyond: IpAddr) -> bool {
        beyond.is_ipv4() || self.routes
    }

    /// When something is to be looked at, and perhaps told.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        let look = self.asked.filter(|_| !self.routes);
        let look = look.map(|asked| asked + LOOK_INTERVAL);
        self.due.map(|due| look.map_or(due, |look| look.min(due)))
    }

    /// What the host says of its routes, if it says anything; all are to hear what is new, whoever asked.
    fn learn(&mut self, now: Instant, routes: Option<bool>) {
        if let Some(routes) = routes
            && routes != self.routes
        {
            self.routes = routes;
            self.due = self.due.map(|_| now);
        }
    }

    /// Notes that all were told; `random` decides about the next time.
    fn sent(&mut self, now: Instant, random: u64) {
        self.sent = self.sent.saturating_add(1);
        let interval = if self.sent < INITIAL {
            INITIAL_INTERVAL
        } else {
            Duration::from_secs(MIN_INTERVAL + random % (MAX_INTERVAL - MIN_INTERVAL + 1))
        };
        self.due = Some(now + interval);
    }
}

/// Tells `to` what the link is like. False where there is nothing to tell, or no room for it.
fn advertise(config: &Config, tx: &mut TxBatch, wire: Wire, to: Ipv6Addr, routes: bool) -> bool {
    let plan = &config.plan;
    let Some(prefix) = plan.subnet6() else {
        return false;
    };
    let advertisement = RouterAdvertisement {
        router: GATEWAY_LINK_LOCAL,
        to,
        lifetime: if routes {
            ROUTER_LIFETIME
        } else {
            Duration::ZERO
        },
        prefix,
        autonomous: config.slaac && prefix.prefix_len() == SLAAC_PREFIX,
        mtu: config.mtu,
        resolver: plan.resolver6().filter(|_| config.dns != Dns::Off),
        search: &config.search,
        validity: VALIDITY,
    };
    ndp::router_advertisement(tx, wire, &advertisement)
}

impl<H: Host> Stack<H> {
    /// Tells all guests what the link is like, when it is time to.
    pub(super) fn advertise_if_due(&mut self, turn: &mut Turn<'_, H>) {
        if self
            .advertiser
            .next_deadline()
            .is_none_or(|at| turn.now < at)
        {
            return;
        }
        let routes = self.ask_for_routes(turn);
        if self.advertiser.due.is_none_or(|due| turn.now < due) {
            return;
        }
        self.advertiser.sent(turn.now, self.secrets.next_u64());
        // The others keep in mind what the first says for all of them.
        if self.share.of_first().is_some() {
            return;
        }
        let wire = Wire {
            link: self.link.id,
            src: self.neighbours.gateway_mac(),
            dst: ndp::group_mac(ALL_NODES),
        };
        advertise(&self.config, turn.tx, wire, ALL_NODES, routes);
    }

    /// Answers a question of neighbour discovery.
    pub(super) fn guest_discovery(
        &mut self,
        turn: &mut Turn<'_, H>,
        ip: &Ip<'_>,
        discovery: Discovery,
    ) -> Disposition {
        let asker = match ip.src {
            IpAddr::V6(asker) if !asker.is_unspecified() => Some(asker),
            IpAddr::V4(_) | IpAddr::V6(_) => None,
        };
        let sent = match discovery {
            Discovery::NeighbourSolicitation { target, source } => {
                if let (Some(asker), Some(mac)) = (asker, source) {
                    self.neighbours.learn(asker.into(), mac);
                }
                if !self.config.plan.is_gateway_side(target.into()) {
                    return Disposition::Dropped(DropReason::NdpIgnored);
                }
                let advertisement = NeighbourAdvertisement {
                    target,
                    asked_by: asker,
                };
                let wire = self.back_to(ip.wire, asker);
                ndp::neighbour_advertisement(turn.tx, wire, advertisement)
            }
            Discovery::NeighbourAdvertisement { target, location } => {
                if let Some(mac) = location
                    && self.config.plan.is_guest_side(target.into())
                {
                    self.neighbours.learn(target.into(), mac);
                }
                true
            }
            Discovery::RouterSolicitation { .. } => {
                // Who hears from the host what is new tells all guests.
                if let Some(elsewhere) = self.share.of_first() {
                    return elsewhere;
                }
                let routes = self.ask_for_routes(turn);
                let wire = self.back_to(ip.wire, asker);
                advertise(
                    &self.config,
                    turn.tx,
                    wire,
                    asker.unwrap_or(ALL_NODES),
                    routes,
                )
            }
        };
        if sent {
            Disposition::Answered
        } else {
            Disposition::Dropped(DropReason::TransmitFull)
        }
    }

    /// Whether the host has a way to global addresses. It is asked now and then: a guest may ask us at
    /// any rate. While it can't tell, what it said last holds.
    fn ask_for_routes(&mut self, turn: &mut Turn<'_, H>) -> bool {
        let asked = self.advertiser.asked;
        if asked.is_none_or(|asked| turn.now >= asked + ASK_INTERVAL) {
            self.advertiser.asked = Some(turn.now);
            let routes = turn.host.reaches_ipv6();
            self.advertiser.learn(turn.now, routes);
        }
        self.advertiser.routes
    }

    /// The way back to who asked, or to all where it has no address yet.
    fn back_to(&self, wire: Wire, asker: Option<Ipv6Addr>) -> Wire {
        let back = self.back(wire);
        match asker {
            Some(_) => back,
            None => Wire {
                dst: ndp::group_mac(ALL_NODES),
                ..back
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advertisements_come_quickly_at_first() {
        let mut advertiser = Advertiser::new(&Config::default());
        assert_eq!(advertiser.next_deadline(), Some(Instant::ZERO));
        let mut intervals = Vec::new();
        for random in [0, 7, u64::MAX, 400, 401] {
            let now = advertiser.next_deadline().unwrap();
            advertiser.sent(now, random);
            intervals.push((advertiser.next_deadline().unwrap() - now).secs());
        }
        assert_eq!(intervals[..2], [16, 16]);
        assert!(intervals[2..].iter().all(|it| (200..=600).contains(it)));
        let mut config = Config::default();
        config.plan = config.plan.without_ipv6();
        assert_eq!(Advertiser::new(&config).next_deadline(), None);
    }
}
