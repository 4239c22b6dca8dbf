//! The flow table beside an ordered map.
//!
//! In: flows that come, move and go in any order. Out: the table agrees with the map, finds no stranger for a late
//! event, and gives back the room that a crowd took.

use super::*;
use crate::buf::LinkId;
use proptest::prelude::*;
use std::collections::BTreeMap;

fn key(n: u16) -> FlowKey {
    FlowKey::Echo {
        link: LinkId(0),
        guest: [10, 0, 2, 100].into(),
        ident: n,
    }
}

fn at(seconds: i64) -> Instant {
    Instant::from_secs(seconds)
}

fn table(limit: usize) -> Table<u16> {
    let most = Most {
        flows: limit,
        half_open: limit,
        ports: limit,
        peers: limit,
        queries: limit,
    };
    Table::new(most, KeyedState::new((1, 2)))
}

#[test]
fn a_late_event_finds_no_stranger() {
    let mut table = table(4);
    let old = table.insert(key(1), 1, at(1)).unwrap();
    assert_eq!(table.remove(old), Some(1));
    let new = table.insert(key(2), 2, at(1)).unwrap();
    assert_eq!(slot_of(old), slot_of(new), "the slot is used again");
    assert_eq!(table.get(old), None);
    assert_eq!(table.get(new), Some(&2));
}

#[test]
fn a_crowd_leaves_no_room_behind() {
    let mut table = table(usize::MAX);
    let crowd: Vec<_> = (0..10_000)
        .map(|n| table.insert(key(n), n, at(1)).unwrap())
        .collect();
    for token in &crowd[1..] {
        table.remove(*token);
    }
    assert_eq!(table.check(), Ok(()));
    assert!(
        table.slots.capacity() <= 2 * KEPT,
        "{}",
        table.slots.capacity()
    );
    assert!(table.index.capacity() <= 4 * KEPT);
    assert_eq!(table.get(crowd[0]), Some(&0));
    for n in 1..10_000 {
        table.insert(key(n), n, at(1)).unwrap();
    }
    let strangers = crowd[1..].iter().filter(|old| table.get(**old).is_some());
    assert_eq!(strangers.count(), 0, "late events find nobody");
}

#[test]
fn a_full_table_forgets_what_is_over_first() {
    let mut table = table(2);
    let first = table.insert(key(1), 1, at(1)).unwrap();
    table.insert(key(2), 2, at(1)).unwrap();
    assert_eq!(table.insert(key(3), 3, at(1)), Err(Full));
    table.set_evictable(first);
    assert!(table.insert(key(3), 3, at(1)).is_ok());
    assert_eq!(table.find(&key(1)), None);
}

#[derive(Debug, Clone)]
enum Step {
    Insert(u16, i64),
    Remove(u16),
    Move(u16, i64),
    Expire(i64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..20_u16, 0..100_i64).prop_map(|(k, t)| Step::Insert(k, t)),
        (0..20_u16).prop_map(Step::Remove),
        (0..20_u16, 0..100_i64).prop_map(|(k, t)| Step::Move(k, t)),
        (0..100_i64).prop_map(Step::Expire),
    ]
}

proptest! {
    /// The table agrees with an ordered map, whatever is done to it.
    #[test]
    fn behaves_like_a_map(steps in proptest::collection::vec(step(), 0..200)) {
        let mut table = table(16);
        let mut model: BTreeMap<u16, i64> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Insert(k, t) if !model.contains_key(&k) => {
                    let inserted = table.insert(key(k), k, at(t));
                    prop_assert_eq!(inserted.is_ok(), model.len() < 16);
                    if inserted.is_ok() {
                        model.insert(k, t);
                    }
                }
                Step::Insert(..) => {}
                Step::Remove(k) => {
                    let removed = table.find(&key(k)).and_then(|token| table.remove(token));
                    prop_assert_eq!(removed.is_some(), model.remove(&k).is_some());
                }
                Step::Move(k, t) => {
                    if let Some(token) = table.find(&key(k)) {
                        table.set_deadline(token, at(t));
                        model.insert(k, t);
                    }
                }
                Step::Expire(t) => {
                    while let Some(token) = table.expired(at(t)) {
                        let k = *table.get(token).unwrap();
                        prop_assert!(model[&k] <= t);
                        table.remove(token);
                        model.remove(&k);
                    }
                    prop_assert!(model.values().all(|&deadline| deadline > t));
                }
            }
            prop_assert_eq!(table.check(), Ok(()));
            prop_assert_eq!(table.len(), model.len());
            let earliest = model.values().min().copied();
            prop_assert!(table.next_deadline().is_none_or(|at| Some(at.secs()) <= earliest));
        }
    }
}
