//! The contract with the container engines, tables 3.1 of `--help`, `--version` and options: each probe
//! of an engine, every option in each of its spellings, every wrong word, and getopt_long(3)'s rules.
//!
//! No namespace is needed: a command line that is accepted goes on to look for the process [`NOBODY`],
//! which does not exist, and one that is refused does not come that far.

mod support;

use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use support::process::{Finished, run};

const PROGRAM: &str = env!("CARGO_BIN_EXE_tapgate");

/// No process has this number.
const NOBODY: &str = "4194303";

fn slirp4netns(arguments: &[&str]) -> Finished {
    run(Command::new(PROGRAM).arg0("slirp4netns").args(arguments))
}

/// Runs a shell script in which `slirp4netns` is found by its name, as every engine finds it.
fn shell(script: &str) -> Finished {
    let folder = tempfile::tempdir().expect("a folder");
    symlink(PROGRAM, folder.path().join("slirp4netns")).expect("our own folder");
    let path = format!("{}:/usr/bin:/bin", folder.path().display());
    run(Command::new("/bin/sh")
        .args(["-ec", script])
        .env("PATH", path))
}

/// Asserts that nothing is wrong with a command line but its target. Descriptors 3 and 4 are open.
#[track_caller]
fn assert_accepted(arguments: &[&str]) -> Finished {
    const SCRIPT: &str = "exec 3>/dev/null 4<&0; exec \"$0\" slirp4netns \"$@\"";
    let mut command = Command::new("/bin/sh");
    let finished = run(command.args(["-c", SCRIPT, PROGRAM]).args(arguments));
    assert!(
        finished.stderr.contains(NOBODY),
        "{arguments:?}: {finished:?}"
    );
    assert_eq!(finished.code(), 1, "{arguments:?}: {finished:?}");
    assert!(
        !finished.stdout.contains("Usage:"),
        "{arguments:?}: {finished:?}"
    );
    finished
}

/// Asserts status 1 and one line on standard error that says `text`, the target not even looked at.
#[track_caller]
fn assert_refused(arguments: &[&str], text: &str) -> Finished {
    let finished = slirp4netns(arguments);
    assert_eq!(finished.code(), 1, "{arguments:?}: {finished:?}");
    assert_eq!(
        finished.stderr.lines().count(),
        1,
        "{arguments:?}: {finished:?}"
    );
    assert!(
        finished.stderr.contains(text),
        "{arguments:?}: {finished:?}"
    );
    assert!(
        !finished.stderr.contains(NOBODY),
        "{arguments:?}: {finished:?}"
    );
    finished
}

/// [`assert_refused`], with the usage on standard output as getopt's users print it.
#[track_caller]
fn assert_usage(arguments: &[&str], text: &str) {
    let finished = assert_refused(arguments, text);
    assert!(
        finished.stdout.starts_with("Usage: slirp4netns"),
        "{arguments:?}: {finished:?}"
    );
}

/// Contract 3.1, `--help`, row "`--netns-type` as a whole word" (containerd-rootless.sh and
/// dockerd-rootless.sh, also 3.6 and 3.7, and 3.11 item 1).
#[test]
fn help_passes_the_probe_of_the_rootless_scripts() {
    for _ in 0..20 {
        let probed = shell("slirp4netns --help | grep -qw -- --netns-type");
        assert_eq!(probed.code(), 0, "{probed:?}");
        assert_eq!(probed.stderr, "", "grep leaves at the first match");
    }
}

/// Contract 3.1: "survive SIGPIPE/EPIPE, do not print a panic".
#[test]
fn help_whose_reader_is_gone_says_nothing_else() {
    for option in ["--help", "--version"] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = Command::new(PROGRAM);
        command.arg0("slirp4netns").arg(option);
        let ended = command
            .stdout(writer)
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&ended.stderr), "", "{option}");
        let code = support::process::exit_code(ended.status);
        assert!([0, 128 + libc::SIGPIPE].contains(&code), "{option}: {code}");
    }
}

