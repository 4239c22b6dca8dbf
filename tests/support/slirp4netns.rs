//! The program under test under the name of slirp4netns: called with an argv as an engine builds it
//! and descriptors under the numbers that the argv names, and clients of its API socket.
//!
//! An engine passes exactly the descriptors that it means to, from 3 on; so does [`Call`], by a short
//! program that puts them in their places and then becomes slirp4netns under its own pid.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::attached::pipe;
use super::guest::Guest;
use super::process::{Finished, Running, fail};
use super::serve::readable;
use super::sys::Plan;
use super::world::World;

/// Where an engine finds it.
pub(crate) const SLIRP4NETNS: &str = "/mnt/slirp4netns";

/// Puts descriptors in their places, closes the rest of what it was given, and becomes the program.
/// Above 15 nothing is wanted, so nothing that is still to be moved is overwritten.
const PLACE: &str = "
import fcntl, os, sys
moves = [tuple(map(int, word.split(':'))) for word in sys.argv[1].split()]
held = [(fcntl.fcntl(given, fcntl.F_DUPFD, 16), wanted) for given, wanted in moves]
for given, _ in moves:
    os.close(given)
for given, wanted in held:
    os.dup2(given, wanted)
    os.close(given)
os.execv(sys.argv[2], ['slirp4netns', *sys.argv[3:]])
";

/// One call of slirp4netns, as an engine makes it.
pub(crate) struct Call<'a> {
    world: &'a World,
    arguments: Vec<String>,
    descriptors: Vec<(Arc<OwnedFd>, i32)>,
    wrapper: Vec<&'a str>,
    keep_capabilities: bool,
}

impl<'a> Call<'a> {
    pub(crate) fn new(world: &'a World, arguments: &[&str]) -> Self {
        world.link("slirp4netns", "tapgate");
        Self {
            world,
            arguments: arguments.iter().map(ToString::to_string).collect(),
            descriptors: Vec::new(),
            wrapper: Vec::new(),
            keep_capabilities: false,
        }
    }

    /// Passes a descriptor under a number from 3 to 15.
    pub(crate) fn pass(mut self, descriptor: &Arc<OwnedFd>, number: i32) -> Self {
        self.descriptors.push((Arc::clone(descriptor), number));
        self
    }

    /// By way of another program, which becomes slirp4netns under its own pid.
    pub(crate) fn by(mut self, wrapper: &[&'a str]) -> Self {
        self.wrapper = wrapper.to_vec();
        self
    }

    /// With the powers of the host's administrator.
    pub(crate) fn with_powers(mut self) -> Self {
        self.keep_capabilities = true;
        self
    }

    /// The command, for who wants to start it in an own way.
    pub(crate) fn command(self) -> Command {
        let moves: Vec<String> = self
            .descriptors
            .iter()
            .map(|(given, wanted)| format!("{}:{wanted}", given.as_raw_fd()))
            .collect();
        let plan = Plan {
            inherit: self.descriptors.into_iter().map(|it| it.0).collect(),
            keep_capabilities: self.keep_capabilities,
            ..self.world.plan().clone()
        };
        let place = ["/usr/bin/python3", "-I", "-S", "-c", PLACE];
        let mut words = self.wrapper;
        words.extend(place);
        let mut command = self.world.command_with(words[0], plan);
        command.args(&words[1..]).arg(moves.join(" "));
        command.arg(SLIRP4NETNS).args(self.arguments);
        command
    }

    /// Starts it; nobody asks whether it is ready.
    pub(crate) fn start(self) -> Running {
        Running::start(&mut self.command())
    }

    /// Starts it and waits until it says on descriptor `number` that it is ready.
    pub(crate) fn ready_at(self, number: i32) -> Slirp4netns {
        let (ready, write_end) = pipe();
        let running = self.pass(&write_end, number).start();
        drop(write_end);
        Slirp4netns::when_ready(running, &ready)
    }
}

/// A running slirp4netns.
pub(crate) struct Slirp4netns {
    running: Running,
}

impl Slirp4netns {
    /// Waits until a started one says that it is ready.
    pub(crate) fn when_ready(running: Running, ready: &OwnedFd) -> Self {
        let mut slirp4netns = Self { running };
        slirp4netns.wait_until_ready(ready);
        slirp4netns
    }

    /// Reads as podman does: at most 16 bytes, at least one, then the end.
    fn wait_until_ready(&mut self, ready: &OwnedFd) {
        let said = read_ready(ready);
        if said != "1" {
            let (status, output) = (self.running.try_status(), self.running.said());
            fail(&format!(
                "not ready: {said:?}, status {status:?}: {output:?}"
            ));
        }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.running.pid()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        self.running.signal(signal);
    }

    pub(crate) fn try_status(&mut self) -> Option<ExitStatus> {
        self.running.try_status()
    }

    /// Standard output and standard error so far.
    pub(crate) fn said(&self) -> (String, String) {
        self.running.said()
    }

