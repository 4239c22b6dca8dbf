"""The kinds of network that are compared, each joined to a fresh namespace.

In: a world, a kind and an MTU. Out: a `Stack`, which says how to run something inside, by which address
the inside reaches the host, by which addresses the host reaches a published port, and which processes
do the work. Each kind is run with what it does by default, told only names, addresses and the MTU.
"""

import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time

from processes import Failed, Lines, last_line, processor_seconds, resident_kb, tree, wait
from world import OTHER_ADDRESS, Guest

GATEWAY, ADDRESS, LOOPBACK = "10.0.2.2", "10.0.2.100", "127.0.0.1"
VETH_HOST, VETH_GUEST = "10.0.3.1", "10.0.3.2"
# The port that is published under the same number inside.
PUBLISHED = 5201
# The ports of the servers on the host, and how far above them the relay has its own.
BULK, ECHO, ECHO_PORTS, RELAYED = 5301, 5401, 8, 1000
KINDS = ("host", "veth", "relay", "slirp4netns", "pasta", "tapgate")
# Those that have no MTU to choose: the loopback's is theirs.
ON_LOOPBACK = ("host", "relay")
PINNED = "pinned"
START_LIMIT = 15


class Stack:
    """A namespace with its way out; what each kind differs in is in the classes below."""

    gateway, published_at = GATEWAY, {"loopback": LOOPBACK, "address": OTHER_ADDRESS}

    def __init__(self, lab, mtu):
        self.lab, self.mtu, self.guest, self.process, self.log = lab, mtu, None, None, None
        self.folder = tempfile.mkdtemp(prefix="tapgate-report-")
        lab.runner.give(self.folder)
        try:
            self.guest = Guest(lab.runner, lab.world)
            self.ready_ms = self.begin()
        except BaseException:
            self.end()
            raise

    def begin(self):
        """Joins the stack to the namespace; gives how long it took to say that it is ready."""
        raise NotImplementedError

    def inside(self, command):
        return self.guest.enter(command)

    def port(self, number):
        """Where the inside finds a server that listens on the host at this port."""
        return number

    def processes(self):
        return tree(self.process.pid) if self.process else []

    def processor_seconds(self):
        return processor_seconds(self.processes()) if self.processes() else None

    def resident_kb(self, what="VmRSS"):
        return resident_kb(self.processes(), what) if self.processes() else None

    def end(self):
        """Ends the stack and its namespace; a second time does nothing."""
        if self.process:
            self.lab.runner.end(self.process)
        if self.log:
            self.log.close()
        if self.guest:
            self.guest.end()
        self.process = self.log = self.guest = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, command, **options):
        """Starts a program on the host; gives the process, and when it got there."""
        self.log = open(os.path.join(self.folder, "log"), "w+")
        there = ["sh", "-c", 'echo started; exec "$@" >&2', "sh", *command]
        process = self.lab.runner.start(self.lab.world.enter(there), stderr=self.log, **options)
        Lines(process, os.path.basename(command[0])).until("started", START_LIMIT)
        return process, time.monotonic()

    def start_with_ready_descriptor(self, command):
        """Starts a program that writes to a descriptor when its network works; `READY` stands for it."""
        reading, writing = os.pipe()
        command = [str(writing) if word == "READY" else word for word in command]
        with os.fdopen(reading) as ready:
            try:
                self.process, begun = self.start(command, pass_fds=[writing])
            finally:
                os.close(writing)
            # Nothing comes when it fails: its end of the pipe is closed. A start that hangs is ended.
            said = os.read(reading, 1) if select.select([ready], [], [], START_LIMIT)[0] else b""
        took = (time.monotonic() - begun) * 1000
        if not said:
            raise Failed(f"{os.path.basename(command[0])}: not ready: {self.said()}")
        return took

    def said(self):
        """The last words of a process that is about to end."""
        try:
            wait(self.process, 1)
        except Failed:
            pass
        self.log.seek(0)
        return last_line(self.log.read())


class Host(Stack):
    """No network in between: the host's own loopback."""

    gateway = LOOPBACK

    def begin(self):
        return None

    def inside(self, command):
        return self.lab.world.enter(command)


class Relay(Host):
    """The host's own loopback twice, with a process in between that copies and does nothing else."""

    def begin(self):
        first = [self.lab.programs["load"], "relay", LOOPBACK]
        ports = [word for port, count in ((BULK, 1), (ECHO, ECHO_PORTS)) for word in (port + RELAYED, port, count)]
        self.process = self.lab.runner.start(self.lab.world.enter([*first, *ports]), stdin=subprocess.PIPE)
        Lines(self.process, "load relay").until("ready")
        return None

    def port(self, number):
        return number + RELAYED


