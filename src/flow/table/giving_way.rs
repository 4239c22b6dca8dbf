//! Who gives way where there is no room: first what is over, then what has waited longest for an answer, then what was
//! idle the longest. An open connection never does.
//!
//! Owns queues of flows by the time since which they wait: what the guest began, what the host's clients did, and queries
//! each have their own, so that none can crowd another out. What is in a queue may be gone, or wait no longer: that is
//! found out when it comes up, so nothing is to be done for a flow that goes on.

use std::collections::VecDeque;

use super::{Full, KEPT, Most, Table};
use crate::host::Token;
use crate::net::Instant;

/// Flows that are looked at to find one that is idle.
const LOOKS: usize = 64;

/// Who began what waits for its other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BegunBy {
    /// The guest.
    Guest,
    /// A client of a published port's.
    Client,
    /// The guest, which asks the resolver.
    Asker,
}

impl BegunBy {
    /// Those who exchange more than a question and an answer.
    pub const ENDS: [Self; 2] = [Self::Guest, Self::Client];
    /// How many there are.
    const COUNT: usize = 3;
}

/// What a flow waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// A connection for its other end.
    OtherEnd,
    /// Datagrams for an answer.
    Answer,
}

/// Flows that wait for their other end, the oldest first.
#[derive(Debug, Default)]
struct HalfOpen {
    queue: VecDeque<(Instant, Token)>,
    /// How many have come since all of them were looked at.
    came: usize,
}

/// The queues, each with the oldest first.
#[derive(Debug)]
pub(super) struct Waiting {
    /// Flows that are over but remembered: they give way to new ones.
    over: VecDeque<Token>,
    /// Flows that wait for their other end, by who began them.
    half_open: [HalfOpen; BegunBy::COUNT],
    /// So many of each may at once.
    most_half_open: [usize; BegunBy::COUNT],
    /// Flows that nobody has answered: the guest's ports, and clients of published ones.
    unanswered: [VecDeque<(Instant, Token)>; BegunBy::COUNT],
    /// Flows that may be idle, and when they were last seen not to be.
    idle: [VecDeque<(Instant, Token)>; BegunBy::COUNT],
}

impl Waiting {
    pub(super) fn new(most: Most) -> Self {
        let most_half_open = [most.half_open, most.half_open, most.queries];
        Self {
            over: VecDeque::new(),
            half_open: Default::default(),
            most_half_open,
            unanswered: Default::default(),
            idle: Default::default(),
        }
    }

    /// Those that wait for this, and whom one of these began.
    const fn queue(&mut self, wait: Wait, begun: BegunBy) -> &mut VecDeque<(Instant, Token)> {
        match wait {
            Wait::OtherEnd => &mut self.half_open[begun as usize].queue,
            Wait::Answer => &mut self.unanswered[begun as usize],
        }
    }

    /// Gives up room that a crowd has left behind.
    pub(super) fn shrink(&mut self) {
        self.over.shrink_to(KEPT);
        for half_open in &mut self.half_open {
            half_open.queue.shrink_to(KEPT);
        }
        for queue in self.unanswered.iter_mut().chain(&mut self.idle) {
            queue.shrink_to(KEPT);
        }
    }

    /// The bounds hold.
    pub(super) fn check(&self) -> Result<(), String> {
        let counts = self.half_open.iter().map(|it| it.queue.len());
        let mut judged = counts.zip(self.most_half_open);
        match judged.find(|(count, most)| count > most) {
            Some((count, _)) => Err(format!("{count} are half open")),
            None => Ok(()),
        }
    }
}

impl<F> Table<F> {
    /// Forgets the oldest flow that is over.
    ///
    /// # Errors
    /// [`Full`] when there is none.
    pub(super) fn forget_one(&mut self) -> Result<(), Full> {
        let oldest = self.waiting.over.pop_front().ok_or(Full)?;
        self.remove(oldest);
        Ok(())
    }

    /// Marks a flow as over: it gives way when the table is full.
    pub fn set_evictable(&mut self, token: Token) {
        self.waiting.over.push_back(token);
        // Tokens of flows that ended otherwise stay behind; the queue is kept in proportion.
        if self.waiting.over.len() > self.most_entries() {
            let mut kept = std::mem::take(&mut self.waiting.over);
            kept.retain(|&token| self.entry(token).is_some());
            self.waiting.over = kept;
        }
    }

    /// Notes that a flow waits for its other end from now on.
    pub fn set_half_open(&mut self, now: Instant, token: Token, begun: BegunBy) {
        let half_open = &mut self.waiting.half_open[begun as usize];
        half_open.queue.push_back((now, token));
        half_open.came += 1;
    }

