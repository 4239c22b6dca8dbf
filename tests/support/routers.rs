//! A path of several hops: a world's host, two routers and a server, joined by virtual cables.
//!
//! ```text
//! world --203.0.113.0/28-- R1 --203.0.113.16/28-- R2 --203.0.113.32/28-- server
//!       --2001:db8:11::/64--   --2001:db8:12::/64--    --2001:db8:13::/64--
//! ```
//!
//! In each namespace `up0` leads away from the world and `down0` back to it. Everything that is not
//! on the path goes towards R2, whose last link is narrow ([`PATH_MTU`]) and which sends each error
//! that a router can send, to whoever asks for an address from [`Error::addr`]. All namespaces belong
//! to the world's user namespace; they end with their agents, and the cables with them.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::time::Duration;

use nix::sched::CloneFlags;

use super::process::{Running, fail, run};
use super::sockets::Sockets;
use super::sys::{Agent, Fresh, Plan};
use super::world::{World, open_namespace};
use super::{SOON, wait_until};

/// What fits through R2's link to the server. The other links take the usual 1500.
pub(crate) const PATH_MTU: u16 = 1400;

/// What a script needs to be the peer, the caller or the watcher of the calls whose outcome the
/// tests compare; see its head.
const CALLS: &str = include_str!("calls.py");

/// The script's path in every namespace of the world.
const CALLS_PATH: &str = "/mnt/calls.py";

/// The script has a limit for each call, so that the outcome of a long table shows which call hung.
const CALLS_LIMIT: Duration = Duration::from_secs(180);

/// One of the two Internet protocols.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) const BOTH: [Self; 2] = [Self::V4, Self::V6];

    fn pick(self, four: [u8; 4], six: [u16; 8]) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::from(four).into(),
            Self::V6 => Ipv6Addr::from(six).into(),
        }
    }

    /// The length of an address.
    pub(crate) fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    /// The first router, as the world sees it.
    pub(crate) fn r1(self) -> IpAddr {
        self.pick([203, 0, 113, 2], [0x2001, 0xdb8, 0x11, 0, 0, 0, 0, 2])
    }

    /// The second router, as the first sees it: the address in its errors.
    pub(crate) fn r2(self) -> IpAddr {
        self.pick([203, 0, 113, 18], [0x2001, 0xdb8, 0x12, 0, 0, 0, 0, 2])
    }

    pub(crate) fn server(self) -> IpAddr {
        self.pick([203, 0, 113, 34], [0x2001, 0xdb8, 0x13, 0, 0, 0, 0, 2])
    }

    /// A neighbour of the server that does not exist: R2 finds out by asking for it.
    pub(crate) fn absent(self) -> IpAddr {
        self.pick([203, 0, 113, 40], [0x2001, 0xdb8, 0x13, 0, 0, 0, 0, 0x40])
    }

    /// R2 has no route to this one, and says so.
    pub(crate) fn unknown(self) -> IpAddr {
        self.pick([203, 0, 113, 100], [0x2001, 0xdb8, 0xff, 0, 0, 0, 0, 1])
    }

    /// R2 has an administrator who does not want this one to be reached.
    pub(crate) fn prohibited(self) -> IpAddr {
        self.pick([203, 0, 113, 66], [0x2001, 0xdb8, 0xf1, 0, 0, 0, 0, 1])
    }

    /// R2's kernel drops what goes there in silence, and a script answers with an ICMP error of
    /// this type and code ([`Routers::answer_with_errors`]): the ones that no Linux router sends,
    /// and those that it sends once a second at most.
    pub(crate) fn answered_with(self, kind: u8, code: u8) -> IpAddr {
        let nth = match kind {
            11 => 32,
            12 => 48,
            _ => 0,
        };
        let six = [0x2001, 0xdb8, 0xf3, 0, 0, 0, kind.into(), code.into()];
        self.pick([203, 0, 113, 128 + nth + code], six)
    }
}

/// A namespace on the path.
pub(crate) struct Hop {
    agent: Agent,
    enter: Plan,
}

