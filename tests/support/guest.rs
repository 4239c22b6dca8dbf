//! A guest: a user and network namespace on a world's host, like one made by `unshare -Urn`.
//! `tapgate attach` gives it its network; until then it has nothing but a `lo` that is down.

use std::io;
use std::os::fd::OwnedFd;
use std::process::Command;

use nix::sched::CloneFlags;

use super::process::{Finished, fail, run};
use super::sockets::Sockets;
use super::sys::{Agent, Fresh, Plan};
use super::user;
use super::world::{World, open_namespace};

/// A namespace without a network.
pub(crate) struct Guest {
    agent: Agent,
    enter: Plan,
}

impl Guest {
    pub(crate) fn new(world: &World) -> Self {
        let (uid, gid) = user::ids();
        let fresh = Fresh {
            flags: CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET,
            uid_map: format!("0 {uid} 1"),
            gid_map: format!("0 {gid} 1"),
            mounts: Vec::new(),
        };
        let agent = Agent::start(world.plan(), &fresh)
            .unwrap_or_else(|error| fail(&format!("a namespace in a world: {error}")));
        let mut enter = world.plan().clone();
        enter.enter.push((
            open_namespace(agent.pid(), "user"),
            CloneFlags::CLONE_NEWUSER,
        ));
        enter
            .enter
            .push((open_namespace(agent.pid(), "net"), CloneFlags::CLONE_NEWNET));
        Self { agent, enter }
    }

    /// The process that holds the namespace: what `tapgate attach` is told.
    pub(crate) fn pid(&self) -> i32 {
        self.agent.pid()
    }

    /// A command as root of the guest, with the files of the world.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        user::plain_environment(&mut command);
        self.enter.clone().attach_to(&mut command);
        command
    }

    /// Runs a program in the guest to its end.
    pub(crate) fn run(&self, program: &str, arguments: &[&str]) -> Finished {
        run(self.command(program).args(arguments))
    }

    /// The hardware address that stands for the gateway, as the guest's kernel learnt it.
    pub(crate) fn gateway_mac(&self) -> [u8; 6] {
        self.run("ping", &["-c1", "-W5", "10.0.2.2"]).output();
        let neighbours = self.run("ip", &["neighbour", "show", "10.0.2.2"]).output();
        let mut words = neighbours
            .split_whitespace()
            .skip_while(|word| *word != "lladdr");
        let mac = words
            .nth(1)
            .unwrap_or_else(|| fail(&format!("no address in {neighbours:?}")));
        let bytes: Vec<u8> = mac
            .split(':')
            .filter_map(|byte| u8::from_str_radix(byte, 16).ok())
            .collect();
        bytes
            .try_into()
            .unwrap_or_else(|_| fail(&format!("{mac:?} is no hardware address")))
    }

    /// Sends Ethernet frames as they are, past every check of the guest's kernel.
    pub(crate) fn send_frames(&self, frames: &[Vec<u8>]) {
        const SEND: &str = "
import socket, sys
link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
link.bind(('tap0', 0))
for frame in sys.argv[1:]:
    link.send(bytes.fromhex(frame))
";
        let hex = |frame: &Vec<u8>| frame.iter().map(|byte| format!("{byte:02x}")).collect();
        let frames: Vec<String> = frames.iter().map(hex).collect();
        let mut command = self.command("/usr/bin/python3");
        run(command.args(["-c", SEND]).args(frames)).output();
    }
}

impl Sockets for Guest {
    fn socket(&self, domain: i32, kind: i32, protocol: i32) -> io::Result<OwnedFd> {
        self.agent.socket(domain, kind, protocol)
    }
}
