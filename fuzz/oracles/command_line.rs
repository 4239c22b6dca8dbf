//! Command lines of all dialects: no words panic, a refusal is one line that says something, and what is
//! understood makes sense.
//!
//! The first byte picks the dialect: `tapgate`, `slirp4netns`, or the language of published ports. The words of
//! the rest stand on lines of their own.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use clap::Parser;
use tapgate::cli::slirp4netns::{self, Asked};
use tapgate::cli::{Cli, Command, publish};
use tapgate::config::{AddressPlan, Config, Memory, Publish};

fn rule_makes_sense(rule: &Publish, plan: &AddressPlan) {
    assert!(rule.host.port() != 0 && rule.guest.port() != 0, "{rule:?}");
    assert!(plan.is_guest_side(rule.guest.ip()), "{rule:?}");
}

fn config_makes_sense(config: &Config) {
    assert!((576..=65_521).contains(&config.mtu), "{}", config.mtu);
    assert!(config.max_flows > 0 && config.workers > 0);
    assert!(config.plan.is_guest_side(config.plan.guest().into()));
    assert!(config.plan.is_gateway_side(config.plan.gateway().into()));
    for rule in &config.publish {
        rule_makes_sense(rule, &config.plan);
    }
}

fn one_line(text: &str) {
    assert!(!text.trim().is_empty(), "it says something");
}

fn native(words: Vec<OsString>) {
    let args = std::iter::once(OsString::from("tapgate")).chain(words);
    match Cli::try_parse_from(args) {
        Ok(cli) => match cli.command {
            Command::Run(run) => config_makes_sense(&run.options.config(Memory::default())),
            Command::Attach(attach) => config_makes_sense(&attach.job(Memory::default()).config),
            Command::Slirp4netns { args } => peer(args),
        },
        Err(error) => {
            assert!([0, 2].contains(&error.exit_code()), "{error}");
            one_line(&error.to_string());
        }
    }
}

fn peer(words: Vec<OsString>) {
    match slirp4netns::parse(words) {
        Ok(Asked::Print(text)) => one_line(&text),
        Ok(Asked::Network { job, .. }) => config_makes_sense(&job.config),
        Err(wrong) => one_line(&wrong.reason),
    }
}

fn ports(bytes: &[u8]) {
    match publish::parse(&String::from_utf8_lossy(bytes)) {
        Ok(spec) => {
            let plan = AddressPlan::default();
            let rules: Vec<Publish> = spec.rules(&plan).collect();
            assert!(!rules.is_empty(), "a port at least");
            for rule in &rules {
                rule_makes_sense(rule, &plan);
            }
        }
        Err(error) => one_line(&error.to_string()),
    }
}

/// Tries an input.
pub fn run(bytes: &[u8]) {
    let Some((dialect, rest)) = bytes.split_first() else {
        return;
    };
    let words = rest.split(|byte| *byte == b'\n');
    let words = words
        .map(|word| OsStr::from_bytes(word).to_owned())
        .collect();
    match dialect % 3 {
        0 => native(words),
        1 => peer(words),
        _ => ports(rest),
    }
}
