//! What a guest's sockets are told when the network can't deliver, on a real kernel as an
//! unprivileged user: every ICMP error of routers and hosts behind the host. The measure is the host:
//! each call is made there as well, by the same script, and must have the same outcome.

mod support;

use std::io::{self, Read, Write};
use std::net::IpAddr;

use support::attached::Attached;
use support::guest::Guest;
use support::routers::{Family, PATH_MTU, Routers};
use support::sockets::Sockets;
use support::{SOON, at, serve, wait_until};

/// What a caller's socket is told of an error, by the numbers of the host's kernel.
struct Provoked {
    to: IpAddr,
    /// The script's option that provokes it.
    option: &'static str,
    errno: &'static str,
    /// Type and code.
    icmp: (u8, u8),
    /// Who sends it: the offender, as IP_RECVERR has it.
    from: IpAddr,
}

/// A call of the script, and a part of its outcome.
type Row = (String, String);

impl Provoked {
    fn by_r2(family: Family, to: IpAddr, errno: &'static str, icmp: (u8, u8)) -> Self {
        Self {
            to,
            option: "",
            errno,
            icmp,
            from: family.r2(),
        }
    }

    /// For a socket that asks for errors (IP_RECVERR): it is told all of it.
    fn asked(&self, kind: &str) -> Row {
        let origin = if self.to.is_ipv4() { 2 } else { 3 };
        let (icmp_type, code) = self.icmp;
        let told = format!(
            "{} origin {origin} type {icmp_type} code {code} info 0 from {}",
            self.errno, self.from
        );
        (self.call(kind, "recverr"), told)
    }

    /// For one that does not. UDP then tells of final errors only (RFC 1122 4.1.3.3).
    fn unasked(&self, kind: &str) -> Row {
        let told = match kind {
            "tcp" => format!("connect {}", self.errno),
            _ => String::new(),
        };
        (self.call(kind, ""), told)
    }

    fn call(&self, kind: &str, asks: &str) -> String {
        let Self { to, option, .. } = self;
        format!("{kind} {to} 9 {asks} {option}")
    }
}

/// Makes the calls on the host and inside, and asserts the same outcome for each.
#[track_caller]
fn assert_same(routers: &Routers, table: &[Row]) {
    let calls: Vec<String> = table.iter().map(|(call, _)| call.clone()).collect();
    let direct = routers.calls_direct(&calls);
    assert_as_expected(&direct, table);
    assert_alike(&direct, &routers.calls_inside(&calls));
}

/// [`assert_same`] for calls that leave something behind in the host's kernel: one at a time.
#[track_caller]
fn assert_each_same(routers: &Routers, table: &[Row]) {
    let calls = || table.iter().map(|(call, _)| [call.clone()]);
    let direct: Vec<_> = calls().flat_map(|it| routers.calls_direct(&it)).collect();
    assert_as_expected(&direct, table);
    let inside: Vec<_> = calls().flat_map(|it| routers.calls_inside(&it)).collect();
    assert_alike(&direct, &inside);
}

/// Holds what this file believes of the host's kernel to be true.
#[track_caller]
fn assert_as_expected(direct: &[String], table: &[Row]) {
    assert_eq!(direct.len(), table.len(), "an outcome for each call");
    let pairs = direct.iter().zip(table);
    let other: Vec<_> = pairs
        .filter(|(line, (_, expected))| !line.contains(expected))
        .collect();
    assert!(other.is_empty(), "(the host, expected): {other:#?}");
}

#[track_caller]
fn assert_alike(direct: &[String], inside: &[String]) {
    let pairs = direct.iter().zip(inside);
    let other: Vec<_> = pairs.filter(|(direct, inside)| direct != inside).collect();
    assert!(
        other.is_empty() && direct.len() == inside.len(),
        "(the host, inside): {} of {} differ: {other:#?}",
        other.len(),
        direct.len()
    );
}

/// The rows of both families.
fn for_both(rows: impl Fn(Family) -> Vec<Row>) -> Vec<Row> {
    Family::BOTH.into_iter().flat_map(rows).collect()
}

// --- errors ----------------------------------------------------------------------------------------

