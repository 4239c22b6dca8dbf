//! What must hold of a scenario after every turn, and what must be left at its end: nothing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tapgate::buf::Offload;
use tapgate::host::DatagramRole;
use tapgate::net::Duration;

use super::packets;
use super::scenario_host::MAX_DEADLINES;
use super::{CLIENTS, GuestConnection, Outcome, Seen, World};

/// Everything is over after this time: the patience with a silent guest, and some.
const LONGEST: Duration = Duration::from_secs(5 * 3600);

/// A frame with the checksum that is left to the link, which sums up from `start`.
fn completed(mut frame: Vec<u8>, offload: Offload) -> Outcome<Vec<u8>> {
    if let Some(partial) = offload.checksum {
        let start = usize::from(partial.start);
        let field = start + usize::from(partial.offset);
        let summed = frame.get(start..).ok_or("a checksum from beyond the end")?;
        let sum = packets::checksum(&[summed]);
        let place = frame.get_mut(field..field + 2);
        place
            .ok_or("a checksum beyond the end")?
            .copy_from_slice(&sum.to_be_bytes());
    }
    Ok(frame)
}

impl World {
    pub(super) fn look(&mut self) -> Outcome {
        self.stack.check()?;
        let counted = self.stack.counters().frames_in;
        if counted != self.frames {
            return Err(format!("{counted} frames counted of {}", self.frames));
        }
        let flows = self.stack.flows();
        self.seen.most_flows = self.seen.most_flows.max(flows);
        if flows > usize::try_from(self.config.max_flows).unwrap_or(usize::MAX) {
            return Err(format!("{flows} flows"));
        }
        let frames: Vec<(Vec<u8>, Offload)> = self
            .tx
            .frames()
            .map(|frame| (frame.bytes().to_vec(), frame.offload))
            .collect();
        self.tx.clear();
        let mut complete = Vec::new();
        for (frame, offload) in frames {
            self.seen.to_guest += 1;
            self.seen.ipv6.to_guest += usize::from(frame[12..14] == [0x86, 0xdd]);
            self.frame_holds(&frame, offload)?;
            self.note_tcp(&frame);
            complete.push(completed(frame, offload)?);
        }
        // A full batch may cut the fragments of a datagram short.
        packets::read(&complete).map(drop).or_else(|error| {
            if error.starts_with("fragment") {
                Ok(())
            } else {
                Err(error)
            }
        })?;
        self.destinations_hold()
    }

    fn frame_holds(&self, frame: &[u8], offload: Offload) -> Outcome {
        let arp = frame[12..14] == [8, 6] && frame.len() >= 42;
        let ipv4 = frame[12..14] == [8, 0] && frame.len() >= 34;
        let ipv6 = frame[12..14] == [0x86, 0xdd] && frame.len() >= 54;
        let expected = ipv6 && self.config.plan.subnet6().is_some();
        if frame[6..12] != packets::GATEWAY_MAC || !(arp || ipv4 || expected) {
            return Err(format!("a frame of no kind: {frame:?}"));
        }
        // What the link cuts up is judged by its pieces.
        let longest = offload.segment.map_or(frame.len(), |segment| {
            usize::from(segment.header_len) + usize::from(segment.size.get())
        });
        if longest > 14 + usize::from(self.config.mtu) {
            let mtu = self.config.mtu;
            return Err(format!("{longest} bytes over an MTU of {mtu}: {frame:?}"));
        }
        Ok(())
    }

    /// Learns from a segment to the guest what the guest's next one may say.
    fn note_tcp(&mut self, frame: &[u8]) {
        let (header, protocol) = match frame[12..14] {
            [8, 0] => (14 + 20, frame[23]),
            [0x86, 0xdd] => (14 + 40, frame[20]),
            _ => return,
        };
        if frame.len() < header + 20 || protocol != packets::TCP {
            return;
        }
        let word = |at: usize| u16::from_be_bytes([frame[header + at], frame[header + at + 1]]);
        let long = |at: usize| u32::from(word(at)) << 16 | u32::from(word(at + 2));
        let addr = if header == 34 {
            <[u8; 4]>::try_from(&frame[26..30]).map(IpAddr::from)
        } else {
            <[u8; 16]>::try_from(&frame[22..38]).map(IpAddr::from)
        };
        let Ok(addr) = addr else { return };
        let remote = (addr, word(0));
        let (from, flags) = (word(2), frame[header + 13]);
        let data = frame.len() - header - usize::from(frame[header + 12] >> 4) * 4;
        let controls = u32::from(flags & 1) + u32::from(flags >> 1 & 1);
        let known = self
            .connections
            .iter()
            .position(|known| known.from == from && known.remote == remote);
        let nth = known.unwrap_or_else(|| {
            self.connections.push(GuestConnection {
                from,
                remote,
                seq: 1000,
                ack: 0,
            });
            self.connections.len() - 1
        });
        let connection = &mut self.connections[nth];
        connection.ack = long(4)
            .wrapping_add(u32::try_from(data).unwrap_or(0))
            .wrapping_add(controls);
        if flags & 0x10 != 0 {
            connection.seq = long(8);
        }
        if self.connections.len() > 16 {
            self.connections.remove(0);
        }
    }