class Veth(Stack):
    """A pair of interfaces, all in the kernel."""

    gateway, published_at = VETH_HOST, {"loopback": VETH_GUEST, "address": VETH_GUEST}

    def begin(self):
        self.lab.world.script(f"""
            ip link add veth0 type veth peer name veth1 netns {self.guest.pid}
            ip address add {VETH_HOST}/24 dev veth0
            ip link set veth0 mtu {self.mtu} up""")
        self.guest.script(f"""
            ip address add {VETH_GUEST}/24 dev veth1
            ip link set veth1 mtu {self.mtu} up""")
        return None

    def end(self):
        try:
            self.lab.world.script("! ip link show veth0 >/dev/null 2>&1 || ip link del veth0")
        finally:
            super().end()


class Tapgate(Stack):
    """The program under test."""

    options, pinned = (), False

    def begin(self):
        ports = [f"--publish={address}:{PUBLISHED}:{PUBLISHED}" for address in (LOOPBACK, OTHER_ADDRESS)]
        took = self.start_with_ready_descriptor([
            self.lab.programs["tapgate"], "attach", "--mtu", str(self.mtu), *ports, *self.options,
            "--ready-fd", "READY", str(self.guest.pid), "tap0"])
        if self.pinned:
            pin_apart(self.process.pid)
        return took


class Slirp4netns(Stack):
    """slirp4netns, its ports published by its API."""

    def begin(self):
        api = os.path.join(self.folder, "api")
        took = self.start_with_ready_descriptor([
            self.lab.programs["slirp4netns"], "--configure", "--mtu", str(self.mtu), "--api-socket", api,
            "--ready-fd", "READY", str(self.guest.pid), "tap0"])
        for address in (LOOPBACK, OTHER_ADDRESS):
            ask(api, {"execute": "add_hostfwd", "arguments": {
                "proto": "tcp", "host_addr": address, "host_port": PUBLISHED, "guest_port": PUBLISHED}})
        return took


class Pasta(Stack):
    """pasta, which says that it is ready by going to the background."""

    pid = None

    def begin(self):
        said = os.path.join(self.folder, "pid")
        program = self.lab.programs["pasta"]
        # Before 2024 the gateway's address always was the host's loopback.
        to_loopback = ["--map-host-loopback", GATEWAY] if "--map-host-loopback" in self.lab.pasta_help else []
        command = [program, "--quiet", "--config-net", "--mtu", str(self.mtu), "--address", ADDRESS, "--netmask", "24",
                   "--gateway", GATEWAY, "--ns-ifname", "tap0", *to_loopback, "--tcp-ports", str(PUBLISHED),
                   "--udp-ports", "none", "--tcp-ns", "none", "--udp-ns", "none", "--pid", said, str(self.guest.pid)]
        self.process, begun = self.start(command)
        status = wait(self.process, START_LIMIT)
        took = (time.monotonic() - begun) * 1000
        if status != 0:
            raise Failed(f"pasta: status {status}: {self.said()}")
        with open(said) as file:
            self.pid = int(file.read())
        return took

    def processes(self):
        return tree(self.pid) if self.pid else []

    def end(self):
        # No child of ours: its number may be somebody else's by now, and its ports are free only when it
        # is gone from the table.
        if self.pid and name_of(self.pid).startswith(("pasta", "passt")):
            os.kill(self.pid, signal.SIGKILL)
            deadline = time.monotonic() + START_LIMIT
            while os.path.exists(f"/proc/{self.pid}") and time.monotonic() < deadline:
                time.sleep(0.002)
        self.pid = None
        super().end()


CLASSES = {"host": Host, "veth": Veth, "relay": Relay, "slirp4netns": Slirp4netns, "pasta": Pasta, "tapgate": Tapgate}


def make(lab, kind, mtu):
    """A fresh stack of a kind; `tapgate OPTIONS` is tapgate with those options, `pinned` last with each thread on a
    processor of its own."""
    name, _, options = kind.partition(" ")
    made = CLASSES[name]
    if options:
        words = [word for word in shlex.split(options) if word != PINNED]
        made = type("TapgateWithOptions", (Tapgate,), {"options": tuple(words), "pinned": is_pinned(kind)})
    return made(lab, mtu)


def is_pinned(kind):
    return kind.split()[-1] == PINNED


def pin_apart(pid):
    """Leaves each thread of a process one processor, the next one to the next."""
    processors = sorted(os.sched_getaffinity(0))
    threads = sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    for place, thread in enumerate(threads):
        os.sched_setaffinity(thread, {processors[place % len(processors)]})


def name_of(pid):
    """A process's own name, or nothing if there is none of that number."""
    try:
        with open(f"/proc/{pid}/comm") as file:
            return file.read()
    except OSError:
        return ""


def ask(path, request):
    """One request to an API socket of slirp4netns's kind; gives the answer."""
    with socket.socket(socket.AF_UNIX) as api:
        api.settimeout(START_LIMIT)
        api.connect(path)
        api.sendall(json.dumps(request).encode())
        api.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: api.recv(65536), b""))
    answer = json.loads(answer or b"{}")
    if "error" in answer:
        raise Failed(f"{request['execute']}: {answer['error']}")
    return answer
