//! The host's half of a scenario: what happens there, and the passing of time.
//!
//! [`World::turn`] is the event loop's turn; it looks at every frame, destination and number.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use tapgate::config::{Protocol, Publish, Splice};
use tapgate::flow::Turn;
use tapgate::host::simulated::{ConnectAnswer, SocketId};
use tapgate::host::{DatagramRole, Event, QueuedError, Token};
use tapgate::net::Duration;
use tapgate::net::emit::IcmpError;

use super::packets;
use super::{Choices, Outcome, World, client, filled};

/// Turns without a move of the clock after which the stack is taken to spin.
const MAX_TURNS: usize = 5_000;
/// Deadlines that may pass until everything is over.
pub(super) const MAX_DEADLINES: usize = 20_000;

const TCP_PORT: u16 = 8080;

/// Where the ports that lead to a guest of a family are published.
fn listened(six: bool, port: u16) -> SocketAddr {
    if six {
        SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port)
    } else {
        SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port)
    }
}

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
                DatagramRole::Outbound(_) | DatagramRole::Loopback(_) | DatagramRole::Published(_),
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
            IcmpError::TooBig(1280),
            IcmpError::TimeExceeded,
            IcmpError::Raw(3, 9, 0),
            IcmpError::Raw(12, 0, 7 << 24),
            IcmpError::HostUnreachable,
            IcmpError::BeyondScope,
            IcmpError::ProtocolUnreachable,
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
        let all = [
            "192.0.2.53:53",
            "127.0.0.53:53",
            "198.51.100.53:53",
            "[2001:db8::53]:53",
            "[::1]:53",
        ];
        let all: Vec<SocketAddr> = all.iter().filter_map(|text| text.parse().ok()).collect();
        let first = choices.below(6);
        self.net.set_resolvers(&all[first.min(all.len())..]);
    }

    pub(super) fn world_changes(&mut self, choices: &mut Choices<'_>) {
        match choices.byte() % 16 {
            0 => self.set_resolvers(choices),
            1 => self.net.fail_open(Some(24)),
            2 => self.net.fail_open(None),
            3 => self.net.fail_echo(Some(13)),
            4 => self.net.fail_echo(None),
            5 => {
                let of_thousand = choices.of(&[5, 50, 300]);
                self.net.fail_at_random(choices.byte().into(), of_thousand);
            }
            6 => self.net.heal(),
            8 => self.net.set_ipv6(choices.chance(2)),
            9 => {
                let limit = choices.of(&[None, Some(1000), Some(1472)]);
                self.net.limit_datagrams(limit);
            }
            10 => self.explain(choices),
            _ => self.net.answer_all(choices.of(&[
                ConnectAnswer::Accept,
                ConnectAnswer::Silent,
                ConnectAnswer::Fail(101),
                ConnectAnswer::FailLater(111),
                ConnectAnswer::FailLater(113),
            ])),
        }
    }

    /// From now on connects to an address fail, and the network says why.
    fn explain(&mut self, choices: &mut Choices<'_>) {
        let to = choices.of(&["[2001:db8::1]:80", "192.0.2.1:80", "192.0.2.53:53"]);
        let Ok(to) = to.parse() else { return };
        let reporter = choices.chance(2).then(|| client(choices).ip());
        let error = choices.of(&[IcmpError::HostUnreachable, IcmpError::Raw(1, 5, 0)]);
        let queued = QueuedError {
            error,
            reporter,
            destination: to,
            quoted: 0,
        };
        self.net.answer(to, ConnectAnswer::FailLater(113));
        self.net.explain_failure(to, queued);
    }

    /// A client of the host's comes to the published port.
    pub(super) fn client_comes(&mut self, choices: &mut Choices<'_>) {
        let to = listened(self.six, TCP_PORT);
        for _ in 0..=choices.byte() % 3 {
            let _ = self.net.client_connect(to, client(choices));
        }
    }

    /// An event that comes late, or for nobody.
    pub(super) fn stray_event(&mut self, choices: &mut Choices<'_>) {
        let slot = u64::from(choices.byte() % 20);
        let generation = u64::from(choices.byte() % 4) << 32;
        let published = match choices.below(5) {
            0 => 1 << 63,
            1 => 1 << 62,
            _ => 0,
        };
        let bits = choices.byte();
        let event = Event {
            token: Token(published | generation | slot),
            readable: bits & 1 != 0,
            writable: bits & 2 != 0,
            hangup: bits & 4 != 0,
            error: bits & 8 != 0,
            urgent: bits & 16 != 0,
        };
        self.with_turn(|stack, turn| stack.handle_host(turn, event));
    }

    pub(super) fn publish(&mut self, protocol: Protocol) -> Outcome {
        let (host, guest) = match protocol {
            Protocol::Tcp => (TCP_PORT, 80),
            Protocol::Udp => (8081, 5000),
        };
        let six = self.six && self.config.plan.subnet6().is_some();
        let inside = if six {
            packets::v6::GUEST.into()
        } else {
            packets::GUEST.into()
        };
        let rule = Publish {
            protocol,
            host: listened(six, host),
            guest: SocketAddr::new(inside, guest),
            splice: Splice::default(),
        };
        let id = self.stack.publish(&mut self.host, rule);
        self.published.push(id.map_err(|error| error.to_string())?);
        Ok(())
    }

    pub(super) fn publish_or_not(&mut self, choices: &mut Choices<'_>) -> Outcome {
        let goes = choices.chance(2) && !self.published.is_empty();
        if goes {
            let id = self.published.remove(choices.below(self.published.len()));
            return if self.stack.unpublish(id, None) {
                Ok(())
            } else {
                Err("a published port was not there".into())
            };
        }
        // Another UDP port may share the address here; a TCP port in use is an error.
        if self.published.len() < 6 && choices.chance(2) && self.publish(Protocol::Udp).is_err() {
            self.net.fail_open(None);
            self.net.heal();
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
            self.net.heal();
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
}
