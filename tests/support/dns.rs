//! A resolver for the tests: answers A questions over UDP and TCP, and remembers who asked what.
//!
//! A name that begins with `a` and a number, like `a40.example`, has that many addresses: the way to
//! an answer of any length. An answer longer than the asker's EDNS size (512 without) is truncated
//! over UDP, as RFC 1035 4.2.1 wants.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};

use super::serve::{self, Server};
use super::sockets::Sockets;

const TYPE_A: u16 = 1;
const TYPE_OPT: u16 = 41;
const HEADER: usize = 12;

/// One question that reached a resolver.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    pub(crate) name: String,
    pub(crate) from: SocketAddr,
    pub(crate) tcp: bool,
}

/// A running resolver, which says that every name is `addr`.
pub(crate) struct Resolver {
    questions: Arc<Mutex<Vec<Question>>>,
    // Held for their drop.
    _servers: [Server; 2],
}

impl Resolver {
    pub(crate) fn start(place: &impl Sockets, listen: SocketAddr, addr: Ipv4Addr) -> Self {
        let questions = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&questions);
        let over_udp = serve::udp(
            place.udp(listen).expect("a free port"),
            move |query, from| answer(query, addr, true, |name| remember(&seen, name, from, false)),
        );
        let seen = Arc::clone(&questions);
        let over_tcp = serve::tcp(place.listen(listen).expect("a free port"), move |stream| {
            let from = stream.peer_addr().expect("it is connected");
            let _ = serve_stream(stream, |query| {
                answer(query, addr, false, |name| remember(&seen, name, from, true))
            });
        });
        Self {
            questions,
            _servers: [over_udp, over_tcp],
        }
    }

    /// Every question so far.
    pub(crate) fn questions(&self) -> Vec<Question> {
        self.questions
            .lock()
            .expect("no thread failed here")
            .clone()
    }
}

fn remember(seen: &Mutex<Vec<Question>>, name: String, from: SocketAddr, tcp: bool) {
    seen.lock()
        .expect("no thread failed here")
        .push(Question { name, from, tcp });
}

/// Messages over TCP carry their length first (RFC 1035 4.2.2).
fn serve_stream(
    mut stream: TcpStream,
    answer: impl Fn(&[u8]) -> Option<Vec<u8>>,
) -> std::io::Result<()> {
    loop {
        let mut length = [0; 2];
        stream.read_exact(&mut length)?;
        let mut query = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut query)?;
        let Some(answer) = answer(&query) else {
            return Ok(());
        };
        let length = u16::try_from(answer.len()).expect("the tests ask for less");
        stream.write_all(&[&length.to_be_bytes(), answer.as_slice()].concat())?;
    }
}

/// The answer to `query`, or none if it is not understood.
fn answer(
    query: &[u8],
    addr: Ipv4Addr,
    over_udp: bool,
    note: impl FnOnce(String),
) -> Option<Vec<u8>> {
    let (name, end_of_name) = read_name(query)?;
    let kind = be16(query, end_of_name)?;
    let question = query.get(HEADER..end_of_name + 4)?;
    let count = if kind == TYPE_A {
        address_count(&name)
    } else {
        0
    };
    let edns = edns_size(query, end_of_name + 4);
    let room = usize::from(edns.unwrap_or(512).max(512));
    note(name);

    let records: Vec<u8> = (0..count).flat_map(|n| record(addr, n)).collect();
    let option = edns.map(|_| [0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);
    let length = HEADER + question.len() + records.len() + option.map_or(0, |option| option.len());
    let truncated = over_udp && length > room;

    let mut message = query.get(..2)?.to_vec();
    // QR, RD and RA, and TC where the answer doesn't fit.
    message.extend(if truncated {
        [0x83, 0x80]
    } else {
        [0x81, 0x80]
    });
    for count in [
        1,
        if truncated { 0 } else { count },
        0,
        u16::from(edns.is_some()),
    ] {
        message.extend(count.to_be_bytes());
    }
    message.extend(question);
    if !truncated {
        message.extend(records);
    }
    message.extend(option.into_iter().flatten());
    Some(message)
}

/// The n-th address record of an answer; its name points at the question.
fn record(addr: Ipv4Addr, n: u16) -> Vec<u8> {
    let addr = Ipv4Addr::from_bits(addr.to_bits().wrapping_add(n.into()));
    let mut record = vec![0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4];
    record.extend(addr.octets());
    record
}

fn address_count(name: &str) -> u16 {
    let label = name.split('.').next().unwrap_or_default();
    label
        .strip_prefix('a')
        .and_then(|number| number.parse().ok())
        .unwrap_or(1)
}

/// The name in the question, and where its type begins.
fn read_name(query: &[u8]) -> Option<(String, usize)> {
    let mut labels = Vec::new();
    let mut place = HEADER;
    loop {
        let length = usize::from(*query.get(place)?);
        place += 1;
        if length == 0 {
            return Some((labels.join("."), place));
        }
        labels.push(String::from_utf8_lossy(query.get(place..place + length)?).into_owned());
        place += length;
    }
}

/// The size in an OPT record right behind the question (RFC 6891 6.1.2), if there is one.
fn edns_size(query: &[u8], place: usize) -> Option<u16> {
    let has_option = be16(query, 10)? > 0 && be16(query, place + 1)? == TYPE_OPT;
    if has_option {
        be16(query, place + 3)
    } else {
        None
    }
}

fn be16(bytes: &[u8], place: usize) -> Option<u16> {
    let word = bytes.get(place..place + 2)?;
    Some(u16::from_be_bytes([word[0], word[1]]))
}
