//! The DHCP server: no message panics, and every address given is of the pool and given once.
//!
//! The input is a run of messages: a byte of time, one of the client, one of length, then the bytes
//! of the options; the fixed part is written here, so that the options are reached. A message that
//! begins with 255 is taken as it stands.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};

use tapgate::config::{AddressPlan, Config};
use tapgate::net::{Duration, Instant};
use tapgate::stack::dhcp::DhcpServer;

/// Time that the server promises an address for.
const LEASE: Duration = Duration::from_secs(86_400);

fn message(client: u8, options: &[u8]) -> Vec<u8> {
    let mut message = vec![1, 1, 6, 0, 1, 2, 3, 4, 0, 0, client & 0x80, 0];
    if client & 0x40 != 0 {
        message.extend([10, 0, 2, 15 + (client & 15)]);
    }
    message.resize(28, 0);
    message.extend([2, 0, 0, 0, 0, client & 31]);
    message.resize(236, 0);
    message.extend([99, 130, 83, 99]);
    message.extend(options);
    message
}

/// Tries an input.
pub fn run(bytes: &[u8]) {
    let config = Config::default();
    let plan = AddressPlan::default();
    let mut server = DhcpServer::new(plan);
    let mut now = Instant::ZERO;
    // Whose an address is, and until when.
    let mut given: HashMap<Ipv4Addr, ([u8; 6], Instant)> = HashMap::new();
    let mut rest = bytes;
    while let [time, client, len, tail @ ..] = rest {
        let (options, tail) = tail.split_at(usize::from(*len).min(tail.len()));
        rest = tail;
        now += Duration::from_secs(1 << (time % 18));
        let message = if *client == 255 {
            options.to_vec()
        } else {
            message(*client, options)
        };
        let src = IpAddr::from([10, 0, 2, 15 + (client & 15)]);
        let Some(reply) = server.answer(now, &config, src, &message) else {
            // Declined and released addresses may be given again; what is left is still bounded.
            given.clear();
            continue;
        };
        assert!(reply.payload.len() >= 300, "long enough for every client");
        assert_eq!(reply.payload[..4], [2, 1, 6, 0], "a reply of BOOTP");
        assert_eq!(
            reply.payload[4..12],
            message[4..12],
            "of the client's exchange"
        );
        let yours = Ipv4Addr::from(<[u8; 4]>::try_from(&reply.payload[16..20]).unwrap_or_default());
        let pool = plan.lease_pool();
        assert!(
            yours.is_unspecified() || pool.contains(&u32::from(yours)),
            "{yours}"
        );
        let acknowledged = reply.payload[242] == 5 && !yours.is_unspecified();
        let mac = <[u8; 6]>::try_from(&reply.payload[28..34]).unwrap_or_default();
        if acknowledged {
            // One address for each client: what it had before may be given to others.
            given.retain(|addr, (of, _)| *of != mac || *addr == yours);
            let before = given.insert(yours, (mac, now + LEASE));
            let free = before.is_none_or(|(of, until)| of == mac || until <= now);
            assert!(free, "{yours} is in use");
        }
    }
}
