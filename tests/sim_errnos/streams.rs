//! TCP over the link: connections of the guest, and of a published port's clients, judged as in `sim_lives`.

use smoltcp::socket::tcp::State;
use tapgate::config::Protocol;
use tapgate::host::simulated::{Call, ConnectAnswer};
use tapgate::net::Duration;

use crate::Script;
use crate::lab::secs;
use crate::life::Life;
use crate::plan::{End, Opening, Pace, Plan, Side, When, addresses};
use crate::sim::{Faults, LinkKind};
use crate::world::{TCP_SERVICE, UDP_SERVICE, World, answer, query};

/// A host that fails without end is well again after this time.
const LASTS: Duration = Duration::from_secs(60);
const LONGEST: Duration = Duration::from_secs(4 * 3600);

/// Six kilobytes each way, more than the host's buffers hold.
fn side(when: When) -> Side {
    let pace = Pace {
        most: 3000,
        every: Duration::ZERO,
    };
    Side {
        total: 6000,
        write: pace,
        read: pace,
        pause: None,
        end: End::Close,
        when,
    }
}

fn plan(opening: Opening, guest: When, host: When) -> Plan {
    Plan {
        addresses: addresses(false),
        opening,
        kind: LinkKind::default(),
        workers: 1,
        faults: Faults::default(),
        outage: None,
        mtu: 1500,
        buffer_memory: 256 << 20,
        guest_buffer: 4096,
        host_buffer: 2000,
        patience: secs(30),
        guest: side(guest),
        host: side(host),
    }
}

/// Lives a planned life to its end, and judges it.
fn follow(world: &mut World, plan: Plan) {
    let mut life = Life::begin(plan, &mut world.lab.0);
    let began = world.lab.0.clock.now();
    let ends = {
        let (lab, life) = (&mut world.lab.0, &mut life);
        lab.run(LONGEST, |sim| {
            if sim.clock.now() > began + LASTS {
                sim.net.heal();
            }
            life.step(sim)
        })
    };
    assert!(ends, "no end: {life:?}");
    world.lab.0.wake = None;
    world.heal();
    if let Some(port) = life.port {
        assert!(world.lab.0.stack.unpublish(port, None));
    }
    let whole = |actor: &crate::actor::Actor| actor.shut && actor.saw_end && !actor.saw_reset;
    let one = life.peers.iter().filter(|(_, host)| whole(host)).count() == 1;
    world.complete = one && life.guest.as_ref().is_some_and(whole);
    life.disturbed = world.struck() > 0 && !world.complete;
    let verdict = life.judge(&world.lab.0);
    assert!(verdict.is_ok(), "{verdict:?}: {life:?}");
}

const STREAM: &[Call] = &[Call::Send, Call::Receive, Call::Shutdown];
const OUT: &[Call] = &[
    Call::Connect,
    Call::Outcome,
    Call::Send,
    Call::Receive,
    Call::Shutdown,
];
const IN: &[Call] = &[
    Call::Accept,
    Call::WatchTcp,
    Call::Send,
    Call::Receive,
    Call::Shutdown,
];

#[test]
fn connection_of_the_guest_that_the_guest_ends_first() {
    Script {
        name: "out, guest first",
        world: World::new,
        live: |world| {
            let opening = Opening::Out(ConnectAnswer::Accept);
            follow(world, plan(opening, When::AllSent, When::OtherEnded));
        },
        calls: OUT,
    }
    .fails_everywhere();
}

#[test]
fn connection_of_the_guest_that_the_host_ends_first() {
    Script {
        name: "out, host first",
        world: World::new,
        live: |world| {
            let opening = Opening::OutLate(Duration::from_millis(300));
            follow(world, plan(opening, When::OtherEnded, When::AllSent));
        },
        calls: OUT,
    }
    .fails_everywhere();
}

