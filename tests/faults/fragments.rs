//! Row 4: datagrams in fragments that come in any order, twice, across each other, or never all.
//!
//! In: fragments of both families. Out: which datagrams reached the host whole, what was dropped and why,
//! and what is held meanwhile.

use std::net::Ipv6Addr;

use tapgate::net::DropReason;

use crate::packets::v6::Ipv6;
use crate::packets::{Ipv4, UDP};
use crate::rig::{OUTSIDE, Rig, pattern};
use crate::{Random, count, heap};

const OUTSIDE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
/// What may be held of unfinished datagrams, and what keeping account of them may cost.
const HELD: i64 = (4 << 20) * 2 + (1 << 20);

/// A datagram of both families in fragments of `step` bytes, in order.
fn datagrams(id: u16, len: usize, step: usize) -> [Vec<Vec<u8>>; 2] {
    let payload = pattern(len);
    let four = Ipv4 {
        id,
        ..Ipv4::new(OUTSIDE, UDP)
    };
    let six = Ipv6::new(OUTSIDE6, UDP);
    [
        four.fragments(&four.udp(5000, 7, &payload), step),
        six.fragments(id.into(), &six.udp(5000, 7, &payload), step),
    ]
}

/// The payloads that reached the host.
fn arrived(rig: &Rig) -> Vec<Vec<u8>> {
    let sent = rig.net.take_sent().into_iter();
    sent.map(|it| it.payload).collect()
}

fn send(rig: &mut Rig, fragments: &[Vec<u8>]) {
    rig.flood(fragments.iter().map(Vec::as_slice));
}

#[test]
fn row_04_fragments() {
    let mut rig = Rig::new();
    in_any_order(&mut rig);
    across_each_other(&mut rig);
    beyond_the_longest(&mut rig);
    full_of_gaps(&mut rig);
    never_finished(&mut rig);
    rig.recovers(0);
}

fn in_any_order(rig: &mut Rig) {
    let mut random = Random::new(4);
    for (round, len) in [3000, 9000, 40_000, 65_507].into_iter().enumerate() {
        for mut fragments in datagrams(u16::try_from(round).unwrap(), len, 1480) {
            // Last first: what slirp4netns dies of.
            fragments.reverse();
            send(rig, &fragments);
            assert_eq!(arrived(rig), [pattern(len)], "reversed, {len}");
            // Each twice, shuffled: it arrives when the last part comes, and once.
            let mut twice = [fragments.clone(), fragments.clone()].concat();
            for at in 0..fragments.len() {
                let other = random.below(fragments.len());
                twice.swap(at, other);
            }
            twice.truncate(fragments.len());
            send(rig, &twice);
            let early = arrived(rig);
            send(rig, &fragments);
            let late = arrived(rig);
            assert!(early.len() + late.len() <= 2, "no copy is made up");
            assert!(!late.is_empty() || !early.is_empty());
            assert!(early.iter().chain(&late).all(|it| *it == pattern(len)));
        }
    }
    rig.secs(31);
    rig.take();
}

/// Each fragment but the first begins too early, or ends too late, by eighths: nothing is delivered.
fn across_each_other(rig: &mut Rig) {
    let payload = pattern(64);
    for (id, shift) in (0..).zip([8_u16, 16, 24]) {
        for end in [40_usize, 48, 56] {
            let ip = |fragment| Ipv4 {
                id: 1000 + id,
                fragment,
                ..Ipv4::new(OUTSIDE, UDP)
            };
            let whole = Ipv4::new(OUTSIDE, UDP).udp(5000, 7, &payload);
            let first = ip(0x2000).frame(&whole[..32]);
            let from = usize::from(32 - shift);
            let mut middle = whole[from..end].to_vec();
            middle.reverse();
            let before = rig.dropped(DropReason::FragmentOverlap);
            rig.frame(&first);
            rig.frame(&ip(0x2000 | ((32 - shift) / 8)).frame(&middle));
            assert_eq!(rig.dropped(DropReason::FragmentOverlap), before + 1);
            let six = Ipv6::new(OUTSIDE6, UDP);
            let whole = six.udp(5000, 7, &payload);
            rig.frame(&six.fragment(7, (0, true), &whole[..32]));
            rig.frame(&six.fragment(7, (32 - shift, true), &middle));
            assert_eq!(rig.dropped(DropReason::FragmentOverlap), before + 2);
            // What is left of them is no datagram either.
            rig.frame(&six.fragment(7, (32, false), &whole[32..]));
            rig.frame(&ip(4).frame(&whole[32..]));
            assert!(arrived(rig).is_empty());
            rig.secs(31);
        }
    }
    rig.take();
}

