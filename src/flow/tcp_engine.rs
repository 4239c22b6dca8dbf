//! One TCP endpoint towards the guest: an `Interface` with a single socket.
//!
//! This and the files beside it that begin with `tcp` are the only ones that name smoltcp's TCP socket. Comes in: IP
//! packets that the parser has passed, and the time. Goes out: frames with the offloads that the
//! link does, or complete ones. The engine has no policy: it neither opens nor closes by itself.

use std::net::{IpAddr, SocketAddr};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{ConnectError, ListenError, SendError, Socket, SocketBuffer, State};
use smoltcp::wire::{HardwareAddress, IpCidr, IpEndpoint};

use super::Fate;
use super::tcp_ahead::Ahead;
use super::tcp_completion::{MSS, Sent, ahead_of, option};
use super::tcp_device::{NullDevice, capabilities};
use super::tcp_dialogue::Dialogue;
use super::tcp_direct::Owed;
use super::tcp_memory::Extent;
use super::tcp_written::Written;
use crate::buf::{Pages, TxBatch};
use crate::net::parse::{self, SynOptions, TcpSegment, tcp_flags};
use crate::net::{Duration, Instant, TCP_HEADER, emit};

pub use super::tcp_completion::LastSent;
pub use super::tcp_device::Path;

/// Bytes of each direction's ring. Less costs throughput; the memory is committed
/// as it is used.
pub const RING: usize = 1 << 20;

/// The scale that smoltcp announces for a ring of that size: the least by which its window fits 16 bits.
pub(super) const RING_SCALE: u32 = (RING.ilog2() + 1).saturating_sub(16);

/// Headers of a segment without payload are no longer than this: 60 bytes each at most.
pub(super) const MAX_HEADERS: usize = 120;

/// How long the acknowledgement of a short segment may wait for an answer to go with: a request is
/// mostly answered sooner, and a guest that waits for the acknowledgement alone (Nagle) loses no more
/// than this (RFC 9293 3.8.6.3 allows 500 ms).
const ACK_DELAY: Duration = Duration::from_millis(1);

// Flows are many: a smoltcp feature that fattens these shows here.
const _: () = assert!(
    size_of::<Interface>() <= 160,
    "smoltcp's default features crept in"
);
const _: () = assert!(
    size_of::<Socket<'static>>() <= 520,
    "smoltcp's default features crept in"
);

/// The connection request of a guest, kept while the host connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Syn {
    /// Initial sequence number.
    pub seq: u32,
    /// Window field.
    pub window: u16,
    /// Type of service.
    pub tos: u8,
    /// Options.
    pub options: SynOptions,
}

/// What is known of a connection beside what smoltcp knows; while it rests, all that is known.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Line {
    /// What the guest offered, its MSS as it was agreed on.
    pub(super) options: SynOptions,
    pub(super) sent: Sent,
    /// Bytes taken from the host since our SYN; wraps.
    pub(super) given: u32,
    /// The next sequence number to pass to the host; the guest's FIN is not counted.
    pub(super) next_in: u32,
    /// Behind the furthest payload that smoltcp has heard of.
    pub(super) furthest: u32,
    /// The latest acknowledgement of the guest's.
    pub(super) guest_ack: Option<u32>,
    /// The window that came with it, scaled.
    pub(super) guest_window: u16,
    /// It came in a segment that is no SYN: nothing of it was lost by scaling.
    pub(super) window_is_exact: bool,
}

/// A TCP endpoint towards the guest.
pub struct Engine {
    pub(super) interface: Interface,
    pub(super) sockets: SocketSet<'static>,
    handle: SocketHandle,
    pub(super) path: Path,
    pub(super) line: Line,
    /// What the host took directly is not acknowledged yet.
    pub(super) owed: Option<Owed>,
    pub(super) dialogue: Dialogue,
    /// How much of the rings has been written to.
    pub(super) extent: Extent,
    /// Where the receive ring lies, which is the socket's.
    pub(super) rx_pages: Pages,
    pub(super) ends: emit::Ends,
    pub(super) varied: bool,
    /// The guest is being asked whether it is still there, and has less time than else.
    pub(super) hurried: bool,
    /// Nobody is challenged before this time.
    pub(super) challenge_at: Option<Instant>,
    /// What is outstanding is to be sent again.
    pub(super) repeats: bool,
    /// The host has taken something, and the guest may have to hear that it may send more.
    pub(super) owes_window: bool,
    /// What smoltcp does not know of what was sent.
    pub(super) ahead: Ahead,
    /// Smoltcp has panicked over it.
    pub(super) broken: bool,
}

