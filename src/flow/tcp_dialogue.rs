//! Whether guest and host take turns, so that an acknowledgement may wait for the answer.
//!
//! Comes in: that the guest sent something, how much had been taken from the host by then, and that an answer did not
//! come in time. Goes out: whether a segment is likely to be a request, and how long the acknowledgement of one
//! may wait.

use crate::net::Duration;

/// How long the acknowledgement of a request may wait: whoever has waited for the answer each time will wait for the
/// next. Less than Linux has it wait there (40 ms, `TCP_ATO_MIN` in `net/tcp.h`).
pub(super) const REQUEST_DELAY: Duration = Duration::from_millis(10);

/// So many answers in a row make a dialogue.
const ANSWERS: u8 = 16;

/// What is known of who spoke when.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Dialogue {
    /// What had been taken from the host when the guest last spoke.
    given: u32,
    /// How often in a row the host had said something before the guest spoke again.
    answers: u8,
}

impl Dialogue {
    /// The guest sends more, and so much has been taken from the host.
    pub(super) const fn note_guest(&mut self, given: u32) {
        self.answers = if self.has_answer(given) {
            self.answers.saturating_add(1)
        } else {
            0
        };
        self.given = given;
    }

    /// An answer did not come in time.
    pub(super) const fn end(&mut self) {
        self.answers = 0;
    }

    /// The next segment is likely to be a request, where so much has been taken from the host.
    pub(super) const fn expects_request(&self, given: u32) -> bool {
        self.answers >= ANSWERS && self.has_answer(given)
    }

    const fn has_answer(&self, given: u32) -> bool {
        given != self.given
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// After so many answers, what the guest has been told so far.
    fn after(answers: u8) -> (Dialogue, u32) {
        let mut dialogue = Dialogue::default();
        for answer in 0..=u32::from(answers) {
            dialogue.note_guest(answer);
        }
        (dialogue, answers.into())
    }

    #[test]
    fn a_request_is_expected_where_each_had_its_answer() {
        let (dialogue, said) = after(ANSWERS - 1);
        assert!(!dialogue.expects_request(said + 1), "too early");
        let (mut dialogue, said) = after(ANSWERS);
        assert!(dialogue.expects_request(said + 1));
        assert!(!dialogue.expects_request(said), "no answer yet");
        // Twice in a row: who does that may wait for the acknowledgement of the first (RFC 896).
        dialogue.note_guest(said);
        assert!(!dialogue.expects_request(said + 1));
    }

    #[test]
    fn an_answer_that_did_not_come_ends_it() {
        let (mut dialogue, said) = after(u8::MAX);
        assert!(dialogue.expects_request(said + 1));
        dialogue.end();
        assert!(!dialogue.expects_request(said + 1));
        dialogue.note_guest(said + 1);
        assert!(!dialogue.expects_request(said + 2));
    }
}
