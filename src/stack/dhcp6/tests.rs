//! Dialogues with the DHCPv6 server, from [`answer`]'s side: messages as clients write them go in,
//! the parts of the reply are compared.

use super::*;
use proptest::prelude::*;

const MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);
const SERVER: [u8; 10] = [0, 3, 0, 1, 2, 0, 0, 0, 0, 1];
const CLIENT: [u8; 10] = [0, 3, 0, 1, 2, 0, 0, 0, 0, 9];

fn option(code: u16, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    push(&mut out, code, data);
    out
}

fn message(kind: u8, options: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = vec![kind, b'x', b'i', b'd'];
    bytes.extend(option(code::CLIENT_ID, &CLIENT));
    bytes.extend(options.concat());
    bytes
}

fn to_us() -> Vec<u8> {
    option(code::SERVER_ID, &SERVER)
}

/// An association with a number, and addresses in it.
fn association(code: u16, id: u8, addresses: &[&str]) -> Vec<u8> {
    let mut data = vec![0, 0, 0, id];
    data.resize(fixed_part(code), 0);
    for address in addresses {
        push_address(&mut data, address.parse().unwrap(), 7);
    }
    option(code, &data)
}

fn config() -> Config {
    Config {
        search: vec!["a.example".into(), "b..example".into(), "c".into()],
        ..Config::default()
    }
}

/// A reply, its type apart; what stands in each association: its status, or its addresses with
/// their lifetimes.
struct Heard {
    kind: u8,
    options: Vec<u8>,
}

impl Heard {
    fn option(&self, code: u16) -> Option<&[u8]> {
        find(&self.options, code)
    }

    fn associations(&self) -> Vec<String> {
        each_option(&self.options)
            .filter_map(|(code, data)| Association::of(code, data))
            .map(|association| {
                let mut text = format!("{}/{}", association.code, association.id[3]);
                for (code, data) in each_option(association.options) {
                    text += &match code {
                        code::STATUS => format!(" status {}", data[1]),
                        code::IA_ADDRESS => {
                            let address = Ipv6Addr::from(*data.first_chunk::<16>().unwrap());
                            let lifetime = u32::from_be_bytes(*data.last_chunk().unwrap());
                            format!(" {address} {lifetime}")
                        }
                        _ => format!(" ?{code}"),
                    };
                }
                text
            })
            .collect()
    }
}

fn hear(config: &Config, bytes: &[u8]) -> Option<Heard> {
    let reply = answer(config, MAC, bytes)?;
    let (head, options) = reply.split_first_chunk::<4>().unwrap();
    assert_eq!(head[1..], bytes[1..4], "of the client's exchange");
    assert!(reply.len() <= MAX_MESSAGE && well_formed(options));
    assert_eq!(find(options, code::SERVER_ID), Some(&SERVER[..]));
    Some(Heard {
        kind: head[0],
        options: options.to_vec(),
    })
}

fn ask(kind: u8, options: &[Vec<u8>]) -> Option<Heard> {
    hear(&config(), &message(kind, options))
}

const SOLICIT: u8 = 1;
const REQUEST: u8 = 3;
const CONFIRM: u8 = 4;
const RENEW: u8 = 5;
const REBIND: u8 = 6;
const RELEASE: u8 = 8;
const DECLINE: u8 = 9;
const INFORMATION: u8 = 11;

#[test]
fn a_client_solicits_and_requests_the_address() {
    let heard = ask(SOLICIT, &[association(code::IA_NA, 1, &[])]).unwrap();
    assert_eq!(heard.kind, ADVERTISE);
    assert_eq!(heard.associations(), ["3/1 fd00::100 86400"]);
    let heard = ask(
        REQUEST,
        &[to_us(), association(code::IA_NA, 1, &["fd00::100"])],
    )
    .unwrap();
    assert_eq!(heard.kind, REPLY);
    assert_eq!(heard.associations(), ["3/1 fd00::100 86400"]);
    assert_eq!(heard.option(code::CLIENT_ID), Some(&CLIENT[..]));
    let times = &heard.option(code::IA_NA).unwrap()[4..12];
    assert_eq!(
        times,
        [43_200_u32.to_be_bytes(), 69_120_u32.to_be_bytes()].concat()
    );
    assert_eq!(heard.option(code::DNS_SERVERS).unwrap()[15], 3);
    assert_eq!(
        heard.option(code::DOMAIN_LIST).unwrap(),
        b"\x01a\x07example\0\x01c\0"
    );
}

#[test]
fn rapid_commit_saves_a_round() {
    let rapid = option(code::RAPID_COMMIT, &[]);
    let heard = ask(SOLICIT, &[rapid, association(code::IA_NA, 1, &[])]).unwrap();
    assert_eq!(heard.kind, REPLY);
    assert!(heard.option(code::RAPID_COMMIT).is_some());
    assert_eq!(heard.associations(), ["3/1 fd00::100 86400"]);
}

#[test]
fn what_is_not_to_be_had_is_refused_by_name() {
    let heard = ask(
        SOLICIT,
        &[
            association(code::IA_PD, 1, &[]),
            association(code::IA_TA, 2, &[]),
            association(code::IA_NA, 3, &["fd00::5"]),
            association(code::IA_NA, 4, &[]),
        ],
    );
    let expected = [
        "25/1 status 6",
        "4/2 status 2",
        "3/3 fd00::100 86400",
        "3/4 status 2",
    ];
    assert_eq!(heard.unwrap().associations(), expected);
    let heard = ask(
        REQUEST,
        &[to_us(), association(code::IA_NA, 1, &["fd01::100"])],
    )
    .unwrap();
    assert_eq!(heard.associations(), ["3/1 status 4"], "not of this link");
}

