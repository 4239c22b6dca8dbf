//! Datagrams that came in fragments: put together in bounded memory, or dropped.
//!
//! Comes in: fragments of either family in any order. Goes out: whole packets, or a [`DropReason`]. Held is at
//! most 64 datagrams and 4 MiB for 30 seconds each, with 128 gaps in each; the oldest gives way. Exact duplicates are
//! passed over; any other overlap drops the whole datagram (RFC 1858, RFC 5722).

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;

use crate::buf::LinkId;
use crate::flow::key::KeyedState;
use crate::net::parse::{Fragment, Ip};
use crate::net::{self, DropReason, Duration, Instant};

const MAX_DATAGRAMS: usize = 64;
const MAX_BYTES: usize = 4 << 20;
/// Longest payload of an IPv4 packet, whose length counts the header, and of an IPv6 one.
const MAX_PAYLOAD: usize = 65_535 - 20;
const MAX_PAYLOAD6: usize = 65_535;
/// Ranges of one datagram that are apart from each other. Every second fragment of the longest datagram at the
/// least MTU of IPv6 makes 27, at IPv4's usual least of 576 bytes 60; looking for a fragment's place
/// takes a step for each (CVE-2018-5391).
const MAX_RANGES: usize = 128;
/// RFC 8200 4.5 says 60 seconds, RFC 1122 3.3.2 60 to 120, which is for networks with delays; Linux waits for 30
/// (`ipfrag_time`), and what comes over a tap is not late.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    link: LinkId,
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    id: u32,
}

/// A datagram of which parts are here.
#[derive(Debug)]
struct Partial {
    /// Tells this datagram from a later one under the same key.
    serial: u64,
    deadline: Instant,
    /// The IP header of the first fragment, once it is here.
    header: Vec<u8>,
    payload: Vec<u8>,
    /// Received ranges, sorted, apart from each other; touching ones are joined.
    received: Vec<(usize, usize)>,
    total: Option<usize>,
}

/// A datagram whose fragments did not come in time.
#[derive(Debug, PartialEq, Eq)]
pub struct Expired {
    /// Who sent it.
    pub src: IpAddr,
    /// Its beginning, headers included, where that was here: to be quoted in an error.
    pub beginning: Option<Vec<u8>>,
}

/// All datagrams that wait for fragments.
pub struct Reassembly {
    partial: HashMap<Key, Partial, KeyedState>,
    /// In order of arrival of their first fragment; entries of finished ones are passed over.
    order: VecDeque<(Instant, Key, u64)>,
    bytes: usize,
    serial: u64,
}

impl Reassembly {
    /// Nothing held.
    #[must_use]
    pub fn new(hash: KeyedState) -> Self {
        Self {
            partial: HashMap::with_hasher(hash),
            order: VecDeque::new(),
            bytes: 0,
            serial: 0,
        }
    }

    /// Takes a fragment; gives the datagram when this was the last that was missing, and the
    /// number of other datagrams that had to go for it.
    ///
    /// # Errors
    /// Why the fragment, and with it its datagram, is dropped.
    pub fn add(
        &mut self,
        now: Instant,
        ip: &Ip<'_>,
        fragment: Fragment,
    ) -> Result<(Option<Vec<u8>>, u64), DropReason> {
        let key = Key {
            link: ip.wire.link,
            src: ip.src,
            dst: ip.dst,
            protocol: ip.protocol,
            id: fragment.id,
        };
        let end = fragment.offset + ip.payload.len();
        let longest = if ip.src.is_ipv6() {
            MAX_PAYLOAD6
        } else {
            MAX_PAYLOAD
        };
        if end > longest {
            self.forget(&key);
            return Err(DropReason::FragmentTooLong);
        }
        if ip.payload.is_empty() || (fragment.more && !ip.payload.len().is_multiple_of(8)) {
            self.forget(&key);
            return Err(DropReason::Malformed);
        }
        if !self.partial.contains_key(&key) {
            self.begin(now, key);
        }
        let grown = match self
            .partial
            .get_mut(&key)
            .map(|partial| partial.add(ip, fragment))
        {
            Some(Ok(grown)) => grown,
            Some(Err(reason)) => {
                self.forget(&key);
                return Err(reason);
            }
            None => 0,
        };
        self.bytes += grown;
        if self.partial.get(&key).is_some_and(Partial::is_whole) {
            let whole = self
                .forget(&key)
                .map(|partial| partial.into_datagram(key.protocol));
            return Ok((whole, 0));
        }
        Ok((None, self.make_room()))
    }