impl Engine {
    /// An engine for the endpoint `local` (an outside address), not yet open. `seed` decides its
    /// initial sequence number and must be unpredictable (RFC 6528).
    pub(super) fn new(
        (now, seed): (Instant, u64),
        path: Path,
        local: IpAddr,
        rings: [Vec<u8>; 2],
        extent: Extent,
    ) -> Self {
        let [mut rx, tx] = rings;
        let rx_pages = Pages::of(&mut rx);
        let [rx, tx] = [rx, tx].map(SocketBuffer::new);
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(Socket::new(rx, tx));
        Self {
            interface: interface((now, seed), path, local),
            sockets,
            handle,
            path,
            line: Line::default(),
            owed: None,
            dialogue: Dialogue::default(),
            extent,
            rx_pages,
            ends: emit::Ends {
                src: SocketAddr::new(local, 0),
                dst: SocketAddr::new(local, 0),
            },
            varied: false,
            hurried: false,
            challenge_at: None,
            repeats: false,
            owes_window: false,
            ahead: Ahead::default(),
            broken: false,
        }
    }

    /// The same for another connection: only the rings stay.
    pub(super) fn renew(&mut self, (now, seed): (Instant, u64), path: Path, local: IpAddr) {
        self.socket().abort();
        self.interface = interface((now, seed), path, local);
        self.path = path;
        self.line = Line::default();
        self.owed = None;
        self.dialogue = Dialogue::default();
        self.extent.restart();
        self.varied = false;
        self.hurried = false;
        self.challenge_at = None;
        self.repeats = false;
        self.owes_window = false;
        self.ahead = Ahead::default();
    }

    /// The socket: states, rings.
    pub fn socket(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    /// Our next sequence number, and what was said last.
    #[must_use]
    pub const fn last_sent(&self) -> (u32, LastSent) {
        let Sent { last, next, .. } = self.line.sent;
        (next, last)
    }

    /// The guest has acknowledged everything, the end of the stream as well where that was sent.
    pub(super) fn has_all_acknowledged(&self) -> bool {
        self.line.guest_ack == Some(self.line.sent.next)
    }

    /// The guest's window scale (RFC 7323), at most 14.
    pub(super) fn scale(&self) -> u8 {
        self.line.options.window_scale.unwrap_or(0)
    }

    /// Largest payload of a segment that the guest takes.
    pub(super) fn mss(&self) -> u16 {
        self.line.options.mss.unwrap_or(self.path.mss())
    }

    /// The sequence number up to which the guest lets us send, once it has said so by a window that is scaled.
    pub(super) fn reach(&self) -> Option<u32> {
        let window = u32::from(self.line.guest_window) << self.scale();
        let acked = self.line.guest_ack.filter(|_| self.line.window_is_exact);
        acked.map(|acked| acked.wrapping_add(window))
    }

    /// The host has taken payload of the guest's.
    pub(super) fn note_taken(&mut self, bytes: usize) {
        self.line.next_in = self.line.next_in.wrapping_add(length(bytes));
    }

    /// Something may be written for the guest.
    pub(super) fn can_send(&mut self) -> bool {
        let segment = usize::from(self.mss());
        let socket = self.socket();
        let (can_send, empty) = (socket.can_send(), socket.send_queue() == 0);
        can_send && self.extent.room(empty, segment) > 0
    }

    /// Lets the host write payload for the guest into the free part of the send ring, as
    /// [`Socket::send`] does.
    ///
    /// # Errors
    /// When nothing can be sent any more.
    pub(super) fn send<R>(
        &mut self,
        write: impl FnOnce(&mut [u8]) -> (usize, R),
    ) -> Result<R, SendError> {
        let empty = self.socket().send_queue() == 0;
        let most = self.extent.room(empty, usize::from(self.mss()));
        let mut written = 0;
        let result = self.socket().send(|room| {
            let most = most.min(room.len());
            let (len, result) = write(&mut room[..most]);
            written = len;
            (len, result)
        });
        self.line.given = self.line.given.wrapping_add(length(written));
        self.extent.sent(empty, written);
        result
    }

    /// Ends the stream to the guest, if that is safe by now; true when it did. smoltcp 0.14 does not hear in
    /// LAST-ACK that a window opens: what does not fit the guest's window goes before the end does.
    pub(super) fn close(&mut self) -> bool {
        let window = usize::from(self.line.guest_window) << self.scale();
        let socket = self.socket();
        let deaf = socket.state() == State::CloseWait && socket.send_queue() > window;
        if !deaf {
            socket.close();
        }
        !deaf
    }

    pub(super) fn prepare(&mut self) -> &mut Socket<'static> {
        self.be_patient();
        let socket = self.socket();
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        // Offered, and taken where the guest offers it; the time is written in by the device.
        socket.set_tsval_generator(Some(|| 0));
        socket
    }

