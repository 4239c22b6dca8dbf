//! The tap device: opening it in the present network namespace, and what it can be asked for.
//!
//! Follows `Documentation/networking/tuntap.rst` and linux/if_tun.h. The crates that open a tap can't
//! ask for a vnet header or offloads, so this is ours.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

/// Longest name of an interface, without the final zero.
pub const MAX_NAME: usize = libc::IFNAMSIZ - 1;

const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const TUNGETIFF: libc::Ioctl = 0x8004_54d2;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;
/// The request of [`set_filter`], `TUNATTACHFILTER`, which has the size of `struct sock_fprog` in it.
pub const SET_FILTER: i32 = if size_of::<libc::sock_fprog>() == 16 {
    0x4010_54d5
} else {
    0x4008_54d5
};
/// The request of [`clear_filter`], `TUNDETACHFILTER`, the number after that.
pub const CLEAR_FILTER: i32 = SET_FILTER + 1;

/// Offloads of `TUNSETOFFLOAD`, by their bits in linux/if_tun.h.
pub mod offload {
    /// Checksums may be left to the other side.
    pub const CSUM: u32 = 0x01;
    /// TCP over IPv4 in long segments.
    pub const TSO4: u32 = 0x02;
    /// TCP over IPv6 in long segments.
    pub const TSO6: u32 = 0x04;
    /// UDP over IPv4 in trains of datagrams (Linux 6.2).
    pub const USO4: u32 = 0x20;
    /// UDP over IPv6 in trains of datagrams (Linux 6.2).
    pub const USO6: u32 = 0x40;
}

fn request(name: &str) -> io::Result<libc::ifreq> {
    if name.is_empty() || name.len() > MAX_NAME || name.bytes().any(|byte| byte == 0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: an `ifreq` of zero bytes is valid: it holds integers, arrays and a union of them.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *target = libc::c_char::from_ne_bytes([byte]);
    }
    Ok(request)
}

/// How a tap is opened.
#[derive(Debug, Clone, Copy)]
pub struct Mode {
    /// With a vnet header.
    pub vnet_header: bool,
    /// It may be opened several times; each descriptor is a queue of its own.
    pub many_queues: bool,
}

/// Opens the tap `name`, which is made if it does not exist, non-blocking, without the packet
/// information header.
///
/// # Errors
/// No `/dev/net/tun`, no permission in this namespace, `EBUSY`: another process has it, or `EINVAL`: it
/// exists and is not of that mode.
pub fn open(name: &str, mode: Mode) -> io::Result<OwnedFd> {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    let mut request = request(name)?;
    let mut flags = libc::IFF_TAP | libc::IFF_NO_PI;
    if mode.vnet_header {
        flags |= libc::IFF_VNET_HDR;
    }
    if mode.many_queues {
        flags |= libc::IFF_MULTI_QUEUE;
    }
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: the pointer is to a live `ifreq`, which TUNSETIFF reads and writes.
    let result = unsafe { libc::ioctl(tun.as_raw_fd(), TUNSETIFF, &raw mut request) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(tun.into())
    }
}

/// Whether the tap was opened with a vnet header.
///
/// # Errors
/// When the descriptor is no attached tap.
pub fn has_vnet_header(tap: BorrowedFd<'_>) -> io::Result<bool> {
    let mut request = request("?")?;
    // SAFETY: the pointer is to a live `ifreq`, which TUNGETIFF writes.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), TUNGETIFF, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: TUNGETIFF filled in the flags member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok(i32::from(flags) & libc::IFF_VNET_HDR != 0)
}

/// Sets the length of the vnet header: 12 bytes for `virtio_net_hdr_v1`.
///
/// # Errors
/// When the kernel refuses the length.
pub fn set_vnet_header_len(tap: BorrowedFd<'_>, len: usize) -> io::Result<()> {
    let len = libc::c_int::try_from(len).map_err(io::Error::other)?;
    // SAFETY: the pointer is to a live integer, which the call reads.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETVNETHDRSZ, &raw const len) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Tells the kernel which frames we can take, see [`offload`].
///
/// # Errors
/// `EINVAL` when it does not know one of them.
pub fn set_offload(tap: BorrowedFd<'_>, offloads: u32) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its flags by value.
    let result = unsafe {
        libc::ioctl(
            tap.as_raw_fd(),
            TUNSETOFFLOAD,
            libc::c_ulong::from(offloads),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Has a program of classic BPF look at each frame before it is queued: it is dropped where that gives 0. It takes
/// the place of the one before.
///
/// # Errors
/// `EINVAL` when the kernel does not take the program.
pub fn set_filter(tap: BorrowedFd<'_>, program: &mut [libc::sock_filter]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(io::Error::other)?,
        filter: program.as_mut_ptr(),
    };
    let request = libc::Ioctl::from(SET_FILTER.unsigned_abs());
    // SAFETY: the pointer is to a live `sock_fprog`, whose pointer and length are those of a slice; the call copies
    // both and writes neither.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), request, &raw const program) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Takes the program of [`set_filter`] away.
///
/// # Errors
/// When the descriptor is no attached tap.
pub fn clear_filter(tap: BorrowedFd<'_>) -> io::Result<()> {
    let request = libc::Ioctl::from(CLEAR_FILTER.unsigned_abs());
    // SAFETY: TUNDETACHFILTER looks at no argument.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), request, 0) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// The Ethernet address of the tap's interface.
///
/// # Errors
/// When the descriptor is no attached tap.
pub fn hardware_address(tap: BorrowedFd<'_>) -> io::Result<[u8; 6]> {
    let mut request = request("?")?;
    // SAFETY: the pointer is to a live `ifreq`, which SIOCGIFHWADDR writes (the tun driver answers
    // it for the attached interface, whatever the name says).
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::SIOCGIFHWADDR, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: SIOCGIFHWADDR filled in the hardware address member of the union.
    let address = unsafe { request.ifr_ifru.ifru_hwaddr };
    Ok([0, 1, 2, 3, 4, 5].map(|i: usize| address.sa_data[i].to_ne_bytes()[0]))
}
