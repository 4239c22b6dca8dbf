//! How long a connection may be silent, and a port unused, before it ends.
//!
//! Whole seconds, since nothing here has to be precise. Comes in: what was asked for. Goes out: the times that follow
//! from it.

use std::ops::RangeInclusive;

/// An open connection: two hours and ten minutes. RFC 5382 REQ-5 asks for two hours and four at least.
pub const DEFAULT_TCP_IDLE: u32 = 7_800;
/// Of a connection that is half closed the guest's end may have no owner, which its kernel forgets after a
/// minute (RFC 9293 3.6).
pub const DEFAULT_TCP_HALF_CLOSED: u32 = 75;
/// A connection that the host's network does not answer: about what Linux waits.
pub const DEFAULT_TCP_CONNECT: u32 = 130;
/// A UDP port that was answered: RFC 4787 REQ-5 asks for two minutes at least.
pub const DEFAULT_UDP_IDLE: u32 = 180;

/// What may be asked for, of each: seconds up to a day, for idle connections up to a month.
pub const TCP_IDLE: RangeInclusive<i64> = 10..=2_592_000;
/// See [`TCP_IDLE`].
pub const TCP_HALF_CLOSED: RangeInclusive<i64> = 5..=86_400;
/// See [`TCP_IDLE`].
pub const TCP_CONNECT: RangeInclusive<i64> = 1..=86_400;
/// See [`TCP_IDLE`].
pub const UDP_IDLE: RangeInclusive<i64> = 1..=86_400;

/// How long a guest that is asked whether it is still there may take to answer, at most.
const ANSWER: u32 = 600;
/// How long a guest may take to answer the SYN of a published port's client, or our SYN|ACK, at most.
const GUEST: u32 = 75;
/// A UDP port that was never answered, at most.
const UDP_UNANSWERED: u32 = 30;
/// A UDP port that only ever spoke to a DNS server, at most.
const UDP_DNS: u32 = 10;

/// Timeouts, seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// An open connection whose guest is silent, and does not answer when asked, is given up.
    pub tcp_idle: u32,
    /// The guest is asked after this time where one stream has ended.
    pub tcp_half_closed: u32,
    /// A connection request that the host's network does not answer.
    pub tcp_connect: u32,
    /// A UDP port that was answered, and carries nothing any more.
    pub udp_idle: u32,
}

impl Timeouts {
    /// A guest that is silent for this time is asked whether it is still there.
    #[must_use]
    pub const fn ask_after(self) -> u32 {
        self.tcp_idle - self.answer()
    }

    /// A guest that was asked has this time to answer.
    #[must_use]
    pub const fn answer(self) -> u32 {
        let half = self.tcp_idle / 2;
        if half < ANSWER { half } else { ANSWER }
    }

    /// A guest that is to agree to a connection has this time.
    #[must_use]
    pub fn guest(self) -> u32 {
        self.tcp_connect.min(GUEST)
    }

    /// A UDP port is closed after this time, by whether it was answered, and only spoke to DNS servers.
    #[must_use]
    pub fn udp(self, answered: bool, only_dns: bool) -> u32 {
        match (only_dns, answered) {
            (true, _) => self.udp_idle.min(UDP_DNS),
            (false, false) => self.udp_idle.min(UDP_UNANSWERED),
            (false, true) => self.udp_idle,
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            tcp_idle: DEFAULT_TCP_IDLE,
            tcp_half_closed: DEFAULT_TCP_HALF_CLOSED,
            tcp_connect: DEFAULT_TCP_CONNECT,
            udp_idle: DEFAULT_UDP_IDLE,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn others_follow_from_what_was_asked_for() {
        let usual = Timeouts::default();
        assert_eq!((usual.ask_after(), usual.answer()), (7_200, 600));
        assert_eq!((usual.guest(), usual.udp(true, false)), (75, 180));
        assert_eq!((usual.udp(false, false), usual.udp(false, true)), (30, 10));
        let short = Timeouts {
            tcp_idle: 10,
            tcp_connect: 1,
            udp_idle: 5,
            ..usual
        };
        assert_eq!((short.ask_after(), short.answer()), (5, 5));
        assert_eq!((short.guest(), short.udp(true, true)), (1, 5));
    }
}
