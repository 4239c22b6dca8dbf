//! A tap device as a [`Link`].
//!
//! Owns the tap's descriptor, which was opened inside the guest's network namespace. One read or
//! write moves one frame, of up to 64 KiB where the kernel grants segmentation offload. Every offload
//! is asked for by itself: a kernel that refuses one costs speed, never correctness.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::task::{Context, Poll};
use std::time::Duration;

use super::thinning::Thinning;
use super::{Link, Look, vnet};
use crate::buf::{HEADROOM, LinkId, RxBatch, RxMeta, TxBatch, TxCapabilities};
use crate::net::Mac;
use crate::sys::readiness::Watched;
use crate::sys::tap::{self, offload};

pub use super::thinning::tap_filter::TapFilter;

/// Who floods no more may be silent: what is thinned is looked at anew that soon, or what comes next would be dropped.
const RELIEF: Duration = Duration::from_millis(100);

/// Offloads granted by the kernel, and whether there is a vnet header to use them by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granted {
    /// Frames have a vnet header.
    pub vnet_header: bool,
    /// Bits of [`offload`].
    pub offloads: u32,
}

impl Granted {
    const NONE: Self = Self {
        vnet_header: false,
        offloads: 0,
    };

    /// What may be left to the kernel in frames that leave. With a vnet header a tap completes
    /// checksums and segments in any case: the offloads are about what *we* can take. But a kernel that
    /// does not offer trains of datagrams knows none.
    #[must_use]
    pub const fn transmit(self) -> TxCapabilities {
        TxCapabilities {
            checksum: self.vnet_header,
            tso4: self.vnet_header,
            tso6: self.vnet_header,
            uso: self.vnet_header && self.offloads & offload::USO4 != 0,
        }
    }
}

/// A tap device.
#[derive(Debug)]
pub struct TapLink {
    id: LinkId,
    device: Watched<File>,
    granted: Granted,
    mac: Mac,
    lost: u64,
    state: State,
    /// None where floods are not to be thinned, or the kernel has refused the filter.
    thinning: Option<Thinning>,
}

/// Whether the interface takes frames, as far as was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Up,
    /// It took none, for it was down.
    Down,
    /// It takes them again, and nobody knows yet.
    Back,
}

impl TapLink {
    /// Takes over an open tap; negotiates what it can do. Needs a tokio runtime.
    ///
    /// # Errors
    /// When the descriptor is no attached tap.
    pub fn new(id: LinkId, tap: OwnedFd) -> io::Result<Self> {
        let granted = negotiate(&tap)?;
        let mac = Mac(tap::hardware_address(tap.as_fd())?);
        let device = Watched::new(File::from(tap))?;
        tracing::debug!(?granted, %mac, "tap ready");
        Ok(Self {
            id,
            device,
            granted,
            mac,
            lost: 0,
            state: State::Up,
            thinning: None,
        })
    }

    /// From now on floods are thinned out that come by this queue, of those that share the tap's filter.
    pub fn thin_floods(&mut self, shared: TapFilter, queue: usize) {
        self.thinning = Some(Thinning::new(shared, queue));
    }

    /// What the kernel granted.
    #[must_use]
    pub const fn granted(&self) -> Granted {
        self.granted
    }

    /// The Ethernet address of the interface inside.
    #[must_use]
    pub const fn mac(&self) -> Mac {
        self.mac
    }

