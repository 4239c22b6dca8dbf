//! What a guest's ping remembers: the host's echo socket for one guest address and identifier.
//!
//! Requests and replies are moved in `stack/echo.rs`.

use std::net::IpAddr;

use crate::net::{Duration, Instant, Wire};

/// Idle time of an echo flow: RFC 5508 REQ-2 asks for no less than 60 seconds.
const IDLE: Duration = Duration::from_secs(60);

/// A guest's echo identifier and its host socket.
pub struct EchoFlow<S> {
    /// The host's echo socket; the kernel gave it an identifier of its own.
    pub socket: S,
    /// The guest's address.
    pub guest: IpAddr,
    /// The guest's identifier, put back into replies.
    pub ident: u16,
    /// The way back to the guest.
    pub wire: Wire,
    /// A reply has come.
    pub answered: bool,
    /// The socket's error queue has something to tell.
    pub failed: bool,
}

impl<S> EchoFlow<S> {
    /// The deadline after a request or reply.
    #[must_use]
    pub fn deadline(now: Instant) -> Instant {
        now + IDLE
    }

    /// When it last carried one, by its deadline.
    #[must_use]
    pub fn active_at(deadline: Instant) -> Instant {
        deadline - IDLE
    }
}
