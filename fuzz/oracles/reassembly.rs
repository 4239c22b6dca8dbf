//! Fragments of both families against a naive model, which keeps every byte of a datagram by its place.
//!
//! The input is a run of fragments: a byte of which datagram and family, one of place and flags, one of
//! length, then that many bytes; or a byte that lets time pass. Eight datagrams at most are under way, so that
//! none has to give way to another.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tapgate::buf::{LinkId, RxMeta};
use tapgate::flow::key::KeyedState;
use tapgate::net::parse::{self, Packet};
use tapgate::net::{DropReason, Duration, Instant};
use tapgate::stack::reassembly::Reassembly;

/// How long fragments are waited for.
const PATIENCE: Duration = Duration::from_secs(30);
/// Gaps that one datagram may have.
const MAX_RANGES: usize = 128;

/// A datagram as the model has it.
struct Model {
    until: Instant,
    bytes: Vec<Option<u8>>,
    total: Option<usize>,
}

/// What becomes of a fragment.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Waits,
    Whole(Vec<u8>),
    Dropped(DropReason),
}

impl Model {
    fn is_range(&self, start: usize, end: usize) -> bool {
        let here = |at: usize| self.bytes.get(at).copied().flatten().is_some();
        let before = start.checked_sub(1).is_some_and(here);
        (start..end).all(here) && !before && !here(end)
    }

    fn ranges(&self) -> usize {
        let here: Vec<bool> = self.bytes.iter().map(Option::is_some).collect();
        here.chunk_by(|a, b| a == b).filter(|run| run[0]).count()
    }

    fn add(&mut self, start: usize, more: bool, payload: &[u8]) -> Fate {
        let end = start + payload.len();
        let known = |at: usize| self.bytes.get(at).copied().flatten();
        let same = (0..payload.len()).all(|nth| known(start + nth) == Some(payload[nth]));
        if same || self.is_range(start, end) {
            return self.fate();
        }
        let overlaps = (start..end).any(|at| known(at).is_some());
        let beyond = !more && self.bytes.iter().rposition(Option::is_some) >= Some(end);
        let contradicts = self
            .total
            .is_some_and(|total| end > total || (!more && end != total));
        if overlaps || beyond || contradicts {
            return Fate::Dropped(DropReason::FragmentOverlap);
        }
        if !more {
            self.total = Some(end);
        }
        if self.bytes.len() < end {
            self.bytes.resize(end, None);
        }
        for (nth, byte) in payload.iter().enumerate() {
            self.bytes[start + nth] = Some(*byte);
        }
        if self.ranges() > MAX_RANGES {
            return Fate::Dropped(DropReason::FragmentGaps);
        }
        self.fate()
    }

    fn fate(&self) -> Fate {
        let all: Option<Vec<u8>> = self.bytes.iter().copied().collect();
        match all.filter(|all| Some(all.len()) == self.total) {
            Some(all) => Fate::Whole(all),
            None => Fate::Waits,
        }
    }
}

fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes
        .chunks(2)
        .map(|it| u32::from(it[0]) << 8 | u32::from(it[1]));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

/// The frame of a fragment; places are in eighths.
fn frame(six: bool, id: u8, (place, more): (u16, bool), payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x52, 0x55, 10, 0, 2, 2, 2, 0, 0, 0, 0, 100];
    let len = u16::try_from(payload.len()).unwrap_or(0);
    if six {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend((len + 8).to_be_bytes());
        frame.extend([44, 64]);
        frame.extend(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x100).octets());
        frame.extend(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).octets());
        frame.extend([17, 0]);
        frame.extend((place << 3 | u16::from(more)).to_be_bytes());
        frame.extend([0, 0, 0, id]);
    } else {
        let mut header = vec![0x45, 0];
        header.extend((len + 20).to_be_bytes());
        header.extend([0, id]);
        header.extend((u16::from(more) << 13 | place).to_be_bytes());
        header.extend([64, 17, 0, 0]);
        header.extend(Ipv4Addr::new(10, 0, 2, 100).octets());
        header.extend(Ipv4Addr::new(192, 0, 2, 1).octets());
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        frame.extend([8, 0]);
        frame.extend(header);
    }
    frame.extend(payload);
    frame
}

