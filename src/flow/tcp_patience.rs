//! How long an engine waits for a guest that is silent, and when it does not wait.
//!
//! Comes in: the time, and word that the link is back. Goes out: what smoltcp is told of timers, and the time at which it
//! is to send. What was asked for is in the configuration's [`Timeouts`](crate::config::Timeouts).

use super::tcp_engine::Engine;
use crate::net::{Duration, Instant};

/// A guest that was asked and says nothing is asked again after this time, or sooner where it has little time to answer.
const ASK_AGAIN: Duration = Duration::from_secs(75);

/// The longest that smoltcp 0.14 waits before it sends again.
const MAX_RTO: Duration = Duration::from_secs(60);
/// Seconds; who has less to answer may be given up by a clock that runs ahead.
const PATIENT: u32 = 300;

impl Engine {
    /// Has the guest asked when it has been silent, and given up in the end.
    pub(super) fn be_patient(&mut self) {
        let timeouts = self.path.timeouts;
        let socket = self.socket();
        socket.set_keep_alive(Some(seconds(timeouts.ask_after())));
        socket.set_timeout(Some(seconds(timeouts.tcp_idle)));
    }

    /// Asks the guest at once whether it is there, and gives it little time to be heard of; once it is, as long as
    /// ever.
    pub(super) fn hurry(&mut self) {
        let answer = seconds(self.path.timeouts.answer());
        let socket = self.socket();
        // Without a time before, this one is due at once.
        socket.set_keep_alive(Some(ASK_AGAIN.min(answer / 4)));
        socket.set_timeout(Some(answer));
        self.hurried = true;
    }

    /// Sends what is outstanding again at the next opportunity.
    pub(super) const fn repeat(&mut self) {
        self.repeats = true;
        self.ahead.seems_lost();
    }

    /// The time at which smoltcp sends next: that of its timer, where what is outstanding is to be sent again. That is no
    /// more than a minute ahead, and matters for one segment; what goes with it has the true time.
    pub(super) fn sends_at(&mut self, now: Instant) -> Instant {
        if !std::mem::take(&mut self.repeats) || self.path.timeouts.tcp_idle < PATIENT {
            return now;
        }
        let timer = self.poll_at(now).filter(|at| *at <= now + MAX_RTO);
        timer.unwrap_or(now).max(now)
    }
}

/// A timeout.
pub(super) const fn seconds(seconds: u32) -> Duration {
    Duration::from_secs(seconds as u64)
}
