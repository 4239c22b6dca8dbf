//! Hop limit, type of service and fragmentation of what a socket sends and receives.
//!
//! Owns what a socket was told last, so that it is told only of changes: the datagrams of one
//! application look alike. Comes in: the [`Marks`] of a guest's packet. Goes out: socket options, and
//! the marks of what was received, out of control messages.

use std::io;
use std::os::fd::AsFd;

use nix::sys::socket::{setsockopt, sockopt};

use crate::net::Marks;
use crate::sys::datagrams::ControlMessage;
use crate::sys::socket::{PathMtu, set_path_mtu};

/// What a socket was told to put on what it sends.
#[derive(Debug, Default)]
pub(super) struct Told {
    hop_limit: Option<u8>,
    /// A new socket has none.
    tos: u8,
    dont_fragment: Option<bool>,
}

impl Told {
    /// Has what is sent from now on look like this.
    pub(super) fn tell<F: AsFd>(&mut self, socket: &F, ipv6: bool, marks: Marks) -> io::Result<()> {
        self.hop_limit(socket, ipv6, marks.hop_limit)?;
        self.tos(socket, ipv6, marks.tos)?;
        if self.dont_fragment != Some(marks.dont_fragment) {
            let way = if marks.dont_fragment {
                PathMtu::Probe
            } else {
                PathMtu::Fragment
            };
            set_path_mtu(socket.as_fd(), ipv6, way)?;
            if ipv6 {
                setsockopt(socket, sockopt::Ipv6DontFrag, &marks.dont_fragment)?;
            }
            self.dont_fragment = Some(marks.dont_fragment);
        }
        Ok(())
    }

    /// Sets the hop limit alone.
    pub(super) fn hop_limit<F: AsFd>(
        &mut self,
        socket: &F,
        ipv6: bool,
        limit: u8,
    ) -> io::Result<()> {
        if self.hop_limit != Some(limit) {
            if ipv6 {
                setsockopt(socket, sockopt::Ipv6Ttl, &limit.into())?;
            } else {
                setsockopt(socket, sockopt::Ipv4Ttl, &limit.into())?;
            }
            self.hop_limit = Some(limit);
        }
        Ok(())
    }

    /// Sets the type of service alone.
    pub(super) fn tos<F: AsFd>(&mut self, socket: &F, ipv6: bool, tos: u8) -> io::Result<()> {
        if self.tos != tos {
            if ipv6 {
                setsockopt(socket, sockopt::Ipv6TClass, &tos.into())?;
            } else {
                setsockopt(socket, sockopt::Ipv4Tos, &tos.into())?;
            }
            self.tos = tos;
        }
        Ok(())
    }
}

/// Has every received datagram say how it looked.
pub(super) fn note_marks<F: AsFd>(socket: &F, ipv6: bool) -> io::Result<()> {
    if ipv6 {
        setsockopt(socket, sockopt::Ipv6RecvTClass, &true)?;
        setsockopt(socket, sockopt::Ipv6RecvHopLimit, &true)?;
    } else {
        setsockopt(socket, sockopt::IpRecvTos, &true)?;
        setsockopt(socket, sockopt::Ipv4RecvTtl, &true)?;
    }
    Ok(())
}

/// Takes what a control message says about a datagram's looks.
pub(super) fn take_mark(marks: &mut Marks, message: ControlMessage<'_>) {
    // The type of service of IPv4 is a byte; the other three are an `int`.
    let value = match *message.data {
        [byte] => byte,
        [a, b, c, d] => u8::try_from(i32::from_ne_bytes([a, b, c, d])).unwrap_or_default(),
        _ => return,
    };
    match (message.level, message.kind) {
        (libc::IPPROTO_IP, libc::IP_TOS) | (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
            marks.tos = value;
        }
        (libc::IPPROTO_IP, libc::IP_TTL) | (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT) => {
            marks.hop_limit = value;
        }
        _ => {}
    }
}