    /// Answers a guest's connection request to `local`: listens, and replays the SYN.
    ///
    /// # Errors
    /// When `local` is no endpoint to listen at, which the parser excludes.
    pub fn accept(
        &mut self,
        now: Instant,
        tx: &mut TxBatch,
        ends: emit::Ends,
        syn: Syn,
    ) -> Result<(), ListenError> {
        let local = endpoint(ends.dst);
        self.prepare().listen(local)?;
        let mut options = syn.options;
        options.mss = Some(self.agree(options.mss));
        self.set_ends(ends);
        self.note_syn(syn.seq, syn.window, options);
        let replay = Written::syn(ends, Syn { options, ..syn });
        self.ingress(now, tx, replay.bytes());
        Ok(())
    }

    /// The guest's SYN came.
    pub(super) fn note_syn(&mut self, seq: u32, window: u16, options: SynOptions) {
        self.line.options = options;
        self.line.next_in = seq.wrapping_add(1);
        self.line.furthest = self.line.next_in;
        // What our own SYN announced, if it came before.
        let said = u32::from(self.line.sent.last.window);
        self.line.sent.edge = self.line.next_in.wrapping_add(said);
        self.line.sent.room = self.line.sent.edge;
        self.extent.begin_at(self.line.next_in);
        // A window in a SYN is not scaled.
        self.line.guest_window = window >> options.window_scale.unwrap_or(0);
    }

    /// Takes the largest segment that a guest announces for what its link can carry.
    fn agree(&self, announced: Option<u16>) -> u16 {
        /// What who announces nothing takes (RFC 9293 3.7.1), and the least that smoltcp sends.
        const DEFAULT: u16 = 536;
        const DEFAULT6: u16 = 1220;
        const LEAST: u16 = 48;
        let silent = if self.path.ipv6 { DEFAULT6 } else { DEFAULT };
        announced
            .filter(|mss| *mss > 0)
            .unwrap_or(silent)
            .clamp(LEAST, self.path.mss().max(LEAST))
    }

    /// Begins a connection to the guest at `ends.dst` from `ends.src`.
    ///
    /// # Errors
    /// When an endpoint has port 0.
    pub fn connect(&mut self, ends: emit::Ends) -> Result<(), ConnectError> {
        self.prepare();
        self.set_ends(ends.reversed());
        let socket = self.sockets.get_mut::<Socket<'static>>(self.handle);
        socket.connect(
            self.interface.context(),
            endpoint(ends.dst),
            endpoint(ends.src),
        )
    }

    /// Takes one segment of this connection from the guest; `packet` is its whole IP packet.
    pub fn segment(
        &mut self,
        now: Instant,
        tx: &mut TxBatch,
        segment: &TcpSegment,
        packet: &[u8],
    ) -> Fate {
        let fate = self.admit(now, tx, segment);
        if fate != Fate::Forwarded {
            return fate;
        }
        let header = packet.len() - segment.payload_len - segment.header_len;
        if segment.has(tcp_flags::SYN) && self.socket().state() == State::SynSent {
            self.syn_ack(now, tx, (packet, header), segment);
            return fate;
        }
        let cut = if segment.payload_len > 0 {
            self.cut(segment, packet, header)
        } else {
            None
        };
        let Some((packet, segment)) = cut else {
            self.take(now, tx, segment, (packet, header));
            return fate;
        };
        // Cut once it stays: `cut` would find nothing more.
        let fate = self.admit(now, tx, &segment);
        if fate == Fate::Forwarded {
            self.take(now, tx, &segment, (&packet, header));
        }
        if segment.payload_len > 0 {
            return fate;
        }
        // Nothing is left where it probed the window: an answer says how large that is.
        let expected = self.expected();
        self.announce(now, tx, expected);
        Fate::Answered
    }

