//! Pings of a guest to the outside, by the host's ICMP echo sockets (RFC 5508 section 3).
//!
//! Comes in: a guest's requests, readiness of host sockets. Goes out: replies and errors. Where the kernel
//! grants no such socket the guest hears "administratively prohibited", and the log says once what to do
//! about it. Replies are never made up.

use std::io::ErrorKind;
use std::net::SocketAddr;

use crate::flow::echo::EchoFlow;
use crate::flow::key::FlowKey;
use crate::flow::table::BegunBy;
use crate::flow::{Flow, Turn};
use crate::host::{EchoSocket, Host, QueuedError, Received, Token};
use crate::net::DropReason;
use crate::net::emit::{self, EchoReply, IcmpError};
use crate::net::parse::{Echo, Ip};

use super::counters::Disposition;
use super::guest::Original;
use super::mapping::{self, Verdict};
use super::{Stack, udp};

/// Inboxes full of replies that one socket may deliver in one turn.
const BUDGET: usize = 4;

/// Bytes of an ICMP echo header.
const HEADER: usize = 8;

impl<H: Host> Stack<H> {
    pub(super) fn guest_echo(
        &mut self,
        turn: &mut Turn<'_, H>,
        ip: &Ip<'_>,
        echo: &Echo<'_>,
    ) -> Disposition {
        if let Some(elsewhere) = self.share.of_first() {
            return elsewhere;
        }
        let to = match mapping::verdict(&self.config, SocketAddr::new(ip.dst, 0)) {
            Verdict::Host(to) => to.ip(),
            Verdict::Drop(reason) => return Disposition::Dropped(reason),
            Verdict::Unreachable(error) => return self.tell(turn, ip, error),
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
                Ok(token) => token,
                Err(error) => return self.tell(turn, ip, error),
            },
        };
        let (marks, back) = (self.marks_outside(ip), self.back(ip.wire));
        let Some(Flow::Echo(flow)) = self.table.get_mut(token) else {
            return Disposition::Dropped(DropReason::HostBusy);
        };
        // The guest may have another Ethernet address by now.
        flow.wire = back;
        let sent = flow.socket.send(to, echo.seq, echo.data, marks);
        self.table
            .set_deadline(token, EchoFlow::<H::Echo>::deadline(turn.now));
        if let Err(error) = &sent
            && self.has_lost_its_address(ip.src.is_ipv6(), error)
        {
            self.table.remove(token);
        }
        let sent = match sent {
            Err(error) if udp::is_too_big(&error) => Err(self.too_long(
                turn,
                |stack| match stack.table.get_mut(token) {
                    Some(Flow::Echo(flow)) => flow.socket.queued_error(&mut stack.scratch),
                    _ => None,
                },
                |stack, turn, queued| stack.report_echo(turn, token, queued),
            )),
            sent => sent.map_err(Into::into),
        };
        self.after_sending(turn, Original::of(ip), sent)
    }

    fn open_echo(
        &mut self,
        turn: &mut Turn<'_, H>,
        key: FlowKey,
        ip: &Ip<'_>,
        ident: u16,
    ) -> Result<Token, IcmpError> {
        let opened = self.begin_port(turn, |host, token| host.echo_open(token, ip.dst.is_ipv6()));
        let (token, socket) = opened.map_err(|error| {
            self.hint(&error);
            self.counters.flows_refused += 1;
            udp::told_of_no_socket(&error)
        })?;
        let flow = EchoFlow {
            socket,
            guest: ip.src,
            ident,
            wire: self.back(ip.wire),
            answered: false,
            failed: false,
        };
        let deadline = EchoFlow::<H::Echo>::deadline(turn.now);
        self.admit(token, key, Flow::Echo(flow), deadline);
        self.table.set_unanswered(turn.now, token, BegunBy::Guest);
        Ok(token)
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

    /// An echo socket has replies or errors.
    pub(super) fn echo_ready(&mut self, turn: &mut Turn<'_, H>, token: Token) {
        let mut unexplained = 0;
        for _ in 0..BUDGET {
            if !self.deliver_inbox(turn) {
                break;
            }
            let Some(Flow::Echo(flow)) = self.table.get_mut(token) else {
                return;
            };
            match flow.socket.recv(&mut self.inbox) {
                Ok(()) => self.inbox_owner = token,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock && !flow.failed => return,
                Err(error) => match flow.socket.queued_error(&mut self.scratch) {
                    Some(queued) => self.report_echo(turn, token, &queued),
                    None if error.kind() == ErrorKind::WouldBlock => {
                        flow.failed = false;
                        return;
                    }
                    None => unexplained += 1,
                },
            }
        }
        // A socket that fails without end is asked again when something comes.
        if unexplained < BUDGET {
            self.make_ready(token);
        }
    }

    /// Hands the first reply of the inbox to the guest; gives the number of replies.
    pub(super) fn deliver_echo(
        &mut self,
        turn: &mut Turn<'_, H>,
        token: Token,
        first: Received,
    ) -> usize {
        let id = self.datagram_id();
        let message = self.inbox.datagrams().next().map(|(_, message)| message);
        let header = message.and_then(<[u8]>::split_first_chunk::<HEADER>);
        let (Some(Flow::Echo(flow)), Some((header, data))) = (self.table.get_mut(token), header)
        else {
            return 1;
        };
        flow.answered = true;
        let from = SocketAddr::new(first.from.ip(), 0);
        let reply = EchoReply {
            src: mapping::seen_inside(&self.config, from, flow.guest).ip(),
            dst: flow.guest,
            ident: flow.ident,
            seq: u16::from_be_bytes([header[6], header[7]]),
            marks: udp::marks_inside(from.ip(), first.marks),
            data,
        };
        if !emit::echo_reply(turn.tx, flow.wire, self.config.mtu, reply, id) {
            self.counters.add_drops(DropReason::TransmitFull, 1);
        }
        self.table
            .set_deadline(token, EchoFlow::<H::Echo>::deadline(turn.now));
        1
    }

    /// Passes an error on to the guest whose request it concerns. The flow lives on (RFC 5508 REQ-6).
    fn report_echo(&mut self, turn: &mut Turn<'_, H>, token: Token, queued: &QueuedError) {
        let Some(Flow::Echo(flow)) = self.table.get(token) else {
            return;
        };
        let message = &self.scratch[..queued.quoted.min(udp::MAX_QUOTED)];
        let Some((header, data)) = message.split_first_chunk::<HEADER>() else {
            return;
        };
        let seq = u16::from_be_bytes([header[6], header[7]]);
        let to = mapping::seen_inside(&self.config, queued.destination, flow.guest).ip();
        if let Some(original) = emit::quoted_echo([flow.guest, to], flow.ident, seq, data) {
            self.pass_on(turn, flow.wire, queued, &original);
        }
    }
}