#[test]
fn bulk_that_stays_with_the_host_until_the_guest_has_it() {
    Script {
        name: "bulk",
        world: World::of_bulk,
        live: |world| {
            let opening = Opening::Out(ConnectAnswer::Accept);
            let mut plan = plan(opening, When::OtherEnded, When::AllSent);
            plan.host.total = 300_000;
            plan.host.write.most = 100_000;
            plan.host.write.every = Duration::from_millis(5);
            plan.guest.read.most = 100_000;
            plan.guest_buffer = 128 * 1024;
            plan.host_buffer = 1 << 20;
            follow(world, plan);
        },
        calls: &[Call::BeginPeeking, Call::Peek, Call::Discard],
    }
    .fails_everywhere();
}

#[test]
fn connection_that_is_half_closed_for_long() {
    Script {
        name: "half-closed",
        world: World::new,
        live: |world| {
            let opening = Opening::Out(ConnectAnswer::Accept);
            let mut plan = plan(opening, When::AllSent, When::AllSent);
            plan.host.write.every = Duration::from_secs(5);
            plan.host.write.most = 2000;
            follow(world, plan);
        },
        calls: STREAM,
    }
    .fails_everywhere();
}

#[test]
fn connection_of_a_published_port() {
    for (name, guest, host) in [
        ("in, guest first", When::AllSent, When::OtherEnded),
        ("in, host first", When::OtherEnded, When::AllSent),
    ] {
        let live: fn(&mut World) = if guest == When::AllSent {
            |world| {
                let client = addresses(false).clients[0];
                follow(
                    world,
                    plan(Opening::In(client), When::AllSent, When::OtherEnded),
                );
            }
        } else {
            |world| {
                let client = addresses(false).clients[0];
                follow(
                    world,
                    plan(Opening::In(client), When::OtherEnded, When::AllSent),
                );
            }
        };
        assert!(host != guest);
        Script {
            name,
            world: World::new,
            live,
            calls: IN,
        }
        .fails_everywhere();
    }
}

#[test]
fn port_that_is_published_and_taken_back() {
    Script {
        name: "publish",
        world: World::new,
        live: |world| {
            let tcp = world.publish(Protocol::Tcp, "0.0.0.0:90", TCP_SERVICE);
            let udp = world.publish(Protocol::Udp, "0.0.0.0:91", UDP_SERVICE);
            world.lab.wait(secs(1));
            world.complete = tcp.is_ok() && udp.is_ok();
            for id in [tcp, udp].into_iter().flatten() {
                world.unpublish(id);
            }
        },
        calls: &[Call::Listen, Call::OpenUdp, Call::WatchUdp],
    }
    .fails_everywhere();
}

/// A query over TCP by way of the gateway's resolver.
fn query_over_tcp(world: &mut World) {
    let before = world.lab.0.net.connections().len();
    let handle = world.lab.0.connect("10.0.2.3:53");
    world.until(30, |sim| {
        !matches!(sim.socket(handle).state(), State::SynSent)
    });
    let question = query(5);
    let len = u8::try_from(question.len()).unwrap();
    let framed = [&[0, len], &question[..]].concat();
    let _ = world.lab.0.socket(handle).send_slice(&framed);
    let (mut asked, mut told) = (Vec::new(), Vec::new());
    world.until(30, |sim| {
        for id in sim.net.connections().into_iter().skip(before) {
            let bytes = sim.net.server_read(id, usize::MAX);
            if !bytes.is_empty() {
                asked.extend(bytes);
                if asked == framed {
                    let reply = answer(&question);
                    let reply = [&[0, len], &reply[..]].concat();
                    let _ = sim.net.server_write(id, &reply);
                }
            }
        }
        let _ = sim.socket(handle).recv(|bytes| {
            told.extend(bytes.iter());
            (bytes.len(), ())
        });
        told.len() >= framed.len()
    });
    let expected = [&[0, len], &answer(&question)[..]].concat();
    assert!(expected.starts_with(&told), "the answer, or less");
    assert!(framed.starts_with(&asked), "the query, or less");
    world.complete = told == expected;
    world.lab.0.socket(handle).close();
    for id in world.lab.0.net.connections().into_iter().skip(before) {
        world.lab.0.net.server_shutdown(id);
    }
    world.until(5, |_| false);
    world.heal();
}

#[test]
fn query_to_the_resolver_over_tcp() {
    Script {
        name: "DNS over TCP",
        world: World::new,
        live: query_over_tcp,
        calls: OUT,
    }
    .fails_everywhere();
}
