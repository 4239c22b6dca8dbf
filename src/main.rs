//! The program: which command line it is, logging, exit status. No logic of its own.
//!
//! Exit status: that of the command for `run`; 0 when a network for something else ends as it should; 1
//! with one line on standard error when something can't be done; 2 for a wrong command line, but 1 under
//! the name of slirp4netns, as there.

use std::env;
use std::ffi::{CString, OsString};
use std::io::Write;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

use tapgate::cli::slirp4netns::{self, Asked};
use tapgate::cli::{Cli, Command, Run};
use tapgate::config::Dns;
use tapgate::log::{self, LogFormat};
use tapgate::session;
use tapgate::setup::guest::TapPlan;
use tapgate::setup::{memory_limit, resolv_conf, run};
use tapgate::sys::{memory, process};

fn main() -> ExitCode {
    memory::map_large_allocations();
    process::restore_sigchld();
    process::show_own_proc();
    let mut args = env::args_os();
    let name = args.next().unwrap_or_default();
    let called_slirp4netns = Path::new(&name)
        .file_name()
        .is_some_and(|name| name.to_string_lossy().contains("slirp4netns"));
    if called_slirp4netns {
        return as_slirp4netns(args);
    }
    let done = match Cli::parse().command {
        Command::Run(args) => run_command(args),
        Command::Attach(args) => {
            log::start(args.options.verbose, args.options.log_format);
            session::attachment(args.job(memory_limit::read()))
        }
        Command::Slirp4netns { args } => return as_slirp4netns(args.into_iter()),
    };
    exit("tapgate", done)
}

fn exit(name: &str, done: Result<u8>) -> ExitCode {
    log::end();
    match done {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            say(&mut std::io::stderr(), &format!("{name}: {error:#}\n"));
            ExitCode::FAILURE
        }
    }
}

/// Prints, as well as whoever reads allows: `grep -q` closes its end at the first match.
fn say(out: &mut impl Write, text: &str) {
    let _ = out.write_all(text.as_bytes());
    let _ = out.flush();
}

fn as_slirp4netns(args: impl Iterator<Item = OsString>) -> ExitCode {
    const NAME: &str = "slirp4netns";
    let (mut out, mut err) = (std::io::stdout(), std::io::stderr());
    match slirp4netns::parse(args) {
        Ok(Asked::Print(text)) => {
            say(&mut out, &text);
            ExitCode::SUCCESS
        }
        Ok(Asked::Network { mut job, warnings }) => {
            for warning in warnings {
                say(&mut out, &format!("WARNING: {warning}\n"));
            }
            log::start(0, LogFormat::Text);
            job.config.fit(memory_limit::read());
            exit(NAME, session::attachment(*job))
        }
        Err(wrong) => {
            say(&mut err, &format!("{NAME}: {}\n", wrong.reason));
            if wrong.usage {
                say(&mut out, slirp4netns::help());
            }
            ExitCode::FAILURE
        }
    }
}

fn run_command(args: Run) -> Result<u8> {
    log::start(args.options.verbose, args.options.log_format);
    let mut config = args.options.config(memory_limit::read());
    config.search = session::search_list();
    // The command has its address before it begins.
    config.slaac = false;
    let resolv_conf = (config.dns != Dns::Off)
        .then(|| resolv_conf::text(config.plan.resolver().into(), &config.search));
    let job = run::Job {
        command: command_line(args.command)?,
        mapping: args.map,
        tap: TapPlan::new(&config, &args.ifname, args.options.mac.map(|mac| mac.0)),
        resolv_conf,
    };
    let api_socket = args.options.api_socket.as_deref();
    session::command(config, job, api_socket, args.options.sandbox.into())
}

/// The command's words, or the caller's shell.
fn command_line(words: Vec<OsString>) -> Result<Vec<CString>> {
    let words = if words.is_empty() {
        vec![
            env::var_os("SHELL")
                .filter(|shell| !shell.is_empty())
                .unwrap_or_else(|| "/bin/sh".into()),
        ]
    } else {
        words
    };
    words
        .into_iter()
        .map(|word| CString::new(word.into_vec()).context("COMMAND: a word holds a zero byte"))
        .collect()
}
