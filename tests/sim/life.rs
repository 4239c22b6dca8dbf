//! The life of one connection, from its opening to the verdict about it.
//!
//! In: a [`Plan`], a [`Sim`], and faults of the host's calls, where a test has planned some. Out: what both
//! ends did and saw, and whether one of them was told a lie ([`Life::judge`]).
#![allow(
    clippy::unwrap_used,
    reason = "a scenario that can not go on has failed"
)]

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::State;
use tapgate::config::{Config, Protocol, Publish, Splice};
use tapgate::host::simulated::{ConnectAnswer, SocketId};
use tapgate::net::{Duration, Instant};

use crate::actor::{Actor, GuestEnd, HostEnd};
use crate::plan::{End, Opening, Plan};
use crate::sim::{Faults, Random, Sim};

/// Longer than the slowest life (88 bytes a segment, one in ten lost) and then any wait of the stack's: keep-alive and
/// silence of a guest that is gone.
const LONGEST: Duration = Duration::from_secs(8 * 3600);

/// A host whose calls fail is well again after this time.
const FAULTS_LAST: Duration = Duration::from_secs(300);

/// Some ten times what the longest life takes.
const MOST_STEPS: usize = 200_000;

/// A reset is told within this time on a link without faults.
const PROMPT: Duration = Duration::from_secs(1);

/// The guest probes an idle connection after this time, so that it learns of a RST that was lost.
const GUEST_KEEPALIVE: Duration = Duration::from_secs(25);

/// One connection, or the attempt at one, and who takes part.
#[derive(Debug)]
pub(crate) struct Life {
    pub(crate) plan: Plan,
    /// The published port.
    pub(crate) port: Option<usize>,
    /// The guest's socket, until the guest forgets it.
    pub(crate) socket: Option<SocketHandle>,
    /// The guest, once it has a connection.
    pub(crate) guest: Option<Actor>,
    /// The guest waited for one in vain.
    pub(crate) gave_up: bool,
    /// Connections at the host that were not accepted yet, and when they will be.
    pub(crate) waiting: Vec<(Instant, SocketId)>,
    /// The host's peers: one, or several where the guest had to ask again.
    pub(crate) peers: Vec<(SocketId, Actor)>,
    pub(crate) connections: usize,
    pub(crate) steps: usize,
    /// Flows and sockets that others have.
    others: (usize, usize),
    /// An error of the host's may have ended it.
    pub(crate) disturbed: bool,
}

impl Life {
    /// A life from its beginning to its end, which must come, with nothing left behind and nobody deceived;
    /// `of_thousand` calls of the host's fail by chance. The seed is for everything but the plan, and with it
    /// come the choices of the link.
    pub(crate) fn whole(plan: Plan, (seed, link): (u64, Random), of_thousand: u64) -> (Self, Sim) {
        let config = Config {
            mtu: plan.mtu,
            max_buffer_memory: plan.buffer_memory,
            ..Config::default()
        };
        let guest = (plan.kind, plan.addresses.guest.ip());
        let mut sim = Sim::shared(plan.workers, guest, seed, config, plan.faults);
        sim.random = link;
        let mut life = Self::begin(plan, &mut sim);
        if of_thousand > 0 {
            sim.net.fail_at_random(seed, of_thousand);
        }
        let ends = sim.run(LONGEST, |sim| {
            if sim.clock.now() > Instant::ZERO + FAULTS_LAST {
                sim.net.heal();
            }
            life.step(sim)
        });
        assert!(
            ends,
            "no end by {}: {} flows, {} sockets, guest {:?}, {life:?}",
            sim.clock.now(),
            sim.flows(),
            sim.net.open_sockets(),
            life.socket.map(|handle| sim.socket(handle).state()),
        );
        if let Some(port) = life.port {
            assert!(sim.stack.unpublish(port, None));
        }
        assert_eq!(sim.net.open_sockets(), 0, "sockets are left");
        life.disturbed = sim.net.faults_struck() > 0;
        let verdict = life.judge(&sim);
        assert!(
            verdict.is_ok(),
            "{verdict:?} at {}; resets {:?}; {life:?}",
            sim.clock.now(),
            sim.resets
        );
        (life, sim)
    }

