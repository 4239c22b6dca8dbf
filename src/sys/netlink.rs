//! Interfaces, addresses and routes of the present network namespace, by rtnetlink(7).
//!
//! Five requests are all that is needed, so the messages are written here. Comes in: an interface
//! index and what it is to have. Goes out: nothing, or the kernel's error.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

/// What an interface is to look like; what is `None` stays as it is.
#[derive(Debug, Clone, Copy, Default)]
pub struct LinkChange {
    /// Largest packet, bytes.
    pub mtu: Option<u16>,
    /// Ethernet address.
    pub mac: Option<[u8; 6]>,
    /// Packets that wait for the reader before the interface drops some.
    pub queue_length: Option<u32>,
}

/// A connection to the kernel's routing tables.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

/// A request under construction.
struct Request {
    bytes: Vec<u8>,
}

impl Request {
    fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let flags = flags | bits(libc::NLM_F_REQUEST | libc::NLM_F_ACK);
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(body);
        Self { bytes }
    }

    /// Adds an attribute (`struct rtattr`), padded to four bytes.
    fn attribute(mut self, kind: u16, data: &[u8]) -> Self {
        let len = u16::try_from(4 + data.len()).unwrap_or(u16::MAX);
        self.bytes.extend(len.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    fn finish(mut self, sequence: u32) -> Vec<u8> {
        let len = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[..4].copy_from_slice(&len.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }
}

/// Constants of the kernel's headers come as `c_int`; all used here fit 16 bits.
fn bits(flags: libc::c_int) -> u16 {
    u16::try_from(flags).unwrap_or(0)
}

fn byte(value: libc::c_int) -> u8 {
    u8::try_from(value).unwrap_or(0)
}

fn octets(addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    }
}

fn family(addr: IpAddr) -> u8 {
    byte(if addr.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    })
}

impl Netlink {
    /// Connects to the kernel.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn open() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    fn call(&mut self, request: Request) -> io::Result<()> {
        self.sequence += 1;
        let bytes = request.finish(self.sequence);
        sendto(
            self.socket.as_raw_fd(),
            &bytes,
            &NetlinkAddr::new(0, 0),
            MsgFlags::empty(),
        )?;
        let mut answer = [0; 4096];
        let len = recv(self.socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        // struct nlmsghdr (16 bytes), then struct nlmsgerr, which begins with the error.
        let error = answer
            .get(16..20)
            .filter(|_| len >= 20)
            .and_then(|bytes| bytes.try_into().ok());
        match error.map(i32::from_ne_bytes) {
            Some(0) => Ok(()),
            Some(error) => Err(io::Error::from_raw_os_error(error.saturating_neg())),
            None => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Lets an interface have each packet at once: no queueing discipline is in between (tc(8)).
    ///
    /// # Errors
    /// What the kernel reports.
    pub fn queue_nothing(&mut self, index: u32) -> io::Result<()> {
        /// `TC_H_ROOT` of linux/pkt_sched.h, and `TCA_KIND` of linux/rtnetlink.h.
        const ROOT: u32 = u32::MAX;
        const KIND: u16 = 1;
        // struct tcmsg: family, padding, interface, handle, parent, info.
        let mut body = vec![0; 4];
        body.extend(index.to_ne_bytes());
        body.extend(0_u32.to_ne_bytes());
        body.extend(ROOT.to_ne_bytes());
        body.extend(0_u32.to_ne_bytes());
        let flags = bits(libc::NLM_F_CREATE | libc::NLM_F_REPLACE);
        let request = Request::new(libc::RTM_NEWQDISC, flags, &body).attribute(KIND, b"noqueue\0");
        self.call(request)
    }

    /// Brings an interface up, with what is to be changed on it.
    ///
    /// # Errors
    /// What the kernel reports: no such interface, a value it does not take.
    pub fn set_up(&mut self, index: u32, change: LinkChange) -> io::Result<()> {
        let up = u32::try_from(libc::IFF_UP).unwrap_or(1);
        // struct ifinfomsg: family, padding, type, index, flags, mask of flags to change.
        let mut body = vec![0; 4];
        body.extend(index.to_ne_bytes());
        body.extend(up.to_ne_bytes());
        body.extend(up.to_ne_bytes());
        let mut request = Request::new(libc::RTM_NEWLINK, 0, &body);
        if let Some(mtu) = change.mtu {
            request = request.attribute(libc::IFLA_MTU, &u32::from(mtu).to_ne_bytes());
        }
        if let Some(mac) = change.mac {
            request = request.attribute(libc::IFLA_ADDRESS, &mac);
        }
        if let Some(length) = change.queue_length {
            request = request.attribute(libc::IFLA_TXQLEN, &length.to_ne_bytes());
        }
        self.call(request)
    }

    /// Gives an interface an address, usable at once (no duplicate address detection).
    ///
    /// # Errors
    /// What the kernel reports; an address that is there already is no error.
    pub fn add_address(&mut self, index: u32, addr: IpAddr, prefix: u8) -> io::Result<()> {
        // struct ifaddrmsg: family, prefix length, flags, scope, index. IFA_F_NODAD is 2.
        let mut body = vec![
            family(addr),
            prefix,
            2,
            byte(libc::RT_SCOPE_UNIVERSE.into()),
        ];
        body.extend(index.to_ne_bytes());
        let flags = bits(libc::NLM_F_CREATE | libc::NLM_F_REPLACE);
        let request = Request::new(libc::RTM_NEWADDR, flags, &body)
            .attribute(libc::IFA_LOCAL, &octets(addr))
            .attribute(libc::IFA_ADDRESS, &octets(addr));
        self.call(request)
    }

    /// Makes a gateway the default route.
    ///
    /// # Errors
    /// What the kernel reports; a default route that is there already is replaced.
    pub fn add_default_route(&mut self, index: u32, gateway: IpAddr) -> io::Result<()> {
        // struct rtmsg: family, lengths, tos, table, protocol, scope, type, flags.
        let mut body = vec![family(gateway), 0, 0, 0, libc::RT_TABLE_MAIN];
        body.extend([
            libc::RTPROT_BOOT,
            libc::RT_SCOPE_UNIVERSE,
            libc::RTN_UNICAST,
        ]);
        body.extend(0_u32.to_ne_bytes());
        let flags = bits(libc::NLM_F_CREATE | libc::NLM_F_REPLACE);
        let request = Request::new(libc::RTM_NEWROUTE, flags, &body)
            .attribute(libc::RTA_GATEWAY, &octets(gateway))
            .attribute(libc::RTA_OIF, &index.to_ne_bytes());
        self.call(request)
    }
}
