//! Published UDP ports of which the first worker knows, and another has the socket.
//!
//! Comes in: rules, at the first worker; ports and their numbers, at the other. Goes out: what one hands to the other, and
//! word of what became of it.

use std::io;

use super::{Socket, listener_token, tell};
use crate::config::Publish;
use crate::host::{DatagramRole, Host};
use crate::stack::Stack;
use crate::stack::share::{FIRST, Freed, Handed};

impl<H: Host> Stack<H> {
    /// Opens a published UDP port, for the worker of the guest's port.
    pub(super) fn publish_udp(
        &mut self,
        host: &mut H,
        id: usize,
        rule: Publish,
    ) -> io::Result<Socket<H>> {
        let socket = host.udp_open(DatagramRole::Published(rule.host))?;
        let place = self.share.place;
        let home = place.of_port(rule.guest);
        if home == place.index {
            host.udp_watch(listener_token(id), &socket)?;
            return Ok(Socket::Udp(socket));
        }
        self.share.hand(home, Handed::Port { id, rule, socket });
        Ok(Socket::Elsewhere(home))
    }

    /// Takes a UDP port over that the first worker has published.
    pub(in crate::stack) fn take_port(
        &mut self,
        host: &mut H,
        id: usize,
        rule: Publish,
        socket: H::Udp,
    ) {
        match host.udp_watch(listener_token(id), &socket) {
            Ok(()) => self.published.add(id, rule, Socket::Udp(socket)),
            Err(error) => {
                tracing::warn!(port = %rule.host, %error, "published port is not served");
                self.share.hand(FIRST, Handed::PortLost { id });
            }
        }
    }

    /// Closes a UDP port that the first worker has taken back, which may never have been served here; at the first
    /// worker, one that its own does not serve.
    pub(in crate::stack) fn give_port_up(&mut self, id: usize, freed: Option<Freed>) {
        drop(self.published.remove(id));
        tell(freed);
    }
}
