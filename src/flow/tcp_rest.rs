//! Connections at rest: what is left of an engine while nothing moves, and how it goes on.
//!
//! A connection in which nothing is under way needs no rings, no timers and no socket: a few numbers say
//! all ([`Rest`]). When something comes, another engine is told the story of the connection in three to
//! five segments that nobody else sees, after which it stands where the first one stopped. Comes in: an
//! engine that is settled, or the numbers. Goes out: the other of the two.
//!
//! smoltcp draws its initial sequence number from a seed; [`seed_for`] finds the one that it draws a given
//! number from. That this is so is verified each time, and by a test.

use smoltcp::phy::{Device, DeviceCapabilities, RxToken, TxToken};
use smoltcp::socket::tcp::State;
use smoltcp::wire::TcpControl;

use super::tcp_device::{Path, capabilities};
use super::tcp_engine::{Engine, Line, MAX_HEADERS, RING, Syn, endpoint, length};
use super::tcp_patience::seconds;
use super::tcp_written::Written;
use crate::config::Timeouts;
use crate::net::emit::Ends;
use crate::net::parse::tcp_flags;
use crate::net::{Duration, Instant};

/// A settled engine waits for nothing that comes sooner, nor in half the time to keep-alive, which is all that is left.
const FAR: Duration = Duration::from_secs(600);

/// A connection in which nothing is under way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rest(Line);

impl Rest {
    /// The seed of an interface for this connection.
    pub(super) fn seed(&self) -> u64 {
        seed_for(self.0.sent.initial)
    }

    /// The next sequence number of the guest's (`RCV.NXT`).
    pub(super) fn expected(&self, guest_ended: bool) -> u32 {
        self.0.next_in.wrapping_add(u32::from(guest_ended))
    }
}

/// What has become of the two directions.
#[derive(Debug, Clone, Copy)]
pub(super) struct Streams {
    /// The guest's end of stream has come, and was acknowledged.
    pub(super) guest_ended: bool,
    /// Ours was sent, and was acknowledged.
    pub(super) host_ended: bool,
    /// Nothing came since.
    pub(super) silent_since: Instant,
}

impl Streams {
    /// When the guest is to be asked whether it is still there.
    pub(super) fn keepalive_at(&self, timeouts: Timeouts) -> Instant {
        let half_closed = self.guest_ended || self.host_ended;
        let patience = if half_closed {
            timeouts.tcp_half_closed
        } else {
            timeouts.ask_after()
        };
        self.silent_since + seconds(patience)
    }
}

impl Engine {
    /// Nothing is to be sent soon, nor awaited.
    pub(super) fn is_settled(&mut self, now: Instant) -> bool {
        let far = FAR.min(seconds(self.path.timeouts.ask_after()) / 2);
        self.poll_at(now).is_none_or(|at| at >= now + far)
    }

    /// What is left of a settled engine.
    pub(super) const fn rest(&self) -> Rest {
        let mut line = self.line;
        // The payload so far moves the beginning: all of it has been acknowledged.
        line.sent.initial = line.sent.initial.wrapping_add(line.given);
        line.given = 0;
        line.sent.next = line.sent.initial.wrapping_add(1);
        line.sent.skipped = 0;
        line.sent.withheld = 0;
        line.furthest = line.next_in;
        Rest(line)
    }

