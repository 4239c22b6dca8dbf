//! The soak and the flood (`benches/soak`, `benches/flood`) from end to end, for seconds: that nothing goes wrong in
//! them, and that what goes wrong is found.
//!
//! How fast anything is nobody judges here.

#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking, also inside a helper"
)]

mod support;

use std::fs;
use std::sync::Mutex;
use std::time::Duration;

use serde_json::Value;

use support::benches::{LOAD, bench, root};
use support::process::{Running, run};

/// A run that takes longer is stuck; it takes some seconds.
const LIMIT: Duration = Duration::from_secs(240);

/// Each wants the machine for itself.
static MACHINE: Mutex<()> = Mutex::new(());

/// The soak's machinery: everything at once for some seconds, in which nothing may go wrong.
#[test]
fn soak_of_some_seconds_has_no_error() {
    let load = LOAD.to_str().unwrap();
    let _alone = MACHINE.lock();
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("soak.json");
    let path = data.to_str().unwrap();
    let words = ["--minutes", "0.1", "--data", path, "--load", load];
    let mut command = bench("soak", &words);
    command.args(["--tapgate", env!("CARGO_BIN_EXE_tapgate")]);
    let finished = Running::start(&mut command).finish(LIMIT);
    assert!(finished.status.success(), "{}", finished.stderr);
    let taken: Value = serde_json::from_str(&fs::read_to_string(&data).unwrap()).unwrap();
    let counts = [
        "connections",
        "queries",
        "datagrams",
        "forwards",
        "bytes_up",
        "bytes_down",
    ];
    for count in counts {
        assert!(
            taken["counts"][count].as_u64() > Some(0),
            "{count}: {taken}"
        );
    }
    let samples = taken["samples"].as_array().unwrap();
    assert!(!samples.is_empty());
    for size in ["resident_kb", "flows", "ready", "engines", "buffers_kb"] {
        let told = samples.iter().all(|sample| sample[size].is_number());
        assert!(told, "{size}: {taken}");
    }
    let picture = fs::read_to_string(data.with_extension("svg")).unwrap();
    assert!(picture.contains("99 of 100"), "{picture}");
}

/// What stands in the repository passed, and its picture is what its data make.
#[test]
fn the_soak_in_the_repository_passed() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("soak.json");
    fs::copy(root().join("doc/soak.json"), &data).unwrap();
    let judged = run(&mut bench("soak", &["--judge", data.to_str().unwrap()]));
    assert!(judged.status.success(), "{judged:?}");
    let picture = fs::read_to_string(data.with_extension("svg")).unwrap();
    let stored = fs::read_to_string(root().join("doc/soak.svg")).unwrap();
    assert_eq!(picture, stored);
}

/// A leak and a stall are found, and a machine's noise is not.
#[test]
fn soak_is_judged_by_its_slope() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("soak.json");
    let verdict = |resident: &dyn Fn(f64) -> f64, latency: &dyn Fn(f64) -> f64| {
        let samples: Vec<Value> = (0..120_u32)
            .map(|sample| {
                let at = f64::from(sample) * 10.0;
                let noise = f64::from(sample * 7919 % 100) / 100.0;
                serde_json::json!({"s": at, "descriptors": 900.0 + 20.0 * noise,
                    "resident_kb": resident(at) + 500.0 * noise,
                    "p50_us": 20.0, "p99_us": latency(at) * (1.0 + noise / 2.0)})
            })
            .collect();
        let taken = serde_json::json!({"errors": [], "samples": samples,
            "counts": {"connections": 1, "datagrams": 1, "lost": 0}});
        fs::write(&data, taken.to_string()).unwrap();
        run(&mut bench("soak", &["--judge", data.to_str().unwrap()]))
    };
    let still = verdict(&|_| 10_000.0, &|_| 1_000.0);
    assert!(still.status.success(), "{still:?}");
    let leak = verdict(&|at| 10_000.0 + 2.0 * at, &|_| 1_000.0);
    assert!(leak.stderr.contains("resident_kb climbs"), "{leak:?}");
    let stall = verdict(&|_| 10_000.0, &|at| {
        if at > 600.0 { 2_000.0 } else { 1_000.0 }
    });
    assert!(stall.stderr.contains("last third"), "{stall:?}");
    assert_eq!((leak.code(), stall.code()), (1, 1));
}

/// A flood ends no connection, and memory stays within the quotas; what is kept of the rate nobody judges here.
#[test]
fn flood_ends_no_connection() {
    let _alone = MACHINE.lock();
    let words = ["--kinds", "all", "--seconds", "1"];
    let mut command = bench("flood", &words);
    command.args(["--tapgate", env!("CARGO_BIN_EXE_tapgate")]);
    let finished = Running::start(&mut command).finish(LIMIT);
    assert!(finished.status.success(), "{}", finished.stderr);
    assert!(finished.stderr.contains("own flow"), "{}", finished.stderr);
}
