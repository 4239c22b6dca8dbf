//! A DNS query on its way: who asked, what, which resolver was asked last.
//!
//! Every attempt has a socket of its own, so that port and identifier are fresh (RFC 5452 9.2);
//! asking and answering is done in `stack/dns.rs`.

use std::net::SocketAddr;

use crate::net::{Duration, Wire};

/// How long one resolver is waited for before the next is asked. libc waits five seconds for each,
/// so the guest's own resolver is still patient when the third of ours is asked.
pub const ATTEMPT: Duration = Duration::from_millis(1000);

/// How often the list of resolvers is gone through before the query fails.
pub const ROUNDS: usize = 2;

/// A query and its present attempt.
pub struct Query<S> {
    /// The socket of this attempt, connected to the resolver.
    pub socket: S,
    /// Who asked.
    pub guest: SocketAddr,
    /// The identifier that the guest chose; answers get it back.
    pub id: u16,
    /// The identifier of this attempt.
    pub attempt_id: u16,
    /// The query as the guest sent it.
    pub bytes: Vec<u8>,
    /// The resolver that this attempt asks.
    pub resolver: SocketAddr,
    /// Place in the list of resolvers of the one that was asked first.
    pub first: usize,
    /// Attempts so far, this one included.
    pub attempts: usize,
    /// The way back to the guest.
    pub wire: Wire,
}
