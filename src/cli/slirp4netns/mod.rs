//! The command line of slirp4netns 1.3.2, as getopt_long(3) reads it: permuted arguments, clusters of
//! short options, unique beginnings of long ones.
//!
//! Comes in: words. Goes out: an [`Asked`], which for a network is the same [`Attachment`] that
//! `tapgate attach` makes. Texts and exit codes are the peer's where its callers look at them; every
//! wrong word is exit code 1 here. `words.rs` has the options themselves.

mod words;

use std::ffi::{OsStr, OsString};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::RawFd;
use std::path::PathBuf;

use ipnet::Ipv4Net;
use lexopt::{Arg, Parser};
use nix::unistd::Pid;

use super::job::{Attachment, Edge, Names};
use super::options::interface_name;
use crate::config::{AddressPlan, Config, Dns, MAX_MTU, MIN_MTU, Outbound, PlanError};
use crate::net::Mac;
use crate::setup::attach::Target;
use crate::setup::guest::TapPlan;
use crate::setup::sandbox::{Demand, Sandbox, Visibility};
use words::{HELP, Name, OPTIONS, long, version};

/// How this dialect calls what errors have to name.
const NAMES: Names = Names {
    target: "PID|PATH",
    userns: "--userns-path",
    outbound: "--outbound-addr",
    no_sandbox: "sandbox",
};

/// What a command line asks for.
#[derive(Debug, Clone)]
pub enum Asked {
    /// To print this and end well.
    Print(String),
    /// A network.
    Network {
        /// What for.
        job: Box<Attachment>,
        /// What to print first.
        warnings: Vec<&'static str>,
    },
}

/// What is wrong with a command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wrong {
    /// One line.
    pub reason: String,
    /// Print the usage as well.
    pub usage: bool,
}

impl Wrong {
    fn usage(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            usage: true,
        }
    }

    fn value(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            usage: false,
        }
    }
}

/// The usage text.
#[must_use]
pub const fn help() -> &'static str {
    HELP
}

/// What was said, word by word, before it is looked at together.
#[derive(Debug, Default)]
struct Said {
    configure: bool,
    exit_fd: Option<RawFd>,
    ready_fd: Option<RawFd>,
    mtu: Option<u16>,
    cidr: Option<OsString>,
    disable_host_loopback: bool,
    netns_type: Option<OsString>,
    userns_path: Option<PathBuf>,
    api_socket: Option<PathBuf>,
    enable_sandbox: bool,
    enable_seccomp: bool,
    outbound_addr: Option<OsString>,
    outbound_addr6: Option<OsString>,
    disable_dns: bool,
    enable_ipv6: bool,
    macaddress: Option<OsString>,
    bess: bool,
    words: Vec<OsString>,
    warnings: Vec<&'static str>,
}

/// Reads a command line without the program's name.
///
/// # Errors
/// What is wrong with it.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Asked, Wrong> {
    let mut said = Said::default();
    let mut parser = Parser::from_args(args);
    while let Some(arg) = parser
        .next()
        .map_err(|error| Wrong::usage(error.to_string()))?
    {
        let (name, value) = match arg {
            Arg::Value(word) => {
                said.words.push(word);
                continue;
            }
            Arg::Long(name) => {
                let (full, takes_value, name) = long(name)?;
                let value = if takes_value {
                    let missing =
                        |_| Wrong::usage(format!("option '--{full}' requires an argument"));
                    parser.value().map_err(missing)?
                } else if parser.optional_value().is_some() {
                    let reason = format!("option '--{full}' doesn't allow an argument");
                    return Err(Wrong::usage(reason));
                } else {
                    OsString::new()
                };
                (name, value)
            }
            Arg::Short(letter) => {
                let unknown = || Wrong::usage(format!("invalid option -- '{letter}'"));
                let option = OPTIONS.iter().find(|it| it.1 == Some(letter));
                let (_, _, takes_value, name) = *option.ok_or_else(unknown)?;
                let missing =
                    |_| Wrong::usage(format!("option requires an argument -- '{letter}'"));
                let value = if takes_value {
                    parser.value().map_err(missing)?
                } else {
                    OsString::new()
                };
                (name, value)
            }
        };
        if let Some(text) = said.take(name, value)? {
            return Ok(Asked::Print(text));
        }
    }
    said.network()
}

/// A number as strtol(3) reads it, within bounds.
fn number<T: TryFrom<i64>>(value: &OsStr) -> Option<T> {
    let number: i64 = value.to_str()?.trim_ascii_start().parse().ok()?;
    T::try_from(number).ok()
}

fn descriptor(name: &str, value: &OsStr) -> Result<RawFd, Wrong> {
    number(value)
        .filter(|number| *number >= 0)
        .ok_or_else(|| Wrong::usage(format!("{name} must be a non-negative integer")))
}