    pub(crate) fn finish(self, limit: Duration) -> Finished {
        self.running.finish(limit)
    }
}

/// Everything that is said on a ready descriptor until it is closed.
pub(crate) fn read_ready(ready: &OwnedFd) -> String {
    let mut said = String::new();
    let mut file = File::from(ready.try_clone().expect("a free descriptor"));
    while readable(ready, super::SOON) {
        let mut some = [0; 16];
        match file.read(&mut some).expect("a pipe of ours") {
            0 => return said,
            length => said.push_str(&String::from_utf8_lossy(&some[..length])),
        }
    }
    said + " (and still open)"
}

/// The API socket of an instance, as its clients see it.
#[derive(Clone)]
pub(crate) struct Api {
    path: PathBuf,
}

impl Api {
    /// The socket that the program under test sees as `/mnt/NAME`.
    pub(crate) fn new(world: &World, name: &str) -> Self {
        Self {
            path: world.dir().join(name),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn connect(&self) -> io::Result<UnixStream> {
        let stream = UnixStream::connect(&self.path)?;
        stream.set_read_timeout(Some(super::SOON))?;
        stream.set_write_timeout(Some(super::SOON))?;
        Ok(stream)
    }

    /// As rootlesskit does: the request and a newline, half-close, everything that comes.
    pub(crate) fn try_ask(&self, request: &str) -> io::Result<String> {
        let mut stream = self.connect()?;
        stream.write_all(format!("{request}\n").as_bytes())?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    /// [`Api::try_ask`] of an instance that is there.
    #[track_caller]
    pub(crate) fn ask(&self, request: &str) -> String {
        let answer = self.try_ask(request);
        answer.unwrap_or_else(|error| fail(&format!("{request}: {error}")))
    }

    /// `add_hostfwd` with these arguments; the answer as JSON.
    #[track_caller]
    pub(crate) fn add(&self, arguments: &Value) -> Value {
        let request = json!({"execute": "add_hostfwd", "arguments": arguments});
        parsed(&self.ask(&request.to_string()))
    }

    /// Publishes a port; gives its number.
    #[track_caller]
    pub(crate) fn publish(&self, proto: &str, host: u16, guest: u16) -> u64 {
        let answer = self.add(
            &json!({"proto": proto, "host_port": host, "guest_addr": "", "guest_port": guest}),
        );
        let id = answer["return"]["id"].as_u64();
        id.unwrap_or_else(|| fail(&format!("{proto} {host} to {guest}: {answer}")))
    }

    /// `list_hostfwd`: the entries.
    #[track_caller]
    pub(crate) fn list(&self) -> Vec<Value> {
        let answer = parsed(&self.ask(r#"{"execute":"list_hostfwd"}"#));
        let entries = answer["entries"].as_array().cloned();
        entries.unwrap_or_else(|| fail(&format!("a list: {answer}")))
    }

    /// `remove_hostfwd`: the answer as it came.
    #[track_caller]
    pub(crate) fn remove(&self, id: u64) -> String {
        self.ask(&json!({"execute": "remove_hostfwd", "arguments": {"id": id}}).to_string())
    }
}

#[track_caller]
fn parsed(answer: &str) -> Value {
    let value = serde_json::from_str(answer);
    value.unwrap_or_else(|error| fail(&format!("{answer:?}: {error}")))
}

/// A world, a guest, and slirp4netns between them, configured (`-c`), ready, with its API at
/// `/mnt/api.sock`. The fields end in this order.
pub(crate) struct Served {
    pub(crate) slirp4netns: Slirp4netns,
    pub(crate) guest: Guest,
    pub(crate) api: Api,
    pub(crate) world: World,
}

impl Served {
    pub(crate) fn with(options: &[&str]) -> Self {
        Self::in_world(World::new(), options)
    }

    /// [`Served::with`] in a world that the test has prepared.
    pub(crate) fn in_world(world: World, options: &[&str]) -> Self {
        let guest = Guest::new(&world);
        let pid = guest.pid().to_string();
        let mut arguments = vec!["-c", "-r", "3", "--api-socket", "/mnt/api.sock"];
        arguments.extend(options);
        arguments.extend([&pid, "tap0"]);
        let slirp4netns = Call::new(&world, &arguments).ready_at(3);
        Self {
            slirp4netns,
            guest,
            api: Api::new(&world, "api.sock"),
            world,
        }
    }
}

/// A process's descriptors, by what they stand for.
pub(crate) fn descriptors(pid: i32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"));
    let entries = entries.unwrap_or_else(|error| fail(&format!("descriptors of {pid}: {error}")));
    let target = |entry: io::Result<fs::DirEntry>| fs::read_link(entry.ok()?.path()).ok();
    let targets = entries.filter_map(target);
    targets
        .map(|path| path.to_string_lossy().into_owned())
        .collect()
}
