//! The gateway that a guest believes in: everything between its frames and the host's sockets.
//!
//! [`Stack`] is an ordinary struct. Frames, host events and time go in by method call; frames come
//! out in a [`TxBatch`](crate::buf::TxBatch), the next deadline by [`Stack::poll_timeout`]. It reads no clock, owns no
//! descriptor and knows no runtime, so whole scenarios run in virtual time. The files beside this
//! one each know one service; this one owns the state and decides the order of things:
//!
//! - [`guest`]: what a frame is for; [`tcp`], [`udp`], [`echo`]: the flows of each protocol; [`trains`]:
//!   datagrams that travel together;
//! - [`mapping`]: what an address leads to, consulted once for each new flow;
//! - [`neighbours`], [`router`], [`dhcp`], [`dhcp6`], [`dns`], [`names`]: the services of the gateway
//!   itself;
//! - [`rest`]: memory of connections in which nothing moves;
//! - [`room`]: who gives way to a new flow where there is no room;
//! - [`publish`]: ports of the host that lead inside, over the link or, by [`spliced`], past it;
//! - [`share`]: what is another worker's, where several serve one network;
//! - [`reassembly`], [`rate`], [`counters`], [`secrets`]: bounded memory, bounded answers, numbers,
//!   unpredictability.

pub mod counters;
pub mod dhcp;
pub mod dhcp6;
pub mod dns;
pub mod echo;
pub mod guest;
pub mod mapping;
pub mod names;
pub mod neighbours;
pub mod publish;
pub mod rate;
pub mod reassembly;
pub mod rest;
pub mod room;
pub mod router;
pub mod secrets;
pub mod share;
pub mod spliced;
pub mod tcp;
pub mod trains;
pub mod udp;

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;

use crate::buf::{LinkId, RxMeta, TxCapabilities};
use crate::config::Config;
use crate::flow::key::{FlowKey, KeyedState};
use crate::flow::table::{Most, Table};
use crate::flow::tcp_engine::Path;
use crate::flow::tcp_pool::EnginePool;
use crate::flow::{self, Flow};
use crate::host::{Event, Host, Inbox, Token};
use crate::net::Mac;

pub use crate::flow::Turn;
pub use crate::net::{Duration, Instant};

use counters::Counters;
use dhcp::DhcpServer;
use neighbours::Neighbours;
use publish::Published;
use rate::Rate;
use reassembly::Reassembly;
use rest::Moving;
use router::Advertiser;
use secrets::Secrets;
use share::{Place, Share};
use trains::Train;

/// Bytes of what the network reports about a packet, its payload included.
const SCRATCH: usize = 65_536;

/// Connections that may wait for their other end at once, of those that guests began, and as many that clients of
/// published ports did.
const HALF_OPEN: usize = 4096;

/// Clients of published UDP ports may have this part of all flows: whoever reaches such a port makes them.
const PEERS: usize = 4;

/// Bytes that are spliced in one turn, about, however many connections have some.
const SPLICED: u64 = 4 << 20;

/// What the stack must know of a link.
#[derive(Debug, Clone, Copy)]
pub struct LinkInfo {
    /// Its name in frames.
    pub id: LinkId,
    /// What it does for frames that leave.
    pub capabilities: TxCapabilities,
    /// The guest's Ethernet address, where it is known before the guest speaks.
    pub guest_mac: Option<Mac>,
}

