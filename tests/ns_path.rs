//! What a guest sees of the path behind the host, on a real kernel as an unprivileged user: every
//! router, the path's MTU, and the bits of the IP header that travel along. The measure is the host:
//! each program and call runs there first. The errors of the path are in `ns_errors.rs`.

mod support;

use std::net::IpAddr;
use std::slice;

use support::process::{Running, run};
use support::routers::{Family, Hop, PATH_MTU, Routers};
use support::{GATEWAY, SOON, wait_until};

/// A call of the script, and a part of its outcome.
type Row = (String, String);

// --- routers ---------------------------------------------------------------------------------------

/// The gateway of the guest's network.
fn gateway(family: Family) -> IpAddr {
    match family {
        Family::V4 => GATEWAY,
        Family::V6 => "fd00::2".parse().expect("an address"),
    }
}

/// Runs a program on the host.
fn on_the_host(routers: &Routers, program: &str) -> String {
    let mut command = routers.world.command("sh");
    let shown = run(command.args(["-ec", program])).output();
    routers.forget_paths();
    shown
}

/// Runs a program in `tapgate run`.
fn inside(routers: &Routers, program: &str) -> String {
    let shown = routers.world.run_inside(&[], program);
    routers.forget_paths();
    shown
}

/// The path to the server: on the host, the gateway is not on it.
fn path(family: Family) -> [IpAddr; 4] {
    [gateway(family), family.r1(), family.r2(), family.server()]
}

/// The first address of each line that begins with the number of a hop. traceroute(1) and
/// tracepath(1) agree in this much.
fn hops(shown: &str) -> Vec<IpAddr> {
    let hop = |line: &str| {
        let mut words = line.split_whitespace();
        words
            .next()?
            .trim_end_matches([':', '?'])
            .parse::<u8>()
            .ok()?;
        words.find_map(|word| word.parse().ok())
    };
    let mut found: Vec<IpAddr> = shown.lines().filter_map(hop).collect();
    found.dedup();
    found
}

#[test]
fn traceroute_shows_gateway_and_every_router() {
    let routers = Routers::new();
    let traces = Family::BOTH.map(|family| {
        ["", "-I"].map(|how| (family, format!("traceroute {how} -n {}", family.server())))
    });
    for (family, program) in traces.as_flattened() {
        let shown = on_the_host(&routers, program);
        assert_eq!(hops(&shown), path(*family)[1..], "{program}: {shown}");
    }
    for (family, program) in traces.as_flattened() {
        let shown = inside(&routers, program);
        assert_eq!(hops(&shown), path(*family), "{program}: {shown}");
    }
}

// --- MTU -------------------------------------------------------------------------------------------

#[test]
fn tracepath_shows_every_router_and_the_mtu() {
    let routers = Routers::new();
    let program = |family: Family| format!("tracepath -n {}", family.server());
    let end = |hops: u8| format!("Resume: pmtu {PATH_MTU} hops {hops} back");
    for family in Family::BOTH {
        let shown = on_the_host(&routers, &program(family));
        assert_eq!(hops(&shown), path(family)[1..], "{shown}");
        assert!(shown.contains(&end(3)), "{shown}");
    }
    for family in Family::BOTH {
        let shown = inside(&routers, &program(family));
        assert_eq!(hops(&shown), path(family), "{shown}");
        assert!(shown.contains(&end(4)), "{shown}");
    }
}

/// The usual socket learns from an error and fragments from then on. A guest's interface may take
/// more than the host's, so that the gateway has something to tell before the routers have.
#[test]
fn datagram_above_the_paths_mtu_arrives_after_errors() {
    let routers = Routers::new();
    let (_server, port) = serve(&routers);
    let lengths = [1440, 3000, 60000];
    let calls = Family::BOTH.map(|family| {
        lengths.map(|length| {
            let call = format!("echo {} {port} size={length} count=4", family.server());
            (call, format!("length {length},"))
        })
    });
    assert_both(&routers, calls.as_flattened());
}

