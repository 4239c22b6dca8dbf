//! TCP between a guest and the host: which segment belongs to which flow, and how flows begin.
//!
//! Comes in: segments, host events. Goes out: flows in the table; a RST or an ICMP error where
//! there is none. Moving bytes is `flow/tcp.rs`'s.

use std::borrow::Cow;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::sync::Arc;

use crate::config::Timeouts;
use crate::flow::key::{FlowKey, Kind};
use crate::flow::named_stream::{NamedStream, Stream};
use crate::flow::query::ATTEMPT;
use crate::flow::table::BegunBy;
use crate::flow::tcp::{Connected, Progress, TcpFlow};
use crate::flow::tcp_engine::Syn;
use crate::flow::{Fate, Flow, Turn};
use crate::host::{Host, QueuedError, Token};
use crate::net::emit::{self, BareSegment, Ends, IcmpError};
use crate::net::parse::{self, Ip, TcpSegment, tcp_flags};
use crate::net::{DropReason, Duration, IPV6_HEADER, Instant, Marks, Wire};

use super::counters::Disposition;
use super::mapping::{self, Verdict};
use super::room::is_exhaustion;
use super::{Stack, names};

/// How a guest learns that its connection request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    Reset,
    Unreachable(IcmpError),
}

/// Where a connection goes.
#[derive(Debug, Clone, Copy)]
struct Target {
    /// On the host's network.
    to: SocketAddr,
    /// As the guest calls it.
    asked: SocketAddr,
    /// As its packets are to look on the host's network.
    marks: Marks,
}

/// What a router or host would say where `connect(2)` reports this.
fn refusal(error: &io::Error) -> Refusal {
    match super::udp::unreachable(error) {
        // Nobody listens, or we are out of something: TCP says both by a RST.
        None | Some(IcmpError::PortUnreachable) => Refusal::Reset,
        Some(said) => Refusal::Unreachable(said),
    }
}

/// The packet without IPv6 extension headers, of which the engine knows nothing.
fn plain<'a>(ip: &Ip<'a>) -> Cow<'a, [u8]> {
    if ip.src.is_ipv4() || ip.header_len() == IPV6_HEADER {
        return Cow::Borrowed(ip.bytes);
    }
    let mut packet = emit::make_whole(ip.bytes, ip.protocol, ip.payload.len());
    packet.extend(ip.payload);
    Cow::Owned(packet)
}

/// How long a host may take to answer: as long as the kernel lets it, or, where another could be
/// asked, no longer than a query over UDP waits.
fn connect_deadline(now: Instant, timeouts: Timeouts, another: bool) -> Instant {
    let patience = Duration::from_secs(timeouts.tcp_connect.into());
    now + if another {
        patience.min(ATTEMPT)
    } else {
        patience
    }
}

impl<H: Host> Stack<H> {
    pub(super) fn guest_tcp(
        &mut self,
        turn: &mut Turn<'_, H>,
        ip: &Ip<'_>,
        segment: &TcpSegment,
    ) -> Disposition {
        let ends = Ends {
            src: SocketAddr::new(ip.src, segment.src_port),
            dst: SocketAddr::new(ip.dst, segment.dst_port),
        };
        let key = FlowKey::Tcp {
            link: ip.wire.link,
            guest: ends.src,
            remote: ends.dst,
        };
        self.free_an_engine(turn.now);
        let back = self.back(ip.wire);
        if let Some(token) = self.table.find(&key)
            && let Some(Flow::Tcp(flow)) = self.table.get_mut(token)
        {
            if !flow.gives_way_to(segment) {
                let tx = (&mut *turn.tx, &mut self.engines);
                let (fate, pump) = flow.segment(turn.now, tx, segment, &plain(ip));
                if fate == Fate::Forwarded && back.dst.is_unicast() && flow.wire() != back {
                    flow.follow(back);
                }
                if pump {
                    self.make_ready(token);
                }
                return fate.into();
            }
            self.table.remove(token);
        }
        if let Some(elsewhere) = self.segment_elsewhere(ends.dst, segment.is_connect()) {
            return elsewhere;
        }
        if segment.is_connect() {
            return self.open_tcp(turn, ip, ends, segment);
        }
        if segment.has(tcp_flags::RST) {
            return Disposition::Dropped(DropReason::TcpNoFlow);
        }
        self.reset(turn, ip.wire, ends, segment)
    }