#[test]
fn addresses_from_elsewhere_end_at_the_renewal() {
    let own = association(code::IA_NA, 1, &["fd00::100", "fd01::7"]);
    let expected = ["3/1 fd00::100 86400 fd01::7 0"];
    assert_eq!(
        ask(RENEW, &[to_us(), own.clone()]).unwrap().associations(),
        expected
    );
    assert_eq!(ask(REBIND, &[own]).unwrap().associations(), expected);
}

#[test]
fn confirm_tells_whether_the_link_is_the_same() {
    let status = |addresses: &[&str]| {
        let heard = ask(CONFIRM, &[association(code::IA_NA, 1, addresses)])?;
        assert!(heard.associations().is_empty());
        heard.option(code::STATUS).map(|status| status[1])
    };
    assert_eq!(status(&["fd00::100", "fd00::7"]), Some(0));
    assert_eq!(status(&["fd00::100", "fd01::7"]), Some(4));
    assert_eq!(status(&[]), None, "nothing to confirm");
}

#[test]
fn released_and_declined_addresses_are_acknowledged() {
    for kind in [RELEASE, DECLINE] {
        let ours = association(code::IA_NA, 1, &["fd00::100"]);
        let other = association(code::IA_NA, 2, &["fd00::7"]);
        let prefix = association(code::IA_PD, 3, &[]);
        let heard = ask(kind, &[to_us(), ours, other, prefix]).unwrap();
        assert_eq!(heard.kind, REPLY);
        assert_eq!(heard.option(code::STATUS), Some(&[0, 0][..]));
        assert_eq!(heard.associations(), ["3/2 status 3", "25/3 status 3"]);
    }
}

#[test]
fn information_is_given_as_it_was_asked_for() {
    let heard = ask(INFORMATION, &[]).unwrap();
    assert!(heard.option(code::DNS_SERVERS).is_some());
    assert_eq!(
        heard.option(code::REFRESH_TIME),
        Some(&86_400_u32.to_be_bytes()[..])
    );
    let heard = ask(INFORMATION, &[option(code::REQUESTED, &[0, 23, 0, 99])]).unwrap();
    assert!(heard.option(code::DNS_SERVERS).is_some());
    assert!(heard.option(code::DOMAIN_LIST).is_none());
    assert!(heard.option(code::REFRESH_TIME).is_none());
    let nameless = [INFORMATION, 1, 2, 3];
    assert!(
        hear(&config(), &nameless)
            .unwrap()
            .option(code::CLIENT_ID)
            .is_none()
    );
    let silent = Config {
        dns: Dns::Off,
        ..Config::default()
    };
    let heard = hear(&silent, &nameless).unwrap();
    assert!(heard.option(code::DNS_SERVERS).is_none());
    assert!(heard.option(code::DOMAIN_LIST).is_none());
}

#[test]
fn what_must_be_discarded_gets_no_answer() {
    let own = || association(code::IA_NA, 1, &["fd00::100"]);
    let other = option(code::SERVER_ID, &[0, 3, 0, 1, 2, 0, 0, 0, 0, 7]);
    for kind in [REQUEST, RENEW, RELEASE, DECLINE] {
        assert!(ask(kind, &[own()]).is_none(), "{kind} without a server");
        assert!(
            ask(kind, &[own(), other.clone()]).is_none(),
            "{kind} to another"
        );
    }
    for kind in [SOLICIT, CONFIRM, REBIND] {
        assert!(
            ask(kind, &[own(), to_us()]).is_none(),
            "{kind} to one server"
        );
    }
    assert!(ask(INFORMATION, &[other]).is_none());
    assert!(ask(INFORMATION, &[own()]).is_none());
    for kind in [0, 2, 7, 10, 12, 13, 14, 255] {
        assert!(ask(kind, &[own()]).is_none(), "{kind} is no client's");
    }
    let nameless = [&[SOLICIT, 1, 2, 3][..], &own()].concat();
    assert!(answer(&config(), MAC, &nameless).is_none());
    let solicit = message(SOLICIT, &[own()]);
    let whole = solicit.len() - own().len();
    for len in (0..solicit.len()).filter(|len| *len != whole) {
        assert!(answer(&config(), MAC, &solicit[..len]).is_none(), "{len}");
    }
    let long = option(99, &[0; MAX_MESSAGE]);
    assert!(ask(SOLICIT, &[own(), long]).is_none());
    let without = Config {
        plan: Config::default().plan.without_ipv6(),
        ..Config::default()
    };
    assert!(answer(&without, MAC, &solicit).is_none());
}

fn any_option() -> impl Strategy<Value = Vec<u8>> {
    let bytes = || proptest::collection::vec(any::<u8>(), 0..40);
    prop_oneof![
        Just(to_us()),
        (0_u8..8, 0_usize..3).prop_map(|(id, code)| {
            let code = [code::IA_NA, code::IA_TA, code::IA_PD][code];
            association(code, id, &["fd00::100", "fd01::1"][..usize::from(id % 3)])
        }),
        (0_u16..40, bytes()).prop_map(|(code, data)| option(code, &data)),
        bytes(),
    ]
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = hear(&config(), &bytes);
    }

    #[test]
    fn no_options_panic(kind in 0_u8..14, options in proptest::collection::vec(any_option(), 0..40)) {
        let _ = ask(kind, &options);
    }
}