    pub(crate) fn begin(plan: Plan, sim: &mut Sim) -> Self {
        let mut life = Self {
            plan,
            port: None,
            socket: None,
            guest: None,
            gave_up: false,
            waiting: Vec::new(),
            peers: Vec::new(),
            connections: sim.net.connections().len(),
            steps: 0,
            others: (sim.flows(), sim.net.open_sockets()),
            disturbed: false,
        };
        sim.net.set_socket_buffer(plan.host_buffer);
        match plan.opening {
            Opening::Out(answer) => life.connect(sim, answer),
            Opening::OutLate(_) => life.connect(sim, ConnectAnswer::Silent),
            Opening::In(client) => {
                let port = plan.addresses.guest.port();
                life.socket = Some(sim.listen_with(port, plan.guest_buffer));
                life.publish(sim, client);
            }
            Opening::InRefused(client) => life.publish(sim, client),
            Opening::InAbsent(client) => {
                sim.cut_link();
                life.publish(sim, client);
            }
        }
        if let Some(handle) = life.socket {
            let socket = sim.socket(handle);
            socket.set_keep_alive(Some(GUEST_KEEPALIVE));
        }
        life
    }

    fn connect(&mut self, sim: &mut Sim, answer: ConnectAnswer) {
        sim.net.answer_all(answer);
        let server = self.plan.addresses.server.to_string();
        self.socket = Some(sim.connect_with(&server, self.plan.guest_buffer));
    }

    fn publish(&mut self, sim: &mut Sim, client: std::net::SocketAddr) {
        let rule = Publish {
            protocol: Protocol::Tcp,
            host: self.plan.addresses.published,
            guest: self.plan.addresses.guest,
            splice: Splice::default(),
        };
        self.port = sim.with_stack(|stack, turn| stack.publish(turn.host, rule).ok());
        let came = sim.net.client_connect(rule.host, client);
        assert_eq!(came.is_some(), self.port.is_some(), "the port is open");
    }

    /// Lets everyone act; true when all is over.
    pub(crate) fn step(&mut self, sim: &mut Sim) -> bool {
        let now = sim.clock.now();
        self.steps += 1;
        assert!(self.steps < MOST_STEPS, "it goes in circles at {now}");
        self.meet(sim, now);
        let mut wakes = vec![self.keep_outage(sim, now)];
        for (id, peer) in &mut self.peers {
            let mut end = HostEnd {
                net: &sim.net,
                id: *id,
            };
            peer.act(now, &mut end);
            wakes.push(peer.wake(now, &mut end));
        }
        wakes.push(self.guest_acts(sim, now));
        wakes.extend(self.waiting.iter().map(|(at, _)| Some(*at)));
        sim.wake = wakes.into_iter().flatten().min();
        self.is_over(sim)
    }

    /// Connections appear at the host.
    fn meet(&mut self, sim: &Sim, now: Instant) {
        for id in sim.net.connections().into_iter().skip(self.connections) {
            self.connections += 1;
            match self.plan.opening {
                Opening::OutLate(time) => self.waiting.push((now + time, id)),
                Opening::Out(ConnectAnswer::Accept)
                | Opening::In(_)
                | Opening::InRefused(_)
                | Opening::InAbsent(_) => self
                    .peers
                    .push((id, Actor::new(self.plan.host, false, now))),
                Opening::Out(
                    ConnectAnswer::Fail(_) | ConnectAnswer::FailLater(_) | ConnectAnswer::Silent,
                ) => {}
            }
        }
        let due = |waiting: &(Instant, SocketId)| waiting.0 <= now;
        for (_, id) in self.waiting.extract_if(.., |waiting| due(waiting)) {
            if !sim.net.is_closed(id) {
                sim.net.server_answers(id, None);
                self.peers
                    .push((id, Actor::new(self.plan.host, false, now)));
            }
        }
    }

