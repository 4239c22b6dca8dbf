//! The performance report's machinery from end to end: `benches/report` takes figures of the program
//! under test, the smallest there are, and makes plots and tables of them; and the report in the
//! repository is what its own data make.
//!
//! No figure is judged here, only that each is there. What takes them is bounded: one round of a
//! second or less a measurement.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use serde_json::Value;

use support::SOON;
use support::benches::{LOAD, bench, root};
use support::process::{Finished, Running, run};

/// A measuring run that takes longer is stuck; it takes about 20 s alone on the machine.
const LIMIT: Duration = Duration::from_secs(240);
const SETS: [&str; 8] = [
    "mtu",
    "streams",
    "publish",
    "latency",
    "rates",
    "datagrams",
    "idle",
    "start",
];
const PLOTS: [&str; 10] = [
    "mtu",
    "processor",
    "streams",
    "publish",
    "latency",
    "rates",
    "datagrams",
    "idle",
    "opening",
    "start",
];

fn report(arguments: &[&str]) -> Command {
    bench("report", arguments)
}

/// One measuring run, for all tests: the text of its data file, and what it said.
static MEASURED: LazyLock<(String, Finished)> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("measured.json");
    let mut command = report(&["measure", "--kinds", "relay,pasta,tapgate"]);
    // Whatever is on this machine, one of the kinds is missing.
    command.args(["--pasta", "/no/such/pasta"]);
    command.arg("--tapgate").arg(env!("CARGO_BIN_EXE_tapgate"));
    command.arg("--load").arg(&*LOAD);
    command.arg("--data").arg(&data);
    let smallest = "--rounds 1 --seconds 0.2 --flood-seconds 0.2 --mtus 1500 --streams 2 --stream-mtus 1500 --sizes 64 \
                    --connections 5,10 --block 5 --wait 0.1 --open-limit 20 --starts 2";
    command.args(smallest.split_whitespace());
    let finished = Running::start(&mut command).finish(LIMIT);
    assert_eq!(finished.code(), 0, "{finished:?}");
    (fs::read_to_string(data).expect("the data file"), finished)
});

fn measured() -> Value {
    serde_json::from_str(&MEASURED.0).expect("JSON")
}

/// Plots and tables of the measuring run; see [`drawn`].
fn drawn_anew() -> BTreeMap<String, String> {
    let data = tempfile::NamedTempFile::new().expect("a file");
    fs::write(data.path(), &MEASURED.0).expect("our own file");
    drawn(data.path())
}

/// Draws into a folder of its own, from the document in the repository; gives every file by name.
fn drawn(data: &Path) -> BTreeMap<String, String> {
    let folder = tempfile::tempdir().expect("a folder");
    let document = folder.path().join("performance.md");
    fs::copy(root().join("doc/performance.md"), &document).expect("the report");
    let mut command = report(&["draw", "--data"]);
    run(command.arg(data).arg("--document").arg(&document)).output();
    let mut files = plots(&folder.path().join("performance"));
    files.insert(
        "document".into(),
        fs::read_to_string(document).expect("our own file"),
    );
    files
}

/// The plots in a folder, by name.
fn plots(folder: &Path) -> BTreeMap<String, String> {
    let entries = fs::read_dir(folder).expect("a folder of plots").flatten();
    let paths = entries.map(|entry| entry.path());
    paths
        .filter(|path| path.extension().is_some_and(|it| it == "svg"))
        .map(|path| {
            let name = path.file_stem().and_then(|name| name.to_str());
            let name = name.expect("a plot's name").to_owned();
            (name, fs::read_to_string(path).expect("a plot"))
        })
        .collect()
}

fn records(content: &Value) -> impl Iterator<Item = &Value> {
    content["records"].as_array().expect("records").iter()
}

fn of_kind<'a>(content: &'a Value, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    records(content).filter(move |record| record["kind"] == kind)
}