/// The ping of death: fragments that end behind the longest datagram there is.
fn beyond_the_longest(rig: &mut Rig) {
    let before = rig.dropped(DropReason::FragmentTooLong);
    for eighths in [0x1fff_u16, 0x1ffe, 8190] {
        let ip = |fragment| Ipv4 {
            id: 2000,
            fragment,
            ..Ipv4::new(OUTSIDE, UDP)
        };
        rig.frame(&ip(0x2000).frame(&pattern(1480)));
        rig.frame(&ip(eighths).frame(&pattern(1480)));
        let six = Ipv6::new(OUTSIDE6, UDP);
        rig.frame(&six.fragment(8, (0, true), &pattern(1448)));
        rig.frame(&six.fragment(8, (eighths << 3, false), &pattern(1448)));
    }
    assert_eq!(rig.dropped(DropReason::FragmentTooLong), before + 6);
    assert!(arrived(rig).is_empty());
}

/// Eighths that are all apart from each other: looking for the place of the next would take ever longer.
fn full_of_gaps(rig: &mut Rig) {
    let before = rig.dropped(DropReason::FragmentGaps);
    for eighth in 0..4000 {
        let ip = Ipv4 {
            id: 3000,
            fragment: 0x2000 | (eighth * 2),
            ..Ipv4::new(OUTSIDE, UDP)
        };
        rig.frame(&ip.frame(&pattern(8)));
    }
    // Each of the 128 that may be apart, and one more, which is the end of them.
    assert_eq!(rig.dropped(DropReason::FragmentGaps), before + 4000 / 129);
    assert!(arrived(rig).is_empty());
    rig.secs(31);
    rig.take();
}

/// Thousands that begin, or end, and never are whole: the oldest give way, whatever their length.
fn never_finished(rig: &mut Rig) {
    let total = count(5_000, 100_000);
    let held = heap::held();
    let before = rig.dropped(DropReason::FragmentEvicted);
    for number in 0..total {
        let id = u16::try_from(number % 65_536).unwrap();
        // The beginning, something near the end (which says how long it is), or every second eighth.
        let four = |fragment| Ipv4 {
            id,
            fragment,
            ..Ipv4::new(OUTSIDE, UDP)
        };
        match number % 3 {
            0 => rig.frame(&four(0x2000).frame(&pattern(1480))),
            1 => rig.frame(&four(8000).frame(&pattern(800))),
            _ => {
                for eighth in 0..8 {
                    rig.frame(&four(0x2000 | (eighth * 2)).frame(&pattern(8)));
                }
            }
        }
        if number % 1000 == 0 {
            rig.stack.check().unwrap();
            assert!(heap::held() - held < HELD, "{} bytes", heap::held() - held);
        }
    }
    let evicted = usize::try_from(rig.dropped(DropReason::FragmentEvicted) - before).unwrap();
    assert!(evicted + 64 >= total, "{evicted} of {total} had to go");
    // A datagram that is whole passes all the same.
    for fragments in datagrams(3, 5000, 1480) {
        send(rig, &fragments);
        assert_eq!(arrived(rig), [pattern(5000)]);
    }
    // The rest is given up after half a minute; who sent a beginning is told so (RFC 792).
    rig.take();
    rig.secs(31);
    let mut told = rig.received();
    // The router's advertisements come by themselves.
    told.retain(|it| it.icmp() != Some((134, 0)));
    assert!(!told.is_empty() && told.len() <= 64, "{}", told.len());
    assert!(told.iter().all(|it| it.icmp() == Some((11, 1))));
    let evicted = usize::try_from(rig.dropped(DropReason::FragmentEvicted) - before).unwrap();
    assert_eq!(evicted, total, "each is accounted for");
}
