//! Several datagrams of one socket by one call: recvmmsg(2).
//!
//! Owns the memory that they are received into and what the kernel says of each. Comes in: a socket.
//! Goes out: payload, sender and control messages (cmsg(3)) of each datagram, as bytes.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Room for the largest datagram.
const SLOT: usize = 65_536;

/// What lies between two slots beside that: it keeps their beginnings out of the same cache sets.
const STAGGER: usize = 33 * 64;

/// Room for the sender's address: `struct sockaddr_in6`.
const NAME: usize = 28;

/// Room for control messages.
const CONTROL: usize = 192;

/// Bytes of a control message's header, and what its end is aligned to: `struct cmsghdr`.
const CONTROL_HEADER: usize = 16;
const CONTROL_ALIGNMENT: usize = 8;

/// A control message's buffer, aligned as the kernel wants it.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

/// Room for a batch of datagrams.
pub struct ReceiveBatch {
    storage: Box<[u8]>,
    names: Box<[[u8; NAME]]>,
    controls: Box<[Control]>,
    vectors: Box<[libc::iovec]>,
    headers: Box<[libc::mmsghdr]>,
}

// SAFETY: the pointers in the headers and vectors are written before each call and not used after it.
unsafe impl Send for ReceiveBatch {}

/// A received datagram.
#[derive(Debug, Clone, Copy)]
pub struct ReceivedDatagram<'a> {
    /// Its payload.
    pub payload: &'a [u8],
    name: &'a [u8],
    control: &'a [u8],
}

/// A control message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ControlMessage<'a> {
    /// `cmsg_level`.
    pub level: i32,
    /// `cmsg_type`.
    pub kind: i32,
    /// Its data.
    pub data: &'a [u8],
}

impl ReceiveBatch {
    /// Room for so many datagrams of any size; memory is committed as it is used.
    #[must_use]
    pub fn new(count: usize) -> Self {
        let vector = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        // SAFETY: a plain structure of the kernel's for which all zeroes are a value.
        let header: libc::mmsghdr = unsafe { std::mem::zeroed() };
        Self {
            storage: vec![0; count * (SLOT + STAGGER)].into_boxed_slice(),
            names: vec![[0; NAME]; count].into_boxed_slice(),
            controls: vec![Control([0; CONTROL]); count].into_boxed_slice(),
            vectors: vec![vector; count].into_boxed_slice(),
            headers: vec![header; count].into_boxed_slice(),
        }
    }

    /// Receives what is there, as far as there is room; gives the number of datagrams. An error that
    /// comes after the first is told by the next call.
    ///
    /// # Errors
    /// `WouldBlock` when there is none, else what recvmmsg(2) reports.
    pub fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let slots = self.storage.chunks_exact_mut(SLOT + STAGGER);
        let places = slots.zip(&mut self.names).zip(&mut self.controls);
        let records = self.vectors.iter_mut().zip(&mut self.headers);
        for (((slot, name), control), (vector, header)) in places.zip(records) {
            vector.iov_base = slot.as_mut_ptr().cast();
            vector.iov_len = SLOT;
            header.msg_len = 0;
            header.msg_hdr.msg_name = name.as_mut_ptr().cast();
            header.msg_hdr.msg_namelen = 28;
            header.msg_hdr.msg_iov = vector;
            header.msg_hdr.msg_iovlen = 1;
            header.msg_hdr.msg_control = control.0.as_mut_ptr().cast();
            header.msg_hdr.msg_controllen = CONTROL;
        }
        let count = libc::c_uint::try_from(self.headers.len()).unwrap_or(libc::c_uint::MAX);
        // SAFETY: `count` headers lie there, and each points at live memory of the lengths it names.
        let received = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                count,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }

    /// Puts a payload into a place, as if it had been received there. For hosts that are not the
    /// kernel's.
    pub fn put(&mut self, number: usize, payload: &[u8]) {
        let start = number * (SLOT + STAGGER);
        let place = self.storage.get_mut(start..start + payload.len().min(SLOT));
        if let (Some(place), Some(header)) = (place, self.headers.get_mut(number)) {
            place.copy_from_slice(&payload[..payload.len().min(SLOT)]);
            header.msg_len = libc::c_uint::try_from(place.len()).unwrap_or(0);
            header.msg_hdr.msg_namelen = 0;
            header.msg_hdr.msg_controllen = 0;
        }
    }

    /// One of the datagrams that the last call received.
    #[must_use]
    pub fn get(&self, number: usize) -> Option<ReceivedDatagram<'_>> {
        let header = self.headers.get(number)?;
        let len = usize::try_from(header.msg_len).ok()?;
        let start = number * (SLOT + STAGGER);
        let name = usize::try_from(header.msg_hdr.msg_namelen).ok()?;
        let control = header.msg_hdr.msg_controllen;
        Some(ReceivedDatagram {
            payload: self.storage.get(start..start + len)?,
            name: self.names.get(number)?.get(..name)?,
            control: self.controls.get(number)?.0.get(..control)?,
        })
    }
}

impl<'a> ReceivedDatagram<'a> {
    /// Its sender, where that is an IP endpoint.
    #[must_use]
    pub fn sender(&self) -> Option<SocketAddr> {
        let family = u16::from_ne_bytes(*self.name.first_chunk()?);
        let port = u16::from_be_bytes(*self.name.get(2..)?.first_chunk()?);
        match i32::from(family) {
            libc::AF_INET => {
                let addr: [u8; 4] = *self.name.get(4..)?.first_chunk()?;
                Some((Ipv4Addr::from(addr), port).into())
            }
            libc::AF_INET6 => {
                let addr: [u8; 16] = *self.name.get(8..)?.first_chunk()?;
                let scope = u32::from_ne_bytes(*self.name.get(24..)?.first_chunk()?);
                Some(SocketAddrV6::new(Ipv6Addr::from(addr), port, 0, scope).into())
            }
            _ => None,
        }
    }

    /// What the kernel says of it.
    pub fn control_messages(&self) -> impl Iterator<Item = ControlMessage<'a>> + use<'a> {
        control_messages(self.control)
    }
}

/// The control messages (cmsg(3)) that a buffer holds, up to its end or to zeroes.
pub(super) fn control_messages(buffer: &[u8]) -> impl Iterator<Item = ControlMessage<'_>> {
    let mut rest = buffer;
    std::iter::from_fn(move || {
        let length = usize::from_ne_bytes(*rest.first_chunk()?);
        let message = ControlMessage {
            level: i32::from_ne_bytes(*rest.get(8..)?.first_chunk()?),
            kind: i32::from_ne_bytes(*rest.get(12..)?.first_chunk()?),
            data: rest.get(CONTROL_HEADER..length)?,
        };
        rest = rest
            .get(length.next_multiple_of(CONTROL_ALIGNMENT)..)
            .unwrap_or_default();
        Some(message)
    })
}