/// Contract 3.1, `--help`, row of podman: each of these is looked for in both outputs together.
#[test]
fn help_names_what_podman_looks_for() {
    let help = slirp4netns(&["--help"]);
    assert_eq!(help.code(), 0, "{help:?}");
    let both = help.stdout + &help.stderr;
    for option in [
        "--disable-host-loopback",
        "--mtu",
        "--enable-sandbox",
        "--enable-seccomp",
        "--cidr",
        "--outbound-addr",
        "--enable-ipv6",
    ] {
        assert!(both.contains(option), "{option}: {both}");
    }
}

/// Contract 3.1, `--help`, row of rootlesskit.
#[test]
fn help_names_what_rootlesskit_looks_for() {
    let help = shell("slirp4netns --help 2>&1");
    assert_eq!(help.code(), 0, "{help:?}");
    for option in [
        "--netns-type",
        "--enable-ipv6",
        "--cidr",
        "--disable-host-loopback",
        "--api-socket",
        "--enable-sandbox",
        "--enable-seccomp",
    ] {
        assert!(help.stdout.contains(option), "{option}: {help:?}");
    }
}

/// Contract 3.1: "First line upstream".
#[test]
fn help_begins_as_slirp4netns_does() {
    for option in ["--help", "-h"] {
        let help = slirp4netns(&[option]);
        assert_eq!(help.code(), 0, "{help:?}");
        assert_eq!(
            help.stdout.lines().next(),
            Some("Usage: slirp4netns [OPTION]... PID|PATH|FD [TAPNAME]")
        );
        assert_eq!(help.stderr, "");
    }
}

/// Contract 3.1, `--version`.
#[test]
fn version_has_the_lines_of_slirp4netns() {
    for option in ["--version", "-v"] {
        let version = slirp4netns(&[option]);
        assert_eq!(version.code(), 0, "{version:?}");
        let mut lines = version.stdout.lines();
        assert_eq!(lines.next(), Some("slirp4netns version 1.3.2"));
        let commit = lines.next().unwrap().strip_prefix("commit: ").unwrap();
        assert_eq!(commit.len(), 40, "{commit}");
        assert!(commit.bytes().all(|byte| byte.is_ascii_hexdigit()));
        assert_eq!(lines.next(), Some("libslirp: 4.8.0"));
        assert_eq!(lines.next(), Some("SLIRP_CONFIG_VERSION_MAX: 5"));
        assert_eq!(lines.next(), Some("libseccomp: 2.5.5"));
    }
}

/// Contract 3.1, `--version`, as moby's `parseRuntimeVersion` reads it: the last line with "version"
/// counts.
#[test]
fn version_is_read_by_docker() {
    let printed = shell("slirp4netns --version").output();
    let mut found = ("", "");
    for line in printed.lines() {
        if let Some((_, version)) = line.rsplit_once("version") {
            found.0 = version.trim();
        }
        if let Some(commit) = line.strip_prefix("commit:") {
            found.1 = commit.trim();
        }
    }
    assert_eq!(found.0, "1.3.2", "{printed}");
    assert_eq!(found.1.len(), 40, "{printed}");
}

/// Contract 3.0: the program is chosen by its name, or by the first word.
#[test]
fn dialect_is_chosen_by_name_or_by_the_first_word() {
    let by_name = shell("slirp4netns --version").output();
    let by_word = run(Command::new(PROGRAM).args(["slirp4netns", "--version"])).output();
    assert_eq!(by_name, by_word);
}