    /// Goes on with a connection that was at rest. The engine is new, with the seed of [`Rest::seed`]. False
    /// when it does not stand where the other one stopped, which would be a change in smoltcp.
    pub(super) fn resume(
        &mut self,
        now: Instant,
        ends: Ends,
        rest: &Rest,
        streams: Streams,
    ) -> bool {
        let line = rest.0;
        let ours = line.sent.initial.wrapping_add(1);
        self.set_ends(ends);
        let overdue = now >= streams.keepalive_at(self.path.timeouts);
        let socket = self.prepare();
        if overdue {
            socket.set_keep_alive(None);
        }
        if socket.listen(endpoint(ends.dst)).is_err() {
            return false;
        }
        let mut options = line.options;
        if let (Some(ours), Some(last)) = (&mut options.timestamp, line.sent.last.timestamps)
            && let [.., a, b, c, d] = last
        {
            *ours = u32::from_be_bytes([a, b, c, d]);
        }
        let syn = Syn {
            seq: line.next_in.wrapping_sub(1),
            window: u16::MAX,
            tos: 0,
            options,
        };
        let window = line.guest_window;
        let tell = |control, ack| Written::ack(ends, control, [line.next_in, ack], window);
        let initial = self.rehearse(now, Some(&Written::syn(ends, syn)));
        self.rehearse(now, Some(&tell(TcpControl::None, ours)));
        if streams.guest_ended {
            self.rehearse(now, Some(&tell(TcpControl::Fin, ours)));
        }
        if streams.host_ended {
            self.socket().close();
            self.rehearse(now, None);
            self.rehearse(now, Some(&tell(TcpControl::None, ours.wrapping_add(1))));
        }
        self.line = line;
        self.line.sent.next = ours.wrapping_add(u32::from(streams.host_ended));
        // smoltcp has said as much as its SYN could, and takes as much as its ring has room for.
        let room = length(RING).min(u32::from(u16::MAX) << self.limit().1);
        self.line.sent.room = line.next_in.wrapping_add(room);
        self.extent.begin_at(line.next_in);
        if overdue {
            self.hurry();
        }
        let state = match (streams.guest_ended, streams.host_ended) {
            (false, false) => State::Established,
            (true, false) => State::CloseWait,
            (false, true) => State::FinWait2,
            (true, true) => return false,
        };
        initial == Some(line.sent.initial) && self.socket().state() == state
    }

    /// Lets smoltcp hear a segment, and answer it to nobody. Gives the sequence number of its SYN, if it
    /// sent one.
    fn rehearse(&mut self, now: Instant, segment: Option<&Written>) -> Option<u32> {
        let mut device = Rehearsal {
            packet: segment.map(Written::bytes),
            path: self.path,
            initial: None,
        };
        self.shielded(|it| {
            if segment.is_some() {
                it.interface
                    .poll_ingress_single(now, &mut device, &mut it.sockets);
            }
            // A SYN|ACK, a FIN or an acknowledgement: one at a time.
            it.interface.poll_egress(now, &mut device, &mut it.sockets);
        });
        device.initial
    }
}

/// A device whose only guest is imagined.
struct Rehearsal<'a> {
    packet: Option<&'a [u8]>,
    path: Path,
    initial: Option<u32>,
}

impl Device for Rehearsal<'_> {
    type RxToken<'a>
        = Heard<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Said<'a>
    where
        Self: 'a;

    fn receive(&mut self, _now: Instant) -> Option<(Heard<'_>, Said<'_>)> {
        let packet = self.packet.take()?;
        Some((Heard(packet), Said(&mut self.initial, self.path.ipv6)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Said<'_>> {
        Some(Said(&mut self.initial, self.path.ipv6))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        capabilities(self.path)
    }
}

struct Heard<'a>(&'a [u8]);

impl RxToken for Heard<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// Takes what smoltcp says, and keeps the sequence number of a SYN.
struct Said<'a>(&'a mut Option<u32>, bool);

impl TxToken for Said<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut headers = [0; MAX_HEADERS];
        let mut longer = Vec::new();
        let packet = match headers.get_mut(..len) {
            Some(packet) => packet,
            None => {
                longer.resize(len, 0);
                &mut longer[..]
            }
        };
        let result = f(packet);
        let tcp = packet.get(if self.1 { 40 } else { 20 }..).unwrap_or(&[]);
        if let [_, _, _, _, a, b, c, d, _, _, _, _, _, flags, ..] = *tcp
            && flags & tcp_flags::SYN != 0
        {
            *self.0 = Some(u32::from_be_bytes([a, b, c, d]));
        }
        result
    }
}