    /// Takes the link down and up again; gives the time of the next change.
    fn keep_outage(&self, sim: &mut Sim, now: Instant) -> Option<Instant> {
        let (from, time) = self.plan.outage?;
        if sim.faults.loss == 100 && !self.is_down(now) && !self.is_cut() {
            sim.faults = self.plan.faults;
        } else if self.is_down(now) {
            sim.faults.loss = 100;
        }
        let changes = [Instant::ZERO + from, Instant::ZERO + from + time];
        changes.into_iter().find(|change| *change > now)
    }

    fn is_down(&self, now: Instant) -> bool {
        self.plan.outage.is_some_and(|(from, time)| {
            now >= Instant::ZERO + from && now < Instant::ZERO + from + time
        })
    }

    /// For good.
    fn is_cut(&self) -> bool {
        let vanished = |guest: &Actor| guest.ended == Some(End::Vanish);
        self.guest.as_ref().is_some_and(vanished)
            || matches!(self.plan.opening, Opening::InAbsent(_))
    }

    fn guest_acts(&mut self, sim: &mut Sim, now: Instant) -> Option<Instant> {
        let handle = self.socket?;
        if self.guest.is_none() {
            let state = sim.socket(handle).state();
            match state {
                State::Closed => return None,
                State::Listen | State::SynSent | State::SynReceived => {
                    return self.guest_waits(sim, now, handle);
                }
                State::Established
                | State::FinWait1
                | State::FinWait2
                | State::CloseWait
                | State::Closing
                | State::LastAck
                | State::TimeWait => self.guest = Some(Actor::new(self.plan.guest, true, now)),
            }
        }
        let guest = self.guest.as_mut()?;
        let mut end = GuestEnd { sim, handle };
        guest.act(now, &mut end);
        if guest.ended == Some(End::Forget) {
            self.socket = None;
        }
        guest.wake(now, &mut end)
    }

    /// The guest has no connection yet: it gives up in time, or at an ICMP error.
    fn guest_waits(
        &mut self,
        sim: &mut Sim,
        now: Instant,
        handle: SocketHandle,
    ) -> Option<Instant> {
        let until = Instant::ZERO + self.plan.patience;
        if now < until && sim.received.is_empty() {
            return Some(until);
        }
        self.gave_up = true;
        sim.socket(handle).abort();
        None
    }

    fn is_over(&self, sim: &mut Sim) -> bool {
        let at_rest = self.is_cut()
            || self.socket.is_none_or(|handle| {
                let state = sim.socket(handle).state();
                matches!(state, State::Closed | State::Listen | State::TimeWait)
            });
        at_rest
            && self.guest.as_ref().is_none_or(Actor::is_over)
            && self.waiting.is_empty()
            && self.peers.iter().all(|(_, peer)| peer.is_over())
            && sim.flows() == self.others.0
            && sim.net.open_sockets() == self.others.1 + usize::from(self.port.is_some())
            && sim.is_quiet()
    }

