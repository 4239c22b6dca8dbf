//! Queries as resolvers write them, and what is read from the answers: by the rules of RFC 1035, not
//! by the functions that wrote them.

use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

fn wire(name: &str) -> Vec<u8> {
    dns::encode_name(name).unwrap_or_else(|| vec![0])
}

/// A query with an identifier of `id`, and whatever comes behind its question.
fn query_with(name: &str, kind: u16, records: [u16; 3], behind: &[u8]) -> Vec<u8> {
    let mut bytes = b"id\x01\x10\0\x01".to_vec();
    bytes.extend(records.iter().flat_map(|count| count.to_be_bytes()));
    bytes.extend(wire(name));
    bytes.extend(kind.to_be_bytes());
    bytes.extend(class::IN.to_be_bytes());
    bytes.extend(behind);
    bytes
}

fn query(name: &str, kind: u16) -> Vec<u8> {
    query_with(name, kind, [0; 3], &[])
}

fn opt(version: u8) -> Vec<u8> {
    vec![0, 0, 41, 0x10, 0, 0, version, 0x80, 0, 0, 0]
}

/// Follows a name, compressed or not, and gives where it ends.
fn name_at(message: &[u8], start: usize) -> Option<(String, usize)> {
    let (mut text, mut at, mut end) = (String::new(), start, None);
    for _ in 0..200 {
        match usize::from(*message.get(at)?) {
            0 => return Some((text, end.unwrap_or(at + 1))),
            len @ 1..=63 => {
                text += &String::from_utf8_lossy(message.get(at + 1..at + 1 + len)?);
                text.push('.');
                at += 1 + len;
            }
            high => {
                end = end.or(Some(at + 2));
                at = (high - 0xc0) * 256 + usize::from(*message.get(at + 1)?);
            }
        }
    }
    None
}

/// An answer in text: the code, and each record as `section name type data`.
fn read(message: &[u8]) -> Option<(u8, Vec<String>)> {
    let header = dns::header(message)?;
    assert_ne!(header.flags & flags::RESPONSE, 0);
    assert!(message.len() <= 512, "fits what every resolver takes");
    let mut at = HEADER;
    for _ in 0..header.questions {
        at = name_at(message, at)?.1 + 4;
    }
    let mut lines = Vec::new();
    for (section, count) in header.records.into_iter().enumerate() {
        for _ in 0..count {
            let (name, fixed) = name_at(message, at)?;
            let record = dns::record(message, at)?;
            at = record.end;
            let data = match (record.kind, record.data) {
                (kind::A, data) => Ipv4Addr::from(*data.first_chunk()?).to_string(),
                (kind::AAAA, data) => Ipv6Addr::from(*data.first_chunk()?).to_string(),
                (kind::PTR, _) => name_at(message, fixed + 10)?.0,
                (kind::SOA, data) => format!("soa {}", data.last()?),
                (kind::OPT, _) => format!("opt {} {:x}", record.class, record.ttl),
                (kind, _) => format!("? {kind}"),
            };
            let ttl = if record.kind == kind::OPT {
                0
            } else {
                record.ttl
            };
            lines.push(format!("{section} {name} {ttl} {data}"));
        }
    }
    assert_eq!(at, message.len(), "nothing behind");
    Some((header.more_flags & 15, lines))
}

fn ask_with(config: &Config, bytes: &[u8]) -> Option<(u8, Vec<String>)> {
    match lookup(config, bytes) {
        Lookup::Answer(answer) | Lookup::FormErr(answer) => {
            assert_eq!(answer[..2], bytes[..2], "of the same exchange");
            Some(read(&answer).unwrap())
        }
        Lookup::Pass | Lookup::Ignore => None,
    }
}

fn ask(name: &str, kind: u16) -> Option<(u8, Vec<String>)> {
    ask_with(&Config::default(), &query(name, kind))
}

fn found(lines: &[&str]) -> Option<(u8, Vec<String>)> {
    Some((0, lines.iter().map(ToString::to_string).collect()))
}

fn nothing(code: u8, zone: &str) -> Option<(u8, Vec<String>)> {
    Some((code, vec![format!("1 {zone} 60 soa 60")]))
}

#[test]
fn names_of_the_gateway_lead_to_it() {
    for name in [
        "host.tapgate.internal",
        "gateway.tapgate.internal",
        "host.containers.internal",
        "host.docker.internal",
        "HoSt.Docker.INTERNAL",
    ] {
        let addr = format!("0 {name}. 60 10.0.2.2");
        let addr6 = format!("0 {name}. 60 fd00::2");
        assert_eq!(ask(name, kind::A), found(&[&addr]));
        assert_eq!(ask(name, kind::AAAA), found(&[&addr6]));
        assert_eq!(ask(name, kind::ANY), found(&[&addr, &addr6]));
    }
    let resolver = ask("dns.tapgate.internal", kind::AAAA);
    assert_eq!(resolver, found(&["0 dns.tapgate.internal. 60 fd00::3"]));
}

