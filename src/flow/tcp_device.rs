//! The one-packet device between smoltcp and a transmit batch, and the completion of what it writes.
//!
//! Comes in: one packet of the guest at most. Goes out: frames with the offloads that the link does,
//! or complete ones.

use std::num::{NonZeroU16, NonZeroUsize};

use smoltcp::phy::{
    Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium, PacketMeta, RxToken,
    TxToken,
};

use super::tcp_shorten::shorten;
use crate::buf::{
    Cut, ETHERNET_HEADER, Offload, PartialChecksum, Segmentation, TxBatch, TxCapabilities,
};
use crate::config::Timeouts;
use crate::net::checksum::{Sum, complete};
use crate::net::parse::tcp_flags;
use crate::net::{Instant, PROTOCOL_TCP, TCP_HEADER, Wire, emit};

/// Largest IP packet that is handed to a link for segmentation.
const MAX_SEGMENT_PACKET: usize = 65_535;

/// TCP options (RFC 9293 3.1, RFC 2018 section 3, RFC 7323 section 3).
pub(super) const MSS: u8 = 2;
const SACK: u8 = 5;
const TIMESTAMPS: u8 = 8;

/// Distance from the start of a TCP header to its checksum field.
const CHECKSUM_FIELD: u16 = 16;

/// How frames reach the guest, and when one is missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Path {
    /// The link and both Ethernet addresses.
    pub wire: Wire,
    /// Largest IP packet, bytes.
    pub mtu: u16,
    /// The family of its packets.
    pub ipv6: bool,
    /// What the link does for us.
    pub capabilities: TxCapabilities,
    /// How patient we are with whoever is silent there.
    pub timeouts: Timeouts,
}

impl Path {
    const fn header_len(&self) -> u16 {
        if self.ipv6 { 40 } else { 20 }
    }

    /// Largest payload of a segment without options (RFC 9293 3.7.1).
    #[must_use]
    pub const fn mss(&self) -> u16 {
        self.mtu.saturating_sub(self.header_len() + 20)
    }
}

/// The sequence space of the last segment sent: all that is left to answer with once a
/// connection is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LastSent {
    /// Sequence number of that segment.
    pub seq: u32,
    /// Acknowledgement number of that segment.
    pub ack: u32,
    /// Window field of that segment.
    pub window: u16,
    /// Its timestamps option (RFC 7323), where the ends agreed on one.
    pub timestamps: Option<[u8; 8]>,
}

/// What has been sent, as far as smoltcp does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Sent {
    /// The last segment.
    pub(super) last: LastSent,
    /// The sequence number of our SYN.
    pub(super) initial: u32,
    /// The next sequence number of ours: behind the furthest segment.
    pub(super) next: u32,
    /// The sequence number up to which the guest was ever told that it may send.
    pub(super) edge: u32,
    /// The sequence number up to which smoltcp would take what it sends.
    pub(super) room: u32,
    /// Bytes of the guest's that smoltcp has not heard of; wraps.
    pub(super) skipped: u32,
    /// Bytes of ours that smoltcp has not heard of; wraps.
    pub(super) withheld: u32,
}

impl Sent {
    /// The window field for an acknowledgement of `ack`, where the guest may send up to `limit` and there
    /// is room for the window `field`; `shift` is its scale. What was promised once stands: of the room a
    /// unit is never promised, since as much may be lost to smoltcp by rounding its window down anew.
    pub(super) fn window(&mut self, ack: u32, (field, shift): (u16, u32), limit: u32) -> u16 {
        let room = u32::from(field.saturating_sub(u16::from(shift > 0))) << shift;
        let upto = |edge: u32| {
            let distance = edge.wrapping_sub(ack);
            if distance.cast_signed() > 0 {
                distance
            } else {
                0
            }
        };
        let wanted = upto(limit).max(upto(self.edge)).min(room);
        // Less than a unit of the scale can't be said (RFC 7323 2.4); rounded up, it would creep on.
        let units = wanted >> shift;
        let edge = ack.wrapping_add(units << shift);
        if edge.wrapping_sub(self.edge).cast_signed() > 0 {
            self.edge = edge;
        }
        // No more than the field was.
        u16::try_from(units).unwrap_or(field)
    }
}

