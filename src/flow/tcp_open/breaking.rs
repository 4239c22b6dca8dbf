//! An open TCP flow that ends before both its streams have: one side failed, or its engine is not to be relied on.
//!
//! Comes in: what failed. Goes out: a RST to the guest where that is still to hear of it; the host's socket is reset with the
//! flow. What a host's socket had received before it failed is `failing.rs`'s.

use super::Open;
use crate::buf::TxBatch;
use crate::flow::tcp::Progress;
use crate::host::TcpSocket;
use crate::net::Instant;

/// What ended one direction early.
pub(super) enum Failure {
    /// The host's side failed: the guest gets a RST.
    Host,
    /// The guest's side failed: the host gets a RST.
    Guest,
}

impl<S: TcpSocket> Open<S> {
    /// Ends it: both sides get a RST.
    pub(in crate::flow) fn give_up(&mut self, now: Instant, tx: &mut TxBatch) {
        self.fail(&Failure::Guest, now, tx);
    }

    /// Ends it, for what one side did.
    pub(super) fn fail(&mut self, failure: &Failure, now: Instant, tx: &mut TxBatch) -> Progress {
        self.failed = true;
        if self.engine.is_broken() {
            self.engine.reset_guest(now, tx);
        } else if matches!(failure, Failure::Host) || self.guest_deadline.is_some() {
            self.engine.socket().abort();
            self.engine.egress(now, tx, false);
        }
        Progress::Gone
    }

    /// Ends the flow if its engine is broken.
    pub(super) fn end_broken(&mut self, now: Instant, tx: &mut TxBatch) -> Option<Progress> {
        let broken = self.engine.is_broken();
        broken.then(|| self.fail(&Failure::Host, now, tx))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::flow::tcp_engine::Path;
    use crate::flow::tcp_pool::EnginePool;
    use crate::host::simulated::{Network, SocketId};
    use crate::host::{Host, Token};
    use crate::net::Marks;
    use crate::net::emit::Ends;
    use crate::net::parse::tcp_flags;

    /// Where the flags are in a frame of IPv4 without options.
    const FLAGS: usize = 14 + 20 + 13;

    #[test]
    fn panic_ends_its_own_connection_and_no_other() {
        let (now, mut pool) = (Instant::ZERO, EnginePool::new(1 << 30, usize::MAX));
        let path = Path::plain();
        let ends = Ends {
            src: "192.0.2.1:80".parse().unwrap(),
            dst: "10.0.2.100:4000".parse().unwrap(),
        };
        let net = Network::new();
        let server = net
            .host()
            .tcp_connect(Token(1), ends.src, Marks::default())
            .unwrap();
        let mut engine = pool.engine(now, path, ends.src.ip(), 1).unwrap();
        engine.connect(ends).unwrap();
        let mut open = Open::new(engine, server, now + crate::net::Duration::from_secs(75));
        let mut tx = TxBatch::new(512, 256 * 1024);
        assert!(matches!(open.pump(now, &mut tx), Progress::Idle));
        tx.clear();

        let outcome = open
            .engine
            .shielded(|_| -> u8 { panic!("as smoltcp does") });
        assert_eq!(outcome, None);
        assert_eq!(open.deadline(now), now);
        assert!(matches!(open.pump(now, &mut tx), Progress::Gone));
        let flags: Vec<_> = tx.frames().map(|frame| frame.bytes()[FLAGS]).collect();
        assert_eq!(flags, [tcp_flags::RST | tcp_flags::ACK]);
        open.end(&mut pool);
        assert!(net.server_sees_reset(SocketId(0)));

        // Nobody gets the engine after it.
        assert_eq!(pool.in_use(), 0);
        let mut next = pool.engine(now, path, ends.src.ip(), 1).unwrap();
        assert_eq!(next.shielded(|_| 7), Some(7));
    }
}
