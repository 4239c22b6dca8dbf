//! podman on a private host: an image, containers that ask, containers that serve.

use std::process::Command;

use crate::host::Host;
use crate::support::process::{Finished, Running, run};

/// A host with podman and the image `box`.
pub(crate) struct Podman {
    pub(crate) host: Host,
}

impl Podman {
    pub(crate) fn new() -> Self {
        let host = Host::new(&["podman", "conmon", "crun"]);
        let import = ["podman", "import", "/run/image.tar", "box"];
        host.run(&import).output();
        Self { host }
    }

    /// Runs `podman ARGUMENTS` to its end.
    pub(crate) fn podman(&self, arguments: &[&str]) -> Finished {
        run(self.host.command("podman").args(arguments))
    }

    /// Runs a shell script in a container with `--network slirp4netns:OPTIONS`.
    pub(crate) fn try_inside(&self, options: &str, script: &str) -> Finished {
        let network = format!("slirp4netns:{options}");
        let arguments = ["run", "--rm", "--network", &network, "box", "sh", "-c"];
        self.podman(&[&arguments[..], &[script]].concat())
    }

    /// What the script printed, which must have succeeded.
    pub(crate) fn inside(&self, options: &str, script: &str) -> String {
        self.try_inside(options, script).output()
    }

    /// Starts a container `name` that serves on 80/tcp and 5000/udp.
    pub(crate) fn serve(&self, name: &str, options: &str, publish: &[&str]) {
        run(&mut self.serving(name, options, publish)).output();
    }

    /// [`Podman::serve`], without waiting.
    pub(crate) fn start_serving(&self, name: &str, options: &str, publish: &[&str]) -> Running {
        Running::start(&mut self.serving(name, options, publish))
    }

    fn serving(&self, name: &str, options: &str, publish: &[&str]) -> Command {
        let mut command = self.host.command("podman");
        command
            .args(["run", "--detach", "--name", name])
            .args(["--env", &format!("NAME={name}")])
            .args(["--network", &format!("slirp4netns:{options}")]);
        for port in publish {
            command.args(["--publish", port]);
        }
        command.args(["box", "/bin/serve"]);
        command
    }

    /// Removes every container; nothing of them may stay.
    pub(crate) fn remove_all(&self) {
        self.podman(&["rm", "--all", "--force", "--time", "0"])
            .output();
        self.host.assert_nothing_left();
    }
}
