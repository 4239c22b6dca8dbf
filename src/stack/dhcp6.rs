//! The DHCPv6 server (RFC 8415): one address, and the resolver, without a memory.
//!
//! Comes in: the payload of a datagram to [`SERVERS`] at port 547. Goes out: the payload of the
//! reply, which goes to where the datagram came from, or nothing. There is only one address to
//! give, [`AddressPlan::guest6`](crate::config::AddressPlan::guest6), and it is never taken back, so
//! nothing is remembered: the first association of every client gets it. Relays are not served;
//! prefixes and temporary addresses are refused.

use std::net::Ipv6Addr;

use ipnet::Ipv6Net;

use crate::config::{Config, Dns};
use crate::net::Mac;
use crate::net::dns::encode_name;

/// Port that clients listen at.
pub const CLIENT_PORT: u16 = 546;
/// Port that servers listen at.
pub const SERVER_PORT: u16 = 547;
/// The group of all servers and relays of a link (RFC 8415 7.1).
pub const SERVERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 1, 2);

/// Longest message that is read or written: what fits a packet of IPv6's least MTU, 1,280 bytes.
const MAX_MESSAGE: usize = 1232;
/// Longest identifier of a client: 128 octets behind a type of two (RFC 8415 11.1).
const MAX_DUID: usize = 130;
/// Bytes of the search list, as the DHCPv4 server has it.
const MAX_SEARCH_BYTES: usize = 255;

/// Seconds that an address is given for.
const LIFETIME: u32 = 86_400;
/// Seconds until a client asks us, and then any server, to renew: RFC 8415 21.4 recommends a half
/// and four fifths.
const RENEW: u32 = LIFETIME / 2;
const REBIND: u32 = LIFETIME / 5 * 4;

/// Options (RFC 8415 section 21; RFC 3646).
mod code {
    pub(super) const CLIENT_ID: u16 = 1;
    pub(super) const SERVER_ID: u16 = 2;
    /// An association that wants addresses.
    pub(super) const IA_NA: u16 = 3;
    /// An association that wants temporary addresses.
    pub(super) const IA_TA: u16 = 4;
    pub(super) const IA_ADDRESS: u16 = 5;
    /// The codes of the options that the client wants.
    pub(super) const REQUESTED: u16 = 6;
    pub(super) const STATUS: u16 = 13;
    pub(super) const RAPID_COMMIT: u16 = 14;
    pub(super) const DNS_SERVERS: u16 = 23;
    pub(super) const DOMAIN_LIST: u16 = 24;
    /// An association that wants prefixes.
    pub(super) const IA_PD: u16 = 25;
    pub(super) const IA_PREFIX: u16 = 26;
    /// How long what an Information-request told is good.
    pub(super) const REFRESH_TIME: u16 = 32;
}

/// Status codes (RFC 8415 21.13).
mod status {
    pub(super) const SUCCESS: u16 = 0;
    pub(super) const NO_ADDRESSES: u16 = 2;
    pub(super) const NO_BINDING: u16 = 3;
    pub(super) const NOT_ON_LINK: u16 = 4;
    pub(super) const NO_PREFIXES: u16 = 6;
}

/// Types of messages to clients (RFC 8415 7.3).
const ADVERTISE: u8 = 2;
const REPLY: u8 = 7;

/// What a client's message is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Solicit,
    Request,
    Confirm,
    Renew,
    Rebind,
    Release,
    Decline,
    InformationRequest,
}

impl Kind {
    const fn of(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Solicit,
            3 => Self::Request,
            4 => Self::Confirm,
            5 => Self::Renew,
            6 => Self::Rebind,
            8 => Self::Release,
            9 => Self::Decline,
            11 => Self::InformationRequest,
            // Messages of servers and relays.
            _ => return None,
        })
    }
}

/// A message of a client whose options are whole.
#[derive(Debug)]
struct Message<'a> {
    kind: Kind,
    transaction: [u8; 3],
    client: Option<&'a [u8]>,
    options: &'a [u8],
}

impl<'a> Message<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let ([kind, transaction @ ..], options) = bytes.split_first_chunk::<4>()?;
        if bytes.len() > MAX_MESSAGE || !well_formed(options) {
            return None;
        }
        let client = find(options, code::CLIENT_ID);
        Some(Self {
            kind: Kind::of(*kind)?,
            transaction: *transaction,
            client: client.filter(|id| (1..=MAX_DUID).contains(&id.len())),
            options,
        })
    }

    /// Must be looked at, says RFC 8415 section 16.
    fn is_valid(&self, own_id: &[u8]) -> bool {
        let server = find(self.options, code::SERVER_ID);
        match self.kind {
            Kind::Solicit | Kind::Confirm | Kind::Rebind => {
                self.client.is_some() && server.is_none()
            }
            Kind::Request | Kind::Renew | Kind::Release | Kind::Decline => {
                self.client.is_some() && server == Some(own_id)
            }
            Kind::InformationRequest => {
                server.is_none_or(|id| id == own_id) && self.associations().next().is_none()
            }
        }
    }

    fn associations(&self) -> impl Iterator<Item = Association<'a>> + use<'a> {
        each_option(self.options).filter_map(|(code, data)| Association::of(code, data))
    }

    fn has(&self, code: u16) -> bool {
        find(self.options, code).is_some()
    }

    /// The client asked for this option, or did not say what it wants.
    fn wants(&self, code: u16) -> bool {
        find(self.options, code::REQUESTED).is_none_or(|codes| {
            codes
                .chunks_exact(2)
                .any(|pair| pair == code.to_be_bytes().as_slice())
        })
    }
}