#[test]
fn what_a_name_does_not_have_is_no_error() {
    let (mail, service) = (15, 65);
    assert_eq!(
        ask("host.tapgate.internal", mail),
        nothing(0, "tapgate.internal.")
    );
    assert_eq!(
        ask("host.Docker.internal", service),
        nothing(0, "host.Docker.internal.")
    );
    let old = Config {
        plan: Config::default().plan.without_ipv6(),
        ..Config::default()
    };
    let six = ask_with(&old, &query("host.tapgate.internal", kind::AAAA));
    assert_eq!(six, nothing(0, "tapgate.internal."));
    // Names below exist, so the zone does.
    assert_eq!(
        ask("tapgate.internal", kind::A),
        nothing(0, "tapgate.internal.")
    );
    let start = ask("tapgate.internal", kind::SOA);
    assert_eq!(start, found(&["0 tapgate.internal. 60 soa 60"]));
}

#[test]
fn other_names_of_the_zone_do_not_exist() {
    for name in ["www.Tapgate.internal", "a.host.Tapgate.internal"] {
        assert_eq!(ask(name, kind::A), nothing(3, "Tapgate.internal."));
    }
}

#[test]
fn addresses_lead_back_to_names() {
    let nibbles = |last: char| format!("{last}{}.0.0.d.f.ip6.arpa", ".0".repeat(27));
    let pointer = |name: &str| {
        let (code, lines) = ask(name, kind::PTR)?;
        let data = lines[0].rsplit(' ').next()?.to_owned();
        Some((code, data))
    };
    let to = |name: &str| Some((0, format!("{name}.tapgate.internal.")));
    assert_eq!(pointer("2.2.0.10.in-addr.arpa"), to("gateway"));
    assert_eq!(pointer("3.2.0.10.IN-ADDR.arpa"), to("dns"));
    assert_eq!(pointer(&nibbles('2')), to("gateway"));
    assert_eq!(pointer(&nibbles('3')), to("dns"));
    assert_eq!(
        ask("2.2.0.10.in-addr.arpa", kind::A),
        nothing(0, "2.2.0.10.in-addr.arpa.")
    );
    for other in [
        "4.2.0.10.in-addr.arpa",
        "02.2.0.10.in-addr.arpa",
        "+2.2.0.10.in-addr.arpa",
        "2.0.10.in-addr.arpa",
        "2.2.2.0.10.in-addr.arpa",
        "2.2.0.10.in-addr.example",
        &nibbles('4'),
        &nibbles('x'),
    ] {
        assert_eq!(ask(other, kind::PTR), None, "{other}");
    }
}

#[test]
fn everything_else_passes() {
    for name in [
        "example.org",
        "",
        "internal",
        "containers.internal",
        "a.host.containers.internal",
        "xtapgate.internal",
        "tapgate.internal.example",
    ] {
        assert_eq!(ask(name, kind::A), None, "{name}");
    }
    let ours = query("host.tapgate.internal", kind::A);
    let (opcode, count, class, last) = (2, 5, ours.len() - 1, 0x28);
    for (at, byte) in [(opcode, last), (count, 2), (count, 0), (class, 3)] {
        let mut other = ours.clone();
        other[at] = byte;
        assert_eq!(lookup(&Config::default(), &other), Lookup::Pass, "{at}");
    }
    let mut any_class = ours.clone();
    any_class[class] = 255;
    let expected = found(&["0 host.tapgate.internal. 60 10.0.2.2"]);
    assert_eq!(ask_with(&Config::default(), &any_class), expected);
    let mut response = ours;
    response[2] |= flags::RESPONSE;
    assert_eq!(lookup(&Config::default(), &response), Lookup::Ignore);
}

#[test]
fn headers_say_who_answers() {
    let answer = lookup(&Config::default(), &query("host.tapgate.internal", kind::A));
    let Lookup::Answer(answer) = answer else {
        panic!("{answer:?}");
    };
    assert_eq!(answer[..4], *b"id\x85\x90", "QR AA RD, RA CD");
}