    fn begin(&mut self, now: Instant, key: Key) {
        self.serial += 1;
        let partial = Partial {
            serial: self.serial,
            deadline: now + PATIENCE,
            header: Vec::new(),
            payload: Vec::new(),
            received: Vec::new(),
            total: None,
        };
        self.order
            .push_back((partial.deadline, key, partial.serial));
        self.partial.insert(key, partial);
    }

    fn forget(&mut self, key: &Key) -> Option<Partial> {
        let partial = self.partial.remove(key)?;
        self.bytes -= partial.payload.len();
        if self.partial.is_empty() {
            self.order.clear();
        }
        Some(partial)
    }

    fn is_held(&self, key: &Key, serial: u64) -> bool {
        self.partial
            .get(key)
            .is_some_and(|partial| partial.serial == serial)
    }

    /// Drops the oldest until the bounds hold again; returns how many.
    fn make_room(&mut self) -> u64 {
        let mut evicted = 0;
        while self.partial.len() > MAX_DATAGRAMS || self.bytes > MAX_BYTES {
            let Some((_, key, serial)) = self.order.pop_front() else {
                break;
            };
            if self.is_held(&key, serial) {
                self.forget(&key);
                evicted += 1;
            }
        }
        // Entries of finished datagrams are dropped from the front as they get there; many short
        // ones behind one long one must not pile up.
        if self.order.len() > 4 * MAX_DATAGRAMS {
            let mut order = std::mem::take(&mut self.order);
            order.retain(|(_, key, serial)| self.is_held(key, *serial));
            self.order = order;
        }
        evicted
    }

    /// Takes out the next datagram that has waited too long.
    pub fn expire(&mut self, now: Instant) -> Option<Expired> {
        while let Some(&(deadline, key, serial)) = self.order.front() {
            let held = self.is_held(&key, serial);
            if held && deadline > now {
                return None;
            }
            self.order.pop_front();
            if held {
                return self
                    .forget(&key)
                    .map(|partial| partial.into_expired(key.src));
            }
        }
        None
    }

    /// When [`Reassembly::expire`] may have something to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.order.front().map(|(deadline, ..)| *deadline)
    }

    /// The bounds hold.
    ///
    /// # Errors
    /// What does not.
    pub fn check(&self) -> Result<(), String> {
        let bytes: usize = self
            .partial
            .values()
            .map(|partial| partial.payload.len())
            .sum();
        if bytes != self.bytes || bytes > MAX_BYTES || self.partial.len() > MAX_DATAGRAMS {
            return Err(format!(
                "reassembly holds {bytes} bytes, counted {}",
                self.bytes
            ));
        }
        Ok(())
    }
}

