//! Frames and windows of time go in. Out comes what is thinned and what is not; that the filter in the kernel agrees with
//! the count here; and that less is let through where the processor does not keep up.

use std::cell::{Cell, RefCell};

use super::*;

/// What the kernel does with a program, as far as [`filter`] needs it.
fn passes(program: &[Instruction], frame: &[u8], random: u32) -> bool {
    let (mut a, mut x, mut at) = (0_u32, 0_u32, 0_usize);
    let byte = |place: u32| {
        frame
            .get(usize::try_from(place).unwrap())
            .map(|byte| u32::from(*byte))
    };
    loop {
        let Instruction { code, jt, jf, k } = program[at];
        at += 1;
        let jump = |condition: bool| usize::from(if condition { jt } else { jf });
        let loaded = match code {
            0x28 => byte(k).zip(byte(k + 1)).map(|(high, low)| high << 8 | low),
            0x30 => byte(k),
            0x50 => byte(x + k),
            0x20 => {
                assert_eq!(k, RANDOM);
                Some(random)
            }
            _ => Some(a),
        };
        // A load beyond the end drops the frame.
        let Some(loaded) = loaded else { return false };
        a = loaded;
        match code {
            0x28 | 0x30 | 0x50 | 0x20 => {}
            0x15 => at += jump(a == k),
            0x45 => at += jump(a & k != 0),
            0x2d => at += jump(a > x),
            0x05 => at += usize::try_from(k).unwrap(),
            0x54 => a &= k,
            0x01 => x = k,
            0xb1 => x = (byte(k).unwrap() & 15) * 4,
            0x06 => return k != 0,
            unknown => panic!("{unknown:x}"),
        }
    }
}

fn frame(ethertype: u16, fields: &[(usize, u8)]) -> Vec<u8> {
    let mut frame = vec![0; 120];
    frame[12..14].copy_from_slice(&ethertype.to_be_bytes());
    for (at, byte) in fields {
        frame[*at] = *byte;
    }
    frame
}

fn samples() -> Vec<(Vec<u8>, Option<Kind>)> {
    let v4 = |protocol, rest: &[(usize, u8)]| {
        frame(IPV4, &[&[(14, 0x45), (23, protocol)], rest].concat())
    };
    let v6 = |protocol, rest: &[(usize, u8)]| frame(IPV6, &[&[(20, protocol)], rest].concat());
    vec![
        (frame(0x0806, &[]), Some(Kind::Link)),
        (frame(0x88cc, &[]), Some(Kind::Link)),
        (v4(6, &[(47, 0x10)]), None),
        (v4(6, &[(47, 0x18)]), None),
        (v4(6, &[(47, 0x11)]), None),
        (v4(6, &[(14, 0x46), (51, 0x10)]), None),
        (v4(6, &[(47, 0x02)]), Some(Kind::Control)),
        (v4(6, &[(47, 0x12)]), Some(Kind::Control)),
        (v4(6, &[(47, 0x14)]), Some(Kind::Control)),
        (v4(6, &[(47, 0x01)]), Some(Kind::Control)),
        (v4(6, &[(47, 0x10), (20, 0x40)]), None),
        (v4(6, &[(47, 0x10), (20, 0x20)]), Some(Kind::Fragment)),
        (v4(17, &[(21, 1)]), Some(Kind::Fragment)),
        (v4(17, &[]), Some(Kind::Datagram)),
        (v4(1, &[]), Some(Kind::Other)),
        (v4(44, &[]), Some(Kind::Other)),
        (v6(6, &[(67, 0x10)]), None),
        (v6(6, &[(67, 0x04)]), Some(Kind::Control)),
        (v6(17, &[]), Some(Kind::Datagram)),
        (v6(44, &[]), Some(Kind::Fragment)),
        (v6(58, &[]), Some(Kind::Other)),
    ]
}

#[test]
fn the_kernel_and_we_call_frames_the_same() {
    for (frame, expected) in samples() {
        assert_eq!(kind(&frame), expected, "{frame:?}");
        for thinned in 0..KINDS {
            let mut kept = [ALL; KINDS];
            kept[thinned] = LEAST;
            let dropped = expected.is_some_and(|kind| kind as usize == thinned);
            assert!(passes(&filter(kept), &frame, LEAST), "a part gets through");
            assert_eq!(
                passes(&filter(kept), &frame, ALL),
                !dropped,
                "{frame:?} {thinned}"
            );
        }
    }
}

/// Of a tap with one queue.
fn alone() -> Thinning {
    Thinning::new(TapFilter::of(1), 0)
}

/// So many frames of a kind, and of segments, in one window.
fn window(thinning: &mut Thinning, now: &mut Instant, frames: u64, segments: u64) -> bool {
    thinning.note_empty();
    full_window(thinning, now, frames, segments)
}