/// IPv4 only: in IPv6 no router fragments. 0 is IP_PMTUDISC_DONT.
#[test]
fn datagram_without_df_is_fragmented_on_the_way() {
    let routers = Routers::new();
    let (_server, port) = serve(&routers);
    let calls = [1440, 3000].map(|length| {
        let server = Family::V4.server();
        let call = format!("echo {server} {port} pmtu=0 size={length}");
        (call, format!("length {length},"))
    });
    assert_both(&routers, &calls);
}

/// Asserts a part of the outcome of each call, in both places.
#[track_caller]
fn assert_both(routers: &Routers, table: &[Row]) {
    for (call, expected) in table {
        let said = routers.calls_direct(slice::from_ref(call)).concat();
        assert!(said.contains(expected), "the host: {said}");
    }
    for (call, expected) in table {
        let said = routers.calls_inside(slice::from_ref(call)).concat();
        assert!(said.contains(expected), "inside: {said}");
    }
}

// --- headers ---------------------------------------------------------------------------------------

/// Starts the script's echo server; its port, the same for both families.
fn serve(routers: &Routers) -> (Running, u16) {
    let server = routers.start_at(&routers.server, "serve", &[]);
    let said = server.said().0;
    let port = said
        .split_whitespace()
        .nth(1)
        .and_then(|it| it.parse().ok());
    (server, port.expect("it says its port first"))
}

#[test]
fn traffic_class_arrives_both_ways() {
    let routers = Routers::new();
    let (_server, port) = serve(&routers);
    // Not ECT, ECT(1), ECT(0), CE; and expedited forwarding with ECT(0). The answers have CE.
    let calls = Family::BOTH.map(|family| {
        [0, 1, 2, 3, 0xba].map(|tos| {
            let call = format!("echo {} {port} tos={tos}", family.server());
            (call, tos)
        })
    });
    let calls = calls.as_flattened();
    // Two routers from the server, and one hop more inside.
    for (call, tos) in calls {
        let said = routers.calls_direct(slice::from_ref(call)).concat();
        let expected = format!("there tos {tos} ttl 62 length 8, back tos 3");
        assert!(said.contains(&expected), "the host: {said}");
    }
    for (call, tos) in calls {
        let said = routers.calls_inside(slice::from_ref(call)).concat();
        let expected = format!("there tos {tos} ttl 61 length 8, back tos 3");
        assert!(said.contains(&expected), "inside: {said}");
    }
}

#[test]
fn hop_limit_of_the_caller_arrives_less_one() {
    let routers = Routers::new();
    let (_server, port) = serve(&routers);
    // Inside, the script adds the gateway's hop.
    let calls = Family::BOTH.map(|family| {
        [3, 100, 254].map(|hops: u8| {
            let call = format!("echo {} {port} hops={hops}", family.server());
            (call, format!("ttl {} length", hops - 2))
        })
    });
    assert_both(&routers, calls.as_flattened());
}

#[test]
fn df_is_on_the_wire_what_the_guest_makes_it() {
    let routers = Routers::new();
    let (_server, port) = serve(&routers);
    let server = Family::V4.server();
    // DONT, WANT, DO, PROBE.
    let calls: Vec<String> = (0..4)
        .map(|mode| format!("echo {server} {port} pmtu={mode}"))
        .collect();
    let expected = |ttl: u8| [0, 1, 1, 1].map(|df| format!("v4 tos 0 ttl {ttl} df {df} length 36"));

    let watcher = watch(&routers, &routers.r1, port);
    routers.calls_direct(&calls);
    assert_eq!(seen(&watcher, calls.len()), expected(64), "the host");
    drop(watcher);

    let watcher = watch(&routers, &routers.r1, port);
    routers.calls_inside(&calls);
    assert_eq!(seen(&watcher, calls.len()), expected(63), "inside");
}

/// Starts to watch what arrives at a hop for a port.
fn watch(routers: &Routers, hop: &Hop, port: u16) -> Running {
    routers.start_at(hop, "watch", &["down0", &port.to_string()])
}

/// What a watcher saw, once it has seen `count` packets.
fn seen(watcher: &Running, count: usize) -> Vec<String> {
    wait_until(&format!("{count} packets"), SOON, || {
        let said = watcher.said().0;
        let lines: Vec<String> = said.lines().skip(1).map(str::to_owned).collect();
        (lines.len() >= count).then_some(lines)
    })
}
