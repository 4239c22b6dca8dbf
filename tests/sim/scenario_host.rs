//! The other half of a scenario: what happens at the host, the passing of time, and what must hold.
//!
//! [`World::turn`] is the event loop's turn; it looks at every frame, destination and number.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use tapgate::config::{Protocol, Publish};
use tapgate::flow::Turn;
use tapgate::host::simulated::{ConnectAnswer, SocketId};
use tapgate::host::{DatagramRole, Event, QueuedError, Token};
use tapgate::net::Duration;
use tapgate::net::emit::IcmpError;

use super::packets;
use super::{CLIENTS, Choices, GuestConnection, Outcome, Seen, World, client, filled};

/// Turns without a move of the clock after which the stack is taken to spin.
const MAX_TURNS: usize = 5_000;
/// Deadlines that may pass until everything is over.
const MAX_DEADLINES: usize = 20_000;
/// Everything is over after this time: the patience with a silent guest, and some.
const LONGEST: Duration = Duration::from_secs(5 * 3600);

const TCP_PORT: u16 = 8080;

impl World {
    // --- the host --------------------------------------------------------------------------------

    fn connection(&self, choices: &mut Choices<'_>) -> Option<SocketId> {
        let all = self.net.connections();
        (!all.is_empty()).then(|| all[all.len() - 1 - choices.below(all.len().min(8))])
    }

    fn datagram_socket(&self, choices: &mut Choices<'_>) -> Option<SocketId> {
        let open = self.net.open_datagram_sockets();
        (!open.is_empty()).then(|| choices.of(&open))
    }

    /// The server of a connection acts.
    pub(super) fn server(&mut self, choices: &mut Choices<'_>) {
        let Some(id) = self.connection(choices) else {
            return;
        };
        match choices.byte() % 10 {
            0..=2 => {
                let _ = self.net.server_write(id, &filled(choices.len()));
            }
            3 => {
                let _ = self.net.server_write(id, &filled(256 * 1024));
            }
            4 | 5 => self.seen.read += self.net.server_read(id, usize::MAX).len(),
            6 | 7 => self.net.server_shutdown(id),
            8 => self.net.server_reset(id),
            _ => self.net.server_pause(id, choices.chance(2)),
        }
    }

    /// A datagram, an answer or an echo reply comes to a socket.
    pub(super) fn datagram_arrives(&mut self, choices: &mut Choices<'_>) {
        let Some(socket) = self.datagram_socket(choices) else {
            return;
        };
        let asked = self.sent.iter().rev().find(|(by, ..)| *by == socket);
        match self.net.role(socket) {
            None => {
                let from = client(choices).ip();
                let len = choices.len();
                let seq = u16::from(choices.byte());
                self.net.deliver_echo(socket, from, seq, &filled(len));
            }
            Some(DatagramRole::Connected(peer)) => {
                let mut answer = asked.map_or_else(Vec::new, |(_, _, bytes)| bytes.clone());
                let kind = choices.byte();
                if let Some(flags) = answer.get_mut(2).filter(|_| kind & 3 != 0) {
                    *flags |= 0x80;
                }
                if let Some(id) = answer.get_mut(1).filter(|_| kind & 12 == 12) {
                    *id ^= 1;
                }
                answer.extend(filled(choices.len()));
                self.net.deliver(socket, peer, &answer);
            }
            Some(
                DatagramRole::Outbound { .. } | DatagramRole::Loopback | DatagramRole::Published(_),
            ) => {
                for _ in 0..=choices.byte() % 4 {
                    let from = client(choices);
                    self.net.deliver(socket, from, &filled(choices.len()));
                }
            }
        }
    }