/// What a client keeps its addresses or prefixes in.
#[derive(Debug, Clone, Copy)]
struct Association<'a> {
    code: u16,
    id: [u8; 4],
    options: &'a [u8],
}

impl<'a> Association<'a> {
    fn of(code: u16, data: &'a [u8]) -> Option<Self> {
        if ![code::IA_NA, code::IA_TA, code::IA_PD].contains(&code) {
            return None;
        }
        Some(Self {
            code,
            id: *data.first_chunk()?,
            options: data.get(fixed_part(code)..)?,
        })
    }

    fn addresses(&self) -> impl Iterator<Item = Ipv6Addr> + use<'a> {
        each_option(self.options)
            .filter(|(code, _)| *code == code::IA_ADDRESS)
            .filter_map(|(_, data)| data.first_chunk::<16>())
            .map(|octets| Ipv6Addr::from(*octets))
    }

    /// Sent back with the times of a lease, or with zeros, which leave them to the client.
    fn push(&self, out: &mut Vec<u8>, times: [u32; 2], options: &[u8]) {
        let mut data = self.id.to_vec();
        if self.code != code::IA_TA {
            data.extend(times.iter().flat_map(|time| time.to_be_bytes()));
        }
        data.extend(options);
        push(out, self.code, &data);
    }

    fn refuse(&self, out: &mut Vec<u8>, status: u16) {
        let mut reason = Vec::new();
        push(&mut reason, code::STATUS, &status.to_be_bytes());
        self.push(out, [0, 0], &reason);
    }
}

struct Server<'a> {
    config: &'a Config,
    /// The link-layer kind of RFC 8415 11.4, of Ethernet.
    id: [u8; 10],
    subnet: Ipv6Net,
    address: Ipv6Addr,
}

/// Takes a message of a client; gives the reply, if one is due. `server_mac` names the server.
#[must_use]
pub fn answer(config: &Config, server_mac: Mac, payload: &[u8]) -> Option<Vec<u8>> {
    let [a, b, c, d, e, f] = server_mac.0;
    let server = Server {
        config,
        id: [0, 3, 0, 1, a, b, c, d, e, f],
        subnet: config.plan.subnet6()?,
        address: config.plan.guest6()?,
    };
    let message = Message::parse(payload).filter(|message| message.is_valid(&server.id))?;
    let reply = server.reply(&message)?;
    (reply.len() <= MAX_MESSAGE).then_some(reply)
}