/// Contract 3.1, the list of options, each in all its spellings.
#[test]
fn every_option_is_taken_in_each_spelling() {
    for spelling in [
        &["-c"][..],
        &["--configure"],
        &["-e", "3"],
        &["-e3"],
        &["--exit-fd", "3"],
        &["--exit-fd=3"],
        &["-r", "3"],
        &["--ready-fd", "3"],
        &["--ready-fd=3"],
        &["-m", "1500"],
        &["-m1500"],
        &["--mtu", "1500"],
        &["--mtu=65520"],
        &["--mtu=1"],
        &["--mtu=65521"],
        &["-6"],
        &["--enable-ipv6"],
        &["-a", "/tmp/x"],
        &["--api-socket", "/tmp/x"],
        &["--api-socket=/tmp/x"],
        &["--cidr", "10.0.2.0/24"],
        &["--cidr=192.168.128.0/25"],
        &["--cidr=128.0.0.0/2"],
        &["--disable-host-loopback"],
        &["--no-host-loopback"],
        &["--netns-type=pid"],
        &["--netns-type", "pid"],
        &["--userns-path=/proc/self/ns/user"],
        &["--userns-path", "/proc/self/ns/user"],
        &["--enable-sandbox"],
        &["--create-sandbox"],
        &["--enable-seccomp"],
        &["--outbound-addr=127.0.0.1"],
        &["--outbound-addr", "lo"],
        &["--outbound-addr6=::1"],
        &["--outbound-addr6", "lo"],
        &["--disable-dns"],
        &["-c", "--macaddress", "52:55:0a:00:02:64"],
        &["-c", "--macaddress=52:55:0A:00:02:64"],
        &["--target-type=netns"],
        &["--target-type", "netns"],
    ] {
        assert_accepted(&[spelling, &[NOBODY, "tap0"]].concat());
    }
}

/// Contract 3.1, options: what takes the place of a namespace, `--netns-type path` and `tapfd` (the
/// name of the tap left out) and `--target-type bess`.
#[test]
fn every_kind_of_target_is_taken() {
    let path = format!("/proc/{NOBODY}/ns/net");
    assert_accepted(&["--netns-type=path", &path, "tap0"]);
    assert_accepted(&["--netns-type", "path", "--", &path, "tap0"]);
    for tap in [
        &["--netns-type=tapfd", NOBODY][..],
        &["--netns-type=tapfd", NOBODY, "tap0"],
    ] {
        assert_accepted(tap);
    }
    let socket = format!("/no/such/folder/{NOBODY}");
    assert_accepted(&["--target-type=bess", &socket]);
}

/// Contract 3.1, options: "any parse error: usage + exit 1", and the texts of slirp4netns.
#[test]
fn wrong_value_is_named_with_usage_and_status_1() {
    const MTU: &str = "MTU must be a positive integer (< 65522)";
    const READY: &str = "ready-fd must be a non-negative integer";
    for (option, text) in [
        ("--mtu=0", MTU),
        ("--mtu=65522", MTU),
        ("--mtu=-1", MTU),
        ("--mtu=1500x", MTU),
        ("--mtu=", MTU),
        ("--mtu=99999999999999999999", MTU),
        ("--exit-fd=-1", "exit-fd must be a non-negative integer"),
        ("--exit-fd=x", "exit-fd must be a non-negative integer"),
        ("--ready-fd=-1", READY),
        ("--ready-fd=4294967296", READY),
        ("--netns-type=container", "netns-type"),
        ("--target-type=vm", "--target-type must be"),
        (
            "--macaddress=52:55:0a:00:02:64",
            "--macaddr cannot be specified when --configure or -c is not specified",
        ),
    ] {
        assert_usage(&[option, NOBODY, "tap0"], text);
    }
}

/// Contract 3.1, options: what slirp4netns says of values that it looks at after the options, without
/// the usage.
#[test]
fn wrong_address_is_one_line_and_status_1() {
    const MAC: &str = "macaddress has to be a valid MAC address";
    const NETWORK: &str = "CIDR needs to be a network address like 10.0.2.0/24";
    const LENGTH: &str = "prefix length needs to be 1-25";
    const OUTBOUND: &str = "outbound-addr has to be valid ipv4 address or interface name.";
    const OUTBOUND6: &str = "outbound-addr6 has to be valid ipv6 address or interface name.";
    for (option, text) in [
        ("--cidr=10.0.2.0", "invalid CIDR: 10.0.2.0"),
        ("--cidr=ten", "invalid CIDR: ten"),
        ("--cidr=10.0.2.0/", "invalid CIDR: 10.0.2.0/"),
        ("--cidr=fd00::/64", "invalid CIDR: fd00::/64"),
        ("--cidr=10.0.2.0/26", LENGTH),
        ("--cidr=0.0.0.0/0", LENGTH),
        ("--cidr=10.0.2.100/24", NETWORK),
        ("--outbound-addr=a-name-of-more-than-15", OUTBOUND),
        ("--outbound-addr=", OUTBOUND),
        ("--outbound-addr=::1", OUTBOUND),
        ("--outbound-addr6=a-name-of-more-than-15", OUTBOUND6),
        ("--macaddress=52:55:0a:00:02", MAC),
        ("--macaddress=52:55:0a:00:02:zz", MAC),
        ("--macaddress=01:00:5e:00:00:01", MAC),
    ] {
        assert_refused(&["-c", option, NOBODY, "tap0"], text);
    }
}

