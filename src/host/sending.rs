//! What became of datagrams that were to be sent.
//!
//! Comes in: one attempt after the other. Goes out: how many failed, and what the first of them was
//! told. One that can not leave does not keep those behind it, but for want of room.

use std::io::{self, ErrorKind};

/// Why datagrams did not leave.
#[derive(Debug, thiserror::Error)]
#[error("{lost} datagrams did not leave: {error}")]
pub struct SendFailure {
    /// What the first of them was told.
    #[source]
    pub error: io::Error,
    /// How many, at least one.
    pub lost: usize,
}

/// Datagrams that are being sent.
#[derive(Debug, Default)]
pub(crate) struct Sending {
    failure: Option<SendFailure>,
    full: bool,
}

impl Sending {
    /// Sends the next. Once the socket has no room, that is not tried: each would only be told the same.
    pub(crate) fn attempt(&mut self, send: impl FnOnce() -> io::Result<()>) {
        let sent = if self.full {
            Err(ErrorKind::WouldBlock.into())
        } else {
            send()
        };
        if let Err(error) = sent {
            self.full |= error.kind() == ErrorKind::WouldBlock;
            let failure = SendFailure { error, lost: 0 };
            self.failure.get_or_insert(failure).lost += 1;
        }
    }

    /// What became of all.
    pub(crate) fn end(self) -> Result<(), SendFailure> {
        self.failure.map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said of datagrams that are told these, and how many were tried.
    fn sent(outcomes: &[Option<ErrorKind>]) -> (Result<(), (ErrorKind, usize)>, usize) {
        let (mut sending, mut tried) = (Sending::default(), 0);
        for outcome in outcomes {
            sending.attempt(|| {
                tried += 1;
                outcome.map_or(Ok(()), |kind| Err(kind.into()))
            });
        }
        let said = sending.end().map_err(|it| (it.error.kind(), it.lost));
        (said, tried)
    }

    #[test]
    fn one_that_fails_does_not_keep_the_others() {
        let (refused, denied) = (ErrorKind::ConnectionRefused, ErrorKind::PermissionDenied);
        assert_eq!(sent(&[None, None]), (Ok(()), 2));
        let mixed = [None, Some(refused), None, Some(denied), None];
        assert_eq!(sent(&mixed), (Err((refused, 2)), 5));
    }

    #[test]
    fn without_room_the_rest_is_not_tried() {
        let full = ErrorKind::WouldBlock;
        assert_eq!(sent(&[None, Some(full), None, None]), (Err((full, 3)), 2));
        let denied = ErrorKind::PermissionDenied;
        assert_eq!(
            sent(&[Some(denied), Some(full), None]),
            (Err((denied, 3)), 2)
        );
    }
}