/// The seed from which smoltcp 0.14 draws a sequence number. Its generator is the sPCG32 of
/// <https://www.pcg-random.org>; the first number drawn becomes an identifier that must not be zero, the
/// second is ours.
fn seed_for(initial: u32) -> u64 {
    const MULTIPLIER: u64 = 0xbb2e_fcec_3c39_611d;
    const INCREMENT: u64 = 0x7590_ef39;
    /// Bits of the state below those that are drawn, where its upper three bits are zero; as many fewer
    /// as those three say.
    const BELOW: u64 = 29;
    let before = |state: u64| inverse(MULTIPLIER).wrapping_mul(state.wrapping_sub(INCREMENT));
    let identifies = |state: &u64| {
        let drawn = (state >> (BELOW - (state >> 61))) & 0xffff_ffff;
        (drawn ^ (drawn >> 16)) & 0xffff != 0
    };
    let mut states = (0..8).map(|low| before(u64::from(initial) << BELOW | low));
    // Eight zeros in a row are not met; the engine would be found out of place.
    before(states.find(identifies).unwrap_or_default())
}

/// The number that gives 1 when multiplied with an odd one, modulo 2^64 (Newton's iteration: each step
/// doubles the bits that are right, of which there are three at first).
const fn inverse(odd: u64) -> u64 {
    let mut inverse = odd;
    let mut step = 0;
    while step < 5 {
        inverse = inverse.wrapping_mul(2_u64.wrapping_sub(odd.wrapping_mul(inverse)));
        step += 1;
    }
    inverse
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::buf::TxBatch;
    use crate::flow::tcp_pool::EnginePool;
    use crate::net::parse::SynOptions;

    fn ends() -> Ends {
        Ends {
            src: "10.0.2.100:4000".parse().unwrap(),
            dst: "192.0.2.1:80".parse().unwrap(),
        }
    }

    fn rest(initial: u32, next_in: u32) -> Rest {
        let mut line = Line::default();
        line.sent.initial = initial;
        line.next_in = next_in;
        line.guest_window = 1000;
        line.options = SynOptions {
            mss: Some(1460),
            window_scale: Some(7),
            sack_permitted: true,
            timestamp: Some(5),
        };
        Rest(line)
    }

    #[test]
    fn an_engine_goes_on_with_any_sequence_number_in_every_state() {
        let mut pool = EnginePool::new(1 << 30, usize::MAX);
        let edges = [0, 1, u32::MAX, u32::MAX - 1, 1 << 31, 0x1234_5678];
        let numbers = (0..2000_u32).map(|n| n.wrapping_mul(0x9e37_79b9));
        for initial in edges.into_iter().chain(numbers) {
            for (guest_ended, host_ended) in [(false, false), (true, false), (false, true)] {
                let streams = Streams {
                    guest_ended,
                    host_ended,
                    silent_since: Instant::ZERO,
                };
                let rest = rest(initial, initial.rotate_left(7));
                let engine = pool.resume(Instant::ZERO, (Path::plain(), ends()), &rest, streams);
                assert!(engine.is_ok(), "{initial:#x} {streams:?}");
                pool.put(engine.unwrap());
            }
        }
    }

    #[test]
    fn a_resumed_engine_has_nothing_to_say_but_its_next_byte() {
        let mut pool = EnginePool::new(1 << 30, usize::MAX);
        let mut tx = TxBatch::new(64, 256 * 1024);
        let streams = Streams {
            guest_ended: false,
            host_ended: false,
            silent_since: Instant::ZERO,
        };
        let rest = rest(999, 5000);
        let mut engine = pool
            .resume(Instant::ZERO, (Path::plain(), ends()), &rest, streams)
            .unwrap();
        engine.egress(Instant::ZERO, &mut tx, true);
        assert_eq!(tx.frames().count(), 0, "it stands where the other stopped");
        engine
            .send(|room| {
                room[0] = b'x';
                (1, ())
            })
            .unwrap();
        engine.egress(Instant::ZERO, &mut tx, true);
        let frames: Vec<_> = tx.frames().map(|frame| frame.bytes().to_vec()).collect();
        assert_eq!(frames.len(), 1);
        let tcp = &frames[0][34..];
        assert_eq!(tcp[4..12], [0, 0, 0x3, 0xe8, 0, 0, 0x13, 0x88]);
        assert_eq!(tcp[12] >> 4, 8, "with timestamps");
        assert_eq!(tcp.last(), Some(&b'x'));
        assert_eq!(engine.rest().seed(), seed_for(1000));
    }
}