/// Contract 3.1, options: "`--userns-path P` (must exist)".
#[test]
fn user_namespace_that_is_not_there_is_refused() {
    let ourselves = std::process::id().to_string();
    let missing = "--userns-path=/no/such/file";
    assert_refused(&[missing, &ourselves, "tap0"], "/no/such/file");
}

/// Contract 3.1, options, the positional words: `PID|PATH|FD TAPNAME`.
#[test]
fn missing_or_wrong_target_is_a_usage_error() {
    for (arguments, text) in [
        (&[][..], "namespace"),
        (&["1"], "tap"),
        (&["zero", "tap0"], "PID must be a positive integer"),
        (&["0", "tap0"], "PID must be a positive integer"),
        (&["--netns-type=tapfd", "x"], "FD must be"),
        (&["--netns-type=tapfd", "--", "-1"], "FD must be"),
    ] {
        assert_usage(arguments, text);
    }
    assert_refused(&["1", "a-name-of-more-than-15"], "TAPNAME");
    assert_refused(&["1", "a/b"], "TAPNAME");
}

/// Contract 3.1, options: "surplus args: stdout `WARNING: too many arguments`, not fatal".
#[test]
fn surplus_words_are_a_warning() {
    let finished = assert_accepted(&[NOBODY, "tap0", "more", "words"]);
    assert_eq!(finished.stdout, "WARNING: too many arguments\n");
}

/// Contract 3.1, options: aliases, and "stdout of experimental flags".
#[test]
fn deprecated_names_and_experiments_are_warned_of() {
    for (option, text) in [
        ("--no-host-loopback", "--disable-host-loopback"),
        ("--create-sandbox", "--enable-sandbox"),
        ("--enable-ipv6", "Support for IPv6 is experimental"),
    ] {
        let finished = assert_accepted(&[option, NOBODY, "tap0"]);
        let first = finished.stdout.lines().next().unwrap_or_default();
        assert!(first.starts_with("WARNING: "), "{option}: {finished:?}");
        assert!(first.contains(text), "{option}: {finished:?}");
    }
}

/// Contract 3.1, options: "bess: exactly one positional (socket); conflicts with -c, --netns-type,
/// --userns-path".
#[test]
fn socket_of_a_machine_conflicts_with_namespaces() {
    for (arguments, text) in [
        (&["-c", "/tmp/x"][..], "--configure"),
        (&["--netns-type=path", "/tmp/x"], "--netns-type"),
        (
            &["--userns-path=/proc/self/ns/user", "/tmp/x"],
            "--userns-path",
        ),
        (&[], "bess"),
        (&["/tmp/x", "tap0"], "bess"),
    ] {
        let arguments = [&["--target-type=bess"], arguments].concat();
        assert_usage(&arguments, text);
    }
}

/// Contract 3.1, options: "getopt_long, permutation on".
#[test]
fn options_may_follow_the_words() {
    assert_accepted(&[NOBODY, "-c", "tap0", "--mtu", "1500"]);
    assert_usage(&[NOBODY, "tap0", "--mtu", "0"], "MTU");
    // Behind two dashes there are only words.
    let finished = assert_accepted(&["-c", "--", NOBODY, "tap0", "--mtu", "0"]);
    assert_eq!(finished.stdout, "WARNING: too many arguments\n");
}

