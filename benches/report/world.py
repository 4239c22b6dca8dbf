"""A private host, and namespaces on it for the stacks to serve.

A `World` is a user and a network namespace: `lo`, and `host0` with 192.0.2.1, an address of the host's
own that is not its loopback. A `Guest` is a namespace on that host with nothing but `lo`. Neither needs
root, nothing of the machine is changed, and both are gone with the shells that hold them, which end
when this program does.
"""

import subprocess

from processes import Failed, Lines

OTHER_ADDRESS = "192.0.2.1"
# The route is what pasta takes its interface from.
SET_UP = f"""
ip link set lo up
ip tuntap add dev host0 mode tap
ip address add {OTHER_ADDRESS}/24 dev host0
ip link set host0 up
ip route add default dev host0
"""


class Namespace:
    """A shell with every capability in namespaces of its own."""

    def __init__(self, runner, command):
        self.runner = runner
        self.shell = runner.start([*command, "sh"], stdin=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.lines = Lines(self.shell, "the shell in a namespace")

    @property
    def pid(self):
        return self.shell.pid

    def script(self, text):
        """Runs a script with the powers of an administrator; gives what it printed."""
        self.shell.stdin.write(f"( set -e\n{text}\n)\necho end of script $?\n")
        self.shell.stdin.flush()
        said = []
        while True:
            line = self.lines.next()
            if line.startswith("end of script "):
                break
            said.append(line)
        if line != "end of script 0":
            raise Failed(f"in a namespace: {' '.join(said) or text}")
        return said

    def enter(self, command):
        """The command line that runs a command in here."""
        return ["nsenter", "--preserve-credentials", "--user", "--net", f"--target={self.pid}", "--", *command]

    def end(self):
        self.runner.end(self.shell)


class World(Namespace):
    """A private host whose user is unprivileged there as well; only `script` is not."""

    def __init__(self, runner):
        super().__init__(runner, ["unshare", "--map-current-user", "--net", "--keep-caps"])
        self.script(SET_UP)

    def congestion_control(self):
        return self.script("cat /proc/sys/net/ipv4/tcp_congestion_control")[0]


class Guest(Namespace):
    """A namespace of an unprivileged user of a world."""

    def __init__(self, runner, world):
        super().__init__(runner, world.enter(["unshare", "--map-root-user", "--net"]))
        self.script("ip link set lo up")
