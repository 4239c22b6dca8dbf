//! Memory of connections in which nothing moves: who holds an engine, and who gives it back.
//!
//! Owns a queue of the TCP flows that hold an engine and have moved, each once, roughly in the order in
//! which they last did; one that can't rest for what is under way comes back when it moves again. Comes in: the time. Goes out: flows at rest, whose engines are free for others. With many
//! engines in use a flow rests after a moment already, so that opening many connections does not take
//! memory for all of them at once; with few it keeps its engine between a request and the next.

use std::collections::VecDeque;

use crate::flow::Flow;
use crate::host::{Host, Token};
use crate::net::{Duration, Instant};

use super::Stack;

/// How long nothing must have moved before a flow rests.
const QUIET: Duration = Duration::from_millis(250);
/// The same where many engines are in use.
const CROWDED_QUIET: Duration = Duration::from_millis(5);
/// More engines than this are many.
const MANY: usize = 256;
/// What was lost on the link is not sent again out of turn more often than this.
const REPEATS: Duration = Duration::from_secs(1);
/// Flows that are looked at in one turn.
const BUDGET: usize = 64;

/// The flows that hold an engine.
pub(super) struct Moving {
    /// When they last moved, as far as was seen.
    queue: VecDeque<(Instant, Token)>,
    /// The time of the latest look.
    now: Instant,
}

impl Default for Moving {
    fn default() -> Self {
        Self {
            queue: VecDeque::new(),
            now: Instant::ZERO,
        }
    }
}

impl Moving {
    /// A flow moves.
    pub(super) fn begin(&mut self, now: Instant, token: Token) {
        self.queue.push_back((now, token));
    }
}

impl<H: Host> Stack<H> {
    /// The link takes frames again: what was lost meanwhile is sent again soon, not when its timer would have it, which
    /// by now may wait for a minute.
    pub fn handle_link_back(&mut self, now: Instant) {
        // A link that comes and goes must not make us look at all flows each time.
        let at = now.max(self.repeated_at + REPEATS);
        self.repeat_at.get_or_insert(at);
    }

    pub(super) fn repeat_if_due(&mut self, now: Instant) {
        if self.repeat_at.is_none_or(|at| now < at) {
            return;
        }
        self.repeat_at = None;
        self.repeated_at = now;
        let tokens: Vec<Token> = self.table.tokens().collect();
        for token in tokens {
            if let Some(Flow::Tcp(flow)) = self.table.get_mut(token)
                && flow.repeat()
            {
                self.make_ready(token);
            }
        }
    }

    /// How long nothing must have moved, as things are.
    fn quiet(&self) -> Duration {
        if self.engines.in_use() > MANY {
            CROWDED_QUIET
        } else {
            QUIET
        }
    }

    /// When [`Stack::let_rest`] has something to do.
    pub(super) fn moving_deadline(&mut self) -> Option<Instant> {
        let front = self.moving.queue.front().map(|(at, _)| *at + self.quiet());
        let unused = self.engines.next_look(self.moving.now);
        [front, unused].into_iter().flatten().min()
    }

    /// Has one of the flows in which nothing is under way give its engine back, where no more can be made; who
    /// moved longest ago is asked first, and who can't rest comes back when it moves again.
    pub(super) fn free_an_engine(&mut self, now: Instant) {
        let mut looks = 0;
        while looks < BUDGET && !self.engines.has_one() {
            let Some((_, token)) = self.moving.queue.pop_front() else {
                return;
            };
            // One that is gone counts for nothing, as in `let_rest`.
            let Some(Flow::Tcp(flow)) = self.table.get_mut(token) else {
                continue;
            };
            looks += 1;
            if flow.rest(now, &mut self.engines) {
                let deadline = flow.deadline(now);
                self.table.set_deadline(token, deadline);
            }
        }
    }

    /// Takes engines back from flows in which nothing moves.
    pub(super) fn let_rest(&mut self, now: Instant) {
        self.moving.now = now;
        self.engines.free_unused(now);
        let mut looks = 0;
        while looks < BUDGET {
            let quiet = self.quiet();
            let due = self.moving.queue.front().copied();
            let Some((_, token)) = due.filter(|(at, _)| *at + quiet <= now) else {
                break;
            };
            self.moving.queue.pop_front();
            // One that is gone counts for nothing: they come faster than a turn's looks where connections are short.
            let Some(Flow::Tcp(flow)) = self.table.get_mut(token) else {
                continue;
            };
            looks += 1;
            let Some(active_at) = flow.active_at() else {
                continue;
            };
            if active_at + quiet > now {
                self.moving.queue.push_back((active_at, token));
            } else if flow.rest(now, &mut self.engines) {
                let deadline = flow.deadline(now);
                self.table.set_deadline(token, deadline);
            }
        }
        if self.moving.queue.is_empty() {
            self.moving.queue.shrink_to(BUDGET);
        }
    }
}
