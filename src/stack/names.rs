//! The few names that the gateway itself knows: its own, the resolver's, and the way back from
//! their addresses.
//!
//! Comes in: a guest's DNS query, or, of a stream, its beginning. Goes out: whether it is to be
//! forwarded untouched, and else the answer. Whatever is not about these names is none of this
//! file's business, so that EDNS, DNSSEC and whatever comes next pass to the host's resolvers. No
//! state; nothing is read but header, question and, for our own names, the records behind.

mod reply;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::config::Config;
use crate::flow::named_stream::Judgement;
use crate::net::dns::{
    self, HEADER, Header, Question, Unreadable, class, flags, kind, split_label,
};

use reply::{Owner, Reply};

/// Longest query that is looked at: EDNS makes answers long, not queries, which fit one packet.
pub const MAX_QUERY: usize = 4096;

/// The zone that is all ours, and the names of its two servers, in wire format.
const ZONE: &[u8] = b"\x07tapgate\x08internal\0";
const GATEWAY: &[u8] = b"\x07gateway\x07tapgate\x08internal\0";
const RESOLVER: &[u8] = b"\x03dns\x07tapgate\x08internal\0";
/// What else leads to the gateway: a name of our own, and what container engines have taught people.
const GATEWAY_ALIASES: &[&[u8]] = &[
    b"\x04host\x07tapgate\x08internal\0",
    b"\x04host\x0acontainers\x08internal\0",
    b"\x04host\x06docker\x08internal\0",
];
/// Where the addresses' names stand (RFC 1035 3.5, RFC 3596 2.5).
const REVERSE4: &[u8] = b"\x07in-addr\x04arpa\0";
const REVERSE6: &[u8] = b"\x03ip6\x04arpa\0";

/// What becomes of a datagram to the resolver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup {
    /// It goes to the host's resolvers as it is.
    Pass,
    /// This is the answer.
    Answer(Vec<u8>),
    /// It can't be read, which this answer says.
    FormErr(Vec<u8>),
    /// It is a response: to answer one could go on for ever.
    Ignore,
}

/// Whose name or address it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Server {
    Gateway,
    Resolver,
}

/// What a name of ours stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meaning {
    /// A server's name: it has addresses.
    Name(Server),
    /// A server's address: it has a name.
    Address(Server),
    /// The zone itself: it exists, as names below do (RFC 8020), and has nothing but its start.
    Zone,
    /// In our zone, but not there.
    Missing,
}

/// What a message, or the beginning of one, turns out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sight<'a> {
    /// Too short to tell.
    Short,
    /// A response.
    Response,
    /// Not about our names, or nothing that we know how to answer.
    Foreign,
    /// Wrong, whatever follows.
    Malformed,
    /// A query for a name of ours.
    Ours(Asked<'a>),
}

/// A query for a name of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Asked<'a> {
    header: Header,
    question: Question<'a>,
    meaning: Meaning,
    /// Where the name of the zone stands that the answer is from.
    zone: Owner,
}

/// What becomes of a guest's datagram to the resolver.
#[must_use]
pub fn lookup(config: &Config, query: &[u8]) -> Lookup {
    let sight = look(config, query);
    if query.len() > MAX_QUERY && sight != Sight::Response {
        return Lookup::FormErr(reply::form_error(query));
    }
    match sight {
        Sight::Response => Lookup::Ignore,
        Sight::Foreign => Lookup::Pass,
        Sight::Short | Sight::Malformed => Lookup::FormErr(reply::form_error(query)),
        Sight::Ours(asked) => respond(config, query, &asked)
            .map_or_else(|| Lookup::FormErr(reply::form_error(query)), Lookup::Answer),
    }
}

/// What becomes of a message of `len` bytes in a guest's stream to the resolver, of which `start` has
/// come. One that is not ours may be longer than a datagram: nothing keeps it.
#[must_use]
pub fn judge(config: &Config, start: &[u8], len: usize) -> Judgement {
    let answer = match look(config, start) {
        Sight::Foreign | Sight::Response => return Judgement::Pass,
        Sight::Malformed => None,
        Sight::Ours(_) if len > MAX_QUERY => None,
        Sight::Short | Sight::Ours(_) if start.len() < len => return Judgement::More,
        Sight::Short => None,
        Sight::Ours(asked) => respond(config, start, &asked),
    };
    Judgement::Answer(answer.unwrap_or_else(|| reply::form_error(start)))
}

fn look<'a>(config: &Config, message: &'a [u8]) -> Sight<'a> {
    if message
        .get(2)
        .is_some_and(|byte| byte & flags::RESPONSE != 0)
    {
        return Sight::Response;
    }
    let Some(header) = dns::header(message) else {
        return Sight::Short;
    };
    if header.flags & flags::OPCODE != 0 || header.questions != 1 {
        return Sight::Foreign;
    }
    let question = match dns::question(message) {
        Ok(question) => question,
        Err(Unreadable::Truncated) => return Sight::Short,
        Err(Unreadable::Malformed) => return Sight::Malformed,
    };
    match meaning(config, question.name) {
        Some((meaning, zone)) if [class::IN, class::ANY].contains(&question.class) => {
            Sight::Ours(Asked {
                header,
                question,
                meaning,
                zone,
            })
        }
        Some(_) | None => Sight::Foreign,
    }
}

