//! The short cut of published ports: a client that may take it is joined to a socket inside the
//! namespace, past the link.
//!
//! Comes in: a client of a port whose rule lets it. Goes out: a flow of two sockets; or, where there is no
//! way inside, one over the link as if nothing had been tried. Moving bytes is `flow/spliced.rs`'s.

use std::net::SocketAddr;

use crate::flow::key::{FlowKey, Kind};
use crate::flow::spliced::{self, Opening, SplicedFlow};
use crate::flow::table::BegunBy;
use crate::flow::tcp::Progress;
use crate::flow::{Flow, Turn};
use crate::host::{Event, Host, TcpSocket, Token};
use crate::net::Duration;

use super::Stack;

/// How long the connection to the guest's address may take at most. It does not leave the kernel, so what is late
/// gets no answer at all (its loopback interface is down), or waits for room in a queue, where a SYN is
/// repeated after a second. Then the link is the way.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long what the guest's side had sent before it failed may take to the client.
const LAST_WORDS: Duration = Duration::from_secs(30);
/// When a flow without a pipe looks for one again, and one of which a side has failed whether the other has it all.
const PAUSE: Duration = Duration::from_millis(100);

impl<H: Host> Stack<H> {
    /// Begins a connection past the link.
    ///
    /// # Errors
    /// Gives the client back when it has to go over the link.
    pub(super) fn splice(
        &mut self,
        turn: &mut Turn<'_, H>,
        socket: H::Tcp,
        client: SocketAddr,
        guest: SocketAddr,
    ) -> Result<(), H::Tcp> {
        // Where there are no descriptors for pipes the link carries it by what is there already.
        let room = self.with_room(turn, Kind::Stream, |stack, host| {
            Ok((stack.token(Kind::Stream)?, host.pipe()?))
        });
        let Ok((token, pipe)) = room else {
            return Err(socket);
        };
        turn.host.return_pipe(pipe);
        let mut flow = SplicedFlow::new(socket, client, guest);
        let opening = flow.connect(turn.host, token);
        if opening == Opening::OverLink {
            return flow
                .into_client()
                .map_or(Ok(()), |(socket, ..)| Err(socket));
        }
        let key = FlowKey::Spliced {
            link: self.link.id,
            guest,
            client,
            serial: self.counters.flows_opened,
        };
        let patience = self.guest_patience().min(PATIENCE);
        self.admit(token, key, Flow::Spliced(flow), turn.now + patience);
        self.after_opening(turn, token, opening);
        Ok(())
    }

    /// Something happened at one of a flow's sockets.
    pub(super) fn spliced_ready(&mut self, turn: &mut Turn<'_, H>, event: Event) {
        let (token, inside) = spliced::owner(event.token);
        let Some(Flow::Spliced(flow)) = self.table.get_mut(token) else {
            return;
        };
        if flow.is_open() {
            flow.ready(event, inside);
            self.make_ready(token);
        } else if inside {
            let opening = flow.proceed(turn.host, token, event);
            self.after_opening(turn, token, opening);
            // What came with the connection is told once.
            if let Some(Flow::Spliced(flow)) = self.table.get_mut(token) {
                flow.ready(event, true);
            }
        }
    }

    fn after_opening(&mut self, turn: &mut Turn<'_, H>, token: Token, opening: Opening) {
        let now = turn.now;
        match opening {
            Opening::Pending => self.note_wait(turn, token),
            Opening::Loopback => {
                // For a socket, if there is none yet.
                let patience = self.guest_patience().min(PATIENCE);
                self.table.set_deadline(token, now + patience);
                self.note_wait(turn, token);
            }
            Opening::Open => {
                let Some(Flow::Spliced(flow)) = self.table.get_mut(token) else {
                    return;
                };
                if let Err(error) = flow.open(turn.host, token) {
                    tracing::debug!(%error, "published connection refused");
                    self.table.remove(token);
                    return;
                }
                self.counters.flows_spliced += 1;
                let ask_after = flow.ask_after(self.config.timeouts);
                self.table.set_deadline(token, now + ask_after);
                self.make_ready(token);
            }
            Opening::Refused | Opening::OverLink => {
                let Some(Flow::Spliced(flow)) = self.table.remove(token) else {
                    return;
                };
                let Some((socket, client, guest)) = flow.into_client() else {
                    return;
                };
                tracing::debug!(%client, %guest, ?opening, "no connection past the link");
                if opening == Opening::Refused {
                    socket.reset();
                } else if let Err(error) = self.connect_guest(turn, socket, client, guest) {
                    tracing::debug!(%client, %guest, %error, "published connection refused");
                }
            }
        }
    }

    /// How long a guest may take to agree to a connection. On the namespace's loopback, which no link leads to, it
    /// has all of it.
    fn guest_patience(&self) -> Duration {
        Duration::from_secs(self.config.timeouts.guest().into())
    }

    /// Counts a flow among those that wait for their other end, from when it does, and gives that its time.
    fn note_wait(&mut self, turn: &mut Turn<'_, H>, token: Token) {
        let begins = match self.table.get_mut(token) {
            Some(Flow::Spliced(flow)) => flow.begins_to_wait(),
            _ => false,
        };
        if begins {
            let patience = self.guest_patience();
            self.table.set_deadline(token, turn.now + patience);
            self.limit_half_open(turn, BegunBy::Client);
            self.table.set_half_open(turn.now, token, BegunBy::Client);
        }
    }

    /// A flow's deadline has come.
    pub(super) fn spliced_overdue(&mut self, turn: &mut Turn<'_, H>, token: Token) {
        let Some(Flow::Spliced(flow)) = self.table.get_mut(token) else {
            return;
        };
        if flow.is_open() {
            let until = flow.last_words(turn.now + LAST_WORDS);
            if until.is_some_and(|until| turn.now >= until) {
                flow.fail();
                self.table.remove(token);
                return;
            }
            let next = flow.have_asked(self.config.timeouts);
            self.table.set_deadline(token, turn.now + next);
            self.make_ready(token);
            return;
        }
        let (opening, without_socket) = flow.give_up();
        if without_socket {
            turn.host.pass_over_inside();
        }
        self.after_opening(turn, token, opening);
    }

    /// The most bytes that one flow has carried past the link at once since this was last asked.
    pub const fn take_spliced_most(&mut self) -> u64 {
        std::mem::replace(&mut self.spliced_most, 0)
    }

    /// Lets a flow move bytes.
    pub(super) fn pump_spliced(&mut self, turn: &mut Turn<'_, H>, token: Token) {
        let Some(Flow::Spliced(flow)) = self.table.get_mut(token) else {
            return;
        };
        let progress = flow.pump(turn.host);
        let moved = flow.moved() as u64;
        self.counters.bytes_spliced += moved;
        self.spliced_most = self.spliced_most.max(moved);
        // No event tells of what the client's system acknowledges.
        let last_words = flow.last_words(turn.now + LAST_WORDS);
        match progress {
            Progress::More => self.make_ready(token),
            Progress::Idle if flow.is_starved() || last_words.is_some() => {
                let next = turn.now + PAUSE;
                let next = last_words.map_or(next, |until| until.min(next));
                self.table.set_deadline(token, next);
            }
            Progress::Idle => {
                if flow.begins_half_close() {
                    let ask_after = flow.ask_after(self.config.timeouts);
                    self.table.set_deadline(token, turn.now + ask_after);
                }
            }
            Progress::Closed | Progress::Left | Progress::Gone => {
                self.table.remove(token);
            }
        }
    }
}