impl Hop {
    fn new(world: &World) -> Self {
        let fresh = Fresh {
            flags: CloneFlags::CLONE_NEWNET,
            uid_map: String::new(),
            gid_map: String::new(),
            mounts: Vec::new(),
        };
        let agent = Agent::start(world.plan(), &fresh)
            .unwrap_or_else(|error| fail(&format!("a network namespace in a world: {error}")));
        let mut enter = world.plan().clone();
        let network = open_namespace(agent.pid(), "net");
        enter.enter.push((network, CloneFlags::CLONE_NEWNET));
        enter.keep_capabilities = true;
        Self { agent, enter }
    }

    /// A command with the powers of the hop's administrator.
    fn command(&self, world: &World, program: &str) -> Command {
        world.command_with(program, self.enter.clone())
    }

    /// Runs a shell script as [`World::set_up`] does.
    fn set_up(&self, world: &World, script: &str) {
        run(self.command(world, "sh").args(["-ec", script])).output();
    }
}

impl Sockets for Hop {
    fn socket(&self, domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
        self.agent.socket(domain, kind, protocol)
    }
}

/// The whole path.
pub(crate) struct Routers {
    pub(crate) r1: Hop,
    pub(crate) r2: Hop,
    pub(crate) server: Hop,
    pub(crate) world: World,
}

/// Forwards, and says every error at once: neither limit counts the errors, which the kernel's
/// second limit (`error_cost`, for routes that are none) would take its own from.
const ROUTER: &str = "
    echo 1 > /proc/sys/net/ipv4/ip_forward
    echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
    echo 0 > /proc/sys/net/ipv4/icmp_ratemask
    echo 0 > /proc/sys/net/ipv6/icmp/ratelimit
    ip link set lo up
";

/// A cable's end with its addresses, used at once (`nodad`, also for the one of the link, which asks
/// for the neighbours), and its neighbours found or missed soon.
fn link(dev: &str, four: &str, six: &str) -> String {
    let local = if dev == "up0" { "fe80::1" } else { "fe80::2" };
    format!(
        "ip address add {four}/28 dev {dev}
         ip address add {six}/64 dev {dev} nodad
         ip link set {dev} addrgenmode none
         ip address add {local}/64 dev {dev} nodad
         ip link set {dev} up
         ip ntable change name arp_cache dev {dev} retrans 50
         ip ntable change name ndisc_cache dev {dev} retrans 50\n"
    )
}

impl Routers {
    pub(crate) fn new() -> Self {
        let world = World::new();
        let [r1, r2, server] = [(); 3].map(|()| Hop::new(&world));
        let cable = |to: &Hop| {
            let pid = to.agent.pid();
            format!("ip link add up0 type veth peer name down0 netns {pid}\n")
        };
        world.file("calls.py", CALLS);
        world.set_up(&(cable(&r1) + &link("up0", "203.0.113.1", "2001:db8:11::1")));
        r1.set_up(
            &world,
            &[
                ROUTER,
                &cable(&r2),
                &link("down0", "203.0.113.2", "2001:db8:11::2"),
                &link("up0", "203.0.113.17", "2001:db8:12::1"),
                "ip route add default via 203.0.113.18
                 ip route add default via 2001:db8:12::2",
            ]
            .concat(),
        );
        r2.set_up(
            &world,
            &[
                ROUTER,
                &cable(&server),
                &link("down0", "203.0.113.18", "2001:db8:12::2"),
                &link("up0", "203.0.113.33", "2001:db8:13::1"),
                &format!("ip link set up0 mtu {PATH_MTU}"),
                "
                 ip route add 203.0.113.0/28 via 203.0.113.17
                 ip route add 2001:db8:11::/64 via 2001:db8:12::1
                 ip route add prohibit 203.0.113.64/28
                 ip route add prohibit 2001:db8:f1::/64
                 ip route add blackhole 203.0.113.128/25
                 ip route add blackhole 2001:db8:f3::/64",
            ]
            .concat(),
        );
        server.set_up(
            &world,
            &[
                ROUTER,
                &link("down0", "203.0.113.34", "2001:db8:13::2"),
                &format!("ip link set down0 mtu {PATH_MTU}"),
                "
                 ip route add default via 203.0.113.33
                 ip route add default via 2001:db8:13::1",
            ]
            .concat(),
        );
        // Last: only now there is something behind the first cable.
        world.set_up(
            "ip route add default via 203.0.113.2
             ip route add default via 2001:db8:11::2",
        );
        let routers = Self {
            r1,
            r2,
            server,
            world,
        };
        for family in Family::BOTH {
            routers.wait_for(family.server());
        }
        routers
    }