/// What a name stands for, and where in the message its zone's name begins. Names are compared as
/// bytes but for case, lengths included: those are below the letters.
fn meaning(config: &Config, name: &[u8]) -> Option<(Meaning, Owner)> {
    let is = |known: &[u8]| name.eq_ignore_ascii_case(known);
    let zone = zone_start(name);
    let whole = Owner::at(HEADER);
    if is(GATEWAY) || GATEWAY_ALIASES.iter().any(|alias| is(alias)) {
        // A name of somebody else's zone is a zone of its own here.
        let zone = zone.map_or(whole, Owner::at);
        return Some((Meaning::Name(Server::Gateway), zone));
    }
    if let Some(zone) = zone {
        let meaning = if is(RESOLVER) {
            Meaning::Name(Server::Resolver)
        } else if is(ZONE) {
            Meaning::Zone
        } else {
            Meaning::Missing
        };
        return Some((meaning, Owner::at(zone)));
    }
    let addr = reverse_address(name)?;
    let server = if config.plan.is_gateway(addr) {
        Server::Gateway
    } else if config.plan.is_resolver(addr) {
        Server::Resolver
    } else {
        return None;
    };
    Some((Meaning::Address(server), whole))
}

/// Where in the message our zone's name begins, if the question's name ends in it.
fn zone_start(name: &[u8]) -> Option<usize> {
    let mut rest = name;
    while !rest.eq_ignore_ascii_case(ZONE) {
        (_, rest) = split_label(rest)?;
    }
    Some(HEADER + name.len() - rest.len())
}

/// The address that a name below `in-addr.arpa` or `ip6.arpa` stands for.
fn reverse_address(name: &[u8]) -> Option<IpAddr> {
    reverse4(name)
        .map(IpAddr::V4)
        .or_else(|| reverse6(name).map(IpAddr::V6))
}

fn reverse4(name: &[u8]) -> Option<Ipv4Addr> {
    let (mut octets, mut rest) = ([0; 4], name);
    for octet in octets.iter_mut().rev() {
        let (label, above) = split_label(rest)?;
        // `02` and `+2` are other names.
        let digits = label.iter().all(u8::is_ascii_digit);
        let plain = digits && (label == b"0" || !label.starts_with(b"0"));
        let text = str::from_utf8(label).ok().filter(|_| plain)?;
        *octet = text.parse().ok()?;
        rest = above;
    }
    rest.eq_ignore_ascii_case(REVERSE4)
        .then(|| Ipv4Addr::from(octets))
}

fn reverse6(name: &[u8]) -> Option<Ipv6Addr> {
    let (mut bits, mut rest) = (0_u128, name);
    for place in 0..32 {
        let (label, above) = split_label(rest)?;
        let [digit] = label else {
            return None;
        };
        let nibble = char::from(*digit).to_digit(16)?;
        bits |= u128::from(nibble) << (4 * place);
        rest = above;
    }
    rest.eq_ignore_ascii_case(REVERSE6)
        .then(|| Ipv6Addr::from(bits))
}

/// The answer to a whole query; `None` where the records behind the question can't be read.
fn respond(config: &Config, query: &[u8], asked: &Asked<'_>) -> Option<Vec<u8>> {
    let extension = reply::extension(query, asked)?;
    let mut reply = Reply::new(asked.header, asked.question);
    if extension.is_some_and(|extension| extension.version > 0) {
        return Some(reply.bad_version(extension));
    }
    let wants = |wanted: u16| [wanted, kind::ANY].contains(&asked.question.kind);
    match asked.meaning {
        Meaning::Name(server) => {
            let (addr, addr6) = addresses(config, server);
            if wants(kind::A) {
                reply.answer(kind::A, &addr.octets());
            }
            if let Some(addr) = addr6.filter(|_| wants(kind::AAAA)) {
                reply.answer(kind::AAAA, &addr.octets());
            }
        }
        Meaning::Address(server) if wants(kind::PTR) => reply.answer(kind::PTR, name_of(server)),
        Meaning::Zone if wants(kind::SOA) => reply.answer(kind::SOA, &reply::start_of_authority()),
        Meaning::Missing => reply.does_not_exist(),
        Meaning::Address(_) | Meaning::Zone => {}
    }
    Some(reply.finish(asked.zone, extension))
}

fn addresses(config: &Config, server: Server) -> (Ipv4Addr, Option<Ipv6Addr>) {
    match server {
        Server::Gateway => (config.plan.gateway(), config.plan.gateway6()),
        Server::Resolver => (config.plan.resolver(), config.plan.resolver6()),
    }
}

const fn name_of(server: Server) -> &'static [u8] {
    match server {
        Server::Gateway => GATEWAY,
        Server::Resolver => RESOLVER,
    }
}

#[cfg(test)]
mod tests;