/// Tries an input.
pub fn run(bytes: &[u8]) {
    let mut reassembly = Reassembly::new(KeyedState::new((1, 2)));
    let mut models: BTreeMap<(bool, u8), Model> = BTreeMap::new();
    let mut now = Instant::ZERO;
    let mut rest = bytes;
    while let [which, place, len, tail @ ..] = rest {
        rest = tail;
        if *which >= 0xf0 {
            now += Duration::from_millis(1 << (place % 16));
            expire(&mut reassembly, &mut models, now);
            continue;
        }
        let (six, id) = (which & 8 != 0, which & 3);
        // Mostly near the beginning; sometimes at the end of what a datagram may hold.
        let step = match which >> 4 {
            0..12 => u16::from(place & 0x7f),
            12 => u16::from(place & 0x7f) * 64,
            _ => 8191 - u16::from(place & 0x7f),
        };
        let more = place & 0x80 != 0;
        let len = match len {
            short @ 0..0xc0 => usize::from(short & 0x3f) * 8,
            odd => usize::from(odd & 0x3f),
        };
        let mut payload = rest[..len.min(rest.len())].to_vec();
        rest = &rest[payload.len().min(8).min(rest.len())..];
        payload.resize(len, *which);
        let frame = frame(six, id, (step, more), &payload);
        let Ok(parsed) = parse::frame(&frame, RxMeta::plain(LinkId(0))) else {
            continue;
        };
        let Packet::Ip(ip) = parsed.packet else {
            unreachable!("an IP packet was made");
        };
        // One at the beginning with nothing behind is a whole datagram.
        let Some(fragment) = ip.fragment else {
            continue;
        };
        let expected = model(
            &mut models,
            now,
            (six, id),
            (fragment.offset, more),
            &payload,
        );
        let got = match reassembly.add(now, &ip, fragment) {
            Ok((None, evicted)) => {
                assert_eq!(evicted, 0, "there is room");
                Fate::Waits
            }
            Ok((Some(whole), _)) => {
                let header = if six { 40 } else { 20 };
                assert!(whole.len() > header, "a header and more");
                Fate::Whole(whole[header..].to_vec())
            }
            Err(reason) => Fate::Dropped(reason),
        };
        assert_eq!(got, expected);
        if got != Fate::Waits {
            models.remove(&(six, id));
        }
        assert_eq!(reassembly.check(), Ok(()));
    }
    now += PATIENCE;
    expire(&mut reassembly, &mut models, now);
    assert!(models.is_empty(), "all have their time");
    assert_eq!(reassembly.expire(now), None);
}

fn model(
    models: &mut BTreeMap<(bool, u8), Model>,
    now: Instant,
    key: (bool, u8),
    (start, more): (usize, bool),
    payload: &[u8],
) -> Fate {
    let longest = if key.0 { 65_535 } else { 65_535 - 20 };
    if start + payload.len() > longest {
        return Fate::Dropped(DropReason::FragmentTooLong);
    }
    if payload.is_empty() || (more && !payload.len().is_multiple_of(8)) {
        return Fate::Dropped(DropReason::Malformed);
    }
    let model = models.entry(key).or_insert_with(|| Model {
        until: now + PATIENCE,
        bytes: Vec::new(),
        total: None,
    });
    model.add(start, more, payload)
}

/// Both forget what has waited too long, and know its beginning.
fn expire(reassembly: &mut Reassembly, models: &mut BTreeMap<(bool, u8), Model>, now: Instant) {
    let mut gone = Vec::new();
    models.retain(|key, model| {
        let over = model.until <= now;
        if over {
            let first = model.bytes.iter().take_while(|byte| byte.is_some()).count();
            gone.push((key.0, first));
        }
        !over
    });
    while let Some(expired) = reassembly.expire(now) {
        let six = matches!(expired.src, IpAddr::V6(_));
        let beginning = expired.beginning.map_or(0, |bytes| bytes.len());
        let header = if six { 48 } else { 20 };
        let place = gone.iter().position(|(of, first)| {
            *of == six
                && match *first {
                    0 => beginning == 0,
                    first => beginning == header + first,
                }
        });
        let place = place.unwrap_or_else(|| unreachable!("{beginning} of {gone:?}"));
        gone.remove(place);
    }
    assert!(gone.is_empty(), "kept for too long: {gone:?}");
}