impl Partial {
    /// Adds a fragment's bytes; returns by how much the memory grew.
    fn add(&mut self, ip: &Ip<'_>, fragment: Fragment) -> Result<usize, DropReason> {
        let (start, end) = (fragment.offset, fragment.offset + ip.payload.len());
        if self.received.contains(&(start, end)) || self.covers_same(start, ip.payload) {
            return Ok(0);
        }
        if self
            .received
            .iter()
            .any(|&(from, to)| start < to && from < end)
        {
            return Err(DropReason::FragmentOverlap);
        }
        let contradicts = |total: usize| end > total || (!fragment.more && end != total);
        let beyond = !fragment.more && self.received.last().is_some_and(|&(_, to)| to > end);
        if beyond || self.total.is_some_and(contradicts) {
            return Err(DropReason::FragmentOverlap);
        }
        if !fragment.more {
            self.total = Some(end);
        }
        if start == 0 {
            self.header = ip.bytes[..ip.header_len()].to_vec();
        }
        self.note(start, end);
        if self.received.len() > MAX_RANGES {
            return Err(DropReason::FragmentGaps);
        }
        let before = self.payload.len();
        if before < end {
            self.payload.resize(end, 0);
        }
        self.payload[start..end].copy_from_slice(ip.payload);
        Ok(self.payload.len() - before)
    }

    /// A repeated fragment inside what is here, with the same bytes.
    fn covers_same(&self, start: usize, bytes: &[u8]) -> bool {
        let end = start + bytes.len();
        self.received
            .iter()
            .any(|&(from, to)| from <= start && end <= to)
            && self.payload[start..end] == *bytes
    }

    fn note(&mut self, start: usize, end: usize) {
        let at = self.received.partition_point(|&(from, _)| from < start);
        self.received.insert(at, (start, end));
        self.received.dedup_by(|next, previous| {
            let touches = next.0 <= previous.1;
            if touches {
                previous.1 = previous.1.max(next.1);
            }
            touches
        });
    }

    fn is_whole(&self) -> bool {
        self.total
            .is_some_and(|total| self.received == [(0, total)])
    }

    fn into_expired(self, src: IpAddr) -> Expired {
        let first = self.received.first().filter(|&&(from, _)| from == 0);
        let beginning = first.map(|&(_, to)| {
            let mut bytes = self.header;
            bytes.extend(&self.payload[..to]);
            bytes
        });
        Expired { src, beginning }
    }