    /// Refuses a segment with the RST of RFC 9293 3.10.7.1.
    fn reset(
        &self,
        turn: &mut Turn<'_, H>,
        wire: Wire,
        ends: Ends,
        segment: &TcpSegment,
    ) -> Disposition {
        let control =
            u32::from(segment.has(tcp_flags::SYN)) + u32::from(segment.has(tcp_flags::FIN));
        let length = u32::try_from(segment.payload_len).unwrap_or(0) + control;
        let answer = if segment.has(tcp_flags::ACK) {
            BareSegment {
                ends: ends.reversed(),
                seq: segment.ack,
                ack: 0,
                flags: tcp_flags::RST,
                window: 0,
                timestamps: None,
            }
        } else {
            let ack = segment.seq.wrapping_add(length);
            BareSegment {
                ends: ends.reversed(),
                seq: 0,
                ack,
                flags: tcp_flags::RST | tcp_flags::ACK,
                window: 0,
                timestamps: None,
            }
        };
        if emit::tcp_bare(turn.tx, self.back(wire), answer) {
            Disposition::Answered
        } else {
            Disposition::Dropped(DropReason::TransmitFull)
        }
    }

    fn open_tcp(
        &mut self,
        turn: &mut Turn<'_, H>,
        ip: &Ip<'_>,
        ends: Ends,
        segment: &TcpSegment,
    ) -> Disposition {
        let to = match mapping::verdict(&self.config, ends.dst) {
            Verdict::Host(to) => to,
            Verdict::Resolver => match self.nth_resolver(turn.host, 0) {
                Some(resolver) => resolver,
                None => return self.reset(turn, ip.wire, ends, segment),
            },
            Verdict::Refuse => return self.reset(turn, ip.wire, ends, segment),
            Verdict::Unreachable(error) => return self.tell(turn, ip, error),
            Verdict::Drop(reason) => return Disposition::Dropped(reason),
        };
        let Some(path) = self.path(ends.src.ip()) else {
            return Disposition::Dropped(DropReason::NoNeighbour);
        };
        let target = Target {
            to,
            asked: ends.dst,
            // What lies behind the resolver's address is not the guest's to reach.
            marks: if self.config.plan.is_resolver(ends.dst.ip()) {
                Marks::default()
            } else {
                self.marks_outside(ip)
            },
        };
        let (token, socket, tried) = match self.begin_tcp(turn, target) {
            Ok(begun) => begun,
            Err(error) => {
                tracing::debug!(%to, %error, "connect failed");
                if error.kind() == ErrorKind::WouldBlock {
                    return Disposition::Dropped(DropReason::TcpNoPort);
                }
                return match refusal(&error) {
                    Refusal::Reset => self.reset(turn, ip.wire, ends, segment),
                    Refusal::Unreachable(error) => self.tell(turn, ip, error),
                };
            }
        };
        let syn = Syn {
            seq: segment.seq,
            window: segment.window,
            tos: segment.tos,
            options: parse::syn_options(ip.payload),
        };
        let asks_resolver = self.config.plan.is_resolver(ends.dst.ip());
        let socket = if asks_resolver {
            self.named(socket)
        } else {
            Stream::Plain(socket)
        };
        let mut flow = TcpFlow::connecting(ends, path, socket, syn);
        flow.tried = tried;
        let key = FlowKey::Tcp {
            link: ip.wire.link,
            guest: ends.src,
            remote: ends.dst,
        };
        let others = if asks_resolver {
            turn.host.resolvers().len()
        } else {
            0
        };
        let deadline = connect_deadline(turn.now, self.config.timeouts, tried + 1 < others);
        let connected = flow.is_connected_already();
        self.admit(token, key, Flow::Tcp(flow), deadline);
        self.table.set_half_open(turn.now, token, BegunBy::Guest);
        if connected {
            self.tcp_connect_ended(turn, token);
            self.make_ready(token);
        }
        Disposition::Forwarded
    }