    /// More of the same is likely to come, whose sender may wait for the acknowledgement: the segment is full, with its
    /// options (RFC 9293 3.7.1), or the window that the guest was given is (3.8.6.2.1).
    pub(super) fn is_part(&self, segment: &TcpSegment) -> bool {
        let whole = usize::from(self.mss());
        let options = segment.header_len.saturating_sub(TCP_HEADER);
        let window = self.line.sent.edge.wrapping_sub(segment.seq);
        let left = window.saturating_sub(length(segment.payload_len));
        segment.payload_len + options >= whole || left < u32::from(self.mss()).min(window / 2)
    }

    /// What ends the stream, or is part of more, is acknowledged at once.
    pub(super) fn delay_answer(&mut self, segment: &TcpSegment) {
        let waits = !self.is_part(segment) && !segment.has(tcp_flags::FIN);
        let delay = if waits { ACK_DELAY } else { Duration::ZERO };
        self.socket().set_ack_delay(Some(delay));
    }

    /// Who speaks with whom, seen from the guest.
    pub(super) const fn set_ends(&mut self, ends: emit::Ends) {
        self.ends = ends;
    }

    pub(super) fn note_segment(&mut self, segment: &TcpSegment) {
        if std::mem::take(&mut self.hurried) {
            self.be_patient();
        }
        let newer = |known: u32| segment.ack.wrapping_sub(known).cast_signed() >= 0;
        // Until a connection is open, nobody has looked at that yet.
        let sent = !ahead_of(segment.ack, self.line.sent.next);
        if segment.has(tcp_flags::ACK) && sent && self.line.guest_ack.is_none_or(newer) {
            self.line.guest_ack = Some(segment.ack);
            self.line.guest_window = segment.window;
            self.line.window_is_exact = true;
        }
        if segment.payload_len > 0 {
            let end = segment.seq.wrapping_add(length(segment.payload_len));
            self.extent.received(end);
            if ahead_of(end, self.line.furthest) {
                self.line.furthest = end;
                self.dialogue.note_guest(self.line.given);
            }
        }
    }

    /// The guest agrees to a connection; the TCP header begins at `header`.
    fn syn_ack(
        &mut self,
        now: Instant,
        tx: &mut TxBatch,
        (packet, header): (&[u8], usize),
        segment: &TcpSegment,
    ) {
        // One for each connection: it may be copied, whatever it carries.
        let mut packet = packet.to_vec();
        let header = &mut packet[header..header + segment.header_len];
        let mut options = parse::syn_options(header);
        let agreed = self.agree(options.mss);
        options.mss = Some(agreed);
        self.note_syn(segment.seq, segment.window, options);
        // Where both began at once, it acknowledges nothing.
        self.line.guest_ack = segment.has(tcp_flags::ACK).then_some(segment.ack);
        if let Some(announced) = option(header, MSS) {
            *announced = agreed.to_be_bytes();
        }
        self.ingress(now, tx, &packet);
    }
}

/// A length in sequence space; none is longer than a ring.
pub(super) fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// An interface that has one address.
pub(super) fn interface((now, seed): (Instant, u64), path: Path, local: IpAddr) -> Interface {
    let mut config = Config::new(HardwareAddress::Ip);
    config.random_seed = seed;
    let mut no_frames = NullDevice(capabilities(path));
    let mut interface = Interface::new(config, &mut no_frames, now);
    interface.update_ip_addrs(|addrs| {
        // One address fits: the feature iface-max-addr-count-1 is on, and the list is empty.
        let _ = addrs.push(IpCidr::new(
            local.into(),
            if local.is_ipv4() { 32 } else { 128 },
        ));
    });
    interface
}

pub(super) fn endpoint(addr: SocketAddr) -> IpEndpoint {
    IpEndpoint::new(addr.ip().into(), addr.port())
}