    /// No socket call names a destination that is forbidden.
    fn destinations_hold(&mut self) -> Outcome {
        for sent in self.net.take_sent() {
            self.seen.to_host += 1;
            self.seen.ipv6.to_host += usize::from(sent.to.is_ipv6());
            let outbound = !matches!(
                self.net.role(sent.socket),
                Some(DatagramRole::Connected(_) | DatagramRole::Published(_))
            );
            if outbound && !self.allowed(sent.to.ip()) {
                return Err(format!("a datagram to {}", sent.to));
            }
            self.sent.push((sent.socket, sent.to, sent.payload));
            if self.sent.len() > 16 {
                self.sent.remove(0);
            }
        }
        let all = self.net.connections();
        for &id in &all[self.seen.connections..] {
            let remote = self.net.remote(id).ok_or("a connection to nowhere")?;
            self.seen.ipv6.connections += usize::from(remote.is_ipv6());
            // The published port's clients have the address they please.
            let comes_in = CLIENTS.contains(&remote.to_string().as_str());
            if !comes_in && remote.port() != 53 && !self.allowed(remote.ip()) {
                return Err(format!("a connection to {remote}"));
            }
        }
        self.seen.connections = all.len();
        Ok(())
    }

    fn allowed(&self, addr: IpAddr) -> bool {
        let local = addr == IpAddr::V4(Ipv4Addr::LOCALHOST) || addr == Ipv6Addr::LOCALHOST;
        if local {
            return self.config.host_loopback;
        }
        let forbidden = match addr {
            IpAddr::V4(addr) => {
                let first = addr.octets()[0];
                first == 0 || first == 127 || first >= 224
            }
            IpAddr::V6(addr) => {
                let embedded = [[0; 12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]];
                let start = &addr.octets()[..12];
                addr.is_multicast() || embedded.iter().any(|it| it == start)
            }
        };
        !forbidden && !self.config.plan.contains(addr)
    }

    /// The servers reset what they have, the guest is silent, and nothing may be left in the end.
    pub(super) fn end(mut self) -> Outcome<Seen> {
        self.net.fail_open(None);
        self.net.heal();
        self.turn()?;
        for id in self.net.connections() {
            self.net.server_reset(id);
        }
        let end = self.now + LONGEST;
        for _ in 0..MAX_DEADLINES {
            self.turn()?;
            let Some(next) = self.stack.poll_timeout().filter(|next| *next <= end) else {
                break;
            };
            self.now = self.now.max(next);
        }
        let (flows, sockets) = (self.stack.flows(), self.net.open_sockets());
        if flows != 0 || sockets != self.published.len() {
            return Err(format!(
                "left at {}: {flows} flows, {sockets} sockets for {} published ports, next {:?}",
                self.now,
                self.published.len(),
                self.stack.poll_timeout()
            ));
        }
        for id in std::mem::take(&mut self.published) {
            self.stack.unpublish(id, None);
        }
        if self.net.open_sockets() != 0 {
            return Err("something is left when all is over".into());
        }
        self.advertises_seldom()?;
        let counters = self.stack.counters();
        self.seen.flows_opened = counters.flows_opened;
        self.seen.forwarded = counters.forwarded;
        self.seen.answered = counters.answered;
        Ok(self.seen)
    }

    /// Nothing is left to do at any time but to advertise the gateway, every few minutes.
    fn advertises_seldom(&mut self) -> Outcome {
        // A host without a way to IPv6 is asked for one more often.
        self.net.set_ipv6(true);
        let mut least = Duration::ZERO;
        for turn in 0..5 {
            let Some(next) = self.stack.poll_timeout() else {
                return if self.config.plan.subnet6().is_none() {
                    Ok(())
                } else {
                    Err("the gateway advertises itself no more".into())
                };
            };
            if self.config.plan.subnet6().is_none() || next < self.now + least {
                return Err(format!("something is left for {next} when all is over"));
            }
            self.now = self.now.max(next);
            // By then it was asked, and has told of the way.
            if turn > 0 {
                least = Duration::from_secs(200);
            }
            self.turn()?;
        }
        Ok(())
    }
}