/// Contract 3.1, options: "short `ce:r:m:a:6hv`", in clusters.
#[test]
fn short_options_come_in_clusters() {
    assert_accepted(&["-c6m", "1500", NOBODY, "tap0"]);
    assert_accepted(&["-c6m1500", NOBODY, "tap0"]);
    assert_accepted(&["-6cr3", "-e4", NOBODY, "tap0"]);
    assert_usage(&["-c6m", "0", NOBODY, "tap0"], "MTU");
    assert_usage(&["-cxm", "1500", NOBODY, "tap0"], "invalid option -- 'x'");
    assert_eq!(slirp4netns(&["-ch"]).code(), 0);
}

/// Contract 3.1, options: "long options may be abbreviated: accept unique prefixes".
#[test]
fn unique_beginnings_of_long_options_are_enough() {
    for abbreviated in [
        "--conf",
        "--ready=3",
        "--mt=1500",
        "--ci=10.0.2.0/24",
        "--disable-h",
        "--no",
        "--netns=pid",
        "--user=/proc/self/ns/user",
        "--api=/tmp/x",
        "--enable-i",
        "--enable-sa",
        "--enable-se",
        "--cr",
        "--disable-d",
        "--t=netns",
        // Exact, although another begins so.
        "--outbound-addr=127.0.0.1",
    ] {
        assert_accepted(&[abbreviated, NOBODY, "tap0"]);
    }
    let version = slirp4netns(&["--vers"]).output();
    assert!(version.starts_with("slirp4netns version"), "{version}");
}

/// Contract 3.1, options: a beginning of several.
#[test]
fn ambiguous_beginning_names_the_possibilities() {
    assert_usage(
        &["--enable-s", NOBODY, "tap0"],
        "option '--enable-s' is ambiguous; possibilities: '--enable-sandbox' '--enable-seccomp'",
    );
    for ambiguous in ["--e", "--enable", "--outbound", "--c", "--n", "--disable"] {
        let text = format!("option '{ambiguous}' is ambiguous");
        assert_usage(&[ambiguous, NOBODY, "tap0"], &text);
    }
}

/// Contract 3.1, options: "any parse error: usage + exit 1".
#[test]
fn unknown_or_incomplete_option_is_a_usage_error() {
    for (arguments, text) in [
        (&["-x"][..], "invalid option -- 'x'"),
        (&["-1", "tap0"], "invalid option -- '1'"),
        (&["--nope"], "unrecognized option '--nope'"),
        (&["--nope=1"], "unrecognized option '--nope"),
        (&["--mtu"], "option '--mtu' requires an argument"),
        (&["--mt"], "option '--mtu' requires an argument"),
        (&["-m"], "option requires an argument -- 'm'"),
        (&["-ca"], "option requires an argument -- 'a'"),
        (
            &["--configure=1"],
            "option '--configure' doesn't allow an argument",
        ),
        // The next word is the value, whatever it looks like.
        (&["--mtu", "--help"], "MTU"),
    ] {
        assert_usage(arguments, text);
    }
}

/// Contract 3.1, options: the first that asks for a text gets it, if nothing before is wrong.
#[test]
fn help_and_version_come_in_their_turn() {
    assert_eq!(slirp4netns(&["-c", "--help", "--nope"]).code(), 0);
    assert_usage(&["--nope", "--help"], "--nope");
    let version = slirp4netns(&["--version", "--help"]).output();
    assert!(version.starts_with("slirp4netns version"), "{version}");
}

/// Contract 3.1: any bytes may come as words.
#[test]
fn words_that_are_no_text_are_refused() {
    use std::os::unix::ffi::OsStrExt;
    let strange = std::ffi::OsStr::from_bytes(b"\xff\xfe");
    for option in [
        &b"-"[..],
        b"--",
        b"--mtu=",
        b"--cidr=",
        b"--macaddress=",
        b"--netns-type=",
    ] {
        let word = [option, strange.as_bytes()].concat();
        let mut command = Command::new(PROGRAM);
        command.arg0("slirp4netns").arg("-c");
        command.arg(std::ffi::OsStr::from_bytes(&word));
        let finished = run(command.args([NOBODY, "tap0"]));
        assert_eq!(finished.code(), 1, "{word:?}: {finished:?}");
        assert_eq!(finished.stderr.lines().count(), 1, "{finished:?}");
        assert!(!finished.stderr.contains("panicked"), "{finished:?}");
    }
}