/// What smoltcp must know of the link.
pub(super) fn capabilities(path: Path) -> DeviceCapabilities {
    let mut caps = DeviceCapabilities::default();
    caps.medium = Medium::Ip;
    // smoltcp 0.14 sends no IPv6 packet above this size, segmented or not: there it is told the largest,
    // and the guest's MSS, which is never above ours, keeps segments in bounds.
    caps.max_transmission_unit = if path.ipv6 {
        MAX_SEGMENT_PACKET
    } else {
        usize::from(path.mtu)
    };
    caps.checksum = ChecksumCapabilities::ignored();
    // Received headers are verified by the parser; sent ones are summed by smoltcp.
    caps.checksum.ipv4 = Checksum::Tx;
    if path.capabilities.tso4 {
        caps.segmentation.tcpv4 = NonZeroUsize::new(MAX_SEGMENT_PACKET);
    }
    if path.capabilities.tso6 {
        caps.segmentation.tcpv6 = NonZeroUsize::new(MAX_SEGMENT_PACKET);
    }
    caps
}

/// A device for constructing an `Interface`, which asks it for its capabilities only.
pub(super) struct NullDevice(pub(super) DeviceCapabilities);

impl Device for NullDevice {
    type RxToken<'a> = NoPacket;
    type TxToken<'a> = NoPacket;

    fn receive(&mut self, _now: Instant) -> Option<(NoPacket, NoPacket)> {
        None
    }

    fn transmit(&mut self, _now: Instant) -> Option<NoPacket> {
        None
    }

    fn capabilities(&self) -> DeviceCapabilities {
        self.0.clone()
    }
}

/// A token that is never given out.
pub(super) enum NoPacket {}

impl RxToken for NoPacket {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, _f: F) -> R {
        match self {}
    }
}

impl TxToken for NoPacket {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, _len: usize, _f: F) -> R {
        match self {}
    }
}

/// The device of one poll: at most one packet in, frames out to the batch.
pub(super) struct OnePacket<'a> {
    /// The packet that comes in.
    pub(super) packet: Option<&'a [u8]>,
    /// Leave the reserve for control frames alone.
    pub(super) bulk: bool,
    pub(super) tx: &'a mut TxBatch,
    pub(super) path: &'a Path,
    /// Payload of the segments that the kernel is to cut a long one into.
    pub(super) mss: u16,
    pub(super) now: Instant,
    pub(super) sent: &'a mut Sent,
    /// The sequence number up to which the guest may send, and the scale of the window that says so.
    pub(super) limit: (u32, u32),
    /// The sequence number up to which we may send, if the guest has said so.
    pub(super) reach: Option<u32>,
}

impl OnePacket<'_> {
    fn room(&mut self) -> Transmit<'_> {
        Transmit {
            tx: self.tx,
            path: self.path,
            mss: self.mss,
            now: self.now,
            sent: self.sent,
            limit: self.limit,
            reach: self.reach,
            segment: None,
        }
    }
}

impl Device for OnePacket<'_> {
    type RxToken<'a>
        = Received<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Transmit<'a>
    where
        Self: 'a;

    fn receive(&mut self, _now: Instant) -> Option<(Received<'_>, Transmit<'_>)> {
        let packet = self.packet.take()?;
        // An answer to a segment is short and may use the reserve, so no room is asked for.
        Some((Received(packet), self.room()))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Transmit<'_>> {
        let free = !self.bulk || self.tx.has_room();
        free.then(|| self.room())
    }

    fn capabilities(&self) -> DeviceCapabilities {
        capabilities(*self.path)
    }
}

/// A packet that came in.
pub(super) struct Received<'a>(&'a [u8]);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// Room for one packet.
pub(super) struct Transmit<'a> {
    tx: &'a mut TxBatch,
    path: &'a Path,
    mss: u16,
    now: Instant,
    sent: &'a mut Sent,
    limit: (u32, u32),
    reach: Option<u32>,
    segment: Option<NonZeroU16>,
}

impl TxToken for Transmit<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let Self {
            tx,
            path,
            mss,
            now,
            sent,
            limit,
            reach,
            segment,
        } = self;
        let mut write = Some(f);
        let mut result = None;
        tx.push_some(path.wire.link, ETHERNET_HEADER + len, |frame| {
            // `push_some` calls this at most once, so the closure is there.
            if let Some(write) = write.take() {
                let packet = emit::ethernet_ip(frame, path.wire, path.ipv6);
                result = Some(write(packet));
            }
            let start = ETHERNET_HEADER + usize::from(path.header_len());
            let reach = reach.map(|reach| reach.wrapping_sub(sent.withheld));
            let len = shorten(frame, start, reach);
            let frame = &mut frame[..len];
            announce(&mut frame[start..], sent, limit);
            let offload = finish(frame, path, (segment, mss), now, sent);
            (Some((len, offload)), ())
        });
        // No room: the frame is lost as on any link, but the closure must have its bytes.
        match (result, write) {
            (Some(result), _) => result,
            (None, Some(write)) => write(&mut vec![0; len]),
            (None, None) => unreachable_write(),
        }
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment = meta.segmentation_offload_size;
    }
}