#[test]
fn every_set_is_measured_and_nothing_fails() {
    let content = measured();
    // What each record of a set has at least, one record in each line.
    let expected = "
        mtu way=up mtu gbit_per_s cpu_s_per_gb whole_cpu_s_per_gb
        mtu way=down mtu gbit_per_s cpu_s_per_gb whole_cpu_s_per_gb
        streams way=up streams gbit_per_s
        streams way=down streams gbit_per_s
        publish way=in via=loopback gbit_per_s cpu_s_per_gb
        publish way=out via=loopback gbit_per_s cpu_s_per_gb
        publish way=in via=address gbit_per_s cpu_s_per_gb
        publish way=out via=address gbit_per_s cpu_s_per_gb
        latency protocol=tcp p50_us p99_us per_s
        latency protocol=udp p50_us p99_us per_s
        rates connections_per_s operations_per_s
        datagrams size sent_per_s echoed_per_s
        idle connections=5 opened resident_kb anonymous_kb kb_per_connection
        idle connections=10 opened=10 alive=10 resident_kb anonymous_kb kb_per_connection wait_s
        idle block=5 opened_per_s
        idle block=10 opened_per_s
        start ready_ms resident_kb";
    for line in expected.lines().filter(|line| !line.trim().is_empty()) {
        let mut words = line.split_whitespace();
        let set = words.next().unwrap();
        let has = |record: &Value, word: &str| match word.split_once('=') {
            Some((name, value)) => record[name].to_string().trim_matches('"') == value,
            None => record[word].as_f64().is_some_and(|value| value >= 0.0),
        };
        let words: Vec<&str> = words.collect();
        let all = of_kind(&content, "tapgate").filter(|record| record["set"] == set);
        let all: Vec<&Value> = all.collect();
        let found = all
            .iter()
            .filter(|record| words.iter().all(|word| has(record, word)))
            .count();
        assert_eq!(found, 1, "one record with {words:?} in {all:?}");
    }
    for record in records(&content) {
        assert!(record["error"].is_null(), "{record}");
        assert_eq!((&record["round"], &record["run"]), (&1.into(), &0.into()));
        assert!(SETS.contains(&record["set"].as_str().unwrap()), "{record}");
    }
}

#[test]
fn a_bare_relay_is_measured_where_it_has_something_to_do() {
    let content = measured();
    let sets: Vec<&str> = of_kind(&content, "relay")
        .map(|record| record["set"].as_str().unwrap())
        .collect();
    assert_eq!(sets, ["mtu", "mtu", "streams", "streams", "rates"]);
    for record in of_kind(&content, "relay").take(4) {
        assert!(record["gbit_per_s"].as_f64() > Some(0.0), "{record}");
        // It is a process, whose time is counted as a stack's is.
        assert!(record["cpu_s_per_gb"].is_f64(), "{record}");
        // It has no MTU but the loopback's.
        assert_eq!(record["mtu"], 65536);
    }
}

#[test]
fn the_run_says_where_and_with_what_it_was_taken() {
    let content = measured();
    assert_eq!(content["format"], 1);
    let [run] = content["runs"].as_array().unwrap().as_slice() else {
        unreachable!("one run: {}", content["runs"]);
    };
    for name in ["kernel", "architecture", "processor", "congestion_control"] {
        assert!(run["machine"][name].is_string(), "{name}: {run}");
    }
    for name in ["cores", "memory_mb"] {
        assert!(run["machine"][name].is_u64(), "{name}: {run}");
    }
    let version = format!("tapgate {}", env!("CARGO_PKG_VERSION"));
    assert_eq!(run["versions"]["tapgate"], version);
    assert!(run["versions"]["iperf3"].is_string(), "{run}");
    assert!(run["date"].is_string() && run["binary_sha256"].is_string());
    let command = run["command"].as_str().unwrap();
    assert!(
        command.starts_with("python3 benches/report measure --quick --mtus 1500 "),
        "{command}"
    );
    // A kind that is not there is left out, and said.
    assert_eq!(run["skipped"]["pasta"], "no such program");
    let said = &MEASURED.1.stderr;
    assert!(said.contains("skipped: pasta: no such program"), "{said}");
}

