//! Whether guest and host take turns, and how long an acknowledgement may wait for that.
//!
//! Comes in: that the guest sent something, and how much had been taken from the host by then. Goes out: how long an
//! acknowledgement may wait for an answer to go with, and whether short payload is likely to be all that comes before
//! one.

use crate::net::Duration;

/// How long the acknowledgement of a short segment may wait for an answer to go with: a request is
/// mostly answered sooner, and a guest that waits for the acknowledgement alone (Nagle) loses no more
/// than this (RFC 9293 3.8.6.3 allows 500 ms).
const USUAL_DELAY: Duration = Duration::from_millis(1);

/// The same where the guest has said nothing twice without an answer in between for a while: it waits for the answer. Less
/// than Linux has it wait there (40 ms, `TCP_ATO_MIN` in `net/tcp.h`).
const DIALOGUE_DELAY: Duration = Duration::from_millis(20);

/// After so many answers in a row.
const WHILE: u8 = 4;

/// What is known of who spoke when.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Dialogue {
    /// What had been taken from the host when the guest last spoke.
    given: u32,
    /// How often in a row the guest had an answer before it spoke again.
    answers: u8,
}

impl Dialogue {
    /// The guest sends more, and so much has been taken from the host.
    pub(super) const fn note_guest(&mut self, given: u32) {
        self.answers = if self.is_answered(given) {
            self.answers.saturating_add(1)
        } else {
            0
        };
        self.given = given;
    }

    /// The guest has heard something since it last spoke, where so much has been taken from the host.
    pub(super) const fn is_answered(&self, given: u32) -> bool {
        given != self.given
    }

    /// How long the acknowledgement of a short segment may wait.
    pub(super) const fn delay(&self) -> Duration {
        if self.answers >= WHILE {
            DIALOGUE_DELAY
        } else {
            USUAL_DELAY
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledgement_waits_longer_while_every_request_has_its_answer() {
        let mut dialogue = Dialogue::default();
        let mut say = |given| {
            dialogue.note_guest(given);
            dialogue.delay()
        };
        for given in [0, 10, 20, 30] {
            assert_eq!(say(given), USUAL_DELAY, "too early at {given}");
        }
        assert_eq!(say(40), DIALOGUE_DELAY);
        assert_eq!(say(50), DIALOGUE_DELAY);
        // Twice in a row: who does that may wait for the acknowledgement of the first (RFC 896).
        assert_eq!(say(50), USUAL_DELAY);
        for given in [60, 50, 70] {
            assert_eq!(say(given), USUAL_DELAY, "too early at {given}");
        }
        assert_eq!(say(u32::MAX), DIALOGUE_DELAY);
    }
}