impl Said {
    /// Takes one option; a text where that is all that is asked for.
    fn take(&mut self, name: Name, value: OsString) -> Result<Option<String>, Wrong> {
        match name {
            Name::Help => return Ok(Some(HELP.to_owned())),
            Name::Version => return Ok(Some(version())),
            Name::Configure => self.configure = true,
            Name::ExitFd => self.exit_fd = Some(descriptor("exit-fd", &value)?),
            Name::ReadyFd => self.ready_fd = Some(descriptor("ready-fd", &value)?),
            Name::Mtu => {
                let mtu = number(&value).filter(|mtu| (1..=MAX_MTU).contains(mtu));
                let wrong = || Wrong::usage("MTU must be a positive integer (< 65522)");
                self.mtu = Some(mtu.ok_or_else(wrong)?);
            }
            Name::Cidr => self.cidr = Some(value),
            Name::NoHostLoopback => {
                self.warnings.push(
                    "--no-host-loopback is deprecated, please use --disable-host-loopback instead.",
                );
                self.disable_host_loopback = true;
            }
            Name::DisableHostLoopback => self.disable_host_loopback = true,
            Name::NetnsType => self.netns_type = Some(value),
            Name::UsernsPath => self.userns_path = Some(value.into()),
            Name::ApiSocket => self.api_socket = Some(value.into()),
            Name::EnableIpv6 => {
                self.warnings.push("Support for IPv6 is experimental");
                self.enable_ipv6 = true;
            }
            Name::CreateSandbox => {
                self.warnings
                    .push("--create-sandbox is deprecated, please use --enable-sandbox instead.");
                self.enable_sandbox = true;
            }
            Name::EnableSandbox => self.enable_sandbox = true,
            Name::EnableSeccomp => self.enable_seccomp = true,
            Name::OutboundAddr => self.outbound_addr = Some(value),
            Name::OutboundAddr6 => self.outbound_addr6 = Some(value),
            Name::DisableDns => self.disable_dns = true,
            Name::Macaddress => self.macaddress = Some(value),
            Name::TargetType => {
                self.bess = match value.to_str() {
                    Some("netns") => false,
                    Some("bess") => true,
                    _ => return Err(Wrong::usage("--target-type must be \"netns\" or \"bess\"")),
                };
            }
        }
        Ok(None)
    }

    /// Looks at everything together.
    fn network(mut self) -> Result<Asked, Wrong> {
        if self.macaddress.is_some() && !self.configure {
            return Err(Wrong::usage(
                "--macaddr cannot be specified when --configure or -c is not specified",
            ));
        }
        let config = self.config()?;
        let edge = if self.bess {
            self.bess_edge()?
        } else {
            self.namespace_edge(&config)?
        };
        let demand = |asked| {
            if asked {
                Demand::Required
            } else {
                Demand::IfPossible
            }
        };
        let sandbox = Sandbox {
            confinement: demand(self.enable_sandbox),
            filter: demand(self.enable_seccomp),
            visibility: Visibility::SameUser,
        };
        Ok(Asked::Network {
            job: Box::new(Attachment {
                config,
                edge,
                ready_fd: self.ready_fd,
                exit_fd: self.exit_fd,
                api_socket: self.api_socket.take(),
                sandbox,
                names: NAMES,
            }),
            warnings: self.warnings,
        })
    }

    fn config(&self) -> Result<Config, Wrong> {
        let default = Config::default();
        let plan = match &self.cidr {
            Some(cidr) => plan(cidr)?,
            None => default.plan.without_ipv6(),
        };
        // The interface may be narrower; we never send more than it asked for in its segments.
        let mtu = self.mtu.unwrap_or(default.mtu).max(MIN_MTU);
        let plan = match default.plan.subnet6() {
            // The default subnet has room, so this is no error.
            Some(subnet) if self.enable_ipv6 => plan.with_ipv6(subnet).unwrap_or(plan),
            _ => plan,
        };
        Ok(Config {
            plan: plan.for_mtu(mtu),
            mtu,
            host_loopback: !self.disable_host_loopback,
            dns: if self.disable_dns {
                Dns::Off
            } else {
                Dns::Host
            },
            outbound: self.outbound_addr.as_deref().map(outbound4).transpose()?,
            outbound6: self.outbound_addr6.as_deref().map(outbound6).transpose()?,
            ..default
        })
    }