/// The same in a window in which the link is never empty.
fn full_window(thinning: &mut Thinning, now: &mut Instant, frames: u64, segments: u64) -> bool {
    thinning.counts[Kind::Control as usize] += frames;
    thinning.segments += segments;
    *now += WINDOW;
    thinning.look(*now)
}

#[test]
fn where_the_processor_does_not_keep_up_fewer_requests_get_through() {
    let half = MOST[Kind::Control as usize] / 100 / 2;
    let mut now = Instant::now();
    let mut thinning = alone();
    for _ in 0..100 {
        assert!(!full_window(&mut thinning, &mut now, half, half), "a crowd");
    }
    thinning.known = half;
    assert!(!full_window(&mut thinning, &mut now, half, 1), "a crowd");
    for nth in 1..=2 * u32::from(PATIENCE) {
        assert_eq!(u32::from(thinning.strain), (nth - 1) / u32::from(PATIENCE));
        assert!(!full_window(&mut thinning, &mut now, half, 1));
    }
    // A quarter is taken of what may be, which is half of this, once it was too much for a while.
    for _ in 2..PATIENCE {
        assert!(!full_window(&mut thinning, &mut now, half, 1));
    }
    assert!(full_window(&mut thinning, &mut now, half, 1));
    let part = thinning.kept[Kind::Control as usize];
    assert!((ALL / 3..ALL / 2 + 1).contains(&part), "half: {part}");
    for _ in 0..2 * PATIENCE {
        full_window(&mut thinning, &mut now, half, 1);
    }
    assert_eq!(thinning.strain, MOST_STRAIN);
}

#[test]
fn what_a_flood_has_changed_is_taken_back_also_where_little_comes() {
    let mut now = Instant::now();
    for (frames, gap) in [(25, 1), (1, 100), (0, 1000)] {
        let mut thinning = alone();
        thinning.strain = MOST_STRAIN;
        let begun = now;
        thinning.look(now);
        while thinning.strain > 0 {
            thinning.counts[Kind::Control as usize] += frames;
            thinning.segments += 1;
            thinning.note_empty();
            now += WINDOW * gap;
            assert!(thinning.is_due());
            assert!(!thinning.look(now));
        }
        let due = CALM * u32::from(MOST_STRAIN);
        let took = now - begun;
        assert!((due..due + WINDOW * gap).contains(&took), "{took:?}");
    }
}

#[test]
fn a_flood_is_thinned_while_connections_carry_data_and_then_no_more() {
    let most = MOST[Kind::Control as usize] / 100;
    let mut now = Instant::now();
    let mut thinning = alone();
    window(&mut thinning, &mut now, 0, 1);
    assert!(!window(&mut thinning, &mut now, most, 1), "what is allowed");
    for _ in 1..PATIENCE {
        assert!(!window(&mut thinning, &mut now, most * 10, 1), "a crowd");
    }
    assert!(window(&mut thinning, &mut now, most * 10, 1));
    let part = thinning.kept[Kind::Control as usize];
    assert!((ALL / 11..ALL / 9).contains(&part), "a tenth: {part}");
    assert_eq!(thinning.kept[Kind::Link as usize], ALL, "nothing else");
    assert!(
        !window(&mut thinning, &mut now, most, 0),
        "it is as it should be"
    );
    assert!(thinning.is_due());
    // Nobody floods any more.
    let windows = (0..10)
        .filter(|_| window(&mut thinning, &mut now, 0, 1))
        .count();
    assert_eq!((windows, thinning.is_on()), (4, false));
}

#[test]
fn floods_of_several_kinds_share_what_one_may_be() {
    let mut now = Instant::now();
    let mut thinning = alone();
    window(&mut thinning, &mut now, 0, 1);
    for _ in 0..PATIENCE {
        for kind in [Kind::Link, Kind::Control] {
            thinning.counts[kind as usize] += 10 * MOST[kind as usize] / 100;
        }
        assert!(!thinning.is_on());
        window(&mut thinning, &mut now, 0, 1);
    }
    for kind in [Kind::Link, Kind::Control] {
        let part = thinning.kept[kind as usize];
        assert!((ALL / 21..ALL / 19).contains(&part), "a twentieth: {part}");
    }
}

#[test]
fn datagrams_of_known_flows_do_not_count() {
    let mut thinning = alone();
    let datagram = |port| frame(IPV4, &[(14, 0x45), (23, 17), (35, port)]);
    for port in (0..80).chain(0..80) {
        thinning.count(&datagram(port));
    }
    let counted = thinning.counts[Kind::Datagram as usize];
    // Two may share a place, and both count each time.
    assert!((80..100).contains(&counted), "{counted}");
}

#[test]
fn nothing_is_thinned_where_there_is_no_connection() {
    let mut now = Instant::now();
    let mut thinning = alone();
    for _ in 0..PATIENCE {
        assert!(!window(&mut thinning, &mut now, 100_000, 0));
    }
    assert!(window(&mut thinning, &mut now, 100_000, 1));
    // A connection that the flood has stopped still counts.
    assert!(!window(&mut thinning, &mut now, 200, 0));
    now += MEMORY;
    assert!(window(&mut thinning, &mut now, 100_000, 0));
    assert!(!thinning.is_on());
}