/// The virtual network of one or more guests.
pub struct Stack<H: Host> {
    config: Arc<Config>,
    link: LinkInfo,
    table: Table<Flow<H>>,
    engines: EnginePool,
    moving: Moving,
    share: Share<H>,
    neighbours: Neighbours,
    dhcp: DhcpServer,
    advertiser: Advertiser,
    /// When what was lost while the link was away is to be sent again, and when it last was.
    repeat_at: Option<Instant>,
    repeated_at: Instant,
    errors: Rate,
    /// Connections that a guest may remember after their end.
    waits: Rate,
    reassembly: Reassembly,
    published: Published<H>,
    /// Flows with something to do, in order, each once.
    ready: VecDeque<Token>,
    secrets: Secrets,
    counters: Counters,
    /// The most bytes that a flow carried past the link at once since somebody asked.
    spliced_most: u64,
    /// The resolver that answered last: DNS over TCP goes there.
    resolver: Option<std::net::SocketAddr>,
    /// The hint about `ping_group_range` was given.
    echo_hint_given: bool,
    /// What was received from a socket of the host's, and whose socket that was.
    inbox: Inbox,
    inbox_owner: Token,
    /// Datagrams of a guest that wait for others.
    train: Train,
    scratch: Box<[u8]>,
}

impl<H: Host> Stack<H> {
    /// A stack for one link. `seed` must come from the system's entropy: sequence numbers, ports
    /// and identifiers are drawn from it.
    #[must_use]
    pub fn new(config: Arc<Config>, link: LinkInfo, seed: [u64; 4]) -> Self {
        Self::worker(config, link, seed, Place::ALONE)
    }

    /// One of several stacks for one link, each with a seed of its own. Limits hold for all together.
    #[must_use]
    pub fn worker(config: Arc<Config>, link: LinkInfo, seed: [u64; 4], place: Place) -> Self {
        let secrets = Secrets::new(seed);
        let hash = KeyedState::new(secrets.hash_key());
        let whole = |limit| usize::try_from(limit).unwrap_or(usize::MAX);
        let part = |limit| place.part(whole(limit));
        let most = Most {
            flows: part(config.max_flows),
            half_open: place.part(HALF_OPEN),
            ports: part(config.max_udp_ports),
            // One worker has those of a port, and the first has all queries.
            peers: (whole(config.max_flows) / PEERS)
                .min(part(config.max_flows) / 2)
                .max(1),
            queries: HALF_OPEN,
        };
        Self {
            link,
            table: Table::new(most, hash),
            engines: EnginePool::new(
                place.part(config.max_buffer_memory),
                place.part(config.ring_space),
            ),
            share: Share::new(place),
            moving: Moving::default(),
            neighbours: Neighbours::new(config.plan.gateway(), link.guest_mac, hash),
            dhcp: DhcpServer::new(config.plan),
            advertiser: Advertiser::new(&config),
            repeat_at: None,
            repeated_at: Instant::ZERO,
            errors: Rate::of_errors(place.count),
            waits: Rate::of_waits(place.count),
            reassembly: Reassembly::new(hash),
            published: Published::default(),
            ready: VecDeque::new(),
            secrets,
            counters: Counters::default(),
            spliced_most: 0,
            resolver: None,
            echo_hint_given: false,
            inbox: Inbox::default(),
            inbox_owner: Token(0),
            train: Train::default(),
            scratch: vec![0; SCRATCH].into_boxed_slice(),
            config,
        }
    }

    /// Takes one frame from a link.
    pub fn handle_frame(&mut self, turn: &mut Turn<'_, H>, bytes: &[u8], meta: RxMeta) {
        let disposition = self.guest_frame(turn, bytes, meta);
        self.counters.count(disposition, bytes.len());
        self.hand_on(disposition, bytes, meta);
    }

    /// Takes one event from the host.
    pub fn handle_host(&mut self, turn: &mut Turn<'_, H>, event: Event) {
        if let Some(index) = publish::listener_of(event.token) {
            return self.published_ready(turn.now, index);
        }
        if event.writable {
            self.tcp_connect_ended(turn, event.token);
        }
        let (token, _) = flow::spliced::owner(event.token);
        match self.table.get_mut(token) {
            Some(Flow::Spliced(_)) => return self.spliced_ready(turn, event),
            // The mark of an inner socket on the token of a flow that has none.
            Some(_) if token != event.token => return,
            Some(Flow::Tcp(flow)) => flow.ready(event),
            Some(Flow::Udp(flow)) => flow.failed |= event.error,
            Some(Flow::Echo(flow)) => flow.failed |= event.error,
            Some(Flow::Query(_)) => {}
            // A peer has no socket of its own; a flow that is gone has nothing to hear.
            Some(Flow::Peer(_)) | None => return,
        }
        self.make_ready(event.token);
    }

