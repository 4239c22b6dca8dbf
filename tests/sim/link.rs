//! The simulated link: frames under way, what befalls them, and the work that it does for its ends.
//!
//! In: frames of the stack with the offloads that are left to do, packets of the guest. Out: the same,
//! late, twice or never; completed and cut up as a tap or a network card would. It may narrow the
//! options of SYNs, which makes a guest of another kind out of the one there is.
#![allow(
    clippy::unwrap_used,
    reason = "a scenario that can not go on has failed"
)]

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};

use tapgate::buf::{Cut, ETHERNET_HEADER, Offload, Segmentation, TxCapabilities};
use tapgate::net::checksum::{Sum, complete};
use tapgate::net::{Duration, Instant};

/// One way over the link takes this long.
const DELAY: Duration = Duration::from_micros(50);

/// A frame that comes late comes up to this much later, microseconds.
const LATE: u64 = 2000;

const FIN: u8 = 1;
const SYN: u8 = 2;
const ACK: u8 = 16;
/// FIN and PSH: of a segment that is cut up, only the last piece has them.
const LAST_ONLY: u8 = FIN | 8;
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;

/// What the link does to frames, each in percent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Faults {
    pub(crate) loss: u64,
    pub(crate) duplicate: u64,
    pub(crate) reorder: u64,
}

/// A small generator (xorshift64*), good enough to decide what becomes of frames; or bytes that decide, for as
/// long as there are any.
#[derive(Debug, Clone)]
pub(crate) struct Random {
    state: u64,
    bytes: VecDeque<u8>,
}

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            bytes: VecDeque::new(),
        }
    }

    /// One byte for each choice among few, more for more.
    pub(crate) fn of_bytes(bytes: &[u8]) -> Self {
        Self {
            bytes: bytes.iter().copied().collect(),
            ..Self::new(u64::try_from(bytes.len()).unwrap())
        }
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        if self.bytes.is_empty() {
            return self.next() % limit;
        }
        let (mut drawn, mut most) = (0, 1);
        while most < limit {
            drawn = drawn << 8 | u64::from(self.bytes.pop_front().unwrap_or(0));
            most <<= 8;
        }
        drawn % limit
    }

    pub(crate) fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }

    pub(crate) fn size(&mut self, limit: usize) -> usize {
        usize::try_from(self.below(u64::try_from(limit).unwrap())).unwrap()
    }

    pub(crate) fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.size(choices.len())]
    }
}

/// What the ends of the link leave to it, and what it lets pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct LinkKind {
    /// What it does for the stack.
    pub(crate) capabilities: TxCapabilities,
    /// It does the same for the guest: checksums come unfinished and segments uncut.
    pub(crate) guest_offload: bool,
    /// The stack's long segments reach the guest uncut, as over a tap, where no wire is in between.
    pub(crate) uncut: bool,
    /// The guest says that it takes segments of this size.
    pub(crate) mss: Option<u16>,
    /// The guest knows no window scaling.
    pub(crate) unscaled: bool,
    /// The guest knows no selective acknowledgements.
    pub(crate) no_sack: bool,
}

impl LinkKind {
    /// The frames that a frame of the stack's becomes on its way to the guest.
    pub(crate) fn pass_to_guest(&self, frame: &[u8], offload: Offload, mtu: usize) -> Vec<Vec<u8>> {
        let mut frames = match offload.segment {
            Some(segment) if !self.uncut => cut(frame, segment),
            Some(_) | None => vec![frame.to_vec()],
        };
        for frame in &mut frames {
            // A train's datagrams have theirs when they are cut.
            let is_train = offload.segment.is_some_and(|it| it.cut == Cut::Udp);
            if offload.checksum.is_some() && !is_train {
                sum_tcp(&mut frame[ETHERNET_HEADER..]);
            }
            let whole = self.uncut && offload.segment.is_some();
            assert!(
                whole || frame.len() <= ETHERNET_HEADER + mtu,
                "over the MTU"
            );
            if let Some(tcp) = tcp_of(frame) {
                let payload = tcp.len() - usize::from(tcp[12] >> 4) * 4;
                let most = self.mss.map_or(usize::MAX, usize::from);
                assert!(whole || payload <= most, "over the guest's MSS");
                self.narrow(&mut frame[ETHERNET_HEADER..], None);
            }
        }
        frames
    }

