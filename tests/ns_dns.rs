//! DNS through tapgate on a real kernel, as an unprivileged user: the forwarder at 10.0.2.3 in front
//! of resolvers on the host's loopback.

mod support;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use support::attached::Net;
use support::dns::Resolver;
use support::sockets::Sockets;
use support::world::World;
use support::{LOOPBACK, SOON, at, timed, wait_until};

const FIRST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 11);
const SECOND: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 22);

fn loopback(last: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, last))
}

/// The addresses that `dig` in the guest finds for `name`.
fn look_up(net: &Net, name: &str, options: &[&str]) -> Vec<String> {
    let fixed = ["@10.0.2.3", "+short", "+tries=1", "+time=8", name];
    let finished = net.guest.run("dig", &[&fixed, options].concat());
    finished.output().lines().map(str::to_owned).collect()
}

#[track_caller]
fn assert_resolves(net: &Net, name: &str, options: &[&str], addr: Ipv4Addr) {
    assert_eq!(
        look_up(net, name, options),
        [addr.to_string()],
        "{name} {options:?}"
    );
}

#[test]
fn name_resolves_over_udp_and_over_tcp() {
    let world = World::new();
    let resolver = Resolver::start(&world, at(LOOPBACK, 53), FIRST);
    let net = Net::up_in(world, &[]);
    assert_resolves(&net, "over-udp.example", &[], FIRST);
    assert_resolves(&net, "over-tcp.example", &["+tcp"], FIRST);
    let questions = resolver.questions();
    let asked: Vec<_> = questions
        .iter()
        .map(|one| (one.name.as_str(), one.tcp))
        .collect();
    assert_eq!(
        asked,
        [("over-udp.example", false), ("over-tcp.example", true)]
    );
}

#[test]
fn dns_works_without_host_loopback() {
    let world = World::new();
    let _resolver = Resolver::start(&world, at(LOOPBACK, 53), FIRST);
    let net = Net::up_in(world, &["--no-host-loopback"]);
    assert_resolves(&net, "name.example", &[], FIRST);
    assert_resolves(&net, "name.example", &["+tcp"], FIRST);
}

#[test]
fn long_answer_comes_whole_with_edns() {
    let world = World::new();
    let resolver = Resolver::start(&world, at(LOOPBACK, 53), FIRST);
    let net = Net::up_in(world, &[]);
    // 60 addresses are about 1000 bytes; 200 are over 3000, which the guest's link has in fragments.
    assert_eq!(
        look_up(&net, "a60.example", &["+bufsize=1232", "+ignore"]).len(),
        60
    );
    assert_eq!(
        look_up(&net, "a200.example", &["+bufsize=4096", "+ignore"]).len(),
        200
    );
    assert!(resolver.questions().iter().all(|question| !question.tcp));
}

#[test]
fn truncated_answer_is_asked_again_over_tcp() {
    let world = World::new();
    let resolver = Resolver::start(&world, at(LOOPBACK, 53), FIRST);
    let net = Net::up_in(world, &[]);
    let shown = net
        .guest
        .run("dig", &["@10.0.2.3", "+noedns", "+ignore", "a60.example"])
        .output();
    assert!(
        shown.contains("flags: qr tc"),
        "the mark goes through: {shown}"
    );
    assert_eq!(look_up(&net, "a61.example", &["+noedns"]).len(), 61);
    assert_eq!(look_up(&net, "a300.example", &["+bufsize=1232"]).len(), 300);
    assert!(resolver.questions().iter().any(|question| question.tcp));
}

#[test]
fn several_questions_fit_one_connection() {
    let world = World::new();
    let _resolver = Resolver::start(&world, at(LOOPBACK, 53), FIRST);
    let net = Net::up_in(world, &[]);
    let arguments = [
        "@10.0.2.3",
        "+tcp",
        "+keepopen",
        "+short",
        "one.example",
        "two.example",
    ];
    let found = net.guest.run("dig", &arguments).output();
    assert_eq!(found.lines().count(), 2, "{found}");
}