/// `write` was taken only where `result` was set.
#[expect(
    clippy::panic,
    reason = "both arms above cover every state that `push` can leave"
)]
fn unreachable_write() -> ! {
    panic!("a transmit closure ran without a result")
}

/// Completes a frame that smoltcp wrote: what it does not know, the checksum, or what the link needs
/// to complete that.
fn finish(
    frame: &mut [u8],
    path: &Path,
    (segment, mss): (Option<NonZeroU16>, u16),
    now: Instant,
    sent: &mut Sent,
) -> Offload {
    let ipv6 = path.ipv6;
    let start = ETHERNET_HEADER + usize::from(path.header_len());
    let tcp = &mut frame[start..];
    let tcp_header = usize::from(tcp[12] >> 4) * 4;
    sent.last = amend(&mut tcp[..tcp_header], path, now);
    if tcp[13] & tcp_flags::SYN != 0 {
        sent.initial = sent.last.seq;
    }
    // smoltcp says for IPv4 alone what it leaves to be segmented.
    let room = usize::from(mss).saturating_sub(tcp_header - TCP_HEADER);
    let too_long = ipv6 && tcp.len() - tcp_header > room;
    let whole = |len: usize| u16::try_from(len).unwrap_or(u16::MAX);
    let segment = segment.or_else(|| NonZeroU16::new(whole(room)).filter(|_| too_long));
    // It may have been shortened since.
    let segment = segment.filter(|size| tcp.len() - tcp_header > usize::from(size.get()));
    let length = whole(tcp.len());
    let pseudo = pseudo_header(&frame[ETHERNET_HEADER..], ipv6, length).fold();
    frame[start + 16..start + 18].copy_from_slice(&pseudo.to_be_bytes());
    if !path.capabilities.checksum {
        complete(frame, start, usize::from(CHECKSUM_FIELD));
        return Offload::NONE;
    }
    Offload {
        checksum: Some(PartialChecksum {
            start: whole(start),
            offset: CHECKSUM_FIELD,
        }),
        segment: segment.map(|size| Segmentation {
            cut: if ipv6 { Cut::Tcp6 } else { Cut::Tcp4 },
            size,
            header_len: whole(start + tcp_header),
        }),
    }
}

/// Writes the window into a TCP segment that the guest may fill, and takes note of what is sent.
fn announce(tcp: &mut [u8], sent: &mut Sent, (limit, scale): (u32, u32)) {
    let [.., high, low] = tcp[..16] else { return };
    let (flags, field) = (tcp[13], u16::from_be_bytes([high, low]));
    let seq = word(tcp, 4).wrapping_add(sent.withheld);
    let ack = word(tcp, 8).wrapping_add(sent.skipped);
    let controls = flags & (tcp_flags::SYN | tcp_flags::FIN);
    let header = usize::from(tcp[12] >> 4) * 4;
    let payload = tcp.len() - header;
    let length = u32::try_from(payload).unwrap_or(u32::MAX) + controls.count_ones();
    let end = seq.wrapping_add(length);
    let is_syn = flags & tcp_flags::SYN != 0;
    if is_syn || end.wrapping_sub(sent.next).cast_signed() > 0 {
        sent.next = end;
    }
    tcp[4..8].copy_from_slice(&seq.to_be_bytes());
    if flags & tcp_flags::ACK != 0 {
        tcp[8..12].copy_from_slice(&ack.to_be_bytes());
        move_blocks(&mut tcp[..header], sent.skipped);
    }
    // A SYN without acknowledgement is sent before anything is known of the guest's numbers; a RST
    // announces nothing.
    if flags & tcp_flags::ACK != 0 && flags & tcp_flags::RST == 0 {
        let shift = if is_syn { 0 } else { scale };
        sent.room = ack.wrapping_add(u32::from(field) << shift);
        let window = sent.window(ack, (field, shift), limit);
        tcp[14..16].copy_from_slice(&window.to_be_bytes());
    }
}