    /// Changes a packet of the guest's on its way to the stack.
    pub(crate) fn pass_from_guest(&self, packet: &mut [u8]) {
        self.narrow(packet, self.mss);
    }

    /// Takes options out of a SYN, in both directions alike, so that both ends agree.
    fn narrow(&self, packet: &mut [u8], mss: Option<u16>) {
        let Some(tcp) = tcp_at(packet).filter(|tcp| packet[tcp + 13] & SYN != 0) else {
            return;
        };
        let end = tcp + usize::from(packet[tcp + 12] >> 4) * 4;
        let (mut at, before) = (tcp + 20, packet[tcp..end].to_vec());
        while at < end && packet[at] != 0 {
            let len = if packet[at] == 1 {
                1
            } else {
                usize::from(packet[at + 1])
            };
            match packet[at] {
                2 => {
                    if let Some(mss) = mss {
                        packet[at + 2..at + 4].copy_from_slice(&mss.to_be_bytes());
                    }
                }
                3 if self.unscaled => packet[at..at + len].fill(1),
                4 if self.no_sack => packet[at..at + len].fill(1),
                _ => {}
            }
            at += len;
        }
        // What was not touched keeps its own checksum, for the guest to look at.
        if packet[tcp..end] != before {
            sum_tcp(packet);
        }
    }
}

/// Where a packet has its TCP header, if it has one.
pub(crate) fn tcp_at(packet: &[u8]) -> Option<usize> {
    let (protocol, header) = match packet.first()? >> 4 {
        4 => (*packet.get(9)?, IPV4_HEADER),
        6 => (*packet.get(6)?, IPV6_HEADER),
        _ => return None,
    };
    (protocol == 6 && packet.len() >= header + 20).then_some(header)
}

/// The TCP part of a frame.
fn tcp_of(frame: &[u8]) -> Option<&[u8]> {
    let packet = frame.get(ETHERNET_HEADER..)?;
    tcp_at(packet).map(|tcp| &packet[tcp..])
}

/// Cuts a long frame up as the vnet header asks for it; checksums are left to be done.
fn cut(frame: &[u8], segment: Segmentation) -> Vec<Vec<u8>> {
    if segment.cut == Cut::Udp {
        return cut_train(frame, segment);
    }
    let (headers, payload) = frame.split_at(usize::from(segment.header_len));
    let header = tcp_at(&frame[ETHERNET_HEADER..]).unwrap();
    assert_eq!(
        header == IPV6_HEADER,
        segment.cut == Cut::Tcp6,
        "the family"
    );
    let tcp = ETHERNET_HEADER + header;
    let first = u32::from_be_bytes(frame[tcp + 4..tcp + 8].try_into().unwrap());
    let size = usize::from(segment.size.get());
    let count = payload.chunks(size).len();
    let piece = |(nth, bytes): (usize, &[u8])| {
        let mut piece = headers.to_vec();
        piece.extend(bytes);
        let total = u16::try_from(piece.len() - ETHERNET_HEADER).unwrap();
        set_length(&mut piece[ETHERNET_HEADER..], total);
        let seq = first.wrapping_add(u32::try_from(nth * size).unwrap());
        piece[tcp + 4..tcp + 8].copy_from_slice(&seq.to_be_bytes());
        if nth + 1 < count {
            piece[tcp + 13] &= !LAST_ONLY;
        }
        piece
    };
    payload.chunks(size).enumerate().map(piece).collect()
}