    /// The whole packet, its header written anew.
    fn into_datagram(self, protocol: u8) -> Vec<u8> {
        let mut bytes = net::emit::make_whole(&self.header, protocol, self.payload.len());
        bytes.extend(self.payload);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LINK: LinkId = LinkId(0);

    fn reassembly() -> Reassembly {
        Reassembly::new(KeyedState::new((1, 2)))
    }

    #[expect(clippy::too_many_arguments, reason = "a fragment has that many fields")]
    fn add(
        r: &mut Reassembly,
        now: i64,
        id: u32,
        offset: usize,
        more: bool,
        payload: &[u8],
    ) -> Result<Option<Vec<u8>>, DropReason> {
        let mut bytes = vec![0x45; 20];
        bytes.extend(payload);
        let mac = crate::net::Mac([2; 6]);
        let ip = Ip {
            wire: crate::net::Wire {
                link: LINK,
                src: mac,
                dst: mac,
            },
            src: [10, 0, 2, 100].into(),
            dst: [192, 0, 2, 1].into(),
            protocol: 17,
            marks: crate::net::Marks::default(),
            fragment: None,
            bytes: &bytes,
            payload: &bytes[20..],
            checksum_verified: false,
            udp_segment: None,
        };
        let whole = r.add(Instant::from_secs(now), &ip, Fragment { id, offset, more })?;
        Ok(whole.0.map(|datagram| datagram[20..].to_vec()))
    }

    #[test]
    fn last_first_as_libslirp_dies_of() {
        let mut r = reassembly();
        assert_eq!(add(&mut r, 0, 1, 16, false, &[3; 8]), Ok(None));
        assert_eq!(add(&mut r, 0, 1, 8, true, &[2; 8]), Ok(None));
        let whole = add(&mut r, 0, 1, 0, true, &[1; 8]).unwrap().unwrap();
        assert_eq!(whole, [[1; 8], [2; 8], [3; 8]].concat());
        assert_eq!(r.check(), Ok(()));
    }

    #[test]
    fn duplicates_pass_overlaps_kill() {
        let mut r = reassembly();
        assert_eq!(add(&mut r, 0, 1, 0, true, &[1; 16]), Ok(None));
        assert_eq!(
            add(&mut r, 0, 1, 0, true, &[1; 16]),
            Ok(None),
            "exact duplicate"
        );
        assert_eq!(
            add(&mut r, 0, 1, 8, true, &[9; 16]),
            Err(DropReason::FragmentOverlap)
        );
        assert_eq!(
            add(&mut r, 0, 1, 16, false, &[2; 8]),
            Ok(None),
            "the first part is gone"
        );
    }

    #[test]
    fn the_ping_of_death_is_too_long() {
        let mut r = reassembly();
        assert_eq!(
            add(&mut r, 0, 1, 65_512, false, &[0; 400]),
            Err(DropReason::FragmentTooLong)
        );
        assert_eq!(r.check(), Ok(()));
    }

    #[test]
    fn gaps_are_bounded() {
        let mut r = reassembly();
        for at in 0..MAX_RANGES {
            assert_eq!(add(&mut r, 0, 1, at * 16, true, &[0; 8]), Ok(None));
        }
        // What fills a gap is welcome; another gap is the end of the datagram.
        assert_eq!(add(&mut r, 0, 1, 8, true, &[0; 8]), Ok(None));
        assert_eq!(add(&mut r, 0, 1, 16_000, true, &[0; 8]), Ok(None));
        assert_eq!(
            add(&mut r, 0, 1, 16_016, true, &[0; 8]),
            Err(DropReason::FragmentGaps)
        );
        assert_eq!((r.partial.len(), r.check()), (0, Ok(())));
    }

    #[test]
    fn unfinished_datagrams_are_bounded_in_number_and_time() {
        let mut r = reassembly();
        for id in 0..5000 {
            assert_eq!(add(&mut r, 0, id, 65_000, true, &[0; 8]), Ok(None));
            assert_eq!(r.check(), Ok(()));
        }
        assert!(r.partial.len() <= MAX_DATAGRAMS);
        assert!(r.order.len() <= 4 * MAX_DATAGRAMS + 1);
        assert_eq!(r.expire(Instant::from_secs(29)), None);
        assert!(r.expire(Instant::from_secs(31)).is_some());
        while r.expire(Instant::from_secs(31)).is_some() {}
        assert_eq!((r.partial.len(), r.bytes, r.next_deadline()), (0, 0, None));
    }

    proptest! {
        /// Any order of the pieces, with repetitions, gives the datagram back.
        #[test]
        fn any_order_gives_the_datagram(
            cuts in proptest::collection::btree_set(1_usize..200, 0..12),
            len in 1_usize..1600,
            order in proptest::collection::vec(any::<prop::sample::Index>(), 0..30),
        ) {
            let payload: Vec<u8> = (0..len).map(|i| u8::try_from(i % 249).unwrap()).collect();
            let mut edges: Vec<usize> = cuts.iter().map(|cut| cut * 8).filter(|&cut| cut < len).collect();
            edges.insert(0, 0);
            edges.push(len);
            let pieces: Vec<(usize, usize)> = edges.windows(2).map(|pair| (pair[0], pair[1])).collect();
            prop_assume!(pieces.len() > 1);
            let mut sequence: Vec<usize> = order.iter().map(|index| index.index(pieces.len())).collect();
            sequence.extend(0..pieces.len());
            let mut r = reassembly();
            let mut whole = None;
            for piece in sequence {
                let (from, to) = pieces[piece];
                let got = add(&mut r, 0, 7, from, to < len, &payload[from..to]);
                prop_assert_eq!(r.check(), Ok(()));
                if let Ok(Some(bytes)) = got {
                    whole = Some(bytes);
                    break;
                }
                prop_assert!(got.is_ok());
            }
            prop_assert_eq!(whole, Some(payload));
        }
    }
}
