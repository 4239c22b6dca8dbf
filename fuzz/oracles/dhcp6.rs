//! The DHCPv6 server: no message panics, and every reply is whole, of the client's exchange, and
//! gives no other address than the one of the plan.
//!
//! The input is the type of a message, then its options; the transaction and the identifiers of
//! both sides are written here, so that what lies behind the checks is reached. An input that
//! begins with 255 is taken as it stands.

use tapgate::config::Config;
use tapgate::net::Mac;
use tapgate::stack::dhcp6;

const SERVER: Mac = Mac([2, 0, 0, 0, 0, 1]);
const CLIENT_ID: [u8; 14] = [0, 1, 0, 10, 0, 3, 0, 1, 2, 0, 0, 0, 0, 9];
const SERVER_ID: [u8; 14] = [0, 2, 0, 10, 0, 3, 0, 1, 2, 0, 0, 0, 0, 1];

/// Types of messages that must name the server: Request, Renew, Release, Decline.
const TO_ONE_SERVER: [u8; 4] = [3, 5, 8, 9];

fn message(kind: u8, options: &[u8]) -> Vec<u8> {
    let mut message = vec![kind, b'x', b'i', b'd'];
    message.extend(CLIENT_ID);
    if TO_ONE_SERVER.contains(&kind) {
        message.extend(SERVER_ID);
    }
    message.extend(options);
    message
}

/// Walks over the options; hands addresses of associations, with their lifetimes, to `see`.
fn walk(mut options: &[u8], see: &mut dyn FnMut(&[u8])) {
    while !options.is_empty() {
        let Some((head, rest)) = options.split_first_chunk::<4>() else {
            unreachable!("an option's head is cut off");
        };
        let len = usize::from(u16::from_be_bytes([head[2], head[3]]));
        let (data, rest) = rest.split_at(len);
        match u16::from_be_bytes([head[0], head[1]]) {
            3 | 25 => walk(&data[12..], see),
            4 => walk(&data[4..], see),
            5 => see(data),
            _ => {}
        }
        options = rest;
    }
}

/// Tries an input.
pub fn run(bytes: &[u8]) {
    let config = Config {
        search: vec!["a.example".into(), "..".into()],
        ..Config::default()
    };
    let Some((&kind, options)) = bytes.split_first() else {
        return;
    };
    let message = if kind == 255 {
        options.to_vec()
    } else {
        message(kind, options)
    };
    let Some(reply) = dhcp6::answer(&config, SERVER, &message) else {
        return;
    };
    assert!(reply.len() <= 1232, "fits a packet of any link");
    assert!([2, 7].contains(&reply[0]), "an Advertise or a Reply");
    assert_eq!(reply[1..4], message[1..4], "of the client's exchange");
    let guest = config.plan.guest6().map(|guest| guest.octets());
    let mut given = 0;
    walk(&reply[4..], &mut |address| {
        assert_eq!(address.len(), 24);
        if address[16..] != [0; 8] {
            assert_eq!(
                guest.as_ref().map(<[u8; 16]>::as_slice),
                Some(&address[..16])
            );
            given += 1;
        }
    });
    assert!(given <= 1, "given once");
}