    /// Waits for the whole way there and back: a cable carries a moment after both ends are up.
    fn wait_for(&self, addr: IpAddr) {
        wait_until(&format!("{addr} to answer"), SOON, || {
            let mut ping = self.world.command("ping");
            let ping = ping.args(["-c1", "-W1", &addr.to_string()]);
            run(ping).status.success().then_some(())
        });
    }

    /// Runs a shell script with the powers of a hop's administrator.
    pub(crate) fn set_up_at(&self, hop: &Hop, script: &str) {
        hop.set_up(&self.world, script);
    }

    /// How often a hop's kernel has said "destination unreachable".
    pub(crate) fn errors_sent(&self, hop: &Hop, family: Family) -> u64 {
        let counter = match family {
            Family::V4 => "IcmpOutDestUnreachs",
            Family::V6 => "Icmp6OutDestUnreachs",
        };
        let mut command = hop.command(&self.world, "nstat");
        // Since the beginning, also zeros; no history is read or written.
        let shown = run(command.args(["--noupdate", "--ignore", "--zeros", counter])).output();
        let words: Vec<&str> = shown.split_whitespace().collect();
        let place = words.iter().position(|word| *word == counter);
        let count = place.and_then(|place| words.get(place + 1)?.parse().ok());
        count.unwrap_or_else(|| fail(&format!("no {counter} in {shown:?}")))
    }

    /// Makes R2 answer what goes to [`Family::answered_with`], until the result is dropped.
    pub(crate) fn answer_with_errors(&self) -> Running {
        self.start_at(&self.r2, "errors", &["down0"])
    }

    /// Starts one of the script's roles at a hop and waits until it is ready.
    pub(crate) fn start_at(&self, hop: &Hop, role: &str, arguments: &[&str]) -> Running {
        let mut command = hop.command(&self.world, "python3");
        let mut running = Running::start(command.args([CALLS_PATH, role]).args(arguments));
        running.wait_for_output("ready");
        running
    }

    /// Makes the calls on the host itself; the outcome of each.
    pub(crate) fn calls_direct(&self, calls: &[String]) -> Vec<String> {
        let mut command = self.world.command("python3");
        self.outcomes(command.args([CALLS_PATH, "calls", "0"]).args(calls))
    }

    /// Makes the calls inside `tapgate run`, which is one hop further away.
    pub(crate) fn calls_inside(&self, calls: &[String]) -> Vec<String> {
        const ALLOW_PING: &str = "gid=$(id -g)
            echo $gid $gid > /proc/sys/net/ipv4/ping_group_range
            exec \"$@\"";
        let mut command = self.world.tapgate(&["run", "--", "sh", "-ec", ALLOW_PING]);
        command.args(["sh", "python3", CALLS_PATH, "calls", "1"]);
        self.outcomes(command.args(calls))
    }

    fn outcomes(&self, command: &mut Command) -> Vec<String> {
        let finished = Running::start(command).finish(CALLS_LIMIT);
        self.forget_paths();
        finished.output().lines().map(str::to_owned).collect()
    }

    /// Makes the host forget what it has learnt of the path's MTU.
    pub(crate) fn forget_paths(&self) {
        self.world
            .set_up("ip route flush cache; ip -6 route flush cache");
    }
}