#[test]
fn extensions_are_answered_in_kind() {
    let name = "host.tapgate.internal";
    let extended = |version| query_with(name, kind::A, [0, 0, 1], &opt(version));
    let config = Config::default();
    let expected = ["0 host.tapgate.internal. 60 10.0.2.2", "2  0 opt 1232 8000"];
    assert_eq!(ask_with(&config, &extended(0)), found(&expected));
    let expected = ["2  0 opt 1232 1008000"];
    assert_eq!(ask_with(&config, &extended(1)), found(&expected), "code 16");
    let two = query_with(name, kind::A, [0, 0, 2], &opt(0).repeat(2));
    let misplaced = query_with(name, kind::A, [1, 0, 0], &opt(0));
    let missing = query_with(name, kind::A, [0, 0, 1], &[]);
    let cut = query_with(name, kind::A, [0, 1, 0], &opt(0)[..10]);
    for wrong in [two, misplaced, missing, cut] {
        assert_eq!(ask_with(&config, &wrong), Some((1, vec![])), "{wrong:?}");
    }
}

#[test]
fn malformed_queries_hear_so() {
    let refused = |bytes: &[u8]| match lookup(&Config::default(), bytes) {
        Lookup::FormErr(answer) => Some(answer),
        Lookup::Pass | Lookup::Answer(_) | Lookup::Ignore => None,
    };
    let answer = |start: [u8; 4]| Some([&start[..], &[0; 8]].concat());
    assert_eq!(refused(b""), answer([0, 0, 0x80, 0x81]));
    assert_eq!(refused(b"i"), answer([b'i', 0, 0x80, 0x81]));
    assert_eq!(refused(b"id\x29"), answer([b'i', b'd', 0xa9, 0x81]));
    let query = query("example.org", kind::A);
    for len in 3..query.len() {
        assert_eq!(
            refused(&query[..len]),
            answer([b'i', b'd', 0x81, 0x81]),
            "{len}"
        );
    }
    assert_eq!(refused(&query), None);
    for label in [64, 0x80, 0xc0] {
        let mut wrong = query.clone();
        wrong[HEADER] = label;
        assert!(refused(&wrong).is_some(), "{label}");
    }
    let mut long = query;
    long.resize(MAX_QUERY, 0);
    assert_eq!(refused(&long), None, "what follows is not our business");
    long.push(0);
    assert!(refused(&long).is_some());
}

#[test]
fn streams_are_judged_as_early_as_can_be() {
    let config = Config::default();
    let ours = query("host.tapgate.internal", kind::A);
    let other = query("example.org", kind::A);
    let judge = |bytes: &[u8], len| judge(&config, bytes, len);
    for len in 0..other.len() {
        assert_eq!(judge(&other[..len], 9000), Judgement::More);
    }
    assert_eq!(judge(&other, 9000), Judgement::Pass, "long messages may");
    assert_eq!(judge(&ours, ours.len() + 1), Judgement::More);
    let error = Judgement::Answer(reply::form_error(&ours));
    assert_eq!(judge(&ours, MAX_QUERY + 1), error, "too long to keep");
    assert_eq!(judge(&ours[..20], 20), error, "cut off");
    assert!(matches!(lookup(&config, &ours), Lookup::Answer(answer)
        if judge(&ours, ours.len()) == Judgement::Answer(answer.clone())));
}

fn any_query() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof![
        Just("host.tapgate.internal"),
        Just("x.tapgate.internal"),
        Just("host.docker.internal"),
        Just("3.2.0.10.in-addr.arpa"),
        Just("example.org"),
    ];
    let behind = prop_oneof![
        Just(opt(0)),
        Just(opt(1)),
        proptest::collection::vec(any::<u8>(), 0..40),
    ];
    (name, 0_u16..260, 0_u16..3, behind, any::<[u8; 2]>()).prop_map(
        |(name, kind, count, behind, flags)| {
            let mut bytes = query_with(name, kind, [0, 0, count], &behind);
            bytes[2..4].copy_from_slice(&[flags[0] & 0x87, flags[1]]);
            bytes
        },
    )
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        if let Lookup::Answer(answer) | Lookup::FormErr(answer) = lookup(&Config::default(), &bytes) {
            prop_assert!(read(&answer).is_some());
        }
    }

    #[test]
    fn answers_can_be_read(bytes in any_query(), cut in 0_usize..10) {
        let bytes = &bytes[..bytes.len() - cut];
        let _ = ask_with(&Config::default(), bytes);
    }

    /// Once it is known what becomes of a message, more of it changes nothing.
    #[test]
    fn judgements_last(bytes in any_query()) {
        let (config, len) = (Config::default(), bytes.len());
        let mut seen = HashMap::new();
        for end in 0..=len {
            let judgement = judge(&config, &bytes[..end], len);
            if judgement != Judgement::More {
                let passes = judgement == Judgement::Pass;
                seen.insert(passes, end);
            }
        }
        prop_assert_eq!(seen.len(), 1, "{:?}", seen);
        prop_assert_ne!(judge(&config, &bytes, len), Judgement::More);
    }
}
