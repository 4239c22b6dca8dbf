//! Numbers that tell what happened to frames: every frame counts exactly once.
//!
//! Frames in = answered + forwarded + dropped, by reason, + handed to another worker: [`Counters::check`]
//! holds it in every simulated test. Datagrams of reassembly that time out later are counted apart.

use crate::flow::Fate;
use crate::net::DropReason;

use super::share::Whose;

/// What became of a frame from a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// The gateway itself answered, or took note.
    Answered,
    /// It went, or will go, to a host socket.
    Forwarded,
    /// It went no further.
    Dropped(DropReason),
    /// It is another worker's.
    Elsewhere(Whose),
}

impl From<Fate> for Disposition {
    fn from(fate: Fate) -> Self {
        match fate {
            Fate::Forwarded => Self::Forwarded,
            Fate::Answered => Self::Answered,
            Fate::Dropped(reason) => Self::Dropped(reason),
        }
    }
}

/// Counters of a stack.
#[derive(Debug, Clone)]
pub struct Counters {
    /// Frames from guests, by way of other workers, too.
    pub frames_in: u64,
    /// Bytes of those frames.
    pub bytes_in: u64,
    /// Frames that the gateway answered.
    pub answered: u64,
    /// Frames that went on to the host.
    pub forwarded: u64,
    /// Frames that were for another worker.
    pub handed: u64,
    dropped: [u64; DropReason::ALL.len()],
    /// Drops of what was no frame, or one that had been counted before: datagrams of the host's, fragments that
    /// waited in vain.
    dropped_later: u64,
    /// Flows begun.
    pub flows_opened: u64,
    /// Flows of published ports that went past the link.
    pub flows_spliced: u64,
    /// Bytes that went past the link.
    pub bytes_spliced: u64,
    /// Flows refused because of a limit.
    pub flows_refused: u64,
    /// Flows that gave way to newer ones before anybody had answered.
    pub flows_abandoned: u64,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            frames_in: 0,
            bytes_in: 0,
            answered: 0,
            forwarded: 0,
            handed: 0,
            dropped: [0; DropReason::ALL.len()],
            dropped_later: 0,
            flows_opened: 0,
            flows_spliced: 0,
            bytes_spliced: 0,
            flows_refused: 0,
            flows_abandoned: 0,
        }
    }
}

impl Counters {
    /// Counts one frame.
    pub fn count(&mut self, disposition: Disposition, bytes: usize) {
        self.frames_in += 1;
        self.bytes_in += bytes as u64;
        match disposition {
            Disposition::Answered => self.answered += 1,
            Disposition::Forwarded => self.forwarded += 1,
            Disposition::Dropped(reason) => self.dropped[reason as usize] += 1,
            Disposition::Elsewhere(_) => self.handed += 1,
        }
    }

    /// Counts drops of something whose frames have been counted already, or that came from the host.
    pub fn add_drops(&mut self, reason: DropReason, count: u64) {
        self.dropped[reason as usize] += count;
        self.dropped_later += count;
    }

    /// A frame that was counted as handed to another worker did not get there.
    pub fn lose_handed(&mut self) {
        self.add_drops(DropReason::WorkerBusy, 1);
    }

    /// Frames dropped for a reason.
    #[must_use]
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.dropped[reason as usize]
    }

    /// The reasons for which something was dropped, and how often.
    #[must_use]
    pub fn drops(&self) -> String {
        let reasons = DropReason::ALL.iter().zip(self.dropped);
        let told = reasons.filter(|(_, count)| *count > 0);
        let told: Vec<String> = told
            .map(|(reason, count)| format!("{reason:?} {count}"))
            .collect();
        told.join(", ")
    }

    /// Every frame is accounted for.
    ///
    /// # Errors
    /// The sums that differ.
    pub fn check(&self) -> Result<(), String> {
        let dropped = self.dropped.iter().sum::<u64>() - self.dropped_later;
        let sum = self.answered + self.forwarded + self.handed + dropped;
        if sum == self.frames_in {
            Ok(())
        } else {
            Err(format!("{} frames in, {sum} accounted for", self.frames_in))
        }
    }
}
