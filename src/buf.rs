//! Receive and transmit batches: the memory frames live in between a link and the stack.
//!
//! Owns the byte arenas and the description of each frame in them ([`RxMeta`], [`Offload`]), and the room that packets are
//! written anew in ([`Scratch`]).
//! A [`Link`](crate::link::Link) fills an [`RxBatch`] and empties a [`TxBatch`]; the stack reads
//! the one and writes the other. Capacities are fixed at construction: they are the budget of a
//! turn of the event loop, and a full [`TxBatch`] is back-pressure. Nothing here parses a frame.

use std::num::NonZeroU16;
use std::ops::Range;

pub(crate) use crate::sys::memory::Pages;
pub use crate::sys::memory::{give_back, zeroed};

/// Bytes of Ethernet header in front of every packet.
pub const ETHERNET_HEADER: usize = 14;

/// Largest frame either way: an IP packet of 65,535 bytes behind an Ethernet header.
pub const MAX_FRAME: usize = 65_535 + ETHERNET_HEADER;

/// Room in front of each frame for the 12-byte `virtio_net_hdr_v1` of `linux/virtio_net.h`.
pub const HEADROOM: usize = 12;

/// Bytes and frames of a [`TxBatch`] that only short control frames may use, so that bulk data
/// can't keep an ACK, a RST or an ARP reply from leaving.
const CONTROL_RESERVE_BYTES: usize = 16 * 1024;
const CONTROL_RESERVE_FRAMES: usize = 64;

/// Frames that one bulk datagram may become: 65,535 bytes in fragments at an MTU of 576.
const BULK_FRAMES: usize = 120;
/// Bytes that one bulk datagram may take with the headers and the alignment of its fragments.
const BULK_BYTES: usize = MAX_FRAME + BULK_FRAMES * 128;

/// Names the link that a frame came from or goes to. Several namespaces on one virtual bridge
/// are several links.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId(pub u16);

/// What a link tells about a received frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RxMeta {
    /// The link that the frame came from.
    pub link: LinkId,
    /// The kernel vouches for the transport checksum (`VIRTIO_NET_HDR_F_NEEDS_CSUM` or
    /// `_DATA_VALID`); otherwise it is verified by the parser.
    pub checksum_verified: bool,
    /// Payload bytes of each datagram of a UDP segmentation-offload frame.
    pub udp_segment: Option<NonZeroU16>,
}

impl RxMeta {
    /// A frame of `link` about which the link knows nothing.
    #[must_use]
    pub const fn plain(link: LinkId) -> Self {
        Self {
            link,
            checksum_verified: false,
            udp_segment: None,
        }
    }
}

/// What a link must still do to a frame that leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offload {
    /// The checksum field holds the folded pseudo-header sum and wants completing.
    pub checksum: Option<PartialChecksum>,
    /// The frame is one long segment, or several datagrams, to be cut up.
    pub segment: Option<Segmentation>,
}

impl Offload {
    /// The frame is complete as it stands.
    pub const NONE: Self = Self {
        checksum: None,
        segment: None,
    };
}

/// Where a partial checksum begins and is stored, both counted from the frame's first byte
/// (`csum_start` and `csum_start + csum_offset` of `virtio_net_hdr`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartialChecksum {
    /// First byte that is summed: the transport header.
    pub start: u16,
    /// Distance from `start` to the checksum field.
    pub offset: u16,
}

/// What a frame that is to be cut up holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// A TCP segment over IPv4 (`VIRTIO_NET_HDR_GSO_TCPV4`).
    Tcp4,
    /// A TCP segment over IPv6 (`VIRTIO_NET_HDR_GSO_TCPV6`).
    Tcp6,
    /// UDP datagrams of either family, one behind the other (`VIRTIO_NET_HDR_GSO_UDP_L4`).
    Udp,
}

/// Segmentation offload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segmentation {
    /// What is cut up.
    pub cut: Cut,
    /// Payload bytes in each piece but the last.
    pub size: NonZeroU16,
    /// Bytes of Ethernet, IP and transport header.
    pub header_len: u16,
}

/// Work that a link takes off the stack's hands for frames that leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TxCapabilities {
    /// Partial checksums are completed.
    pub checksum: bool,
    /// TCP over IPv4 is segmented; implies `checksum`.
    pub tso4: bool,
    /// TCP over IPv6 is segmented; implies `checksum`.
    pub tso6: bool,
    /// Trains of UDP datagrams of either family are cut up; implies `checksum`.
    pub uso: bool,
}

struct RxFrame {
    bytes: Range<usize>,
    meta: RxMeta,
}