impl Server<'_> {
    fn reply(&self, message: &Message<'_>) -> Option<Vec<u8>> {
        let at_once = message.kind != Kind::Solicit || message.has(code::RAPID_COMMIT);
        let mut out = vec![if at_once { REPLY } else { ADVERTISE }];
        out.extend(message.transaction);
        if let Some(client) = message.client {
            push(&mut out, code::CLIENT_ID, client);
        }
        push(&mut out, code::SERVER_ID, &self.id);
        match message.kind {
            Kind::Solicit | Kind::Request | Kind::Renew | Kind::Rebind => {
                if message.kind == Kind::Solicit && at_once {
                    push(&mut out, code::RAPID_COMMIT, &[]);
                }
                self.lease(message, &mut out);
                self.configure(message, &mut out);
            }
            Kind::Confirm => {
                let status = self.confirm(message)?;
                push(&mut out, code::STATUS, &status.to_be_bytes());
            }
            Kind::Release | Kind::Decline => self.give_up(message, &mut out),
            Kind::InformationRequest => {
                self.configure(message, &mut out);
                if message.wants(code::REFRESH_TIME) {
                    push(&mut out, code::REFRESH_TIME, &LIFETIME.to_be_bytes());
                }
            }
        }
        Some(out)
    }

    /// Grants the address to the first association that may have it; refuses the others.
    fn lease(&self, message: &Message<'_>, out: &mut Vec<u8>) {
        let mut free = true;
        for association in message.associations() {
            let elsewhere = |address| !self.subnet.contains(&address);
            match association.code {
                code::IA_PD => association.refuse(out, status::NO_PREFIXES),
                // RFC 8415 18.3.2; other messages name addresses as a hint, or to have them renewed.
                code::IA_NA
                    if message.kind == Kind::Request && association.addresses().any(elsewhere) =>
                {
                    association.refuse(out, status::NOT_ON_LINK);
                }
                code::IA_NA if std::mem::take(&mut free) => {
                    self.grant(message.kind, association, out);
                }
                _ => association.refuse(out, status::NO_ADDRESSES),
            }
        }
    }

    fn grant(&self, kind: Kind, association: Association<'_>, out: &mut Vec<u8>) {
        let mut addresses = Vec::new();
        push_address(&mut addresses, self.address, LIFETIME);
        // RFC 8415 18.3.4: what the client has from elsewhere ends now.
        if matches!(kind, Kind::Renew | Kind::Rebind) {
            for stale in association.addresses().filter(|own| *own != self.address) {
                push_address(&mut addresses, stale, 0);
            }
        }
        association.push(out, [RENEW, REBIND], &addresses);
    }

    /// Whether all addresses are of this link. Nothing to say where there are none (RFC 8415 18.3.3).
    fn confirm(&self, message: &Message<'_>) -> Option<u16> {
        let mut addresses = message
            .associations()
            .flat_map(|association| association.addresses())
            .peekable();
        addresses.peek()?;
        Some(if addresses.all(|address| self.subnet.contains(&address)) {
            status::SUCCESS
        } else {
            status::NOT_ON_LINK
        })
    }

    /// RFC 8415 18.3.7 and 18.3.8. An address that was declined is given again all the same: it is
    /// the only one, and who else has it is another guest of the same user.
    fn give_up(&self, message: &Message<'_>, out: &mut Vec<u8>) {
        push(out, code::STATUS, &status::SUCCESS.to_be_bytes());
        for association in message.associations() {
            let ours = association.addresses().any(|own| own == self.address);
            if association.code != code::IA_NA || !ours {
                association.refuse(out, status::NO_BINDING);
            }
        }
    }

    /// What a guest must know besides its address.
    fn configure(&self, message: &Message<'_>, out: &mut Vec<u8>) {
        if self.config.dns != Dns::Off
            && message.wants(code::DNS_SERVERS)
            && let Some(resolver) = self.config.plan.resolver6()
        {
            push(out, code::DNS_SERVERS, &resolver.octets());
        }
        let search = encode_search(&self.config.search);
        if message.wants(code::DOMAIN_LIST) && !search.is_empty() {
            push(out, code::DOMAIN_LIST, &search);
        }
    }
}

/// Splits the first option off.
fn split_option(bytes: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let ([code, code_low, len, len_low], rest) = bytes.split_first_chunk::<4>()?;
    let len = u16::from_be_bytes([*len, *len_low]);
    let (data, rest) = rest.split_at_checked(usize::from(len))?;
    Some((u16::from_be_bytes([*code, *code_low]), data, rest))
}

/// The options of a message, or within an option, that [`well_formed`] has passed.
fn each_option(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut left = bytes;
    std::iter::from_fn(move || {
        let (code, data, rest) = split_option(left)?;
        left = rest;
        Some((code, data))
    })
}

fn find(options: &[u8], wanted: u16) -> Option<&[u8]> {
    each_option(options)
        .find(|(code, _)| *code == wanted)
        .map(|(_, data)| data)
}

/// Bytes of an option before the options that it holds; 0 where it holds none.
const fn fixed_part(code: u16) -> usize {
    match code {
        code::IA_NA | code::IA_PD => 12,
        code::IA_TA => 4,
        code::IA_ADDRESS => 24,
        code::IA_PREFIX => 25,
        _ => 0,
    }
}

/// No option is cut short, nor one within another. How deep they go is bounded by [`MAX_MESSAGE`].
fn well_formed(options: &[u8]) -> bool {
    let mut left = options;
    while !left.is_empty() {
        let Some((code, data, rest)) = split_option(left) else {
            return false;
        };
        let fixed = fixed_part(code);
        if fixed > 0 && !data.get(fixed..).is_some_and(well_formed) {
            return false;
        }
        left = rest;
    }
    true
}

fn push(out: &mut Vec<u8>, code: u16, data: &[u8]) {
    if let Ok(len) = u16::try_from(data.len()) {
        out.extend(code.to_be_bytes());
        out.extend(len.to_be_bytes());
        out.extend(data);
    }
}

/// An address that is preferred as long as it is valid.
fn push_address(out: &mut Vec<u8>, address: Ipv6Addr, lifetime: u32) {
    let mut data = address.octets().to_vec();
    data.extend(lifetime.to_be_bytes());
    data.extend(lifetime.to_be_bytes());
    push(out, code::IA_ADDRESS, &data);
}

/// The search list as RFC 3646 has it: as many domains as fit.
fn encode_search(domains: &[String]) -> Vec<u8> {
    let mut encoded = Vec::new();
    for name in domains.iter().filter_map(|domain| encode_name(domain)) {
        if encoded.len() + name.len() <= MAX_SEARCH_BYTES {
            encoded.extend(name);
        }
    }
    encoded
}

#[cfg(test)]
mod tests;
