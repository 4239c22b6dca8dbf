//! The DHCP server (RFC 2131): sixteen addresses, and what a guest must know of the network.
//!
//! Comes in: the payload of a datagram to port 67. Goes out: the payload of the reply and where it
//! goes, or nothing. Relays are not served. Leases are bounded by the pool: when it is used up the
//! one that ran out, or was promised, longest ago is given again, never one in use.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::config::{AddressPlan, Config, Dns};
use crate::net::dns::encode_names;
use crate::net::emit::Ends;
use crate::net::{Duration, Instant, Mac};

/// Port that servers listen at.
pub const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;

/// Fixed part of a BOOTP message with the magic cookie of RFC 2131 behind it.
const FIXED: usize = 240;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Some clients drop replies shorter than BOOTP's 300 bytes.
const MIN_REPLY: usize = 300;
/// Bytes of option 119 that fit one option.
const MAX_SEARCH_BYTES: usize = 255;

const LEASE: Duration = Duration::from_secs(86_400);
/// How long an offer is held for the client that it was made to.
const OFFER: Duration = Duration::from_secs(60);
/// How long an address rests that a client found in use.
const DECLINED: Duration = Duration::from_secs(600);

/// DHCP message types (RFC 2132 9.6).
mod kind {
    pub(super) const DISCOVER: u8 = 1;
    pub(super) const OFFER: u8 = 2;
    pub(super) const REQUEST: u8 = 3;
    pub(super) const DECLINE: u8 = 4;
    pub(super) const ACK: u8 = 5;
    pub(super) const NAK: u8 = 6;
    pub(super) const RELEASE: u8 = 7;
    pub(super) const INFORM: u8 = 8;
}

/// A reply and where it goes.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    /// Both endpoints.
    pub ends: Ends,
    /// Ethernet destination.
    pub mac: Mac,
    /// Contents.
    pub payload: Vec<u8>,
}

/// A message of a client, as far as the server looks.
#[derive(Debug)]
struct Message {
    /// Transaction, seconds and flags: bytes 4 to 11, sent back.
    exchange: [u8; 8],
    broadcast: bool,
    client_addr: Ipv4Addr,
    /// The client's hardware address field, sent back whole.
    hardware: [u8; 16],
    mac: Mac,
    kind: u8,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
}

fn parse(bytes: &[u8]) -> Option<Message> {
    let (fixed, mut options) = bytes.split_at_checked(FIXED)?;
    // A request, over Ethernet with six octets of address.
    if fixed[..3] != [1, 1, 6] || fixed[236..] != COOKIE {
        return None;
    }
    let hardware: [u8; 16] = *fixed[28..].first_chunk()?;
    let mut message = Message {
        exchange: *fixed[4..].first_chunk()?,
        broadcast: fixed[10] & 0x80 != 0,
        client_addr: Ipv4Addr::from(*fixed[12..].first_chunk::<4>()?),
        mac: Mac(*hardware.first_chunk()?),
        hardware,
        kind: 0,
        requested: None,
        server: None,
    };
    while let Some((&code, rest)) = options.split_first() {
        match code {
            0 => options = rest,
            255 => break,
            _ => {
                let (&len, rest) = rest.split_first()?;
                let (data, rest) = rest.split_at_checked(usize::from(len))?;
                options = rest;
                let addr = || <[u8; 4]>::try_from(data).ok().map(Ipv4Addr::from);
                match code {
                    50 => message.requested = addr(),
                    53 => message.kind = *data.first()?,
                    54 => message.server = addr(),
                    _ => {}
                }
            }
        }
    }
    (message.kind != 0 && message.mac.is_unicast()).then_some(message)
}

#[derive(Debug, Clone, Copy)]
struct Lease {
    mac: Option<Mac>,
    until: Instant,
}

/// The server and its leases.
#[derive(Debug)]
pub struct DhcpServer {
    plan: AddressPlan,
    /// One for each address of the pool, in order.
    leases: Vec<Lease>,
}

impl DhcpServer {
    /// A server for the pool of `plan`, with no lease given.
    #[must_use]
    pub fn new(plan: AddressPlan) -> Self {
        let free = Lease {
            mac: None,
            until: Instant::from_micros(i64::MIN),
        };
        Self {
            plan,
            leases: plan.lease_pool().map(|_| free).collect(),
        }
    }