/// Cuts a train of datagrams up; each gets a checksum of its own.
fn cut_train(frame: &[u8], segment: Segmentation) -> Vec<Vec<u8>> {
    let (headers, payload) = frame.split_at(usize::from(segment.header_len));
    let udp = headers.len() - 8;
    let number = |at: usize| u16::from_be_bytes([headers[udp + at], headers[udp + at + 1]]);
    let whole = number(4);
    assert_eq!(
        usize::from(whole),
        8 + payload.len(),
        "the train's own length"
    );
    let piece = |bytes: &[u8]| {
        let mut piece = headers.to_vec();
        piece.extend(bytes);
        let total = u16::try_from(piece.len() - ETHERNET_HEADER).unwrap();
        set_length(&mut piece[ETHERNET_HEADER..], total);
        let length = u16::try_from(8 + bytes.len()).unwrap();
        piece[udp + 4..udp + 6].copy_from_slice(&length.to_be_bytes());
        let pseudo = Sum::default().word(number(6)).word(!whole).word(length);
        piece[udp + 6..udp + 8].copy_from_slice(&pseudo.fold().to_be_bytes());
        let sum = match Sum::default().bytes(&piece[udp..]).finish() {
            0 => 0xffff,
            sum => sum,
        };
        piece[udp + 6..udp + 8].copy_from_slice(&sum.to_be_bytes());
        piece
    };
    payload
        .chunks(segment.size.get().into())
        .map(piece)
        .collect()
}