    /// An error of the network concerns a socket.
    pub(super) fn network_reports(&mut self, choices: &mut Choices<'_>) {
        let Some(socket) = self.datagram_socket(choices) else {
            return;
        };
        let destination = client(choices);
        let reporter = choices.chance(2).then(|| client(choices).ip());
        let error = choices.of(&[
            IcmpError::PortUnreachable,
            IcmpError::FragmentationNeeded(1280),
            IcmpError::TimeExceeded,
            IcmpError::Raw(3, 9, 0),
            IcmpError::Raw(12, 0, 7 << 24),
        ]);
        let queued = QueuedError {
            error,
            reporter,
            destination,
            quoted: 0,
        };
        self.net
            .report_error(socket, queued, &filled(choices.len()));
    }

    pub(super) fn set_resolvers(&mut self, choices: &mut Choices<'_>) {
        let all: Vec<SocketAddr> = [[192, 0, 2, 53], [127, 0, 0, 53], [198, 51, 100, 53]]
            .map(|addr| SocketAddr::new(addr.into(), 53))
            .to_vec();
        let first = choices.below(4);
        self.net.set_resolvers(&all[first.min(all.len())..]);
    }

    pub(super) fn world_changes(&mut self, choices: &mut Choices<'_>) {
        match choices.byte() % 8 {
            0 => self.set_resolvers(choices),
            1 => self.net.fail_open(Some(24)),
            2 => self.net.fail_open(None),
            3 => self.net.fail_echo(Some(13)),
            4 => self.net.fail_echo(None),
            _ => self.net.answer_all(choices.of(&[
                ConnectAnswer::Accept,
                ConnectAnswer::Silent,
                ConnectAnswer::Fail(101),
                ConnectAnswer::FailLater(111),
                ConnectAnswer::FailLater(113),
            ])),
        }
    }