    /// Ends what is overdue and lets due timers act.
    pub fn handle_timeout(&mut self, turn: &mut Turn<'_, H>) {
        self.give_fragments_up(turn);
        self.advertise_if_due(turn);
        self.let_rest(turn.now);
        self.repeat_if_due(turn.now);
        while let Some(token) = self.table.expired(turn.now) {
            match self.table.get_mut(token) {
                Some(Flow::Tcp(flow)) if flow.is_open() => {
                    // Looked at again by the pump below, which sets the next deadline.
                    self.table
                        .set_deadline(token, turn.now + Duration::from_secs(1));
                    self.make_ready(token);
                }
                Some(Flow::Tcp(_)) => self.tcp_gave_up(turn, token),
                Some(Flow::Spliced(_)) => self.spliced_overdue(turn, token),
                Some(Flow::Query(_)) => self.query_timed_out(turn, token),
                Some(Flow::Udp(_) | Flow::Peer(_) | Flow::Echo(_)) | None => {
                    self.table.remove(token);
                }
            }
        }
        self.trim_ready();
    }

    /// Lets every flow that has something to do move bytes, each in its turn. True when some could
    /// not finish: the batch was full, or a budget used up.
    pub fn poll_transmit(&mut self, turn: &mut Turn<'_, H>) -> bool {
        self.send_train(turn);
        // Whose turn it is may have to pause.
        self.deliver_inbox(turn);
        let published_first = self.published.are_first();
        if published_first {
            self.serve_published(turn, true);
        }
        // Those who would find the batch full keep their places.
        if !self.published.have_filled() {
            self.pump_ready(turn);
        }
        if !published_first {
            self.serve_published(turn, false);
        }
        !self.ready.is_empty() || self.published.have_more() || !self.inbox.is_empty()
    }

    fn pump_ready(&mut self, turn: &mut Turn<'_, H>) {
        let most_spliced = self.counters.bytes_spliced + SPLICED;
        for _ in 0..self.ready.len() {
            let Some(token) = self.ready.pop_front() else {
                break;
            };
            if self.table.get(token).is_none() {
                continue;
            }
            self.table.unqueue(token);
            self.pump(turn, token);
            // The one that filled the batch is last in line now: the next leads the next turn.
            if !turn.tx.has_room() || self.counters.bytes_spliced >= most_spliced {
                break;
            }
        }
        self.trim_ready();
    }

    /// Takes a new flow into the table, whose socket was opened with `token`, the one that
    /// [`Table::next_token`] had promised.
    fn admit(&mut self, token: Token, key: FlowKey, flow: Flow<H>, deadline: Instant) {
        let inserted = self.table.insert(key, flow, deadline);
        debug_assert_eq!(inserted, Ok(token), "nothing came in between");
        self.counters.flows_opened += 1;
    }

    /// Puts a flow in the queue of those with something to do, once.
    fn make_ready(&mut self, token: Token) {
        if self.table.queue(token) {
            self.ready.push_back(token);
            self.trim_ready();
        }
    }

    /// Those that have ended in the queue are still in it, and a guest ends flows as fast as it likes.
    fn trim_ready(&mut self) {
        if self.ready.len() > self.most_ready() {
            let table = &self.table;
            self.ready.retain(|token| table.get(*token).is_some());
        }
    }

    fn most_ready(&self) -> usize {
        2 * self.table.len() + 64
    }

