//! The words of slirp4netns 1.3.2: its options, its usage text, its version.
//!
//! Comes in: an option's name as it was written. Goes out: which option it is. What options mean is the
//! business of the rest of [`super`].

use super::Wrong;

/// What `--help` prints, and what follows an error.
pub(super) const HELP: &str = "\
Usage: slirp4netns [OPTION]... PID|PATH|FD [TAPNAME]
User-mode networking for unprivileged network namespaces (by tapgate).

-c, --configure          bring up the interface
-e, --exit-fd=FD         end when the other side of FD is closed
-r, --ready-fd=FD        write \"1\" to FD once the network works
-m, --mtu=MTU            largest packet, bytes (default=1500, max=65521)
-6, --enable-ipv6        enable IPv6 (experimental)
-a, --api-socket=PATH    publish ports by this socket
--cidr=CIDR              network of the namespace (default=10.0.2.0/24)
--disable-host-loopback  keep 127.0.0.1:* of the host out of reach
--netns-type=TYPE        what names the namespace ([path|pid|tapfd], default=pid)
--userns-path=PATH       user namespace that owns it
--enable-sandbox         insist on an empty root and no capabilities
--enable-seccomp         insist on the filter of system calls
--outbound-addr=IPv4     send from this address, or by this interface
--outbound-addr6=IPv6    send from this address, or by this interface
--disable-dns            no resolver at the third address of the network
--macaddress=MAC         Ethernet address of the interface (only with -c)
--target-type=TYPE       what is served ([netns|bess], default=netns)
-h, --help               show this help and exit
-v, --version            show version and exit
";

/// The version that is spoken, for callers that compare it.
const VERSION: &str = "1.3.2";

/// What `--version` prints. Docker takes the last line with that word, and the commit.
pub(super) fn version() -> String {
    let commit =
        option_env!("TAPGATE_COMMIT").unwrap_or("0000000000000000000000000000000000000000");
    let ours = env!("CARGO_PKG_VERSION");
    format!(
        "slirp4netns version {VERSION}\ncommit: {commit}\nlibslirp: 4.8.0\n\
         SLIRP_CONFIG_VERSION_MAX: 5\nlibseccomp: 2.5.5\ntapgate: {ours}\n"
    )
}

/// The options by what they do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Name {
    Configure,
    ExitFd,
    ReadyFd,
    Mtu,
    Cidr,
    DisableHostLoopback,
    NoHostLoopback,
    NetnsType,
    UsernsPath,
    ApiSocket,
    EnableIpv6,
    EnableSandbox,
    CreateSandbox,
    EnableSeccomp,
    Help,
    Version,
    OutboundAddr,
    OutboundAddr6,
    DisableDns,
    Macaddress,
    TargetType,
}

/// Long name, short name, whether it takes a value.
pub(super) const OPTIONS: &[(&str, Option<char>, bool, Name)] = &[
    ("configure", Some('c'), false, Name::Configure),
    ("exit-fd", Some('e'), true, Name::ExitFd),
    ("ready-fd", Some('r'), true, Name::ReadyFd),
    ("mtu", Some('m'), true, Name::Mtu),
    ("cidr", None, true, Name::Cidr),
    (
        "disable-host-loopback",
        None,
        false,
        Name::DisableHostLoopback,
    ),
    ("no-host-loopback", None, false, Name::NoHostLoopback),
    ("netns-type", None, true, Name::NetnsType),
    ("userns-path", None, true, Name::UsernsPath),
    ("api-socket", Some('a'), true, Name::ApiSocket),
    ("enable-ipv6", Some('6'), false, Name::EnableIpv6),
    ("enable-sandbox", None, false, Name::EnableSandbox),
    ("create-sandbox", None, false, Name::CreateSandbox),
    ("enable-seccomp", None, false, Name::EnableSeccomp),
    ("help", Some('h'), false, Name::Help),
    ("version", Some('v'), false, Name::Version),
    ("outbound-addr", None, true, Name::OutboundAddr),
    ("outbound-addr6", None, true, Name::OutboundAddr6),
    ("disable-dns", None, false, Name::DisableDns),
    ("macaddress", None, true, Name::Macaddress),
    ("target-type", None, true, Name::TargetType),
];

/// The option that a long name means: itself, or the only one that begins so.
pub(super) fn long(name: &str) -> Result<(&'static str, bool, Name), Wrong> {
    let mut found = OPTIONS.iter().filter(|it| it.0.starts_with(name));
    if let Some(exact) = OPTIONS.iter().find(|it| it.0 == name) {
        return Ok((exact.0, exact.2, exact.3));
    }
    match (found.next(), found.next()) {
        (Some(only), None) => Ok((only.0, only.2, only.3)),
        (None, _) => Err(Wrong::usage(format!("unrecognized option '--{name}'"))),
        (Some(_), Some(_)) => {
            let all = OPTIONS.iter().filter(|it| it.0.starts_with(name));
            let all: Vec<String> = all.map(|it| format!("'--{}'", it.0)).collect();
            Err(Wrong::usage(format!(
                "option '--{name}' is ambiguous; possibilities: {}",
                all.join(" ")
            )))
        }
    }
}
