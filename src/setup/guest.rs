//! Inside the guest's network namespace: makes the tap and gives it an address and a route.
//!
//! Comes in: a [`TapPlan`]. Goes out: the tap's descriptors, when everything works. Needs
//! `CAP_NET_ADMIN` over the present network namespace.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use nix::net::if_::if_nametoindex;

use super::{SetupError, Step, opener};
use crate::config::{AddressPlan, Config, Publish};
use crate::sys::netlink::{LinkChange, Netlink};
use crate::sys::tap::{self, Mode};

/// Packets that wait for us before the tap drops some. At an MTU of 576 without segmentation
/// offload a window of 1 MiB is 2,000 packets, and several flows may be open.
const QUEUE_LENGTH: u32 = 16_384;

/// How the tap is to look.
#[derive(Debug, Clone)]
pub struct TapPlan {
    /// Name of the interface.
    pub name: String,
    /// Its Ethernet address; the kernel's choice where there is none.
    pub mac: Option<[u8; 6]>,
    /// Largest packet, bytes.
    pub mtu: u16,
    /// Ask for a vnet header, without which there are no offloads.
    pub vnet_header: bool,
    /// Queues, each of which is a descriptor.
    pub queues: usize,
    /// One queue will do where the interface is there already and has no more.
    pub one_will_do: bool,
    /// Address and route to configure; the interface stays as it is where there are none.
    pub addresses: Option<AddressPlan>,
    /// The host has a way to global IPv6 addresses, so the guest gets a default route to them.
    pub routes_ipv6: bool,
    /// Sockets inside will be needed: a process stays there to open them.
    pub opener: bool,
}

impl TapPlan {
    /// The plan that a configuration and the names on the command line make.
    #[must_use]
    pub fn new(config: &Config, name: &str, mac: Option<[u8; 6]>) -> Self {
        Self {
            name: name.to_owned(),
            mac,
            mtu: config.mtu,
            vnet_header: config.offload,
            queues: config.workers,
            one_will_do: false,
            addresses: Some(config.plan),
            routes_ipv6: true,
            opener: config.publish.iter().any(Publish::may_splice),
        }
    }
}

impl TapPlan {
    /// Both ends of the lines to an opener, one for each queue; none where sockets inside won't be needed,
    /// or no descriptors are left.
    pub(super) fn opener_lines(&self) -> (Vec<UnixStream>, Vec<UnixStream>) {
        let wanted = if self.opener { self.queues } else { 0 };
        let lines = (0..wanted).map(|_| opener::line());
        let lines: Result<Vec<_>, _> = lines.collect();
        lines.unwrap_or_default().into_iter().unzip()
    }
}

/// Opens the tap and, where addresses are planned, configures it and the loopback interface.
///
/// # Errors
/// The step that failed.
pub fn make_tap(plan: &TapPlan) -> Result<Vec<OwnedFd>, SetupError> {
    let name = &plan.name;
    let mode = Mode {
        vnet_header: plan.vnet_header,
        many_queues: plan.queues > 1,
    };
    let was_there = if_nametoindex(name.as_str()).is_ok();
    let opened = (0..plan.queues).map(|_| tap::open(name, mode));
    let taps = opened.collect::<Result<_, _>>();
    let taps = taps.step(|| match std::fs::metadata("/dev/net/tun") {
        Ok(_) => {
            let queues = match plan.queues {
                1 => "",
                _ => "made without multi_queue, which --workers needs, ",
            };
            format!(
                "opening the tap '{name}' (is it in use, {queues}or /dev/net/tun closed to you?)"
            )
        }
        Err(_) => "opening /dev/net/tun (load the tun module, or add the device)".into(),
    })?;
    if let Some(addresses) = &plan.addresses {
        configure(plan, addresses, was_there)?;
    }
    Ok(taps)
}

fn configure(plan: &TapPlan, addresses: &AddressPlan, was_there: bool) -> Result<(), SetupError> {
    let name = &plan.name;
    let mut netlink = Netlink::open().step(|| "opening a netlink socket".into())?;
    let loopback = if_nametoindex("lo").step(|| "finding the loopback interface".into())?;
    netlink
        .set_up(loopback, LinkChange::default())
        .step(|| "bringing 'lo' up".into())?;
    let index = if_nametoindex(name.as_str()).step(|| format!("finding '{name}'"))?;
    // The tap has queues of its own and never asks anybody to wait. In front of several queues the kernel would put 256
    // disciplines with room for as many packets each, which takes 10 ms and 100 MB (Linux 6.18).
    if !was_there && let Err(error) = netlink.queue_nothing(index) {
        tracing::debug!(interface = name, %error, "queueing discipline as it is");
    }
    let change = LinkChange {
        mtu: Some(plan.mtu),
        mac: plan.mac,
        queue_length: Some(QUEUE_LENGTH),
    };
    netlink
        .set_up(index, change)
        .step(|| format!("bringing '{name}' up"))?;
    let (guest, gateway): (Ipv4Addr, Ipv4Addr) = (addresses.guest(), addresses.gateway());
    netlink
        .add_address(index, guest.into(), addresses.subnet().prefix_len())
        .step(|| format!("giving '{name}' the address {guest}"))?;
    netlink
        .add_default_route(index, gateway.into())
        .step(|| format!("routing by {gateway}"))?;
    if let Err(error) = configure_ipv6(plan, addresses, &mut netlink, index) {
        // As where the system's administrator has switched IPv6 off.
        tracing::info!(interface = name, %error, "no IPv6 inside");
    }
    Ok(())
}

fn configure_ipv6(
    plan: &TapPlan,
    addresses: &AddressPlan,
    netlink: &mut Netlink,
    index: u32,
) -> std::io::Result<()> {
    let (Some(subnet), Some(guest), Some(gateway)) = (
        addresses.subnet6(),
        addresses.guest6(),
        addresses.gateway6(),
    ) else {
        return Ok(());
    };
    netlink.add_address(index, guest.into(), subnet.prefix_len())?;
    if plan.routes_ipv6 {
        netlink.add_default_route(index, gateway.into())?;
    }
    Ok(())
}