    /// Takes out the flow that has waited longest, of those that one of `begun` began, if it has since `latest` at
    /// least; `waits` says whether one does.
    pub fn take_longest(
        &mut self,
        wait: Wait,
        begun: &[BegunBy],
        latest: Instant,
        waits: impl Fn(&F) -> bool,
    ) -> Option<F> {
        let longest = begun
            .iter()
            .filter_map(|&begun| Some((self.longest(wait, begun, &waits)?, begun)));
        let ((since, token), begun) = longest.min_by_key(|((since, _), _)| *since)?;
        if since > latest {
            return None;
        }
        self.waiting.queue(wait, begun).pop_front();
        self.remove(token)
    }

    fn longest(
        &mut self,
        wait: Wait,
        begun: BegunBy,
        waits: impl Fn(&F) -> bool,
    ) -> Option<(Instant, Token)> {
        while let Some(&(since, token)) = self.waiting.queue(wait, begun).front() {
            let flow = self.get(token);
            if flow.is_some_and(&waits) {
                return Some((since, token));
            }
            let lives = flow.is_some();
            self.waiting.queue(wait, begun).pop_front();
            // What has been answered may be idle.
            if lives && wait == Wait::Answer {
                self.set_idle(since, token, begun);
            }
        }
        None
    }

    /// As many flows that these began wait for their other end as may.
    pub fn is_half_open_full(&mut self, begun: BegunBy, waits: impl Fn(&F) -> bool) -> bool {
        let most = self.waiting.most_half_open[begun as usize];
        let half_open = &mut self.waiting.half_open[begun as usize];
        // Looking at all costs each newcomer no more than a few looks.
        if half_open.queue.len() >= most && half_open.came >= most / 4 {
            let mut kept = std::mem::take(&mut half_open.queue);
            kept.retain(|&(_, token)| self.get(token).is_some_and(&waits));
            self.waiting.half_open[begun as usize] = HalfOpen {
                queue: kept,
                came: 0,
            };
        }
        self.longest(Wait::OtherEnd, begun, waits).is_some()
            && self.waiting.half_open[begun as usize].queue.len() >= most
    }

    /// Notes that a flow has not been answered; once it is, it may be idle.
    pub fn set_unanswered(&mut self, now: Instant, token: Token, begun: BegunBy) {
        self.waiting.unanswered[begun as usize].push_back((now, token));
        if self.waiting.unanswered[begun as usize].len() > self.most_entries() {
            let queue = std::mem::take(&mut self.waiting.unanswered[begun as usize]);
            self.waiting.unanswered[begun as usize] = self.living(queue);
        }
    }

    /// Notes a flow that may give way once it is idle.
    pub fn set_idle(&mut self, now: Instant, token: Token, begun: BegunBy) {
        self.waiting.idle[begun as usize].push_back((now, token));
        if self.waiting.idle[begun as usize].len() > self.most_entries() {
            let queue = std::mem::take(&mut self.waiting.idle[begun as usize]);
            self.waiting.idle[begun as usize] = self.living(queue);
        }
    }

    /// Takes out a flow that has carried nothing since `latest`, of those that one of `begun` began and that were idle the
    /// longest; `seen` says when one did, by its deadline. Of a crowd in use some are looked at, the others the next time.
    pub fn take_idle(
        &mut self,
        begun: &[BegunBy],
        latest: Instant,
        seen: impl Fn(&F, Instant) -> Option<Instant>,
    ) -> Option<F> {
        for _ in 0..LOOKS {
            let fronts = begun.iter().filter_map(|&begun| {
                let front = self.waiting.idle[begun as usize].front()?;
                Some((*front, begun))
            });
            let ((since, token), begun) = fronts.min_by_key(|((since, _), _)| *since)?;
            let entry = self.entry(token);
            let at = entry.and_then(|entry| seen(&entry.flow, entry.deadline));
            if at.is_some_and(|at| at <= since) && since > latest {
                return None;
            }
            let queue = &mut self.waiting.idle[begun as usize];
            queue.pop_front();
            match at {
                Some(at) if at <= latest => return self.remove(token),
                Some(at) => queue.push_back((at, token)),
                None => {}
            }
        }
        None
    }

    fn living(&self, mut queue: VecDeque<(Instant, Token)>) -> VecDeque<(Instant, Token)> {
        queue.retain(|&(_, token)| self.entry(token).is_some());
        queue
    }
}