/// What was set: a filter, none, or nothing at all.
type Setting = Option<Option<Vec<Instruction>>>;

fn set(thinning: &Thinning) -> Setting {
    let setting = RefCell::new(None);
    let set = |filter| {
        setting.replace(Some(filter));
        Ok(())
    };
    thinning.set(set).unwrap();
    setting.into_inner()
}

/// Of a tap with two queues.
fn two() -> [Thinning; 2] {
    let shared = TapFilter::of(2);
    [0, 1].map(|queue| Thinning::new(shared.clone(), queue))
}

/// So much of this kind is let through.
fn only(kind: Kind, part: u32) -> [u32; KINDS] {
    let mut kept = [ALL; KINDS];
    kept[kind as usize] = part;
    kept
}

#[test]
fn the_strictest_of_several_queues_decides() {
    let [mut one, mut other] = two();
    assert_eq!(set(&one), None, "nothing is to change");
    other.kept = only(Kind::Link, ALL / 2);
    assert_eq!(set(&other), Some(Some(filter(other.kept))));
    assert_eq!(set(&other), None, "so it is already");
    one.kept = only(Kind::Datagram, ALL / 4);
    let mut both = only(Kind::Datagram, ALL / 4);
    both[Kind::Link as usize] = ALL / 2;
    assert_eq!(set(&one), Some(Some(filter(both))));
    other.kept = only(Kind::Datagram, ALL / 8);
    assert_eq!(set(&other), Some(Some(filter(other.kept))));
    one.kept = [ALL; KINDS];
    assert_eq!(set(&one), None, "the other is stricter");
    other.kept = [ALL; KINDS];
    assert_eq!(set(&other), Some(None));
}

#[test]
fn the_filter_goes_with_the_first_queue_and_none_comes_after() {
    let [mut one, mut other] = two();
    one.end(|| panic!("there is none"));
    let [first, mut second] = two();
    second.kept = only(Kind::Link, LEAST);
    assert!(set(&second).is_some());
    let mut cleared = 0;
    first.end(|| cleared += 1);
    second.end(|| cleared += 1);
    assert_eq!(cleared, 1);
    for thinning in [&mut one, &mut other, &mut second] {
        thinning.kept = only(Kind::Other, LEAST);
        assert_eq!(set(thinning), None);
    }
}

#[test]
fn who_can_t_set_the_filter_is_left_out_of_account() {
    let [mut one, mut other] = two();
    other.kept = only(Kind::Other, LEAST);
    assert!(set(&other).is_some());
    one.kept = only(Kind::Link, LEAST);
    let tried = Cell::new(0);
    let fails = |filter: Option<Vec<Instruction>>| {
        tried.set(tried.get() + 1);
        assert_eq!(filter.is_some(), tried.get() == 1, "then it is cleared");
        Err(io::ErrorKind::InvalidInput.into())
    };
    assert!(one.set(fails).is_err());
    assert_eq!(tried.get(), 2);
    other.kept = only(Kind::Other, LEAST * 2);
    assert_eq!(set(&other), Some(Some(filter(other.kept))));
}

#[test]
fn what_is_costly_is_shared_out_to_the_queues() {
    let [mut one, _other] = two();
    for kind in [Kind::Link, Kind::Fragment] {
        assert_eq!(one.most(kind as usize), MOST[kind as usize]);
    }
    for kind in COSTLY {
        assert_eq!(2 * one.most(kind as usize), MOST[kind as usize]);
    }
    // So is what counts as much where the processor does not keep up.
    let frames = MOST[Kind::Control as usize] / 100 / 2;
    let frames = (frames >> MOST_STRAIN) + 1;
    let mut now = Instant::now();
    for _ in 0..=PATIENCE {
        full_window(&mut one, &mut now, frames, 0);
    }
    assert_eq!(one.strain, 1);
}

#[test]
fn connections_that_meet_another_queue_count() {
    let most = MOST[Kind::Link as usize] / 100;
    let mut now = Instant::now();
    let [mut one, mut other] = two();
    let flooded = |one: &mut Thinning, now: &mut Instant| {
        for _ in 0..2 * PATIENCE {
            one.counts[Kind::Link as usize] = 10 * most;
            *now += WINDOW;
            one.note_empty();
            one.look(*now);
        }
        one.is_on()
    };
    other.segments = 1;
    assert!(!other.is_due(), "nobody wants to know");
    assert!(!flooded(&mut one, &mut now), "there are no connections");
    assert!(other.is_due());
    other.look(now);
    assert!(flooded(&mut one, &mut now));
    now += MEMORY;
    assert!(!flooded(&mut one, &mut now), "they are gone");
}
