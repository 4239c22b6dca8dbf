//! Fragments and extension headers of a guest's packets (RFC 8200 section 4, RFC 5722, RFC 6946).

use tapgate::net::DropReason;

use crate::lab::{Lab, filled, millis, secs};
use crate::packets::v6::{
    DESTINATION, Extension, FRAGMENT, GUEST, HOP_BY_HOP, Ipv6, NO_NEXT_HEADER, PADDING, ROUTING,
};
use crate::packets::{ICMPV6, Received, UDP};
use crate::{GATEWAY6, OUTSIDE6};

const ID: u32 = 0x0102_0304;
/// A routing header of type 0 with nowhere left to go.
const THERE: Extension<'static> = Extension(ROUTING, &[0, 0, 0, 0, 0, 0]);
const HOPS: Extension<'static> = Extension(HOP_BY_HOP, PADDING);
const OPTIONS: Extension<'static> = Extension(DESTINATION, PADDING);
/// A fragment header of a datagram that is all in one piece.
const ATOMIC: Extension<'static> = Extension(FRAGMENT, &[0, 0, 1, 2, 3, 4]);

fn ip() -> Ipv6 {
    Ipv6::new(OUTSIDE6, UDP)
}

/// All orders of `count` things.
fn orders(count: usize) -> Vec<Vec<usize>> {
    let Some(less) = count.checked_sub(1) else {
        return vec![vec![]];
    };
    let into = |order: Vec<usize>| {
        (0..=order.len()).map(move |at| {
            let mut longer = order.clone();
            longer.insert(at, less);
            longer
        })
    };
    orders(less).into_iter().flat_map(into).collect()
}

/// The payloads that left since the last time.
fn carried(lab: &Lab) -> Vec<Vec<u8>> {
    lab.sent().into_iter().map(|sent| sent.payload).collect()
}

#[test]
fn fragments_are_joined_in_any_order_and_however_often_they_come() {
    let mut lab = Lab::new();
    let data = filled(70);
    for order in orders(4) {
        let pieces = ip().fragments(ID, &ip().udp(5000, 7, &data), 24);
        assert_eq!(pieces.len(), 4);
        for (nth, &piece) in order.iter().enumerate() {
            lab.0.inject(pieces[piece].clone());
            if nth < 3 {
                lab.0.inject(pieces[order[0]].clone());
            }
        }
        lab.wait(millis(1));
        assert_eq!(carried(&lab)[..], [&data[..]], "{order:?}");
    }
    assert_eq!(lab.received(), []);
    lab.rest();
}

#[test]
fn datagrams_that_mix_are_kept_apart() {
    let mut lab = Lab::new();
    let mut frames = Vec::new();
    for number in 0..20_u8 {
        let data = vec![number; 100];
        let src = if number % 2 == 0 {
            "fd00::100"
        } else {
            "fd00::101"
        };
        let ip = Ipv6 {
            src: src.parse().unwrap(),
            ..ip()
        };
        frames.push(ip.fragments((number / 2).into(), &ip.udp(5000, 7, &data), 56));
    }
    for nth in [1, 0] {
        for pieces in &frames {
            lab.0.inject(pieces[nth].clone());
        }
    }
    lab.wait(millis(1));
    let whole: Vec<_> = (0..20_u8).map(|number| vec![number; 100]).collect();
    assert_eq!(carried(&lab), whole);
    lab.rest();
}

#[test]
fn overlapping_fragments_take_their_datagram_with_them() {
    let datagram = ip().udp(5000, 7, &filled(88));
    let shifted =
        |offset: u16, more: bool, len: usize| ip().fragment(ID, (offset, more), &vec![0x55; len]);
    for odd in [
        shifted(8, true, 48),
        shifted(40, true, 16),
        shifted(0, true, 16),
        // Beyond the end, and another end.
        shifted(96, true, 8),
        shifted(40, false, 8),
    ] {
        let mut lab = Lab::new();
        let pieces = ip().fragments(ID, &datagram, 48);
        lab.send(pieces[1].clone());
        lab.send(odd.clone());
        lab.send(pieces[0].clone());
        assert_eq!(carried(&lab), Vec::<Vec<u8>>::new());
        let overlapped = lab.dropped(DropReason::FragmentOverlap);
        // What does not overlap the second piece does overlap the first.
        assert!((1..=2).contains(&overlapped), "{overlapped}");
        assert_eq!(lab.received(), []);
    }
}