    /// Lets a flow do what it can.
    fn pump(&mut self, turn: &mut Turn<'_, H>, token: Token) {
        match self.table.get(token) {
            Some(Flow::Tcp(_)) => self.pump_tcp(turn, token),
            Some(Flow::Spliced(_)) => self.pump_spliced(turn, token),
            Some(Flow::Udp(_)) => self.udp_ready(turn, token),
            Some(Flow::Echo(_)) => self.echo_ready(turn, token),
            Some(Flow::Query(_)) => self.query_ready(turn, token),
            Some(Flow::Peer(_)) | None => {}
        }
    }

    /// When [`Stack::handle_timeout`] wants to be called, at the latest.
    pub fn poll_timeout(&mut self) -> Option<Instant> {
        [
            self.table.next_deadline(),
            self.reassembly.next_deadline(),
            self.advertiser.next_deadline(),
            self.published.deadline(),
            self.moving_deadline(),
            self.repeat_at,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// The way frames take to a guest's address.
    fn path(&self, guest: IpAddr) -> Option<Path> {
        let dst = self.neighbours.lookup(guest)?;
        let wire = crate::net::Wire {
            link: self.link.id,
            src: self.neighbours.gateway_mac(),
            dst,
        };
        Some(Path {
            wire,
            mtu: self.config.mtu,
            ipv6: guest.is_ipv6(),
            capabilities: self.link.capabilities,
            timeouts: self.config.timeouts,
        })
    }

    /// Numbers of frames and flows.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Number of flows in the table.
    #[must_use]
    pub fn flows(&self) -> usize {
        self.table.len()
    }

    /// Bytes of memory that the rings of TCP flows hold, and the number of flows that have any.
    #[must_use]
    pub fn buffers(&self) -> (usize, usize) {
        (self.engines.held(), self.engines.in_use())
    }

    /// Says in the log what this worker holds at this moment, and what became of its frames so far.
    pub fn tell_sizes(&self) {
        let (buffers, engines) = self.buffers();
        let Counters {
            frames_in,
            answered,
            forwarded,
            handed,
            flows_opened,
            flows_refused,
            flows_abandoned,
            flows_spliced,
            bytes_spliced,
            ..
        } = self.counters;
        tracing::debug!(
            worker = self.share.place.index,
            flows = self.flows(),
            ready = self.ready.len(),
            engines,
            buffers,
            frames_in,
            answered,
            forwarded,
            handed,
            dropped = %self.counters.drops(),
            flows_opened,
            flows_refused,
            flows_abandoned,
            flows_spliced,
            bytes_spliced,
            "sizes"
        );
    }

    /// What must hold between any two calls; tests ask after every step.
    ///
    /// # Errors
    /// What does not hold.
    pub fn check(&self) -> Result<(), String> {
        self.table.check()?;
        self.counters.check()?;
        self.reassembly.check()?;
        self.published.check()?;
        self.check_ready()?;
        self.check_engines()
    }

    /// Each flow that is in the queue is there once, and no other is taken to be.
    fn check_ready(&self) -> Result<(), String> {
        let mut live: Vec<Token> = self.ready.iter().copied().collect();
        live.retain(|token| self.table.get(*token).is_some());
        let ready = live.len();
        // A few may have ended since it was trimmed.
        if self.ready.len() > 2 * self.most_ready() {
            return Err(format!("{} in the queue, {ready} live", self.ready.len()));
        }
        live.sort_unstable();
        live.dedup();
        let queued = self.table.queued();
        if live.len() == ready && queued == ready {
            return Ok(());
        }
        Err(format!(
            "{ready} flows are ready, {} different ones; {queued} say so",
            live.len()
        ))
    }

    /// Each engine that is in use is a flow's.
    fn check_engines(&self) -> Result<(), String> {
        let moving = |token: &Token| matches!(self.table.get(*token), Some(Flow::Tcp(flow)) if flow.active_at().is_some());
        let moving = self.table.tokens().filter(moving).count();
        let used = self.engines.in_use();
        if moving == used {
            Ok(())
        } else {
            Err(format!("{used} engines for {moving} flows"))
        }
    }
}
