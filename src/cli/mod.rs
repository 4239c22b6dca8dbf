//! Command lines: text in, a [`Config`] and a job out.
//!
//! One file for each dialect and vocabulary: [`options`] is what `run` and `attach` share,
//! [`publish`] the language of published ports, [`slirp4netns`] the peer's command line; [`job`] is
//! what comes out. Nothing here opens or changes anything.

pub mod job;
pub mod options;
pub mod publish;
pub mod slirp4netns;

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::{Config, Memory};
use crate::setup::attach::Target;
use crate::setup::guest::TapPlan;
use crate::setup::idmap::Mapping;
use job::{Attachment, Edge};
use options::Options;

/// A rootless user-mode network for Linux namespaces.
#[derive(Debug, Parser)]
#[command(name = "tapgate", version, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a command in new user, network and mount namespaces with a working network
    Run(Run),
    /// Give a network to a namespace that exists, until it is gone
    Attach(Attach),
    /// Take the command line of slirp4netns (or call this program by that name)
    #[command(disable_help_flag = true)]
    Slirp4netns {
        /// See `tapgate slirp4netns --help`.
        #[arg(
            trailing_var_arg = true,
            allow_hyphen_values = true,
            value_name = "ARG"
        )]
        args: Vec<OsString>,
    },
}

/// `tapgate run`.
#[derive(Debug, Args)]
pub struct Run {
    /// What `run` and `attach` share.
    #[command(flatten)]
    pub options: Options,
    /// Name of the tap inside
    #[arg(long, value_name = "NAME", default_value = "tap0", value_parser = options::interface_name)]
    pub ifname: String,
    /// Who the caller is inside
    #[arg(long, value_enum, default_value_t, value_name = "MAP")]
    pub map: Mapping,
    /// The command and its arguments [default: $SHELL]
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// `tapgate attach`.
#[derive(Debug, Args)]
pub struct Attach {
    /// What `run` and `attach` share.
    #[command(flatten)]
    pub options: Options,
    /// Name of the tap inside (same as IFNAME)
    #[arg(long = "ifname", value_name = "NAME", conflicts_with = "ifname", value_parser = options::interface_name)]
    pub ifname_option: Option<String>,
    /// Leave addresses and routes inside to somebody else
    #[arg(long)]
    pub no_configure: bool,
    /// User namespace that owns the network namespace
    #[arg(long, value_name = "PATH")]
    pub userns: Option<PathBuf>,
    /// Write "1" to this descriptor and close it once the network works
    #[arg(long, value_name = "FD")]
    pub ready_fd: Option<RawFd>,
    /// End when the other side of this descriptor is closed
    #[arg(long, value_name = "FD")]
    pub exit_fd: Option<RawFd>,
    /// A process, or a file that stands for a network namespace
    #[arg(value_name = "TARGET")]
    pub target: String,
    /// Name of the tap inside [default: tap0]
    #[arg(value_name = "IFNAME", value_parser = options::interface_name)]
    pub ifname: Option<String>,
}

impl Attach {
    /// What these words ask for where there is so much memory.
    #[must_use]
    pub fn job(&self, memory: Memory) -> Attachment {
        let config = Config {
            slaac: self.no_configure,
            ..self.options.config(memory)
        };
        let mut tap = TapPlan::new(&config, self.interface(), self.options.mac.map(|mac| mac.0));
        if self.no_configure {
            tap.addresses = None;
        }
        tap.one_will_do = self.options.workers.is_none();
        Attachment {
            edge: Edge::Namespace {
                target: Target::parse(&self.target),
                userns: self.userns.clone(),
                tap,
            },
            config,
            ready_fd: self.ready_fd,
            exit_fd: self.exit_fd,
            api_socket: self.options.api_socket.clone(),
            sandbox: self.options.sandbox.into(),
            names: job::TAPGATE,
        }
    }

    /// The name of the tap, however it was given.
    fn interface(&self) -> &str {
        self.ifname
            .as_deref()
            .or(self.ifname_option.as_deref())
            .unwrap_or("tap0")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_end_where_the_command_begins() {
        let cli = Cli::parse_from(["tapgate", "run", "--mtu", "9000", "ls", "--mtu", "-l"]);
        let Command::Run(run) = cli.command else {
            panic!("run expected")
        };
        assert_eq!(run.options.mtu, 9000);
        assert_eq!(run.command, ["ls", "--mtu", "-l"]);
    }

    #[test]
    fn attach_takes_the_name_both_ways() {
        for args in [
            &["tapgate", "attach", "1", "eth0"][..],
            &["tapgate", "attach", "--ifname", "eth0", "1"],
        ] {
            let Command::Attach(attach) = Cli::parse_from(args).command else {
                panic!("attach expected")
            };
            assert_eq!(attach.interface(), "eth0");
        }
    }

    #[test]
    fn nonsense_is_a_usage_error() {
        for args in [
            &["tapgate"][..],
            &["tapgate", "run", "--mtu", "575"],
            &["tapgate", "run", "--mtu", "65522"],
            &["tapgate", "run", "--subnet", "10.0.2.0/26"],
            &["tapgate", "run", "--subnet", "10.0.2.1/24"],
            &["tapgate", "run", "--ifname", "a/b"],
            &["tapgate", "run", "--mac", "01:00:00:00:00:00"],
            &["tapgate", "run", "-p", "80"],
            &["tapgate", "run", "--max-flows", "0"],
            &["tapgate", "run", "--tcp-idle-timeout", "9"],
            &["tapgate", "run", "--udp-idle-timeout", "2m"],
            &["tapgate", "attach"],
        ] {
            let error = Cli::try_parse_from(args).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{args:?}");
        }
    }
}