/// Tells a packet how long it is.
fn set_length(ip: &mut [u8], total: u16) {
    if ip[0] >> 4 == 6 {
        let payload = total - u16::try_from(IPV6_HEADER).unwrap();
        ip[4..6].copy_from_slice(&payload.to_be_bytes());
        return;
    }
    ip[2..4].copy_from_slice(&total.to_be_bytes());
    ip[10..12].fill(0);
    let sum = !Sum::default().bytes(&ip[..IPV4_HEADER]).fold();
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// How far each of the guest's connections lets the stack send, by the guest's port.
#[derive(Default)]
pub(crate) struct Windows(HashMap<u16, Window>);

#[derive(Default, Clone, Copy)]
struct Window {
    scale: u8,
    /// The furthest that was ever allowed: a window that shrinks finds data under way.
    edge: Option<u32>,
    /// It was one unit or none the last time: that is not held against the stack.
    tiny: bool,
    /// Behind the furthest payload that the guest has sent.
    sent: Option<u32>,
}

impl Windows {
    /// Takes note of what the guest says.
    pub(crate) fn note(&mut self, packet: &[u8]) {
        let Some(tcp) = tcp_at(packet).map(|tcp| &packet[tcp..]) else {
            return;
        };
        let window = self.0.entry(port(tcp, 0)).or_default();
        let field = u32::from(u16::from_be_bytes([tcp[14], tcp[15]]));
        let is_syn = tcp[13] & SYN != 0;
        let scale = if is_syn { 0 } else { window.scale };
        let edge = word(tcp, 8).wrapping_add(field << scale);
        if is_syn {
            *window = Window {
                scale: window_scale(tcp),
                ..Window::default()
            };
        }
        window.tiny = field <= 1;
        if tcp[13] & ACK != 0 && window.edge.is_none_or(|before| ahead(edge, before)) {
            window.edge = Some(edge);
        }
        let end = end(tcp);
        if !is_syn && window.sent.is_none_or(|sent| ahead(end, sent)) {
            window.sent = Some(end);
        }
    }

    /// A segment that goes to the guest leaves something of the guest's outstanding, and closes the window.
    pub(crate) fn closes_behind(&self, packet: &[u8]) -> bool {
        let Some(tcp) = tcp_at(packet).map(|tcp| &packet[tcp..]) else {
            return false;
        };
        let sent = self.0.get(&port(tcp, 2)).and_then(|window| window.sent);
        tcp[14..16] == [0, 0] && sent.is_some_and(|sent| ahead(sent, word(tcp, 8)))
    }

    /// Nothing is sent beyond the window but the one byte that probes it (RFC 9293 3.8.6.1): Linux
    /// takes nothing of such a segment, and smoltcp skips a byte where it carries a FIN.
    pub(crate) fn check(&self, frame: &[u8]) {
        let Some(tcp) = tcp_of(frame) else {
            return;
        };
        let end = end(tcp);
        let window = self.0.get(&port(tcp, 2)).filter(|window| !window.tiny);
        let beyond = window
            .and_then(|window| window.edge)
            .is_some_and(|edge| ahead(end, edge));
        let probe = end.wrapping_sub(word(tcp, 4)) <= 1;
        assert!(probe || !beyond, "beyond the guest's window");
    }
}

/// The sequence number behind a segment's payload.
fn end(tcp: &[u8]) -> u32 {
    let payload = tcp.len() - usize::from(tcp[12] >> 4) * 4;
    word(tcp, 4).wrapping_add(u32::try_from(payload).unwrap())
}

fn port(tcp: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([tcp[at], tcp[at + 1]])
}

fn word(tcp: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(tcp[at..at + 4].try_into().unwrap())
}

fn ahead(seq: u32, other: u32) -> bool {
    seq.wrapping_sub(other).cast_signed() > 0
}

/// What befalls a packet of the guest's: one that closes the window does not come late.
///
/// smoltcp 0.14 lets a stale window close the send window while data is in flight, and then neither
/// retransmits nor probes: the connection stands still until a keep-alive. A tap keeps the order.
pub(crate) fn faults_of(packet: &[u8], faults: Faults) -> Faults {
    let closes = tcp_at(packet).is_some_and(|tcp| packet[tcp + 14..tcp + 16] == [0, 0]);
    Faults {
        reorder: if closes { 0 } else { faults.reorder },
        ..faults
    }
}

/// The window scale option of a SYN.
fn window_scale(tcp: &[u8]) -> u8 {
    let mut options = &tcp[20..usize::from(tcp[12] >> 4) * 4];
    loop {
        options = match options {
            [3, 3, scale, ..] => return *scale,
            [1, rest @ ..] => rest,
            [] | [_] | [0, ..] => return 0,
            [_, len, ..] => &options[usize::from(*len).min(options.len())..],
        };
    }
}

/// Sums a TCP packet anew.
pub(crate) fn sum_tcp(packet: &mut [u8]) {
    let tcp = tcp_at(packet).unwrap();
    let addresses = if tcp == IPV4_HEADER { 12..20 } else { 8..40 };
    let length = u16::try_from(packet.len() - tcp).unwrap();
    let pseudo = Sum::default()
        .bytes(&packet[addresses])
        .word(6)
        .word(length)
        .fold();
    packet[tcp + 16..tcp + 18].copy_from_slice(&pseudo.to_be_bytes());
    complete(packet, tcp, 16);
}

/// Frames under way in one direction.
#[derive(Default)]
pub(crate) struct Wire {
    queue: BinaryHeap<Reverse<(Instant, u64, Vec<u8>)>>,
    serial: u64,
}

impl Wire {
    pub(crate) fn send(
        &mut self,
        now: Instant,
        frame: Vec<u8>,
        faults: Faults,
        random: &mut Random,
    ) {
        if random.percent(faults.loss) {
            return;
        }
        let copies = if random.percent(faults.duplicate) {
            2
        } else {
            1
        };
        for _ in 0..copies {
            let late = if random.percent(faults.reorder) {
                random.below(LATE)
            } else {
                0
            };
            self.serial += 1;
            self.queue.push(Reverse((
                now + DELAY + Duration::from_micros(late),
                self.serial,
                frame.clone(),
            )));
        }
    }

    pub(crate) fn due(&mut self, now: Instant) -> Option<Vec<u8>> {
        if self.queue.peek()?.0.0 > now {
            return None;
        }
        self.queue.pop().map(|Reverse((_, _, frame))| frame)
    }

    pub(crate) fn next(&self) -> Option<Instant> {
        self.queue.peek().map(|Reverse((at, ..))| *at)
    }

    /// What is under way is lost.
    pub(crate) fn clear(&mut self) {
        self.queue.clear();
    }
}
