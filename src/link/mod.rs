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
use std::task::{Context, Poll};
use std::time::Duration;

use crate::buf::{RxBatch, TxBatch};

pub use crate::sys::readiness::Look;

/// A source and sink of frames.
pub trait Link {
    /// Has the task woken when there may be frames to receive, and says whether there may be some now.
    ///
    /// # Errors
    /// When the runtime goes away.
    fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// It goes to another thread next: no runtime is to wake anybody for it.
    fn leave(&mut self);

    /// It is in this thread now, whose runtime is to wake it. Before that it can be used all the same.
    ///
    /// # Errors
    /// When the runtime has no room; then nothing has changed.
    fn settle(&mut self) -> io::Result<()>;

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

    /// How long it may be left alone at most, though nothing comes.
    fn patience(&self) -> Option<Duration> {
        None
    }

    /// It takes frames again, after it took none for a while. Told once each time.
    fn is_back(&mut self) -> bool {
        false
    }
}
