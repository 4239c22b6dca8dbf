//! Every error at every call: whatever the host's kernel answers, and whenever, one flow is concerned.
//!
//! In: scripted lives (TCP both ways, past the link, UDP, ping, DNS, published ports), in which the n-th call
//! of each kind fails with each error that its man page names, once, or from then on for a minute; then random
//! lives with random faults by seed (`TAPGATE_TEST_LIVES` says how many, `TAPGATE_TEST_SEED` picks one). Out: a
//! failure that names the fault, when afterwards
//!
//! - something panicked, spun, or broke the stack's invariants (no flow without a deadline, no engine and no
//!   place in the queue without a flow);
//! - an end was told a lie, or not told;
//! - a flow beside it was disturbed, or a new one of any kind does not work;
//! - a flow or a socket is left.
#![allow(
    clippy::unwrap_used,
    reason = "a scenario that can not go on has failed"
)]

#[path = "../sim/actor.rs"]
mod actor;
#[path = "../sim/lab.rs"]
mod lab;
#[path = "../sim/life.rs"]
mod life;
#[path = "../sim/packets.rs"]
mod packets;
#[path = "../sim/plan.rs"]
mod plan;
#[path = "../sim/mod.rs"]
mod sim;

mod datagrams;
mod past_link;
mod seeds;
mod streams;
mod world;

use std::thread;

use tapgate::host::simulated::{Call, Fault};

use world::World;

/// A life whose course is the same each time, but for what fails.
struct Script {
    name: &'static str,
    /// What is there before anything fails.
    world: fn() -> World,
    /// What happens, whatever fails meanwhile.
    live: fn(&mut World),
    /// Calls that it must come to, or it is not what it seems.
    calls: &'static [Call],
}

/// How a fault was met, for a failure to name it.
struct Named(&'static str, Option<Fault>);

impl Drop for Named {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}: {:?}", self.0, self.1);
        }
    }
}

impl Script {
    /// Lives without a fault, which must be of all kinds of calls; gives how many there were.
    fn rehearse(&self) -> Vec<(Call, usize)> {
        let _named = Named(self.name, None);
        let mut world = (self.world)();
        world.count_calls();
        (self.live)(&mut world);
        let counts = Call::ALL.map(|call| (call, world.calls(call)));
        let missing = self.calls.iter().find(|call| {
            counts
                .iter()
                .any(|(counted, count)| counted == *call && *count == 0)
        });
        assert_eq!(missing, None, "a call that {} does not come to", self.name);
        world.is_complete();
        world.recovers();
        counts.into_iter().filter(|(_, count)| *count > 0).collect()
    }

    /// Lives once for each fault.
    fn fails_everywhere(&self) {
        let mut lives = 0;
        for (call, count) in self.rehearse() {
            for nth in 0..count {
                for &errno in call.errnos() {
                    self.fails(call, nth, errno, false);
                    lives += 1;
                    if call.can_last(errno) {
                        self.fails(call, nth, errno, true);
                        lives += 1;
                    }
                }
            }
        }
        println!("{}: {lives} lives", self.name);
    }

    fn fails(&self, call: Call, nth: usize, errno: i32, lasts: bool) {
        let fault = Fault {
            call,
            nth,
            errno,
            lasts,
        };
        let _named = Named(self.name, Some(fault));
        let mut world = (self.world)();
        world.fail(fault);
        (self.live)(&mut world);
        assert!(world.struck() > 0, "the fault was not met");
        if is_passing(call, errno) && !lasts {
            // Nothing has happened, but that it took a moment.
            world.is_complete();
        }
        world.recovers();
    }
}

/// A caller need only ask again.
fn is_passing(call: Call, errno: i32) -> bool {
    let moves = matches!(
        call,
        Call::Send
            | Call::Receive
            | Call::Fill
            | Call::Drain
            | Call::ReceiveDatagrams
            | Call::ReceiveEchoes
            | Call::Accept
    );
    moves && (errno == libc::EINTR || errno == libc::EAGAIN)
}
