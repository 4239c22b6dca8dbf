//! An open TCP flow whose host's socket has failed: what the socket had received before still goes to the guest.
//!
//! Comes in: what the host's socket says of itself, the time. Goes out: whether all has been said, behind which the
//! guest's RST comes.

use super::{Open, is_end};
use crate::host::TcpSocket;
use crate::net::{Duration, Instant};

/// How long what the host had sent before it failed may take to the guest.
const LAST_WORDS: Duration = Duration::from_secs(30);

impl<S: TcpSocket> Open<S> {
    /// Asks the host's socket what it has failed by, if it may have.
    pub(super) fn look_for_error(&mut self) {
        if std::mem::take(&mut self.look_for_error)
            && let Err(error) = self.socket.connect_outcome()
            && (is_end(&error) || !self.host_ended)
        {
            self.lose_host();
        }
    }

    /// The host's socket has failed. It says so once; afterwards its stream looks as if it had ended in order.
    pub(super) const fn lose_host(&mut self) {
        self.host_failed = true;
        // What has come before is there without another word.
        self.readable = true;
    }

    /// The guest has what the host's socket had received before it failed. It may take its time, but not for ever.
    pub(super) fn has_said_all(&mut self, now: Instant) -> bool {
        self.guest_deadline.get_or_insert(now + LAST_WORDS);
        let read = self.host_ended || !self.readable;
        read && self.engine.socket().send_queue() == 0 && self.engine.ahead.is_settled()
    }
}