    /// Counts what came, and changes the filter where that is due. A kernel that takes none is left alone.
    #[expect(
        clippy::disallowed_methods,
        reason = "only while there may be a flood, and not the time of the stack's"
    )]
    fn thin(&mut self, batch: &RxBatch) {
        let Some(thinning) = &mut self.thinning else {
            return;
        };
        for (frame, _) in batch.frames() {
            thinning.count(frame);
        }
        if thinning.is_due() && thinning.look(std::time::Instant::now()) {
            let tap = self.device.get().as_fd();
            if let Err(error) = thinning.set(|filter| set_filter(tap, filter)) {
                tracing::debug!(%error, "floods are not thinned");
                self.thinning = None;
            }
        }
    }

    /// Adds frames to a batch as [`Link::receive`] does.
    fn fill(&mut self, batch: &mut RxBatch, look: Look) -> io::Result<bool> {
        while let Some(spare) = batch.spare() {
            let (id, granted) = (self.id, self.granted);
            let read = self
                .device
                .try_read(look, |device| read_frame(device, spare, id, granted));
            match read {
                Ok((bytes, meta)) => batch.push(bytes, meta),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // One frame without its header: the next may have one.
                Err(error) if error.kind() == ErrorKind::InvalidData => self.lost += 1,
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}

/// A tap that somebody else made stays when we go.
impl Drop for TapLink {
    fn drop(&mut self) {
        // Other queues' links may be with threads that end without a word.
        if let Some(thinning) = &self.thinning {
            thinning.end(|| clear_filter(self.device.get().as_fd()));
        }
    }
}

/// Has the tap drop nothing any more, if the kernel lets us.
fn clear_filter(tap: BorrowedFd<'_>) {
    if let Err(error) = tap::clear_filter(tap) {
        tracing::debug!(%error, "the filter of the tap stays");
    }
}

/// Has the tap drop what a program says, or nothing.
fn set_filter(tap: BorrowedFd<'_>, program: Option<Vec<libc::sock_filter>>) -> io::Result<()> {
    match program {
        Some(mut program) => tap::set_filter(tap, &mut program),
        None => tap::clear_filter(tap),
    }
}

/// Asks for each offload by itself and keeps those that the kernel takes.
fn negotiate(tap: &OwnedFd) -> io::Result<Granted> {
    if !tap::has_vnet_header(tap.as_fd())? {
        return Ok(Granted::NONE);
    }
    tap::set_vnet_header_len(tap.as_fd(), vnet::LEN)?;
    let mut offloads = 0;
    // USO is taken only for both families at once.
    for asked in [
        offload::CSUM,
        offload::TSO4,
        offload::TSO6,
        offload::USO4 | offload::USO6,
    ] {
        if tap::set_offload(tap.as_fd(), offloads | asked).is_ok() {
            offloads |= asked;
        }
    }
    tap::set_offload(tap.as_fd(), offloads)?;
    Ok(Granted {
        vnet_header: true,
        offloads,
    })
}

/// Reads one frame into `spare`; its bytes and what the header says.
fn read_frame(
    mut device: &File,
    spare: &mut [u8],
    id: LinkId,
    granted: Granted,
) -> io::Result<(std::ops::Range<usize>, RxMeta)> {
    let len = device.read(spare)?;
    if len == 0 {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    if !granted.vnet_header {
        return Ok((0..len, RxMeta::plain(id)));
    }
    match spare.first_chunk::<{ vnet::LEN }>() {
        Some(header) if len >= vnet::LEN => Ok((vnet::LEN..len, vnet::decode(id, *header))),
        _ => Err(ErrorKind::InvalidData.into()),
    }
}

/// The interface is gone, not just down or short of memory.
fn is_fatal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADFD | libc::EBADF))
        || error.kind() == ErrorKind::UnexpectedEof
}

impl Link for TapLink {
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.device.poll_readable(cx)
    }

    fn leave(&mut self) {
        self.device.leave();
    }

    fn settle(&mut self) -> io::Result<()> {
        self.device.settle()
    }

    fn receive(&mut self, batch: &mut RxBatch, look: Look) -> io::Result<bool> {
        let more = self.fill(batch, look)?;
        if self.state == State::Down && batch.frames().next().is_some() {
            self.state = State::Back;
        }
        if !more && let Some(thinning) = &mut self.thinning {
            thinning.note_empty();
        }
        self.thin(batch);
        Ok(more)
    }

    fn patience(&self) -> Option<Duration> {
        let thins = self.thinning.as_ref().is_some_and(Thinning::is_on);
        thins.then_some(RELIEF)
    }

    fn is_back(&mut self) -> bool {
        let back = self.state == State::Back;
        if back {
            self.state = State::Up;
        }
        back
    }

    fn transmit(&mut self, batch: &mut TxBatch) -> io::Result<()> {
        let header = self.granted.vnet_header;
        let mut device = self.device.get();
        let (mut sent, mut failed) = (false, None);
        for frame in batch.frames() {
            let bytes = if header {
                let (start, _) = frame.with_headroom.split_at_mut(HEADROOM);
                start.copy_from_slice(&vnet::encode(frame.offload));
                &*frame.with_headroom
            } else {
                &frame.with_headroom[HEADROOM..]
            };
            if let Err(error) = device.write(bytes) {
                self.lost += 1;
                failed = Some(error);
            } else {
                sent = true;
            }
        }
        batch.clear();
        // tun(4): so it says while it is down.
        let down = failed
            .as_ref()
            .is_some_and(|error| error.raw_os_error() == Some(libc::EIO));
        self.state = match self.state {
            _ if down => State::Down,
            State::Down if sent => State::Back,
            state @ (State::Up | State::Down | State::Back) => state,
        };
        match failed {
            Some(error) if is_fatal(&error) => Err(error),
            Some(error) => {
                tracing::debug!(%error, lost = self.lost, "frames lost at the tap");
                Ok(())
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_without_header_leaves_everything_to_us() {
        assert_eq!(Granted::NONE.transmit(), TxCapabilities::default());
        assert!(
            Granted {
                vnet_header: true,
                offloads: 0
            }
            .transmit()
            .tso4
        );
    }
}