    /// Begins the host's part of a connection, under the token that its flow is to have. Where there is no
    /// room for it, who has waited longest for its other end gives way: a flood of requests to who does
    /// not answer must not keep others out (RFC 4987 3.4).
    fn begin_tcp(
        &mut self,
        turn: &mut Turn<'_, H>,
        target: Target,
    ) -> io::Result<(Token, H::Tcp, usize)> {
        self.limit_half_open(turn, BegunBy::Guest);
        let begun = self.with_room(turn, Kind::Stream, |stack, host| {
            let token = stack.token(Kind::Stream)?;
            let (socket, tried) = stack.connect_host(host, token, target)?;
            Ok((token, socket, tried))
        });
        let refused = begun.as_ref().is_err_and(is_exhaustion);
        self.counters.flows_refused += u64::from(refused);
        begun
    }

    /// Begins a connection; where that is to a resolver, to the first that can be asked. Gives how many
    /// could not.
    fn connect_host(
        &self,
        host: &mut H,
        token: Token,
        target: Target,
    ) -> io::Result<(H::Tcp, usize)> {
        let first = host.tcp_connect(token, target.to, target.marks);
        if first.is_ok() || !self.config.plan.is_resolver(target.asked.ip()) {
            return first.map(|socket| (socket, 0));
        }
        for tried in 1..host.resolvers().len() {
            if let Some(resolver) = self.nth_resolver(host, tried)
                && let Ok(socket) = host.tcp_connect(token, resolver, Marks::default())
            {
                return Ok((socket, tried));
            }
        }
        first.map(|socket| (socket, 0))
    }

    /// A connection to a resolver, before which the names of the gateway's own are answered.
    fn named(&self, socket: H::Tcp) -> Stream<H::Tcp> {
        let config = Arc::clone(&self.config);
        Stream::Named(Box::new(NamedStream::new(socket, config, names::judge)))
    }

    /// The resolver to be asked after `tried` others, the one that answered last being the first.
    fn nth_resolver(&self, host: &mut H, tried: usize) -> Option<SocketAddr> {
        let resolvers = host.resolvers();
        let last = self
            .resolver
            .and_then(|last| resolvers.iter().position(|resolver| *resolver == last));
        let place = last.unwrap_or(0) + tried;
        resolvers.get(place.checked_rem(resolvers.len())?).copied()
    }

    pub(super) fn tcp_connect_ended(&mut self, turn: &mut Turn<'_, H>, token: Token) {
        self.free_an_engine(turn.now);
        let Some(Flow::Tcp(flow)) = self.table.get_mut(token) else {
            return;
        };
        let (engines, secrets, now) = (&mut self.engines, &mut self.secrets, turn.now);
        let engine = |path, local| engines.engine(now, path, local, secrets.next_u64());
        match flow.finish_connect(now, turn.tx, engine) {
            Connected::Yes | Connected::Pending => {}
            Connected::Failed(error) => self.tcp_refused(turn, token, &error),
        }
    }

    /// The host gave no answer in time, or the end of a flow was remembered long enough.
    pub(super) fn tcp_gave_up(&mut self, turn: &mut Turn<'_, H>, token: Token) {
        self.tcp_refused(turn, token, &ErrorKind::TimedOut.into());
    }

    /// A query over TCP whose resolver is not there goes to the next one. True when it does.
    fn next_resolver(&mut self, turn: &mut Turn<'_, H>, token: Token) -> bool {
        let Some(Flow::Tcp(flow)) = self.table.get(token) else {
            return false;
        };
        if !self.config.plan.is_resolver(flow.ends.dst.ip()) || flow.waiting_syn().is_none() {
            return false;
        }
        let count = turn.host.resolvers().len();
        for tried in flow.tried + 1..count {
            if let Some(resolver) = self.nth_resolver(turn.host, tried)
                && let Ok(socket) = turn.host.tcp_connect(token, resolver, Marks::default())
            {
                let named = self.named(socket);
                if let Some(Flow::Tcp(flow)) = self.table.get_mut(token) {
                    flow.connect_instead(named, tried);
                }
                let deadline = connect_deadline(turn.now, self.config.timeouts, tried + 1 < count);
                self.table.set_deadline(token, deadline);
                return true;
            }
        }
        false
    }

