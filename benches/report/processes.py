"""Processes of the report: started as an unprivileged user, watched, ended.

In: command lines. Out: what they say, the processor time and memory of a tree of processes. Everything
that is started here is ended by `end_all`, and nothing else is.
"""

import fcntl
import os
import pwd
import re
import resource
import select
import signal
import subprocess
import time

# The caller's own PATH may lead to places that the unprivileged user can't read.
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# The users that root steps down to, as the tests do; then a number that is nobody's anywhere.
USERS = ("tapgate-test", "nobody")
# Descriptors for 50,000 connections, where root may allow so many.
DESCRIPTORS = 262_144


class Failed(Exception):
    """A program did not do what it was started for; the text says which and what it said."""


def find(name):
    """The path of a program, by name in the system's folders or as it is; None if there is none."""
    folders = [""] if "/" in name else SYSTEM_PATH.split(":")
    for folder in folders:
        path = os.path.abspath(os.path.join(folder, name))
        if os.access(path, os.X_OK):
            return path
    return None


class Runner:
    """Starts programs as one user."""

    def __init__(self):
        self.started = []
        self.identity = {}
        if os.geteuid() == 0:
            self.identity = unprivileged()
        self.descriptors = raise_descriptors()
        self.environment = {"PATH": SYSTEM_PATH, "HOME": "/", "LC_ALL": "C", "TERM": "dumb"}

    def start(self, command, **options):
        """Starts a program with pipes for its output and, if asked for, its input."""
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        command = [str(word) for word in command]
        process = subprocess.Popen(command, start_new_session=True, text=True, bufsize=1,
                                   env=self.environment, **self.identity, **options)
        self.started.append(process)
        return process

    def run(self, command, limit=20):
        """Runs a program to its end; gives what it said on standard output."""
        process = self.start(command)
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            raise Failed(f"{words(command)}: no end after {limit:.0f} s") from None
        finally:
            self.end(process)
        if process.returncode != 0:
            raise Failed(f"{words(command)}: status {process.returncode}: {last_line(err) or last_line(out)}")
        return out

    def end(self, process):
        """Ends a process and what it started in its session; closes its pipes."""
        # Once it was waited for, its number may be somebody else's.
        if process.returncode is None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass
        if process in self.started:
            self.started.remove(process)

    def end_all(self):
        """Ends everything that is left, youngest first."""
        for process in reversed(list(self.started)):
            self.end(process)

    def give(self, path):
        """Makes a file or folder the unprivileged user's."""
        if self.identity:
            os.chown(path, self.identity["user"], self.identity["group"])


def raise_descriptors():
    """Raises the number of open files that children may have as far as it goes; gives it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for limit in (max(DESCRIPTORS, hard), hard):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            return limit
        except (ValueError, OSError):
            # Only an administrator with CAP_SYS_RESOURCE may go above the hard limit.
            continue
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def unprivileged():
    for name in USERS:
        try:
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
        except KeyError:
            continue
    return {"user": 61234, "group": 61234, "extra_groups": []}


def words(command):
    """A command line, short enough for a message."""
    text = " ".join(os.path.basename(str(word)) if "/" in str(word) else str(word) for word in command)
    return text if len(text) < 160 else "..." + text[-157:]


def last_line(text):
    lines = [line for line in (text or "").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "nothing said"


def wait(process, limit):
    """The status of a process that ends within a limit, noticed at once; `Popen.wait` looks at times."""
    descriptor = os.pidfd_open(process.pid)
    try:
        if not select.select([descriptor], [], [], limit)[0]:
            raise Failed(f"{words(process.args)}: no end after {limit:.0f} s")
    finally:
        os.close(descriptor)
    return process.wait()


class Lines:
    """Lines of a process's output, each within a limit."""

    def __init__(self, process, what):
        self.process, self.what, self.pending = process, what, b""
        self.descriptor = process.stdout.fileno()
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags | os.O_NONBLOCK)

    def next(self, limit=20):
        """The next line."""
        deadline = time.monotonic() + limit
        while b"\n" not in self.pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.descriptor], [], [], left)[0]:
                raise Failed(f"{self.what}: said nothing for {limit:.0f} s")
            some = os.read(self.descriptor, 65536)
            if not some:
                said = self.process.stderr.read() if self.process.stderr else ""
                raise Failed(f"{self.what}: ended: {last_line(said)}")
            self.pending += some
        line, self.pending = self.pending.split(b"\n", 1)
        return line.decode(errors="replace")

    def until(self, text, limit=20):
        """Skips lines up to the one that contains a text."""
        deadline = time.monotonic() + limit
        while True:
            line = self.next(max(0.01, deadline - time.monotonic()))
            if text in line:
                return line


def tree(pid):
    """A process and all that it started, as far as they live."""
    found, waiting = [], [pid]
    while waiting:
        one = waiting.pop()
        found.append(one)
        try:
            for task in os.listdir(f"/proc/{one}/task"):
                with open(f"/proc/{one}/task/{task}/children") as file:
                    waiting += [int(child) for child in file.read().split()]
        except OSError:
            continue
    return found


def processor_seconds(pids):
    """Time on a processor so far, of every thread that lives, to the nanosecond."""
    total = 0
    for pid in pids:
        try:
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/schedstat") as file:
                    total += int(file.read().split()[0])
        except OSError:
            continue
    return total / 1e9


def resident_kb(pids, what="VmRSS"):
    """Resident memory in kB of 1,000 bytes, a page that two processes share counted twice.

    With `RssAnon` without what is of a file, such as a program's own text.
    """
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/status") as file:
                found = re.search(what + r":\s+(\d+)", file.read())
                total += int(found.group(1)) if found else 0
        except OSError:
            continue
    return total * 1.024