    /// A client of the host's comes to the published port.
    pub(super) fn client_comes(&mut self, choices: &mut Choices<'_>) {
        let to = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), TCP_PORT);
        for _ in 0..=choices.byte() % 3 {
            let _ = self.net.client_connect(to, client(choices));
        }
    }

    /// An event that comes late, or for nobody.
    pub(super) fn stray_event(&mut self, choices: &mut Choices<'_>) {
        let slot = u64::from(choices.byte() % 20);
        let generation = u64::from(choices.byte() % 4) << 32;
        let published = if choices.chance(4) { 1 << 63 } else { 0 };
        let bits = choices.byte();
        let event = Event {
            token: Token(published | generation | slot),
            readable: bits & 1 != 0,
            writable: bits & 2 != 0,
            hangup: bits & 4 != 0,
        };
        self.with_turn(|stack, turn| stack.handle_host(turn, event));
    }

    pub(super) fn publish(&mut self, protocol: Protocol) -> Outcome {
        let (host, guest) = match protocol {
            Protocol::Tcp => (TCP_PORT, 80),
            Protocol::Udp => (8081, 5000),
        };
        let rule = Publish {
            protocol,
            host: SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), host),
            guest: SocketAddr::new(packets::GUEST.into(), guest),
        };
        let id = self.stack.publish(&mut self.host, rule);
        self.published.push(id.map_err(|error| error.to_string())?);
        Ok(())
    }

    pub(super) fn publish_or_not(&mut self, choices: &mut Choices<'_>) -> Outcome {
        let goes = choices.chance(2) && !self.published.is_empty();
        if goes {
            let id = self.published.remove(choices.below(self.published.len()));
            return if self.stack.unpublish(id) {
                Ok(())
            } else {
                Err("a published port was not there".into())
            };
        }
        // Another UDP port may share the address here; a TCP port in use is an error.
        if self.published.len() < 4 && choices.chance(2) && self.publish(Protocol::Udp).is_err() {
            self.net.fail_open(None);
        }
        Ok(())
    }

    // --- time ------------------------------------------------------------------------------------

    /// From a microsecond to hours; every deadline in between is kept.
    pub(super) fn time_passes(&mut self, choices: &mut Choices<'_>) -> Outcome {
        let micros = 1_u64 << (choices.byte() % 34);
        let end = self.now + Duration::from_micros(micros);
        if micros > 60_000_000 {
            // Without descriptors a published port looks ten times a second, for as long as that is.
            self.net.fail_open(None);
        }
        for _ in 0..MAX_DEADLINES {
            let Some(next) = self.stack.poll_timeout().filter(|next| *next <= end) else {
                self.now = end;
                return Ok(());
            };
            self.now = self.now.max(next);
            self.turn()?;
        }
        Err(format!("{MAX_DEADLINES} deadlines in {micros} us"))
    }

    pub(super) fn next_deadline(&mut self) {
        if let Some(next) = self.stack.poll_timeout() {
            self.now = self.now.max(next);
        }
    }

    fn with_turn(
        &mut self,
        act: impl FnOnce(
            &mut tapgate::stack::Stack<tapgate::host::simulated::SimulatedHost>,
            &mut Turn<'_, tapgate::host::simulated::SimulatedHost>,
        ),
    ) {
        let mut turn = Turn {
            now: self.now,
            host: &mut self.host,
            tx: &mut self.tx,
        };
        act(&mut self.stack, &mut turn);
    }

    /// What the event loop does until nothing is left to do at this time.
    pub(super) fn turn(&mut self) -> Outcome {
        for _ in 0..MAX_TURNS {
            let events = self.net.take_events();
            let mut more = false;
            self.with_turn(|stack, turn| {
                for event in events {
                    stack.handle_host(turn, event);
                }
                stack.handle_timeout(turn);
                more = stack.poll_transmit(turn);
            });
            self.look()?;
            let due = self
                .stack
                .poll_timeout()
                .is_some_and(|next| next <= self.now);
            if !more && !due && !self.net.has_events() {
                return Ok(());
            }
        }
        Err(format!("spins at {}: {MAX_TURNS} turns", self.now))
    }

    // --- what must hold --------------------------------------------------------------------------

    fn look(&mut self) -> Outcome {
        self.stack.check()?;
        let flows = self.stack.flows();
        self.seen.most_flows = self.seen.most_flows.max(flows);
        if flows > usize::try_from(self.config.max_flows).unwrap_or(usize::MAX) {
            return Err(format!("{flows} flows"));
        }
        let frames: Vec<(Vec<u8>, bool)> = self
            .tx
            .frames()
            .map(|frame| {
                let partial = frame.offload.checksum.is_some();
                (frame.bytes().to_vec(), partial)
            })
            .collect();
        self.tx.clear();
        let mut complete = Vec::new();
        for (frame, partial) in frames {
            self.seen.to_guest += 1;
            self.frame_holds(&frame, partial)?;
            self.note_tcp(&frame);
            if !partial {
                complete.push(frame);
            }
        }
        // A full batch may cut the fragments of a datagram short.
        packets::read(&complete).map(drop).or_else(|error| {
            if error.starts_with("fragment") {
                Ok(())
            } else {
                Err(error)
            }
        })?;
        self.destinations_hold()
    }

    fn frame_holds(&self, frame: &[u8], partial: bool) -> Outcome {
        let arp = frame[12..14] == [8, 6] && frame.len() >= 42;
        let ip = frame[12..14] == [8, 0] && frame.len() >= 34;
        if frame[6..12] != packets::GATEWAY_MAC || !(arp || ip) {
            return Err(format!("a frame of no kind: {frame:?}"));
        }
        if ip && !partial && frame.len() - 14 > usize::from(self.config.mtu) {
            return Err(format!(
                "{} bytes over an MTU of {}",
                frame.len(),
                self.config.mtu
            ));
        }
        Ok(())
    }

    /// Learns from a segment to the guest what the guest's next one may say.
    fn note_tcp(&mut self, frame: &[u8]) {
        if frame.len() < 54 || frame[12..14] != [8, 0] || frame[23] != packets::TCP {
            return;
        }
        let word = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
        let long = |at: usize| u32::from(word(at)) << 16 | u32::from(word(at + 2));
        let remote = (Ipv4Addr::from(long(26)), word(34));
        let (from, flags) = (word(36), frame[47]);
        let data = frame.len() - 34 - usize::from(frame[46] >> 4) * 4;
        let controls = u32::from(flags & 1) + u32::from(flags >> 1 & 1);
        let known = self
            .connections
            .iter()
            .position(|known| known.from == from && known.remote == remote);
        let nth = known.unwrap_or_else(|| {
            self.connections.push(GuestConnection {
                from,
                remote,
                seq: 1000,
                ack: 0,
            });
            self.connections.len() - 1
        });
        let connection = &mut self.connections[nth];
        connection.ack = long(38)
            .wrapping_add(u32::try_from(data).unwrap_or(0))
            .wrapping_add(controls);
        if flags & 0x10 != 0 {
            connection.seq = long(42);
        }
        if self.connections.len() > 16 {
            self.connections.remove(0);
        }
    }

    /// No socket call names a destination that is forbidden.
    fn destinations_hold(&mut self) -> Outcome {
        for sent in self.net.take_sent() {
            self.seen.to_host += 1;
            let outbound = !matches!(
                self.net.role(sent.socket),
                Some(DatagramRole::Connected(_) | DatagramRole::Published(_))
            );
            if outbound && !self.allowed(sent.to.ip()) {
                return Err(format!("a datagram to {}", sent.to));
            }
            self.sent.push((sent.socket, sent.to, sent.payload));
            if self.sent.len() > 16 {
                self.sent.remove(0);
            }
        }
        let all = self.net.connections();
        for &id in &all[self.seen.connections..] {
            let remote = self.net.remote(id).ok_or("a connection to nowhere")?;
            // The published port's clients have the address they please.
            let comes_in = CLIENTS.contains(&remote.to_string().as_str());
            if !comes_in && remote.port() != 53 && !self.allowed(remote.ip()) {
                return Err(format!("a connection to {remote}"));
            }
        }
        self.seen.connections = all.len();
        Ok(())
    }

    fn allowed(&self, addr: IpAddr) -> bool {
        let IpAddr::V4(addr) = addr else { return false };
        let first = addr.octets()[0];
        let local = first == 127;
        let forbidden = first == 0 || first >= 224 || self.config.plan.contains(addr.into());
        if local {
            addr == Ipv4Addr::LOCALHOST && self.config.host_loopback
        } else {
            !forbidden
        }
    }

    // --- the end ---------------------------------------------------------------------------------

    /// The servers reset what they have, the guest is silent, and nothing may be left in the end.
    pub(super) fn end(mut self) -> Outcome<Seen> {
        self.net.fail_open(None);
        self.turn()?;
        for id in self.net.connections() {
            self.net.server_reset(id);
        }
        let end = self.now + LONGEST;
        for _ in 0..MAX_DEADLINES {
            self.turn()?;
            let Some(next) = self.stack.poll_timeout().filter(|next| *next <= end) else {
                break;
            };
            self.now = self.now.max(next);
        }
        let (flows, sockets) = (self.stack.flows(), self.net.open_sockets());
        if flows != 0 || sockets != self.published.len() {
            return Err(format!(
                "left at {}: {flows} flows, {sockets} sockets for {} published ports, next {:?}",
                self.now,
                self.published.len(),
                self.stack.poll_timeout()
            ));
        }
        for id in std::mem::take(&mut self.published) {
            self.stack.unpublish(id);
        }
        if self.net.open_sockets() != 0 || self.stack.poll_timeout().is_some() {
            return Err("something is left when all is over".into());
        }
        let counters = self.stack.counters();
        self.seen.flows_opened = counters.flows_opened;
        self.seen.forwarded = counters.forwarded;
        self.seen.answered = counters.answered;
        Ok(self.seen)
    }
}