    /// What the records of both ends say about each other.
    pub(crate) fn judge(&mut self, sim: &Sim) -> Result<(), String> {
        for (id, peer) in &mut self.peers {
            peer.finish(&mut HostEnd {
                net: &sim.net,
                id: *id,
            });
        }
        let hold = |holds: bool, what: &str| if holds { Ok(()) } else { Err(what.to_owned()) };
        let Some(guest) = &self.guest else {
            return self.judge_without_guest(sim, hold);
        };
        let [(id, host)] = &self.peers[..] else {
            return self.judge_reconnected(guest, hold);
        };
        hold(ended_in_order(guest, host), "the guest saw an end too soon")?;
        hold(ended_in_order(host, guest), "the host saw an end too soon")?;
        if self.disturbed {
            // Who has heard of it is not alone with that.
            let guest_knows = guest.gone || guest.saw_reset || (guest.saw_end && guest.shut);
            hold(!host.saw_reset || guest_knows, "the guest missed a fault")?;
            let host_knows = host.gone || host.saw_reset || (host.saw_end && host.shut);
            hold(!guest.saw_reset || host_knows, "the host missed a fault")?;
        } else if !guest.gone && !host.gone {
            let all = host.received == guest.sent && guest.received == host.sent;
            hold(
                all && guest.saw_end && host.saw_end,
                "an orderly life lost something",
            )?;
            hold(!host.saw_reset, "the host saw a reset that nobody sent")?;
            // The last acknowledgement of all may be lost until nobody remembers the connection.
            let late =
                |state: &State| matches!(state, State::LastAck | State::Closing | State::TimeWait);
            let resets = sim.resets.iter().all(|(_, state)| late(state));
            hold(resets, "the guest saw a reset that nobody sent")?;
        }
        // Who has seen and sent the end of a stream each need not be told of anything.
        let guest_knows = guest.gone || guest.saw_reset || (guest.saw_end && guest.shut);
        let host_knows = host.gone || host.saw_reset || (host.saw_end && host.shut);
        hold(!host.gone || guest_knows, "the guest missed a reset")?;
        hold(!guest.gone || host_knows, "the host missed a reset")?;
        // Which error a fault hides is not known before the other end speaks up.
        let prompt = sim.net.is_broken(*id) || self.is_prompt(guest, host);
        hold(prompt, "a reset was told late")?;
        let lost_up = guest.acknowledged > host.received;
        hold(!lost_up || guest_knows, "acknowledged bytes were lost")?;
        let lost_down = host.sent > guest.received;
        hold(!lost_down || host_knows, "bytes for the guest were lost")
    }

    /// Where nothing is lost on the way, a reset is told at once, and not only when the other end speaks
    /// up; but behind what a slow guest has yet to read.
    fn is_prompt(&self, guest: &Actor, host: &Actor) -> bool {
        let sound = self.plan.faults == Faults::default() && self.plan.outage.is_none();
        let silent = matches!(guest.ended, Some(End::Forget | End::Vanish));
        let (Some(here), Some(there)) = (guest.lost_at, host.lost_at) else {
            return true;
        };
        let apart = here.max(there) - here.min(there);
        !sound || silent || !guest.is_swift() || apart < PROMPT
    }

    /// The guest never had a connection.
    fn judge_without_guest(
        &self,
        sim: &Sim,
        hold: impl Fn(bool, &str) -> Result<(), String>,
    ) -> Result<(), String> {
        for (_, host) in &self.peers {
            hold(host.received == 0, "bytes came from nowhere")?;
            hold(host.gone || host.saw_reset, "the host missed a refusal")?;
        }
        let knows = self.gave_up || !sim.resets.is_empty() || self.socket.is_none();
        // A guest that listens need not know of clients that did not get that far.
        let lossy = self.plan.faults != Faults::default() || self.plan.outage.is_some();
        let unheard = (self.disturbed || lossy) && matches!(self.plan.opening, Opening::In(_));
        let left = |host: &Actor| host.gone || (unheard && host.saw_reset);
        let left = self.peers.iter().all(|(_, host)| left(host));
        hold(knows || left, "the guest missed a refusal")
    }

    /// The guest had to ask more than once: which of its peers was the last is not clear.
    fn judge_reconnected(
        &self,
        guest: &Actor,
        hold: impl Fn(bool, &str) -> Result<(), String>,
    ) -> Result<(), String> {
        let alone = |host: &Actor| host.received == 0;
        let busy = self.peers.iter().filter(|(_, host)| !alone(host)).count();
        hold(busy <= 1, "two connections got the guest's bytes")?;
        let some = self
            .peers
            .iter()
            .any(|(_, host)| ended_in_order(guest, host));
        hold(some, "the guest saw an end too soon")?;
        let all = self
            .peers
            .iter()
            .all(|(_, host)| alone(host) || ended_in_order(host, guest));
        hold(all, "the host saw an end too soon")
    }
}

/// An end of stream that `reader` saw, if it saw one, came after everything that `writer` had sent.
fn ended_in_order(reader: &Actor, writer: &Actor) -> bool {
    !reader.saw_end || (writer.shut && reader.received == writer.sent)
}
