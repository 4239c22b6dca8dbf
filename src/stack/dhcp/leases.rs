//! Which address of the pool is whose, and until when.
//!
//! Comes in: clients by their Ethernet address, what they ask for, and word of who uses which address. Goes out:
//! places of the pool. There are sixteen, and a guest can make up as many clients as it likes: where none is free the
//! one goes that was promised longest ago and never used by its owner, never one that was; and where half are taken
//! they are given for an hour, no longer for a day, so that made up ones that are used go as well.

use std::net::Ipv4Addr;

use crate::config::AddressPlan;
use crate::net::{Duration, Instant, Mac};

/// How long an address is given for.
pub(super) const LEASE: Duration = Duration::from_secs(86_400);
/// The same where many are taken.
const CROWDED: Duration = Duration::from_secs(3_600);
/// How long an offer is held for the client that it was made to.
const OFFER: Duration = Duration::from_secs(60);
/// How long an address rests that a client found in use.
const DECLINED: Duration = Duration::from_secs(600);
/// What was promised is not given to another for this time, however many ask: a client that is there probes its
/// address and announces it within eight seconds (RFC 5227 2.1).
const GRACE: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy)]
struct Lease {
    /// Whose it is; nobody's where it was never given, or found in use.
    mac: Option<Mac>,
    since: Instant,
    until: Instant,
    /// Its owner was heard with this address.
    used: bool,
}

/// The leases, one for each address of the pool, in order.
#[derive(Debug)]
pub(super) struct Leases {
    plan: AddressPlan,
    all: Vec<Lease>,
}

impl Leases {
    /// None given.
    pub(super) fn new(plan: AddressPlan) -> Self {
        let free = Lease {
            mac: None,
            since: Instant::from_micros(i64::MIN),
            until: Instant::from_micros(i64::MIN),
            used: false,
        };
        Self {
            plan,
            all: plan.lease_pool().map(|_| free).collect(),
        }
    }

    /// The address of a place.
    pub(super) fn addr(&self, place: usize) -> Ipv4Addr {
        let first = *self.plan.lease_pool().start();
        Ipv4Addr::from(first + u32::try_from(place).unwrap_or(0))
    }

    /// The place of an address, where it is of the pool.
    pub(super) fn place(&self, addr: Ipv4Addr) -> Option<usize> {
        let pool = self.plan.lease_pool();
        let addr = u32::from(addr);
        pool.contains(&addr)
            .then(|| usize::try_from(addr - pool.start()).ok())?
    }

    fn holds(&self, place: usize, mac: Mac) -> bool {
        self.all[place].mac == Some(mac)
    }

    fn is_free(&self, place: usize, now: Instant) -> bool {
        self.all[place].until <= now
    }

    /// The place for a client that asks for any: its own of before, else the one it would like, else the one free the
    /// longest, else the one whose owner was never heard.
    pub(super) fn choose(&self, now: Instant, mac: Mac, liked: Option<Ipv4Addr>) -> Option<usize> {
        let places = 0..self.all.len();
        let own = places.clone().find(|&place| self.holds(place, mac));
        let liked = liked
            .and_then(|addr| self.place(addr))
            .filter(|&place| self.is_free(place, now));
        let free = places
            .clone()
            .filter(|&place| self.is_free(place, now))
            .min_by_key(|&place| self.all[place].until);
        let unheard = || {
            places
                .filter(|&place| !self.all[place].used && self.all[place].since + GRACE <= now)
                // One that was found in use comes last.
                .min_by_key(|&place| (self.all[place].mac.is_none(), self.all[place].since))
        };
        own.or(liked).or(free).or_else(unheard)
    }

    /// Promises a place; a holder that asks again keeps what it was promised.
    pub(super) fn offer(&mut self, now: Instant, place: usize, mac: Mac) {
        let until = now + OFFER;
        if self.holds(place, mac) {
            let lease = &mut self.all[place];
            lease.until = lease.until.max(until);
        } else {
            self.all[place] = Lease {
                mac: Some(mac),
                since: now,
                until,
                used: false,
            };
        }
    }

    /// Gives an address, and takes back any other that the client had. None where it is another's, or not of the
    /// pool; else for how long.
    pub(super) fn grant(&mut self, now: Instant, mac: Mac, addr: Ipv4Addr) -> Option<Duration> {
        let place = self
            .place(addr)
            .filter(|&place| self.holds(place, mac) || self.is_free(place, now))?;
        let used = self.holds(place, mac) && self.all[place].used;
        self.release_all(now, mac);
        let taken = self.all.iter().filter(|lease| lease.until > now).count();
        let time = if taken < self.all.len() / 2 {
            LEASE
        } else {
            CROWDED
        };
        self.all[place] = Lease {
            mac: Some(mac),
            since: now,
            until: now + time,
            used,
        };
        Some(time)
    }

    /// The owner of an address found it in use.
    pub(super) fn decline(&mut self, now: Instant, mac: Mac, addr: Ipv4Addr) {
        if let Some(place) = self.place(addr).filter(|&place| self.holds(place, mac)) {
            self.all[place] = Lease {
                mac: None,
                since: now,
                until: now + DECLINED,
                used: false,
            };
        }
    }

    /// The owner of an address gives it back; it may have it again.
    pub(super) fn release(&mut self, now: Instant, mac: Mac, addr: Ipv4Addr) {
        if let Some(place) = self.place(addr).filter(|&place| self.holds(place, mac)) {
            self.all[place].until = now;
        }
    }

    /// Whatever a client has is free again.
    pub(super) fn release_all(&mut self, now: Instant, mac: Mac) {
        for lease in self.all.iter_mut().filter(|it| it.mac == Some(mac)) {
            lease.until = now;
        }
    }

    /// Somebody was heard with an address.
    pub(super) fn note_use(&mut self, addr: Ipv4Addr, mac: Mac) {
        if let Some(place) = self.place(addr).filter(|&place| self.holds(place, mac)) {
            self.all[place].used = true;
        }
    }
}