/// Frames received in one turn, packed one behind the other.
pub struct RxBatch {
    storage: Box<[u8]>,
    frames: Vec<RxFrame>,
    used: usize,
}

impl RxBatch {
    /// A batch of up to `frames` frames with `bytes` of room; `bytes` is raised to what one
    /// frame of the largest size needs.
    #[must_use]
    pub fn new(frames: usize, bytes: usize) -> Self {
        let bytes = bytes.max(MAX_FRAME + HEADROOM);
        Self {
            storage: vec![0; bytes].into_boxed_slice(),
            frames: Vec::with_capacity(frames),
            used: 0,
        }
    }

    /// Room for one more frame of any size with its header, or `None` when the batch is full.
    pub fn spare(&mut self) -> Option<&mut [u8]> {
        let end = self.used + MAX_FRAME + HEADROOM;
        if self.frames.len() == self.frames.capacity() || end > self.storage.len() {
            return None;
        }
        self.storage.get_mut(self.used..end)
    }

    /// Adds the frame that was written to `bytes` of the slice [`RxBatch::spare`] gave.
    pub fn push(&mut self, bytes: Range<usize>, meta: RxMeta) {
        debug_assert!(
            self.frames.len() < self.frames.capacity(),
            "spare() said there is room"
        );
        let frame = self.used + bytes.start..self.used + bytes.end;
        // Frames start on a cache line, so that copies out of the batch are aligned alike.
        self.used = frame.end.next_multiple_of(64);
        self.frames.push(RxFrame { bytes: frame, meta });
    }

    /// Copies a frame in; false when the batch is full. For links that are not descriptors.
    pub fn push_copy(&mut self, frame: &[u8], meta: RxMeta) -> bool {
        let Some(target) = self.spare().and_then(|spare| spare.get_mut(..frame.len())) else {
            return false;
        };
        target.copy_from_slice(frame);
        self.push(0..frame.len(), meta);
        true
    }

    /// The frames in order of arrival.
    pub fn frames(&self) -> impl Iterator<Item = (&[u8], RxMeta)> {
        self.frames
            .iter()
            .map(|frame| (&self.storage[frame.bytes.clone()], frame.meta))
    }

    /// Number of frames held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// No frame is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Forgets all frames; the memory stays.
    pub fn clear(&mut self) {
        self.frames.clear();
        self.used = 0;
    }
}

/// One frame on its way out, with its headroom in front.
pub struct TxFrame<'a> {
    /// Where it goes.
    pub link: LinkId,
    /// What the link must still do.
    pub offload: Offload,
    /// [`HEADROOM`] bytes of scratch space, then the frame.
    pub with_headroom: &'a mut [u8],
}

impl TxFrame<'_> {
    /// The frame itself.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.with_headroom[HEADROOM..]
    }
}

struct TxSlot {
    bytes: Range<usize>,
    link: LinkId,
    offload: Offload,
}

/// Room to write packets anew in on their way to a flow, kept from one to the next.
#[derive(Debug, Default)]
pub struct Scratch(Vec<Vec<u8>>);

impl Scratch {
    /// As many are in use at a time: a packet's rest, and that with other numbers.
    const MOST: usize = 2;

    /// An empty buffer.
    pub fn take(&mut self) -> Vec<u8> {
        self.0.pop().unwrap_or_default()
    }

    /// Takes a buffer back.
    pub fn put(&mut self, mut buffer: Vec<u8>) {
        if self.0.len() < Self::MOST {
            buffer.clear();
            self.0.push(buffer);
        }
    }
}

/// Frames produced in one turn, packed one behind the other.
pub struct TxBatch {
    storage: Box<[u8]>,
    frames: Vec<TxSlot>,
    used: usize,
    /// What a turn's packets are written anew in.
    pub scratch: Scratch,
}

impl TxBatch {
    /// A batch of up to `frames` frames with `bytes` of room besides the reserve for control
    /// frames; `bytes` is raised to what one frame of the largest size needs.
    #[must_use]
    pub fn new(frames: usize, bytes: usize) -> Self {
        let bytes = bytes.max(BULK_BYTES) + CONTROL_RESERVE_BYTES;
        Self {
            storage: vec![0; bytes].into_boxed_slice(),
            frames: Vec::with_capacity(frames.max(BULK_FRAMES) + CONTROL_RESERVE_FRAMES),
            used: 0,
            scratch: Scratch::default(),
        }
    }