    /// Takes a message from `src`; gives the reply, if one is due.
    pub fn answer(
        &mut self,
        now: Instant,
        config: &Config,
        src: IpAddr,
        bytes: &[u8],
    ) -> Option<Reply> {
        let message = parse(bytes)?;
        match message.kind {
            kind::DISCOVER => {
                let place = self.choose(now, &message)?;
                // A holder that asks again keeps what it was promised; any other has run out.
                let promised = self.leases[place].until;
                self.leases[place] = Lease {
                    mac: Some(message.mac),
                    until: promised.max(now + OFFER),
                };
                Some(self.reply(config, &message, kind::OFFER, Some(self.addr(place))))
            }
            kind::REQUEST => self.request(now, config, &message),
            kind::DECLINE => {
                let place = self
                    .place(message.requested?)
                    .filter(|&place| self.holds(place, message.mac))?;
                self.leases[place] = Lease {
                    mac: None,
                    until: now + DECLINED,
                };
                None
            }
            kind::RELEASE => {
                let place = self
                    .place(message.client_addr)
                    .filter(|&place| self.holds(place, message.mac))?;
                self.leases[place].until = now;
                None
            }
            kind::INFORM => {
                let known = self.plan.is_guest_side(src) && src == message.client_addr;
                known.then(|| self.reply(config, &message, kind::ACK, None))
            }
            _ => None,
        }
    }

    fn request(&mut self, now: Instant, config: &Config, message: &Message) -> Option<Reply> {
        if message
            .server
            .is_some_and(|server| server != self.plan.gateway())
        {
            // The client chose another server: what was offered is free again.
            if let Some(place) =
                (0..self.leases.len()).find(|&place| self.holds(place, message.mac))
            {
                self.leases[place].until = now;
            }
            return None;
        }
        let wanted = message.requested.unwrap_or(message.client_addr);
        let granted = self
            .place(wanted)
            .filter(|&place| self.holds(place, message.mac) || self.is_free(place, now));
        let Some(place) = granted else {
            return Some(self.reply(config, message, kind::NAK, None));
        };
        // One address for each client: what it held before is free again.
        for lease in self
            .leases
            .iter_mut()
            .filter(|lease| lease.mac == Some(message.mac))
        {
            lease.until = now;
        }
        self.leases[place] = Lease {
            mac: Some(message.mac),
            until: now + LEASE,
        };
        Some(self.reply(config, message, kind::ACK, Some(wanted)))
    }

    fn addr(&self, place: usize) -> Ipv4Addr {
        let first = *self.plan.lease_pool().start();
        Ipv4Addr::from(first + u32::try_from(place).unwrap_or(0))
    }

    fn place(&self, addr: Ipv4Addr) -> Option<usize> {
        let pool = self.plan.lease_pool();
        let addr = u32::from(addr);
        pool.contains(&addr)
            .then(|| usize::try_from(addr - pool.start()).ok())?
    }

    fn holds(&self, place: usize, mac: Mac) -> bool {
        self.leases[place].mac == Some(mac)
    }

    fn is_free(&self, place: usize, now: Instant) -> bool {
        self.leases[place].until <= now
    }

    /// The client's own address of before, else the one it asks for, else the one free the longest.
    fn choose(&self, now: Instant, message: &Message) -> Option<usize> {
        let own = (0..self.leases.len()).find(|&place| self.holds(place, message.mac));
        let asked = message
            .requested
            .and_then(|addr| self.place(addr))
            .filter(|&place| self.is_free(place, now));
        own.or(asked).or_else(|| {
            (0..self.leases.len())
                .filter(|&place| self.is_free(place, now))
                .min_by_key(|&place| self.leases[place].until)
        })
    }

    fn reply(
        &self,
        config: &Config,
        message: &Message,
        kind: u8,
        yours: Option<Ipv4Addr>,
    ) -> Reply {
        let mut payload = vec![2, 1, 6, 0];
        payload.extend(message.exchange);
        payload.extend(if kind == kind::NAK {
            [0; 4]
        } else {
            message.client_addr.octets()
        });
        payload.extend(yours.unwrap_or(Ipv4Addr::UNSPECIFIED).octets());
        payload.extend(self.plan.gateway().octets());
        payload.extend([0; 4]);
        payload.extend(message.hardware);
        payload.resize(FIXED - COOKIE.len(), 0);
        payload.extend(COOKIE);
        self.options(config, kind, yours.is_some(), &mut payload);
        payload.resize(payload.len().max(MIN_REPLY), 0);
        let (mac, addr) = destination(message, kind, yours);
        Reply {
            ends: Ends {
                src: SocketAddr::new(self.plan.gateway().into(), SERVER_PORT),
                dst: SocketAddr::new(addr.into(), CLIENT_PORT),
            },
            mac,
            payload,
        }
    }

