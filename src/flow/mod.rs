//! One conversation is one value: its key, its deadline, its state.
//!
//! A [`Table`](table::Table) holds them all, is searched by [`key::FlowKey`] or
//! [`Token`](crate::host::Token), and is the connection table that users see. [`tcp`] carries byte
//! streams over the link, [`spliced`] past it; [`udp`], [`echo`] and [`query`] hold what their protocols need to remember. Flows know
//! host sockets by their traits only, and know nothing of policy, names or addresses' meaning: that
//! is [`crate::stack`]'s.

pub mod echo;
pub mod key;
pub mod named_stream;
pub mod query;
pub mod spliced;
pub mod table;
pub mod tcp;
mod tcp_ahead;
mod tcp_completion;
mod tcp_device;
mod tcp_dialogue;
mod tcp_direct;
pub mod tcp_engine;
mod tcp_guard;
mod tcp_memory;
mod tcp_open;
mod tcp_patience;
pub mod tcp_pool;
mod tcp_rest;
mod tcp_shield;
mod tcp_shorten;
mod tcp_window;
mod tcp_written;
pub mod udp;

use crate::buf::TxBatch;
use crate::host::Host;
use crate::net::{DropReason, Instant};
use named_stream::Stream;

/// What every step of a turn needs: the time, the host, and room for frames to the guest.
pub struct Turn<'a, H> {
    /// The time of this turn; read once by the event loop.
    pub now: Instant,
    /// The host's network.
    pub host: &'a mut H,
    /// Frames on their way to the guest.
    pub tx: &'a mut TxBatch,
}

/// What became of a segment of a flow's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// What it says is passed on.
    Forwarded,
    /// It was answered, or noted.
    Answered,
    /// It changed nothing.
    Dropped(DropReason),
}

/// A conversation of any kind.
pub enum Flow<H: Host> {
    /// A TCP connection.
    Tcp(tcp::TcpFlow<Stream<H::Tcp>>),
    /// A TCP connection that goes past the link.
    Spliced(spliced::SplicedFlow<H::Tcp, H::Pipe>),
    /// A guest's UDP port.
    Udp(udp::UdpFlow<H::Udp>),
    /// A host's client of a published UDP port.
    Peer(udp::PublishedPeer),
    /// A guest's ping.
    Echo(echo::EchoFlow<H::Echo>),
    /// A DNS query on its way.
    Query(query::Query<H::Udp>),
}
