//! The DHCP server (RFC 2131): sixteen addresses, and what a guest must know of the network.
//!
//! Comes in: the payload of a datagram to port 67. Goes out: the payload of the reply and where it
//! goes, or nothing. Relays are not served. `leases` knows whose an address is.

mod leases;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::config::{AddressPlan, Config, Dns};
use crate::net::dns::encode_names;
use crate::net::emit::Ends;
use crate::net::{Duration, Instant, Mac};

use leases::Leases;

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

/// The server and its leases.
#[derive(Debug)]
pub struct DhcpServer {
    plan: AddressPlan,
    leases: Leases,
}

impl DhcpServer {
    /// A server for the pool of `plan`, with no lease given.
    #[must_use]
    pub fn new(plan: AddressPlan) -> Self {
        Self {
            plan,
            leases: Leases::new(plan),
        }
    }

    /// Somebody was heard with an address: its lease is in use if it is the owner.
    pub fn note_use(&mut self, addr: IpAddr, mac: Mac) {
        if let IpAddr::V4(addr) = addr {
            self.leases.note_use(addr, mac);
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
        let (mac, wanted) = (message.mac, message.requested);
        match message.kind {
            kind::DISCOVER => {
                let place = self.leases.choose(now, mac, wanted)?;
                self.leases.offer(now, place, mac);
                let given = (self.leases.addr(place), leases::LEASE);
                Some(self.reply(config, &message, kind::OFFER, Some(given)))
            }
            kind::REQUEST => self.request(now, config, &message),
            kind::DECLINE => {
                self.leases.decline(now, mac, wanted?);
                None
            }
            kind::RELEASE => {
                self.leases.release(now, mac, message.client_addr);
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
        let another = |server| server != self.plan.gateway();
        if message.server.is_some_and(another) {
            // The client chose another server: what was offered is free again.
            self.leases.release_all(now, message.mac);
            return None;
        }
        let wanted = message.requested.unwrap_or(message.client_addr);
        let granted = self.leases.grant(now, message.mac, wanted);
        Some(match granted {
            Some(time) => self.reply(config, message, kind::ACK, Some((wanted, time))),
            None => self.reply(config, message, kind::NAK, None),
        })
    }

    fn reply(
        &self,
        config: &Config,
        message: &Message,
        kind: u8,
        given: Option<(Ipv4Addr, Duration)>,
    ) -> Reply {
        let yours = given.map(|(addr, _)| addr);
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
        self.options(config, kind, given.map(|(_, time)| time), &mut payload);
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

    fn options(&self, config: &Config, kind: u8, lease: Option<Duration>, payload: &mut Vec<u8>) {
        let mut option = |code: u8, data: &[u8]| {
            if let Ok(len) = u8::try_from(data.len()) {
                payload.extend([code, len]);
                payload.extend(data);
            }
        };
        option(53, &[kind]);
        option(54, &self.plan.gateway().octets());
        if kind != kind::NAK {
            if let Some(time) = lease {
                let secs = u32::try_from(time.secs()).unwrap_or(u32::MAX);
                option(51, &secs.to_be_bytes());
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
        lab.server.note_use(ip(15).into(), Mac([2, 0, 0, 0, 0, 1]));
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
