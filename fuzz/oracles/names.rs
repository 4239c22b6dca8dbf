//! The gateway's own names: no query panics, every answer is whole and of the query's exchange, and a
//! stream comes to the same end as a datagram.
//!
//! The first byte of the input picks a name that is written here, the next three are the type and the
//! number of records behind the question, and the rest stands behind it. An input that begins with
//! 255 is taken as it stands.

use tapgate::config::Config;
use tapgate::flow::named_stream::Judgement;
use tapgate::net::dns;
use tapgate::stack::names::{self, Lookup, MAX_QUERY};

const NAMES: [&str; 6] = [
    "host.tapgate.internal",
    "www.tapgate.internal",
    "tapgate.internal",
    "host.docker.internal",
    "2.2.0.10.in-addr.arpa",
    "example.org",
];

fn query(pick: u8, kind: [u8; 2], records: u8, behind: &[u8]) -> Option<Vec<u8>> {
    let mut query = b"id\x01\0\0\x01\0\0\0\0\0".to_vec();
    query.push(records);
    query.extend(dns::encode_name(NAMES[usize::from(pick) % NAMES.len()])?);
    query.extend(kind);
    query.extend([0, 1]);
    query.extend(behind);
    Some(query)
}

fn check(query: &[u8], answer: &[u8]) {
    assert!(answer.len() <= 512, "fits what every resolver takes");
    let Some(header) = dns::header(answer) else {
        unreachable!("no header");
    };
    let id = query.iter().chain([&0, &0]).take(2);
    assert!(answer[..2].iter().eq(id), "of the query's exchange");
    assert_ne!(answer[2] & 0x80, 0, "a response");
    let mut at = match header.questions {
        0 => dns::HEADER,
        _ => dns::question(answer).map_or(usize::MAX, |question| question.end),
    };
    for _ in 0..header.records.iter().sum() {
        at = dns::record(answer, at).map_or(usize::MAX, |record| record.end);
    }
    assert_eq!(at, answer.len(), "whole, and nothing behind");
}

/// Tries an input.
pub fn run(bytes: &[u8]) {
    let query = match bytes {
        [255, whole @ ..] => Some(whole.to_vec()),
        [pick, kind, kind_low, records, behind @ ..] => {
            query(*pick, [*kind, *kind_low], *records, behind)
        }
        _ => None,
    };
    let Some(query) = query else {
        return;
    };
    let config = Config::default();
    let judgement = names::judge(&config, &query, query.len());
    match names::lookup(&config, &query) {
        Lookup::Answer(answer) | Lookup::FormErr(answer) => {
            check(&query, &answer);
            if query.len() <= MAX_QUERY {
                assert_eq!(judgement, Judgement::Answer(answer));
            }
        }
        Lookup::Pass | Lookup::Ignore => assert_eq!(judgement, Judgement::Pass),
    }
}