#[test]
fn nothing_stands_behind_the_last_fragment() {
    for later in [(48, true), (48, false)] {
        let mut lab = Lab::new();
        lab.send(ip().fragment(ID, later, &[0; 48]));
        lab.send(ip().fragment(ID, (40, false), &[0; 8]));
        assert_eq!(lab.dropped(DropReason::FragmentOverlap), 1, "{later:?}");
        assert_eq!(lab.0.stack.poll_timeout().map(|at| at.secs()), Some(16));
    }
}

#[test]
fn what_nobody_sends_in_fragments_is_dropped() {
    let mut lab = Lab::new();
    // A fragment once more, its offset and all.
    let inner = [&[UDP, 0, 0, 8, 0, 0, 0, 9][..], &[0; 88]].concat();
    for frame in Ipv6::new(OUTSIDE6, FRAGMENT).fragments(1, &inner, 48) {
        lab.send(frame);
    }
    assert_eq!(lab.dropped(DropReason::Malformed), 1);
    // RFC 6980: a question of neighbour discovery.
    let ip = Ipv6::discovery(GUEST, GATEWAY6);
    let long = ip.solicitation(GATEWAY6, &[1, 7].repeat(28));
    for frame in ip.fragments(2, &long, 48) {
        lab.send(frame);
    }
    assert_eq!(lab.dropped(DropReason::NdpIgnored), 1);
    assert_eq!((carried(&lab).len(), lab.received()), (0, vec![]));
    lab.rest();
}

#[test]
fn a_fragment_that_is_all_waits_for_no_other() {
    let mut lab = Lab::new();
    let datagram = ip().udp(5000, 7, &filled(88));
    lab.send(ip().fragments(1, &datagram, 48).remove(0));
    // The same identification as one that is waited for (RFC 6946).
    lab.send(ip().fragment(1, (0, false), &ip().udp(5000, 7, b"whole")));
    assert_eq!(carried(&lab), [b"whole"]);
    lab.send(ip().fragments(1, &datagram, 48).remove(1));
    assert_eq!(carried(&lab), [filled(88)]);
    lab.rest();
}

#[test]
fn impossible_fragments_are_dropped_and_counted() {
    let mut lab = Lab::new();
    let cases = [
        (
            ip().fragment(1, (65_528, false), &[0; 8]),
            DropReason::FragmentTooLong,
        ),
        (ip().fragment(2, (0, true), &[0; 12]), DropReason::Malformed),
        (ip().fragment(3, (8, false), &[]), DropReason::Malformed),
        (
            Ipv6::new(OUTSIDE6, FRAGMENT).frame(&[UDP, 0, 0, 1]),
            DropReason::Truncated,
        ),
    ];
    for (frame, reason) in cases {
        let before = lab.dropped(reason);
        lab.send(frame);
        assert_eq!(lab.dropped(reason), before + 1);
    }
    // A first part alone, for half a minute; who sent it is told.
    lab.send(ip().fragment(4, (0, true), &[0; 8]));
    lab.wait(secs(29));
    assert_eq!(lab.dropped(DropReason::FragmentEvicted), 0);
    lab.wait(secs(2));
    lab.wait(millis(1));
    assert_eq!(lab.dropped(DropReason::FragmentEvicted), 1);
    let told: Vec<_> = lab.received().iter().map(Received::icmp).collect();
    assert_eq!(told, [Some((3, 1))]);
    for id in 0..1000 {
        lab.0.inject(ip().fragment(id, (60_000, true), &[0; 8]));
    }
    lab.wait(millis(1));
    assert_eq!(lab.dropped(DropReason::FragmentEvicted), 1 + 1000 - 64);
    assert_eq!((carried(&lab).len(), lab.received()), (0, vec![]));
    lab.rest();
}

