//! The one-packet device between smoltcp and a transmit batch.
//!
//! Comes in: one packet of the guest at most. Goes out: frames, as long as the guest has room for
//! (`tcp_shorten.rs`), completed for the link (`tcp_completion.rs`).

use std::num::{NonZeroU16, NonZeroUsize};

use smoltcp::phy::{
    Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium, PacketMeta, RxToken,
    TxToken,
};

use super::tcp_completion::{Sent, announce, finish};
use super::tcp_shorten::shorten;
use crate::buf::{ETHERNET_HEADER, TxBatch, TxCapabilities};
use crate::config::Timeouts;
use crate::net::{Instant, Wire, emit};

/// Largest IP packet that is handed to a link for segmentation.
const MAX_SEGMENT_PACKET: usize = 65_535;

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
    pub(super) const fn header_len(&self) -> u16 {
        if self.ipv6 { 40 } else { 20 }
    }

    /// Largest payload of a segment without options (RFC 9293 3.7.1).
    #[must_use]
    pub const fn mss(&self) -> u16 {
        self.mtu.saturating_sub(self.header_len() + 20)
    }
}

#[cfg(test)]
impl Path {
    /// One at an MTU of 1500 that leaves everything to us.
    pub(super) fn plain() -> Self {
        use crate::buf::LinkId;
        use crate::net::Mac;

        Self {
            wire: Wire {
                link: LinkId(0),
                src: Mac([2; 6]),
                dst: Mac([4; 6]),
            },
            mtu: 1500,
            ipv6: false,
            capabilities: TxCapabilities::default(),
            timeouts: Timeouts::default(),
        }
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
            let withheld = sent.withheld;
            let len = shorten(
                frame,
                start,
                reach.map(|reach| reach.wrapping_sub(withheld)),
            );
            let frame = &mut frame[..len];
            announce(&mut frame[start..], sent, limit, reach);
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