#[test]
fn replaced_resolv_conf_counts_from_the_next_query() {
    let world = World::new();
    let _first = Resolver::start(&world, at(loopback(1), 53), FIRST);
    let _second = Resolver::start(&world, at(loopback(2), 53), SECOND);
    world.set_resolv_conf("nameserver 127.0.0.1\n");
    let net = Net::up_in(world, &[]);
    assert_resolves(&net, "before.example", &[], FIRST);
    net.world.set_resolv_conf("nameserver 127.0.0.2\n");
    assert_resolves(&net, "after.example", &[], SECOND);
    assert_resolves(&net, "after.example", &["+tcp"], SECOND);
    net.world.set_resolv_conf("nameserver 127.0.0.1\n");
    assert_resolves(&net, "again.example", &["+tcp"], FIRST);
}

#[test]
fn resolv_conf_written_in_place_counts_from_the_next_query() {
    let world = World::new();
    let _first = Resolver::start(&world, at(loopback(1), 53), FIRST);
    let _second = Resolver::start(&world, at(loopback(2), 53), SECOND);
    world.set_resolv_conf("nameserver 127.0.0.1\n");
    let net = Net::up_in(world, &[]);
    assert_resolves(&net, "before.example", &[], FIRST);
    // The same length, and perhaps the same second: neither is a sign of a change.
    std::fs::write(
        net.world.dir().join("etc/resolv.conf"),
        "nameserver 127.0.0.2\n",
    )
    .unwrap();
    assert_resolves(&net, "after.example", &[], SECOND);
}

#[test]
fn changed_link_or_its_target_counts_from_the_next_query() {
    let world = World::new();
    let _first = Resolver::start(&world, at(loopback(1), 53), FIRST);
    let _second = Resolver::start(&world, at(loopback(2), 53), SECOND);
    world.file("one.conf", "nameserver 127.0.0.1\n");
    world.file("two.conf", "nameserver 127.0.0.2\n");
    world.link("current.conf", "one.conf");
    world.link_resolv_conf("/mnt/current.conf");
    let net = Net::up_in(world, &[]);
    assert_resolves(&net, "before.example", &[], FIRST);
    net.world.link("current.conf", "two.conf");
    assert_resolves(&net, "link-in-the-middle.example", &[], SECOND);
    net.world.link_resolv_conf("/mnt/one.conf");
    assert_resolves(&net, "first-link.example", &[], FIRST);
    net.world.file("one.conf", "nameserver 127.0.0.2\n");
    assert_resolves(&net, "file-behind-it.example", &[], SECOND);
}

#[test]
fn second_resolver_answers_within_two_seconds_when_the_first_is_dead() {
    for silent in [true, false] {
        let world = World::new();
        // A socket that nobody reads is a resolver that says nothing; without one the kernel says
        // that nobody is there.
        let _dead = silent.then(|| {
            let silent = (
                world.udp(at(loopback(9), 53)),
                world.listen(at(loopback(9), 53)),
            );
            (silent.0.unwrap(), silent.1.unwrap())
        });
        let _second = Resolver::start(&world, at(loopback(2), 53), SECOND);
        world.set_resolv_conf("nameserver 127.0.0.9\nnameserver 127.0.0.2\n");
        let net = Net::up_in(world, &[]);
        let (took, ()) = timed(|| assert_resolves(&net, "name.example", &[], SECOND));
        assert!(
            took < Duration::from_secs(2),
            "silent: {silent}, took {took:?}"
        );
        let (took, ()) = timed(|| assert_resolves(&net, "name.example", &["+tcp"], SECOND));
        assert!(
            took < Duration::from_secs(2),
            "TCP goes to the one that answered: {took:?}"
        );
    }
}