    /// Ends a flow that never came to be; a guest that waits is told why.
    fn tcp_refused(&mut self, turn: &mut Turn<'_, H>, token: Token, error: &io::Error) {
        if self.next_resolver(turn, token) {
            return;
        }
        let Some(Flow::Tcp(mut flow)) = self.table.remove(token) else {
            return;
        };
        let Some(syn) = flow.waiting_syn() else {
            return;
        };
        tracing::debug!(to = %flow.ends.dst, %error, "connect failed");
        let original = emit::quoted_syn(flow.ends, syn.seq);
        let queued = flow.connect_error();
        // What the network said goes on as it is; about an address of the other family (a resolver's)
        // it would make no sense.
        let same_family = |it: &QueuedError| it.destination.is_ipv6() == flow.ends.src.is_ipv6();
        if let (Some(queued), Some(original)) = (queued.filter(same_family), &original) {
            return self.pass_on(turn, flow.wire(), &queued, original);
        }
        match (refusal(error), original) {
            (Refusal::Reset, _) => {
                let answer = BareSegment {
                    ends: flow.ends.reversed(),
                    seq: 0,
                    ack: syn.seq.wrapping_add(1),
                    flags: tcp_flags::RST | tcp_flags::ACK,
                    window: 0,
                    timestamps: None,
                };
                emit::tcp_bare(turn.tx, flow.wire(), answer);
            }
            (Refusal::Unreachable(error), Some(original)) => {
                if let Some(from) = self.config.plan.gateway_like(flow.ends.src.ip())
                    && self.may_tell(turn.now)
                {
                    emit::icmp_error(turn.tx, flow.wire(), from, error, &original);
                }
            }
            (Refusal::Unreachable(_), None) => {}
        }
    }

    /// The guest says by ICMP that it does not take a connection of a published port's client.
    pub(super) fn guest_refuses(&mut self, wire: Wire, quoted: Ends) -> Disposition {
        let key = FlowKey::Tcp {
            link: wire.link,
            guest: quoted.dst,
            remote: quoted.src,
        };
        let token = self.table.find(&key);
        let flow = token.and_then(|token| self.table.get_mut(token));
        let (Some(token), Some(Flow::Tcp(flow))) = (token, flow) else {
            let elsewhere = self.share.of_others();
            return elsewhere.unwrap_or(Disposition::Dropped(DropReason::TcpNoFlow));
        };
        if flow.refuse() {
            self.make_ready(token);
        }
        Disposition::Answered
    }

    /// Lets a flow move bytes, and looks after it when it is over.
    pub(super) fn pump_tcp(&mut self, turn: &mut Turn<'_, H>, token: Token) {
        self.free_an_engine(turn.now);
        let Some(Flow::Tcp(flow)) = self.table.get_mut(token) else {
            return;
        };
        let progress = flow.pump(turn.now, turn.tx, &mut self.engines);
        if flow.begins_to_move() {
            self.moving.begin(turn.now, token);
        }
        match progress {
            Progress::Gone | Progress::Left => {
                if progress == Progress::Left && !self.waits.take(turn.now) {
                    flow.end_wait(turn.tx);
                }
                self.table.remove(token);
            }
            Progress::More => self.make_ready(token),
            Progress::Idle | Progress::Closed => {
                let waits = flow.waiting_syn().is_some();
                let deadline = flow.deadline(turn.now);
                if !waits {
                    self.table.set_deadline(token, deadline);
                }
                if progress == Progress::Closed {
                    self.table.set_evictable(token);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_hear_what_the_network_said() {
        let said = |errno| refusal(&io::Error::from_raw_os_error(errno));
        // ECONNREFUSED, ENETUNREACH, EHOSTUNREACH, ETIMEDOUT, EPERM, EMFILE by their numbers.
        assert_eq!(said(111), Refusal::Reset);
        assert_eq!(said(101), Refusal::Unreachable(IcmpError::NetUnreachable));
        assert_eq!(said(113), Refusal::Unreachable(IcmpError::HostUnreachable));
        assert_eq!(said(110), Refusal::Unreachable(IcmpError::HostUnreachable));
        assert_eq!(
            said(1),
            Refusal::Unreachable(IcmpError::AdministrativelyProhibited)
        );
        assert_eq!(said(24), Refusal::Reset);
    }
}
