//! What became of datagrams that were to be sent.
//!
//! Comes in: one attempt after the other. Goes out: how many failed, and what the first of them was
//! told. One that is too long does not keep a shorter one behind it.

use std::io;

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
    /// The length from which on none leaves; none at all where that is 0.
    too_long: Option<usize>,
}

impl Sending {
    /// Sends the next, of `len` bytes. It is not tried where it would only be told the same as one before: too long is what a
    /// longer one is, too, and all else (no room, no route, no permission) is said of the others as well.
    pub(crate) fn attempt(&mut self, len: usize, send: impl FnOnce() -> io::Result<()>) {
        if self.too_long.is_none_or(|most| len < most) {
            let Err(error) = send() else {
                return;
            };
            let too_long = error.raw_os_error() == Some(libc::EMSGSIZE);
            self.too_long = Some(if too_long { len } else { 0 });
            self.failure.get_or_insert(SendFailure { error, lost: 0 });
        }
        if let Some(failure) = &mut self.failure {
            failure.lost += 1;
        }
    }

    /// So many can not leave, nor those behind them.
    pub(crate) fn give_up(&mut self, count: usize, error: io::Error) {
        self.too_long = Some(0);
        let failure = SendFailure { error, lost: 0 };
        self.failure.get_or_insert(failure).lost += count;
    }

    /// What became of all.
    pub(crate) fn end(self) -> Result<(), SendFailure> {
        self.failure.map_or(Ok(()), Err)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said of datagrams of these lengths that are told these, and how many were tried.
    fn sent(outcomes: &[(usize, i32)]) -> (Result<(), (Option<i32>, usize)>, usize) {
        let (mut sending, mut tried) = (Sending::default(), 0);
        for (len, errno) in outcomes {
            sending.attempt(*len, || {
                tried += 1;
                match errno {
                    0 => Ok(()),
                    errno => Err(io::Error::from_raw_os_error(*errno)),
                }
            });
        }
        let said = sending.end();
        let said = said.map_err(|it| (it.error.raw_os_error(), it.lost));
        (said, tried)
    }

    #[test]
    fn one_that_is_too_long_does_not_keep_shorter_ones() {
        let too_long = libc::EMSGSIZE;
        assert_eq!(sent(&[(9, 0), (9, 0)]), (Ok(()), 2));
        let last = [(9, too_long), (9, too_long), (4, 0)];
        assert_eq!(sent(&last), (Err((Some(too_long), 2)), 2));
        let both = [(9, too_long), (4, too_long), (3, 0)];
        assert_eq!(sent(&both), (Err((Some(too_long), 2)), 3));
    }

    #[test]
    fn what_is_said_of_all_is_asked_once() {
        for errno in [libc::EAGAIN, libc::ENOBUFS, libc::ENETUNREACH, libc::EPERM] {
            let all = [(9, 0), (9, errno), (9, 0), (4, 0)];
            assert_eq!(sent(&all), (Err((Some(errno), 3)), 2));
        }
        let both = [(9, libc::EMSGSIZE), (4, libc::EAGAIN), (3, 0)];
        assert_eq!(sent(&both), (Err((Some(libc::EMSGSIZE), 3)), 2));
    }
}