#[test]
fn dead_resolver_is_used_again_when_it_lives() {
    let world = World::new();
    world.set_resolv_conf("nameserver 127.0.0.9\nnameserver 127.0.0.2\n");
    let second = Resolver::start(&world, at(loopback(2), 53), SECOND);
    let net = Net::up_in(world, &[]);
    assert_resolves(&net, "name.example", &[], SECOND);
    drop(second);
    let _first = Resolver::start(&net.world, at(loopback(9), 53), FIRST);
    wait_until("the first resolver to be asked again", SOON, || {
        (look_up(&net, "name.example", &[]) == [FIRST.to_string()]).then_some(())
    });
}

#[test]
fn no_resolver_at_all_is_an_answer_not_a_silence() {
    let world = World::new();
    world.set_resolv_conf("# nothing\n");
    let net = Net::up_in(world, &["--dns", "127.0.0.9"]);
    let fixed = ["@10.0.2.3", "+tries=1", "+time=10", "name.example"];
    let shown = net.guest.run("dig", &fixed);
    assert!(shown.stdout.contains("SERVFAIL"), "{shown:?}");
}

#[test]
fn dns_option_replaces_the_hosts_resolvers() {
    let world = World::new();
    let host = Resolver::start(&world, at(loopback(1), 53), FIRST);
    let _port = Resolver::start(&world, at(loopback(1), 5353), SECOND);
    let net = Net::up_in(world, &["--dns", "127.0.0.1:5353"]);
    assert_resolves(&net, "name.example", &[], SECOND);
    assert_resolves(&net, "name.example", &["+tcp"], SECOND);
    assert!(host.questions().is_empty(), "the host's own is not asked");
}

#[test]
fn dns_option_can_be_repeated() {
    let world = World::new();
    let _second = Resolver::start(&world, at(loopback(2), 53), SECOND);
    let net = Net::up_in(world, &["--dns", "127.0.0.9", "--dns", "127.0.0.2"]);
    assert_resolves(&net, "name.example", &[], SECOND);
}

#[test]
fn no_dns_leaves_the_resolvers_address_silent_or_refused() {
    let world = World::new();
    let resolver = Resolver::start(&world, at(LOOPBACK, 53), FIRST);
    let net = Net::up_in(world, &["--no-dns"]);
    let asked = ["@10.0.2.3", "+tries=1", "+time=1", "name.example"];
    for way in ["+notcp", "+tcp"] {
        let finished = net.guest.run("dig", &[&asked[..], &[way]].concat());
        assert!(!finished.status.success(), "{finished:?}");
    }
    assert!(resolver.questions().is_empty());
}

#[test]
fn every_query_has_its_own_source_port() {
    let world = World::new();
    let resolver = Resolver::start(&world, at(LOOPBACK, 53), FIRST);
    let net = Net::up_in(world, &[]);
    // One guest socket, so that a mapping by socket would show as one port.
    let names: Vec<String> = (0..24).map(|n| format!("name{n}.example")).collect();
    let guest = net.guest.udp_to(at(support::RESOLVER, 53)).unwrap();
    for (id, name) in (0_u16..).zip(&names) {
        guest.send(&query(id, name)).unwrap();
        let mut answer = [0; 512];
        let length = guest.recv(&mut answer).unwrap();
        assert!(
            length > 12 && answer[..2] == id.to_be_bytes(),
            "the guest's own id comes back"
        );
    }
    let questions = resolver.questions();
    let ports: Vec<u16> = questions
        .iter()
        .map(|question| question.from.port())
        .collect();
    let different: BTreeSet<u16> = ports.iter().copied().collect();
    assert!(different.len() >= 22, "of 24 queries: {ports:?}");
    let steps: BTreeSet<u16> = ports
        .windows(2)
        .map(|two| two[1].wrapping_sub(two[0]))
        .collect();
    assert!(steps.len() > 12, "not one after the other: {ports:?}");
}

/// A question for the address of `name`.
fn query(id: u16, name: &str) -> Vec<u8> {
    let mut message = [id, 0x0100, 1, 0, 0, 0].map(u16::to_be_bytes).concat();
    for label in name.split('.') {
        message.push(u8::try_from(label.len()).expect("small"));
        message.extend(label.bytes());
    }
    message.extend([0, 0, 1, 0, 1]);
    message
}
