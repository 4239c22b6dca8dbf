//! Pings of a guest to the outside, by the host's ICMP echo sockets (RFC 5508 section 3).
//!
//! Where the kernel grants no such socket the guest hears "administratively prohibited", and the
//! log says once what to do about it. Replies are never made up.

use std::io::ErrorKind;
use std::net::SocketAddr;

use crate::flow::echo::EchoFlow;
use crate::flow::key::FlowKey;
use crate::flow::{Flow, Turn};
use crate::host::{EchoSocket, Host, Token};
use crate::net::DropReason;
use crate::net::emit::{self, DatagramId, EchoReply, IcmpError};
use crate::net::parse::{Echo, Ip};

use super::Stack;
use super::counters::Disposition;
use super::mapping::{self, Verdict};

/// Replies that one socket may deliver in one turn.
const BUDGET: usize = 16;

impl<H: Host> Stack<H> {
    pub(super) fn guest_echo(
        &mut self,
        turn: &mut Turn<'_, H>,
        ip: &Ip<'_>,
        echo: &Echo<'_>,
    ) -> Disposition {
        let to = match mapping::verdict(&self.config, SocketAddr::new(ip.dst, 0)) {
            Verdict::Host(to) => to.ip(),
            Verdict::Drop(reason) => return Disposition::Dropped(reason),
            Verdict::Unreachable(error) => return self.echo_failed(turn, ip, error),
            Verdict::Resolver | Verdict::Refuse => {
                return Disposition::Dropped(DropReason::Destination);
            }
        };
        let key = FlowKey::Echo {
            link: ip.wire.link,
            guest: ip.src,
            ident: echo.ident,
        };
        let token = match self.table.find(&key) {
            Some(token) => token,
            None => match self.open_echo(turn, key, ip, echo.ident) {
                Some(token) => token,
                None => {
                    return self.echo_failed(turn, ip, IcmpError::AdministrativelyProhibited);
                }
            },
        };
        let Some(Flow::Echo(flow)) = self.table.get_mut(token) else {
            return Disposition::Dropped(DropReason::HostBusy);
        };
        let sent = flow.socket.send_to(to, echo.seq, echo.data);
        self.table
            .set_deadline(token, EchoFlow::<H::Echo>::deadline(turn.now));
        match sent {
            Ok(()) => Disposition::Forwarded,
            Err(error) => match super::udp::unreachable(&error) {
                Some(error) => self.echo_failed(turn, ip, error),
                None => Disposition::Dropped(DropReason::HostBusy),
            },
        }
    }

    fn echo_failed(
        &mut self,
        turn: &mut Turn<'_, H>,
        ip: &Ip<'_>,
        error: IcmpError,
    ) -> Disposition {
        self.tell(turn, ip, error);
        Disposition::Answered
    }

    fn open_echo(
        &mut self,
        turn: &mut Turn<'_, H>,
        key: FlowKey,
        ip: &Ip<'_>,
        ident: u16,
    ) -> Option<Token> {
        let Ok(token) = self.table.next_token() else {
            self.counters.flows_refused += 1;
            return None;
        };
        let socket = match turn.host.echo_open(token, ip.dst.is_ipv6()) {
            Ok(socket) => socket,
            Err(error) => {
                self.hint(&error);
                return None;
            }
        };
        let flow = EchoFlow {
            socket,
            guest: ip.src,
            ident,
            wire: self.back(ip.wire),
        };
        let deadline = EchoFlow::<H::Echo>::deadline(turn.now);
        self.admit(token, key, Flow::Echo(flow), deadline);
        Some(token)
    }

    /// Says once why pings go nowhere.
    fn hint(&mut self, error: &std::io::Error) {
        let denied = error.kind() == ErrorKind::PermissionDenied;
        if denied && !std::mem::replace(&mut self.echo_hint_given, true) {
            tracing::warn!(
                hint = "sysctl net.ipv4.ping_group_range='0 2147483647'",
                "ping to the outside needs a wider ping_group_range"
            );
        } else if !denied {
            tracing::debug!(%error, "no echo socket");
        }
    }

    /// An echo socket has replies.
    pub(super) fn echo_ready(&mut self, turn: &mut Turn<'_, H>, token: Token) {
        for _ in 0..BUDGET {
            if !turn.tx.has_room() {
                break;
            }
            let Some(Flow::Echo(flow)) = self.table.get_mut(token) else {
                return;
            };
            let (from, seq, len) = match flow.socket.recv_from(&mut self.scratch) {
                Ok(reply) => reply,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => continue,
            };
            let src = mapping::seen_inside(&self.config, SocketAddr::new(from, 0)).ip();
            let reply = EchoReply {
                src,
                dst: flow.guest,
                ident: flow.ident,
                seq,
                data: &self.scratch[..len],
            };
            let id = DatagramId(self.secrets.next_u16());
            emit::echo_reply(turn.tx, flow.wire, self.config.mtu, reply, id);
            self.table
                .set_deadline(token, EchoFlow::<H::Echo>::deadline(turn.now));
        }
        self.make_ready(token);
    }
}