/// What Linux routers send of themselves; `port_closed` is the server's own. At most five of these
/// may be asked for at once: for want of a route, the kernel has a burst of five errors for each
/// source and then one a second.
fn of_the_kernel(family: Family) -> Vec<Provoked> {
    let (absent, unknown, prohibited, exceeded) = match family {
        Family::V4 => ((3, 1), (3, 0), ((3, 13), "EHOSTUNREACH"), (11, 0)),
        Family::V6 => ((1, 3), (1, 0), ((1, 1), "EACCES"), (3, 0)),
    };
    vec![
        Provoked::by_r2(family, family.absent(), "EHOSTUNREACH", absent),
        Provoked::by_r2(family, family.unknown(), "ENETUNREACH", unknown),
        Provoked::by_r2(family, family.prohibited(), prohibited.1, prohibited.0),
        Provoked {
            option: "hops=2",
            ..Provoked::by_r2(family, family.server(), "EHOSTUNREACH", exceeded)
        },
        Provoked {
            option: "hops=1",
            from: family.r1(),
            ..Provoked::by_r2(family, family.server(), "EHOSTUNREACH", exceeded)
        },
    ]
}

/// Every error of RFC 792, RFC 1812 and RFC 4443, sent by a script. Not among them: what limits the
/// path's MTU, which has tests of its own, and the end of IPv4's patience with fragments (11, 1),
/// of which Linux tells nobody.
fn of_the_script(family: Family) -> Vec<Provoked> {
    let codes: &[((u8, u8), &'static str)] = match family {
        Family::V4 => &[
            ((3, 0), "ENETUNREACH"),
            ((3, 1), "EHOSTUNREACH"),
            ((3, 2), "ENOPROTOOPT"),
            ((3, 3), "ECONNREFUSED"),
            ((3, 5), "EOPNOTSUPP"),
            ((3, 6), "ENETUNREACH"),
            ((3, 7), "EHOSTDOWN"),
            ((3, 8), "ENONET"),
            ((3, 9), "ENETUNREACH"),
            ((3, 10), "EHOSTUNREACH"),
            ((3, 11), "ENETUNREACH"),
            ((3, 12), "EHOSTUNREACH"),
            ((3, 13), "EHOSTUNREACH"),
            ((3, 14), "EHOSTUNREACH"),
            ((3, 15), "EHOSTUNREACH"),
            ((11, 0), "EHOSTUNREACH"),
            ((12, 0), "EPROTO"),
        ],
        Family::V6 => &[
            ((1, 0), "ENETUNREACH"),
            ((1, 1), "EACCES"),
            ((1, 2), "EHOSTUNREACH"),
            ((1, 3), "EHOSTUNREACH"),
            ((1, 4), "ECONNREFUSED"),
            ((1, 5), "EACCES"),
            ((1, 6), "EACCES"),
            ((3, 0), "EHOSTUNREACH"),
            ((3, 1), "EHOSTUNREACH"),
            ((4, 0), "EPROTO"),
            ((4, 1), "EPROTO"),
        ],
    };
    let provoke = |&((kind, code), errno): &((u8, u8), _)| {
        let to = family.answered_with(kind, code);
        Provoked::by_r2(family, to, errno, (kind, code))
    };
    codes.iter().map(provoke).collect()
}

#[test]
fn datagrams_meet_the_errors_of_linux_as_on_the_host() {
    let table = for_both(|family| {
        let icmp = match family {
            Family::V4 => (3, 3),
            Family::V6 => (1, 4),
        };
        let closed = Provoked {
            from: family.server(),
            ..Provoked::by_r2(family, family.server(), "ECONNREFUSED", icmp)
        };
        let mut table = vec![closed.asked("udp"), closed.unasked("udp")];
        table.extend(of_the_kernel(family).iter().map(|it| it.asked("udp")));
        table
    });
    assert_same(&Routers::new(), &table);
}

#[test]
fn echo_requests_meet_the_errors_of_linux_as_on_the_host() {
    let table = for_both(|family| {
        let errors = of_the_kernel(family);
        errors.iter().map(|error| error.asked("ping")).collect()
    });
    assert_same(&Routers::new(), &table);
}

/// The others are left to the script: a connection attempt that the kernel repeats after a second
/// uses up what a router sends.
#[test]
fn connects_meet_the_errors_of_linux_as_on_the_host() {
    let table = for_both(|family| {
        let server = family.server();
        let mut table = vec![(
            format!("tcp {server} 9 recverr"),
            "connect ECONNREFUSED, queue empty".to_owned(),
        )];
        for error in of_the_kernel(family) {
            if error.to == server || error.to == family.absent() {
                table.extend([error.asked("tcp"), error.unasked("tcp")]);
            }
        }
        table
    });
    assert_same(&Routers::new(), &table);
}

#[test]
fn datagrams_meet_every_error_as_on_the_host() {
    every_error("udp");
}

#[test]
fn echo_requests_meet_every_error_as_on_the_host() {
    every_error("ping");
}

#[test]
fn connects_meet_every_error_as_on_the_host() {
    every_error("tcp");
}

fn every_error(kind: &str) {
    let routers = Routers::new();
    let _script = routers.answer_with_errors();
    let table = for_both(|family| {
        let errors = of_the_script(family);
        let rows = errors
            .iter()
            .flat_map(|error| [error.asked(kind), error.unasked(kind)]);
        rows.collect()
    });
    assert_same(&routers, &table);
}

// --- MTU -------------------------------------------------------------------------------------------

/// Above the path's MTU, below that of each interface that the two places have.
const TOO_LONG: &str = "size=1440";

#[test]
fn datagram_that_may_not_be_fragmented_is_told_the_paths_mtu() {
    let table = for_both(|family| {
        let (server, r2) = (family.server(), family.r2());
        // 2 is IP_PMTUDISC_DO.
        let (icmp, options): (_, &[_]) = match family {
            Family::V4 => ("origin 2 type 3 code 4", &["pmtu=2"]),
            Family::V6 => ("origin 3 type 2 code 0", &["pmtu=2", "dontfrag"]),
        };
        // The router tells of the first; then the caller's own kernel knows.
        let all = format!(
            "send ok, receive EMSGSIZE, queue EMSGSIZE {icmp} info {PATH_MTU} from {r2} | \
             send EMSGSIZE, receive EAGAIN, queue EMSGSIZE origin 1 type 0 code 0 info {PATH_MTU}"
        );
        let number = "receive EMSGSIZE, queue empty | send EMSGSIZE, receive EAGAIN";
        let rows = options.iter().flat_map(|option| {
            let call = |kind: &str, asks: &str| {
                format!("{kind} {server} 9 {asks} count=2 {TOO_LONG} {option}")
            };
            [
                (call("udp", "recverr"), all.clone()),
                (call("ping", "recverr"), all.clone()),
                (call("udp", ""), number.to_owned()),
            ]
        });
        rows.collect()
    });
    assert_each_same(&Routers::new(), &table);
}

// --- connections -----------------------------------------------------------------------------------

#[test]
fn connection_outlives_errors_of_the_path_ipv4() -> io::Result<()> {
    connection_outlives_errors(Family::V4)
}

#[test]
fn connection_outlives_errors_of_the_path_ipv6() -> io::Result<()> {
    connection_outlives_errors(Family::V6)
}

/// An established connection is not told of what may pass (RFC 1122 4.2.3.9), and neither may the
/// host's half of it end for that.
fn connection_outlives_errors(family: Family) -> io::Result<()> {
    let routers = Routers::new();
    let guest = Guest::new(&routers.world);
    let pid = guest.pid().to_string();
    let _tapgate = Attached::start(&routers.world, &[&pid, "tap0"]);
    let listener = routers.server.listen(at(family.server(), 0))?;
    let mut inside = guest.connect(listener.local_addr()?)?;
    let mut outside = serve::accept(&listener).0;

    let route = format!("prohibit {}/{}", family.server(), family.bits());
    let before = routers.errors_sent(&routers.r2, family);
    routers.set_up_at(&routers.r2, &format!("ip route add {route}"));
    inside.write_all(b"on its way")?;
    wait_until("an error from the path", SOON, || {
        (routers.errors_sent(&routers.r2, family) > before).then_some(())
    });
    routers.set_up_at(&routers.r2, &format!("ip route del {route}"));

    let mut heard = [0; 10];
    outside.read_exact(&mut heard)?;
    assert_eq!(&heard, b"on its way", "sent again once there was a way");
    outside.write_all(b"and back")?;
    let mut heard = [0; 8];
    inside.read_exact(&mut heard)?;
    assert_eq!(&heard, b"and back");
    Ok(())
}