/// Writes into a TCP header what smoltcp does not know: the time, and the largest segment of IPv6.
fn amend(header: &mut [u8], path: &Path, now: Instant) -> LastSent {
    if path.ipv6
        && header[13] & tcp_flags::SYN != 0
        && let Some(mss) = option(header, MSS)
    {
        // smoltcp derives it from the size that it was told, see `capabilities`.
        *mss = path.mss().to_be_bytes();
    }
    let timestamps = option::<8>(header, TIMESTAMPS).map(|value| {
        let [a, b, c, d] = timestamp(now).to_be_bytes();
        value[..4].copy_from_slice(&[a, b, c, d]);
        *value
    });
    LastSent {
        seq: word(header, 4),
        ack: word(header, 8),
        window: u16::from_be_bytes([header[14], header[15]]),
        timestamps,
    }
}

/// The number at a place in a TCP header.
pub(super) fn word(tcp: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]])
}

/// Moves the blocks that a header says were received out of order (RFC 2018 section 3).
fn move_blocks(header: &mut [u8], by: u32) {
    fn each<const LEN: usize>(header: &mut [u8], by: u32) {
        if let Some(blocks) = option::<LEN>(header, SACK) {
            for edge in blocks.as_chunks_mut().0 {
                *edge = u32::from_be_bytes(*edge).wrapping_add(by).to_be_bytes();
            }
        }
    }
    if by != 0 {
        each::<8>(header, by);
        each::<16>(header, by);
        each::<24>(header, by);
    }
}

/// The value of the timestamps option, sent again at another time.
pub(super) fn stamped(mut value: [u8; 8], now: Instant) -> [u8; 8] {
    value[..4].copy_from_slice(&timestamp(now).to_be_bytes());
    value
}

/// The clock of timestamps: milliseconds, wrapping (RFC 7323 5.4).
fn timestamp(now: Instant) -> u32 {
    let millis = now.total_millis() & i64::from(u32::MAX);
    u32::try_from(millis).unwrap_or_default()
}

/// The value of an option in a TCP header, if it is there, in `LEN` bytes (RFC 9293 3.1).
pub(super) fn option<const LEN: usize>(header: &mut [u8], wanted: u8) -> Option<&mut [u8; LEN]> {
    /// Kinds without a length.
    const END: u8 = 0;
    const NO_OPERATION: u8 = 1;
    let mut at = 20;
    loop {
        let length = match (*header.get(at)?, header.get(at + 1)) {
            (END, _) => return None,
            (NO_OPERATION, _) => 1,
            (kind, Some(&length)) if kind == wanted => {
                let whole = usize::from(length) == 2 + LEN;
                return header
                    .get_mut(at + 2..)
                    .filter(|_| whole)?
                    .first_chunk_mut();
            }
            (_, Some(&length @ 2..)) => usize::from(length),
            (_, Some(_) | None) => return None,
        };
        at += length;
    }
}

fn pseudo_header(packet: &[u8], ipv6: bool, length: u16) -> Sum {
    // The addresses stand next to each other in both headers, so their order does not matter.
    let addresses = if ipv6 {
        &packet[8..40]
    } else {
        &packet[12..20]
    };
    Sum::default()
        .bytes(addresses)
        .word(u16::from(PROTOCOL_TCP))
        .word(length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::tcp_engine::RING;

    #[test]
    fn blocks_are_moved_and_nothing_else() {
        let mut header = [0; 20].to_vec();
        header.extend([1, 1, 8, 10, 9, 9, 9, 9, 9, 9, 9, 9, 1, 1, 5, 18]);
        for edge in [10_u32, 20, u32::MAX, 3] {
            header.extend(edge.to_be_bytes());
        }
        let before = header.clone();
        move_blocks(&mut header, 0);
        assert_eq!(header, before);
        move_blocks(&mut header, 5);
        let (words, _) = header[36..].as_chunks::<4>();
        let edges: Vec<u32> = words.iter().map(|it| u32::from_be_bytes(*it)).collect();
        assert_eq!(edges, [15, 25, 4, 8]);
        assert_eq!(header[..36], before[..36]);
    }

    #[test]
    fn what_was_promised_is_still_taken_when_the_window_is_rounded_anew() {
        let (ring, shift) = (u32::try_from(RING).unwrap(), 5);
        for start in [0, 24, u32::MAX - 100] {
            let mut sent = Sent::default();
            // The ring fills: nothing is taken from it, and each piece is acknowledged.
            for came in (0..ring).step_by(1_013) {
                let ack = u32::wrapping_add(start, came);
                let field = u16::try_from((ring - came) >> shift).unwrap();
                let takes = u32::from(field) << shift;
                sent.window(ack, (field, shift), start.wrapping_add(ring));
                let promised = sent.edge.wrapping_sub(ack);
                assert!(promised <= takes, "{promised} of {takes} at {came}");
            }
        }
    }
}