    /// There is room for a bulk frame or a datagram of any size. Ask before taking data out of a
    /// flow.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.used + BULK_BYTES + CONTROL_RESERVE_BYTES <= self.storage.len()
            && self.frames.len() + BULK_FRAMES + CONTROL_RESERVE_FRAMES <= self.frames.capacity()
    }

    /// Half of the room for bulk is used, which is as much as what is answered at once may have.
    #[must_use]
    pub fn is_half_full(&self) -> bool {
        let bytes = self.storage.len() - BULK_BYTES - CONTROL_RESERVE_BYTES;
        let frames = self.frames.capacity() - BULK_FRAMES - CONTROL_RESERVE_FRAMES;
        self.used > bytes / 2 || self.frames.len() > frames / 2
    }

    /// Adds a frame of `len` bytes that `fill` writes; `None`, without calling `fill`, when there
    /// is no room. The control reserve may be used.
    pub fn push<R>(
        &mut self,
        link: LinkId,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> (Offload, R),
    ) -> Option<R> {
        self.push_some(link, len, |frame| {
            let (offload, result) = fill(frame);
            (Some((frame.len(), offload)), result)
        })
    }

    /// Adds a frame of `most` bytes or less: as many as `fill` says it is to have; none where it says so,
    /// or where there is no room for `most`, in which case it is not called.
    pub fn push_some<R>(
        &mut self,
        link: LinkId,
        most: usize,
        fill: impl FnOnce(&mut [u8]) -> (Option<(usize, Offload)>, R),
    ) -> Option<R> {
        let start = self.used;
        let end = start.checked_add(HEADROOM)?.checked_add(most)?;
        if self.frames.len() == self.frames.capacity() {
            return None;
        }
        let frame = self.storage.get_mut(start + HEADROOM..end)?;
        let (filled, result) = fill(frame);
        if let Some((len, offload)) = filled {
            let end = start + HEADROOM + len.min(most);
            self.used = end.next_multiple_of(64);
            self.frames.push(TxSlot {
                bytes: start..end,
                link,
                offload,
            });
        }
        Some(result)
    }

    /// The frames in order of production.
    pub fn frames(&mut self) -> impl Iterator<Item = TxFrame<'_>> {
        let mut rest: &mut [u8] = &mut self.storage;
        let mut consumed = 0;
        self.frames.iter().map(move |slot| {
            let tail = std::mem::take(&mut rest);
            let (_, tail) = tail.split_at_mut(slot.bytes.start - consumed);
            let (frame, tail) = tail.split_at_mut(slot.bytes.len());
            consumed = slot.bytes.end;
            rest = tail;
            TxFrame {
                link: slot.link,
                offload: slot.offload,
                with_headroom: frame,
            }
        })
    }

    /// Number of frames held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.frames.len()
    }

    /// Bytes that the frames take, with the room between them.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.used
    }

    /// No frame is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Forgets all frames; the memory stays.
    pub fn clear(&mut self) {
        self.frames.clear();
        self.used = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn received_frames_come_back_in_order() {
        let mut batch = RxBatch::new(4, 0);
        assert!(batch.push_copy(b"one", RxMeta::plain(LinkId(1))));
        let frames: Vec<_> = batch
            .frames()
            .map(|(bytes, meta)| (bytes.to_vec(), meta.link))
            .collect();
        assert_eq!(frames, [(b"one".to_vec(), LinkId(1))]);
        assert!(
            batch.spare().is_none(),
            "one more frame of the largest size does not fit"
        );
        batch.clear();
        assert!(batch.spare().is_some());
    }

    #[test]
    fn the_frame_count_is_a_limit_too() {
        let mut batch = RxBatch::new(2, 4 * MAX_FRAME);
        assert!(batch.push_copy(b"a", RxMeta::plain(LinkId(0))));
        assert!(batch.push_copy(b"b", RxMeta::plain(LinkId(0))));
        assert!(!batch.push_copy(b"c", RxMeta::plain(LinkId(0))));
    }

    #[test]
    fn a_full_transmit_batch_still_takes_control_frames() {
        let mut batch = TxBatch::new(8, 0);
        assert!(batch.has_room());
        let pushed = batch.push(LinkId(0), MAX_FRAME, |frame| {
            frame.fill(7);
            (Offload::NONE, ())
        });
        assert!(pushed.is_some());
        assert!(!batch.has_room(), "no room for bulk");
        assert!(batch.push(LinkId(0), 64, |_| (Offload::NONE, ())).is_some());
        let lengths: Vec<_> = batch.frames().map(|frame| frame.bytes().len()).collect();
        assert_eq!(lengths, [MAX_FRAME, 64]);
    }

    #[test]
    fn a_frame_that_does_not_fit_is_refused_untouched() {
        let mut batch = TxBatch::new(8, 0);
        let refused = batch.push(LinkId(0), 8 * MAX_FRAME, |_| (Offload::NONE, ()));
        assert!(refused.is_none());
        assert!(batch.is_empty());
    }
}
