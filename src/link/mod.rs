//! The guest's edge: where frames come from and go to.
//!
//! A [`Link`] fills receive batches and empties transmit batches. [`tap`] is the tap device of a
//! namespace; [`vnet`] reads and writes the header that carries its offloads; [`seqpacket`] is a socket. What a link can't do
//! for a frame it says in its [`TxCapabilities`](crate::buf::TxCapabilities), and the frame comes
//! finished. Links know nothing of what frames mean.

pub mod seqpacket;
pub mod tap;
mod thinning;
pub mod vnet;

use std::io;

use crate::buf::{RxBatch, TxBatch};

pub use crate::sys::readiness::Look;

/// A source and sink of frames.
pub trait Link {
    /// Waits until there may be frames to receive.
    fn readable(&self) -> impl Future<Output = io::Result<()>>;

    /// Adds frames to the batch until it is full or there are none; true when there may be more.
    ///
    /// # Errors
    /// When the link is gone for good.
    fn receive(&mut self, batch: &mut RxBatch, look: Look) -> io::Result<bool>;

    /// Sends all frames of the batch, and clears it. A frame that the link does not take is lost,
    /// as on any wire.
    ///
    /// # Errors
    /// When the link is gone for good.
    fn transmit(&mut self, batch: &mut TxBatch) -> io::Result<()>;

    /// It takes frames again, after it took none for a while. Told once each time.
    fn is_back(&mut self) -> bool {
        false
    }
}
