//! Who is where on the link: ARP for the gateway's addresses, and the guests' Ethernet addresses
//! (`router.rs` does the same for IPv6).
//!
//! Comes in: ARP packets and the source addresses of IP packets. Goes out: ARP replies for the
//! gateway and the resolver only, so a guest's probe for its own address (RFC 5227) stays
//! unanswered. The table is bounded; a guest that claims more addresses than fit replaces its own.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};

use crate::buf::TxBatch;
use crate::config::AddressPlan;
use crate::flow::key::KeyedState;
use crate::net::parse::Arp;
use crate::net::{DropReason, Mac, Wire, emit};

use super::counters::Disposition;

/// More addresses than this are not remembered.
const MAX_NEIGHBOURS: usize = 1024;

/// So many wait for another worker to have room again.
const MAX_UNTOLD: usize = 64;

/// Ethernet addresses of the link.
pub struct Neighbours {
    gateway_mac: Mac,
    /// Where packets to an address go that has not spoken yet.
    default_mac: Option<Mac>,
    known: HashMap<IpAddr, Mac, KeyedState>,
    /// The last one learned: most frames come from the same guest.
    latest: Option<(IpAddr, Mac)>,
    /// What was learned and nobody knows yet.
    news: Vec<(IpAddr, Mac)>,
}

impl Neighbours {
    /// The gateway's own address is derived from its IP address, as slirp4netns does it.
    #[must_use]
    pub fn new(gateway: Ipv4Addr, default_mac: Option<Mac>, hash: KeyedState) -> Self {
        let [a, b, c, d] = gateway.octets();
        Self {
            gateway_mac: Mac([0x52, 0x55, a, b, c, d]),
            default_mac,
            known: HashMap::with_hasher(hash),
            latest: None,
            news: Vec::new(),
        }
    }

    /// The gateway's Ethernet address.
    #[must_use]
    pub const fn gateway_mac(&self) -> Mac {
        self.gateway_mac
    }

    /// Whether a frame to this Ethernet address is ours to look at.
    #[must_use]
    pub fn is_ours(&self, dst: Mac) -> bool {
        // RFC 2464 section 7: groups of IPv6 are at addresses that begin so.
        dst == self.gateway_mac || dst == Mac::BROADCAST || dst.0[..2] == [0x33, 0x33]
    }

    /// Learns from a frame that `addr` is at `mac`.
    pub fn learn(&mut self, addr: IpAddr, mac: Mac) {
        if self.latest != Some((addr, mac)) && mac.is_unicast() && self.note(addr, mac) {
            self.news.push((addr, mac));
        }
    }

    /// Notes that `addr` is at `mac`; true when that is new.
    pub fn note(&mut self, addr: IpAddr, mac: Mac) -> bool {
        self.latest = Some((addr, mac));
        if self.known.len() >= MAX_NEIGHBOURS && !self.known.contains_key(&addr) {
            self.known.clear();
        }
        self.known.insert(addr, mac) != Some(mac)
    }

    /// What was learned since the last time, and still holds.
    pub fn take_news(&mut self) -> Vec<(IpAddr, Mac)> {
        let mut news = std::mem::take(&mut self.news);
        news.retain(|(addr, mac)| self.known.get(addr) == Some(mac));
        news
    }

    /// Has another worker told again, with what is learned next: it had no room. What is out of date by then, or
    /// too much, it learns from frames of its own.
    pub fn tell_again(&mut self, addr: IpAddr, mac: Mac) {
        if self.news.len() < MAX_UNTOLD && !self.news.contains(&(addr, mac)) {
            self.news.push((addr, mac));
        }
    }

    /// Who was heard with an address.
    #[must_use]
    pub fn heard(&self, addr: IpAddr) -> Option<Mac> {
        self.known.get(&addr).copied()
    }

    /// Where a guest's address is.
    #[must_use]
    pub fn lookup(&self, addr: IpAddr) -> Option<Mac> {
        match self.latest {
            Some((latest, mac)) if latest == addr => Some(mac),
            _ => self.known.get(&addr).copied().or(self.default_mac),
        }
    }

    /// Answers an ARP request for one of our addresses, and learns from what it says.
    pub fn handle_arp(
        &mut self,
        plan: &AddressPlan,
        tx: &mut TxBatch,
        wire: Wire,
        arp: Arp,
    ) -> Disposition {
        if plan.is_guest_side(arp.sender.into()) && arp.sender_mac == wire.src {
            self.learn(arp.sender.into(), arp.sender_mac);
        }
        if !arp.is_request {
            return Disposition::Answered;
        }
        if !plan.is_gateway_side(arp.target.into()) {
            return Disposition::Dropped(DropReason::ArpIgnored);
        }
        let back = Wire {
            link: wire.link,
            src: self.gateway_mac,
            dst: wire.src,
        };
        if emit::arp_reply(tx, back, arp) {
            Disposition::Answered
        } else {
            Disposition::Dropped(DropReason::TransmitFull)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(last: u16) -> IpAddr {
        let [high, low] = last.to_be_bytes();
        Ipv4Addr::new(10, 0, high, low).into()
    }

    fn mac(last: u8) -> Mac {
        Mac([2, 0, 0, 0, 0, last])
    }

    fn neighbours() -> Neighbours {
        Neighbours::new(Ipv4Addr::new(10, 0, 2, 2), None, KeyedState::new((1, 2)))
    }

    #[test]
    fn who_had_no_room_is_told_again_while_it_holds() {
        let mut neighbours = neighbours();
        neighbours.learn(guest(1), mac(1));
        assert_eq!(neighbours.take_news(), [(guest(1), mac(1))]);
        // Two workers had no room.
        neighbours.tell_again(guest(1), mac(1));
        neighbours.tell_again(guest(1), mac(1));
        assert_eq!(neighbours.take_news(), [(guest(1), mac(1))]);
        neighbours.learn(guest(1), mac(2));
        neighbours.tell_again(guest(1), mac(1));
        assert_eq!(neighbours.take_news(), [(guest(1), mac(2))]);
    }

    #[test]
    fn what_waits_to_be_told_is_bounded() {
        let mut neighbours = neighbours();
        for last in 0..500 {
            neighbours.learn(guest(last), mac(1));
        }
        for (addr, mac) in neighbours.take_news() {
            neighbours.tell_again(addr, mac);
        }
        assert_eq!(neighbours.take_news().len(), MAX_UNTOLD);
    }
}