    fn bess_edge(&mut self) -> Result<Edge, Wrong> {
        for (said, option) in [
            (self.configure, "--configure"),
            (self.netns_type.is_some(), "--netns-type"),
            (self.userns_path.is_some(), "--userns-path"),
        ] {
            if said {
                return Err(Wrong::usage(format!(
                    "--target-type=bess conflicts with {option}: leave it out"
                )));
            }
        }
        match (self.words.pop(), self.words.is_empty()) {
            (Some(path), true) => Ok(Edge::Socket(path.into())),
            _ => Err(Wrong::usage(
                "--target-type=bess takes one argument, a socket's path",
            )),
        }
    }

    fn namespace_edge(&mut self, config: &Config) -> Result<Edge, Wrong> {
        if self.words.len() > 2 {
            self.warnings.push("too many arguments");
        }
        let mut words = std::mem::take(&mut self.words).into_iter();
        let (target, tap) = (words.next(), words.next());
        let missing = || Wrong::usage("name a namespace and a tap: PID|PATH TAPNAME");
        let target = target.ok_or_else(missing)?;
        let kind = self.netns_type.as_deref().map(OsStr::to_string_lossy);
        let target = match kind.as_deref() {
            Some("tapfd") => {
                let wrong = || Wrong::usage("FD must be a non-negative integer");
                return number(&target)
                    .filter(|number| *number >= 0)
                    .map(Edge::Tap)
                    .ok_or_else(wrong);
            }
            Some("path") => Target::Path(target.into()),
            Some("pid") | None => {
                let pid = number(&target).filter(|pid| *pid > 0);
                let wrong = || Wrong::usage("PID must be a positive integer");
                Target::Process(Pid::from_raw(pid.ok_or_else(wrong)?))
            }
            Some(other) => {
                return Err(Wrong::usage(format!(
                    "unknown --netns-type '{other}': use path, pid or tapfd"
                )));
            }
        };
        let tap = self.tap(config, &tap.ok_or_else(missing)?)?;
        Ok(Edge::Namespace {
            target,
            userns: self.userns_path.take(),
            tap,
        })
    }

    fn tap(&self, config: &Config, name: &OsStr) -> Result<TapPlan, Wrong> {
        let name = interface_name(&name.to_string_lossy())
            .map_err(|error| Wrong::value(format!("TAPNAME: {error}")))?;
        let mac = self.macaddress.as_deref().map(mac).transpose()?;
        Ok(TapPlan {
            mtu: self.mtu.unwrap_or(config.mtu),
            // Addresses of IPv6 are the guest's own to make up, as with the peer.
            addresses: self.configure.then_some(config.plan.without_ipv6()),
            ..TapPlan::new(config, &name, mac)
        })
    }
}

fn plan(cidr: &OsStr) -> Result<AddressPlan, Wrong> {
    let invalid = || Wrong::value(format!("invalid CIDR: {}", cidr.to_string_lossy()));
    let network: Ipv4Net = cidr
        .to_str()
        .ok_or_else(invalid)?
        .parse()
        .map_err(|_| invalid())?;
    AddressPlan::new(network).map_err(|error| {
        Wrong::value(match error {
            PlanError::PrefixLength(_) => "prefix length needs to be 1-25".to_owned(),
            PlanError::NotTheNetwork(..) => "CIDR needs to be a network address like 10.0.2.0/24, \
                                             not like 10.0.2.100/24"
                .to_owned(),
            PlanError::NotUnicast(_)
            | PlanError::PrefixLength6(_)
            | PlanError::NotTheNetwork6(..)
            | PlanError::NotUnicast6(_) => format!("--cidr: {error}"),
        })
    })
}

fn mac(word: &OsStr) -> Result<[u8; 6], Wrong> {
    let mac = word.to_str().and_then(|word| word.parse::<Mac>().ok());
    mac.filter(|mac| mac.is_unicast()).map(|mac| mac.0).ok_or_else(|| {
        Wrong::value(
            "macaddress has to be a valid MAC address (hex string, 6 bytes, each byte separated by \
             a ':').",
        )
    })
}

fn outbound4(word: &OsStr) -> Result<Outbound, Wrong> {
    let text = word.to_string_lossy();
    let address = text.parse::<Ipv4Addr>().map(IpAddr::V4);
    outbound(
        &text,
        address.ok(),
        "outbound-addr has to be valid ipv4 address or interface name.",
    )
}

fn outbound6(word: &OsStr) -> Result<Outbound, Wrong> {
    let text = word.to_string_lossy();
    let address = text.parse::<Ipv6Addr>().map(IpAddr::V6);
    outbound(
        &text,
        address.ok(),
        "outbound-addr6 has to be valid ipv6 address or interface name.",
    )
}

fn outbound(text: &str, address: Option<IpAddr>, wrong: &str) -> Result<Outbound, Wrong> {
    match address {
        Some(address) => Ok(Outbound::Address(address)),
        None => interface_name(text)
            .map(Outbound::Interface)
            .map_err(|_| Wrong::value(wrong)),
    }
}