#[test]
fn plots_and_tables_are_made_the_same_each_time() {
    let (once, again) = (drawn_anew(), drawn_anew());
    assert_eq!(once, again);
    let document = &once["document"];
    for plot in PLOTS {
        let picture = format!("](performance/{plot}.svg)");
        assert!(document.contains(&picture), "{picture} in {document}");
        assert!(once[plot].contains("tapgate"), "{plot}: {}", once[plot]);
    }
    assert_eq!(once.len(), PLOTS.len() + 1);
    for set in SETS {
        let command = format!(" --sets {set}`.");
        assert!(document.contains(&command), "{command} in {document}");
    }
}

#[test]
fn plots_are_well_formed() {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in drawn_anew().iter().filter(|(name, _)| *name != "document") {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        let mut command = Command::new("python3");
        command.args([
            "-c",
            "import sys, xml.dom.minidom as xml; xml.parse(sys.argv[1])",
        ]);
        run(command.arg(path)).output();
    }
}

#[test]
fn the_report_in_the_repository_is_made_from_its_data() {
    let folder = root().join("doc/performance");
    let mut committed = plots(&folder);
    let document = fs::read_to_string(root().join("doc/performance.md")).unwrap();
    committed.insert("document".into(), document);
    let made = drawn(&folder.join("measured.json"));
    let names: Vec<_> = committed.keys().collect();
    assert_eq!(names, made.keys().collect::<Vec<_>>());
    for (name, text) in &committed {
        assert!(
            *text == made[name],
            "{name}: not what `python3 benches/report draw` makes; numbers are not written by hand"
        );
    }
}

/// Compares the data in the repository with the same, but tapgate's throughput `factor` times as high.
fn compared_with(factor: f64) -> Finished {
    let path = root().join("doc/performance/measured.json");
    let text = fs::read_to_string(&path).expect("the report's data");
    let mut content: Value = serde_json::from_str(&text).expect("JSON");
    for record in content["records"].as_array_mut().expect("records") {
        if record["kind"] == "tapgate"
            && let Some(value) = record["gbit_per_s"].as_f64()
        {
            record["gbit_per_s"] = (value * factor).into();
        }
    }
    let folder = tempfile::tempdir().expect("a folder");
    let changed = folder.path().join("changed.json");
    fs::write(&changed, content.to_string()).expect("our own file");
    run(report(&["check"]).arg(path).arg(changed))
}

#[test]
fn ratios_that_differ_by_more_than_a_fifth_are_found() {
    for factor in [1.0, 1.15, 0.87] {
        let finished = compared_with(factor);
        assert_eq!(finished.code(), 0, "{factor}: {finished:?}");
    }
    for factor in [1.3, 0.75] {
        let finished = compared_with(factor);
        assert_eq!(finished.code(), 1, "{factor}: {finished:?}");
        assert!(
            finished
                .stdout
                .contains("claim: MTU 1500 over slirp4netns, up: "),
            "{factor}: {finished:?}"
        );
    }
}

#[test]
fn bad_input_is_told_in_a_line() {
    let finished = run(&mut report(&["measure", "--load", "/no/such/load"]));
    finished.assert_runtime_error("--load");
    let finished = run(&mut report(&["vm", "--load", "/no/such/load"]));
    finished.assert_runtime_error("--load");
    let finished = run(&mut report(&["measure", "--mtus", "1500,576"]));
    assert_eq!(finished.code(), 2, "{finished:?}");
    assert!(finished.stderr.contains("--mtus"), "{finished:?}");
    let folder = tempfile::tempdir().unwrap();
    let document = folder.path().join("performance.md");
    fs::write(&document, "nothing generated\n").unwrap();
    let data = root().join("doc/performance/measured.json");
    let mut command = report(&["draw", "--data"]);
    let finished = Running::start(command.arg(data).arg("--document").arg(document)).finish(SOON);
    finished.assert_runtime_error("no place for");
}