    fn options(&self, config: &Config, kind: u8, leased: bool, payload: &mut Vec<u8>) {
        let mut option = |code: u8, data: &[u8]| {
            if let Ok(len) = u8::try_from(data.len()) {
                payload.extend([code, len]);
                payload.extend(data);
            }
        };
        option(53, &[kind]);
        option(54, &self.plan.gateway().octets());
        if kind != kind::NAK {
            if leased {
                option(
                    51,
                    &u32::try_from(LEASE.secs())
                        .unwrap_or(u32::MAX)
                        .to_be_bytes(),
                );
            }
            option(1, &self.plan.subnet().netmask().octets());
            option(3, &self.plan.gateway().octets());
            if config.dns != Dns::Off {
                option(6, &self.plan.resolver().octets());
            }
            option(26, &config.mtu.to_be_bytes());
            // RFC 3397, without compression.
            let search = encode_names(&config.search, MAX_SEARCH_BYTES);
            if !search.is_empty() {
                option(119, &search);
            }
        }
        payload.push(255);
    }
}

/// RFC 2131 4.1: unicast where the client can hear it, else broadcast.
fn destination(message: &Message, kind: u8, yours: Option<Ipv4Addr>) -> (Mac, Ipv4Addr) {
    if !message.client_addr.is_unspecified() && kind != kind::NAK {
        return (message.mac, message.client_addr);
    }
    match yours {
        Some(addr) if !message.broadcast => (message.mac, addr),
        _ => (Mac::BROADCAST, Ipv4Addr::BROADCAST),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(mac: u8, kind: u8, options: &[(u8, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; FIXED];
        bytes[..3].copy_from_slice(&[1, 1, 6]);
        bytes[4..8].copy_from_slice(b"xid!");
        bytes[28..34].copy_from_slice(&[2, 0, 0, 0, 0, mac]);
        bytes[236..].copy_from_slice(&COOKIE);
        bytes.extend([53, 1, kind]);
        for (code, data) in options {
            bytes.extend([*code, u8::try_from(data.len()).unwrap()]);
            bytes.extend(*data);
        }
        bytes.push(255);
        bytes
    }

    struct Lab {
        server: DhcpServer,
        config: Config,
        now: i64,
    }

    impl Lab {
        fn new() -> Self {
            let config = Config {
                search: vec!["a.example".into()],
                ..Config::default()
            };
            Self {
                server: DhcpServer::new(config.plan),
                config,
                now: 0,
            }
        }

        fn ask(&mut self, bytes: &[u8]) -> Option<(u8, Ipv4Addr)> {
            let src = Ipv4Addr::UNSPECIFIED.into();
            let reply =
                self.server
                    .answer(Instant::from_secs(self.now), &self.config, src, bytes)?;
            let yours = Ipv4Addr::from(*reply.payload[16..].first_chunk::<4>().unwrap());
            Some((reply.payload[FIXED + 2], yours))
        }
    }

    fn ip(last: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, 2, last)
    }

    #[test]
    fn the_first_client_gets_fifteen_and_keeps_it() {
        let mut lab = Lab::new();
        assert_eq!(
            lab.ask(&message(1, kind::DISCOVER, &[])),
            Some((kind::OFFER, ip(15)))
        );
        let request = message(
            1,
            kind::REQUEST,
            &[(50, &[10, 0, 2, 15]), (54, &[10, 0, 2, 2])],
        );
        assert_eq!(lab.ask(&request), Some((kind::ACK, ip(15))));
        assert_eq!(
            lab.ask(&message(2, kind::DISCOVER, &[])),
            Some((kind::OFFER, ip(16)))
        );
        assert_eq!(
            lab.ask(&message(1, kind::DISCOVER, &[])),
            Some((kind::OFFER, ip(15)))
        );
    }

    #[test]
    fn replies_carry_what_a_guest_needs() {
        let mut lab = Lab::new();
        let src = Ipv4Addr::UNSPECIFIED.into();
        let discover = message(1, kind::DISCOVER, &[]);
        let reply = lab
            .server
            .answer(Instant::from_secs(0), &lab.config, src, &discover)
            .unwrap();
        assert_eq!(&reply.payload[4..8], b"xid!");
        assert!(reply.payload.len() >= MIN_REPLY);
        let options = &reply.payload[FIXED..];
        let has = |bytes: &[u8]| options.windows(bytes.len()).any(|window| window == bytes);
        assert!(has(&[26, 2, 5, 0xdc]), "MTU 1500");
        assert!(has(&[6, 4, 10, 0, 2, 3]), "resolver");
        assert!(has(b"\x77\x0b\x01a\x07example\x00"), "search list");
        assert_eq!(reply.mac, Mac([2, 0, 0, 0, 0, 1]));
        assert_eq!(reply.ends.dst, "10.0.2.15:68".parse().unwrap());
    }

    #[test]
    fn wrong_addresses_are_refused() {
        let mut lab = Lab::new();
        for wrong in [[10, 0, 2, 100], [192, 168, 0, 1], [10, 0, 2, 31]] {
            let request = message(1, kind::REQUEST, &[(50, &wrong)]);
            assert_eq!(lab.ask(&request), Some((kind::NAK, Ipv4Addr::UNSPECIFIED)));
        }
        let elsewhere = message(
            1,
            kind::REQUEST,
            &[(50, &[10, 0, 2, 15]), (54, &[10, 0, 2, 9])],
        );
        assert_eq!(lab.ask(&elsewhere), None);
    }

    #[test]
    fn a_declined_address_rests_and_a_released_one_returns() {
        let mut lab = Lab::new();
        assert!(
            lab.ask(&message(1, kind::REQUEST, &[(50, &[10, 0, 2, 15])]))
                .is_some()
        );
        assert_eq!(
            lab.ask(&message(1, kind::DECLINE, &[(50, &[10, 0, 2, 15])])),
            None
        );
        assert_eq!(
            lab.ask(&message(1, kind::DISCOVER, &[])),
            Some((kind::OFFER, ip(16)))
        );
        lab.now = 700;
        assert_eq!(
            lab.ask(&message(2, kind::REQUEST, &[(50, &[10, 0, 2, 15])])),
            Some((kind::ACK, ip(15)))
        );
        let mut release = message(2, kind::RELEASE, &[]);
        release[12..16].copy_from_slice(&[10, 0, 2, 15]);
        assert_eq!(lab.ask(&release), None);
        assert_eq!(
            lab.ask(&message(3, kind::REQUEST, &[(50, &[10, 0, 2, 15])])),
            Some((kind::ACK, ip(15)))
        );
    }

    #[test]
    fn starvation_does_not_take_a_lease_in_use() {
        let mut lab = Lab::new();
        assert_eq!(
            lab.ask(&message(1, kind::REQUEST, &[(50, &[10, 0, 2, 15])])),
            Some((kind::ACK, ip(15)))
        );
        for mac in 2..250 {
            lab.now += 1;
            if let Some((_, offered)) = lab.ask(&message(mac, kind::DISCOVER, &[])) {
                assert_ne!(offered, ip(15));
            }
        }
        assert_eq!(
            lab.ask(&message(1, kind::DISCOVER, &[])),
            Some((kind::OFFER, ip(15)))
        );
    }

    #[test]
    fn inform_is_acknowledged_without_an_address() {
        let mut lab = Lab::new();
        let mut inform = message(1, kind::INFORM, &[]);
        inform[12..16].copy_from_slice(&[10, 0, 2, 100]);
        let src = IpAddr::from(ip(100));
        let reply = lab
            .server
            .answer(Instant::from_secs(0), &lab.config, src, &inform)
            .unwrap();
        assert_eq!(reply.payload[16..20], [0; 4]);
        assert_eq!(reply.ends.dst, "10.0.2.100:68".parse().unwrap());
        assert_eq!(lab.ask(&inform), None, "from another source");
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut lab = Lab::new();
            let _ = lab.ask(&bytes);
        }

        #[test]
        fn no_options_panic(kind: u8, options in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut lab = Lab::new();
            let mut bytes = message(1, kind, &[]);
            bytes.pop();
            bytes.extend(options);
            let _ = lab.ask(&bytes);
        }
    }
}