#[test]
fn headers_that_ask_for_nothing_are_passed_over() {
    let mut lab = Lab::new();
    let long = [PADDING, &[1, 14, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]].concat();
    let chains: [&[Extension<'_>]; 9] = [
        &[HOPS],
        &[OPTIONS],
        &[THERE],
        &[ATOMIC],
        &[HOPS, OPTIONS, THERE, ATOMIC, OPTIONS],
        &[Extension(HOP_BY_HOP, &[0; 6])],
        &[Extension(DESTINATION, &long), OPTIONS],
        // An unknown option that may be passed over.
        &[Extension(DESTINATION, &[0x1e, 4, 1, 2, 3, 4])],
        &[OPTIONS; 8],
    ];
    for (nth, chain) in chains.into_iter().enumerate() {
        let data = filled(10 + nth);
        lab.send(ip().extended_frame(chain, &ip().udp(5000, 7, &data)));
        assert_eq!(carried(&lab), [data], "chain {nth}");
        let ping = Ipv6::new(GATEWAY6, ICMPV6);
        lab.send(ping.extended_frame(chain, &ping.icmp([128, 0], [7, 1], b"data")));
        assert_eq!(lab.reply().icmp(), Some((129, 0)));
    }
    lab.rest();
}

#[test]
fn headers_stand_before_fragments_and_within_them() {
    let mut lab = Lab::new();
    let data = filled(80);
    let datagram = ip().udp(5000, 7, &data);
    let first = Extension(FRAGMENT, &[0, 1, 0, 0, 0, 5]);
    let second = Extension(FRAGMENT, &[0, 48, 0, 0, 0, 5]);
    lab.send(ip().extended_frame(&[HOPS, THERE, first], &datagram[..48]));
    lab.send(ip().extended_frame(&[HOPS, second], &datagram[48..]));
    assert_eq!(carried(&lab)[..], [&data[..]]);
    // What is cut up begins with a header of its own.
    let mut inner = vec![UDP, 0];
    inner.extend(PADDING);
    inner.extend(&datagram);
    let cut = Ipv6 {
        protocol: DESTINATION,
        ..ip()
    };
    for frame in cut.fragments(6, &inner, 40) {
        lab.send(frame);
    }
    assert_eq!(carried(&lab), [data]);
    lab.rest();
}

#[test]
fn headers_that_ask_for_something_are_dropped_and_counted() {
    let mut lab = Lab::new();
    let extension = DropReason::ExtensionHeader;
    let cases: [(&str, &[Extension<'_>], DropReason); 8] = [
        (
            "segments left",
            &[Extension(ROUTING, &[0, 1, 0, 0, 0, 0])],
            extension,
        ),
        (
            "segments left, type 4",
            &[OPTIONS, Extension(ROUTING, &[4, 9, 0, 0, 0, 0])],
            extension,
        ),
        (
            "option to drop for",
            &[Extension(HOP_BY_HOP, &[0x5e, 4, 0, 0, 0, 0])],
            extension,
        ),
        (
            "option to complain of",
            &[Extension(DESTINATION, &[0xc2, 4, 0, 1, 0, 0])],
            extension,
        ),
        (
            "option that ends beyond",
            &[Extension(DESTINATION, &[1, 9, 0, 0, 0, 0])],
            DropReason::Malformed,
        ),
        ("too many", &[OPTIONS; 9], extension),
        ("hops come first", &[OPTIONS, HOPS], DropReason::Malformed),
        (
            "nothing follows",
            &[OPTIONS, Extension(NO_NEXT_HEADER, PADDING)],
            DropReason::Malformed,
        ),
    ];
    for (what, chain, reason) in cases {
        let before = lab.dropped(reason);
        lab.send(ip().extended_frame(chain, &ip().udp(5000, 7, b"x")));
        assert_eq!(lab.dropped(reason), before + 1, "{what}");
    }
    let before = lab.dropped(DropReason::Truncated);
    lab.send(Ipv6::new(OUTSIDE6, DESTINATION).frame(&[UDP, 3, 1, 4, 0, 0, 0, 0]));
    assert_eq!(
        lab.dropped(DropReason::Truncated),
        before + 1,
        "longer than the packet"
    );
    assert_eq!((carried(&lab).len(), lab.received()), (0, vec![]));
    lab.rest();
}
