"""What the figures were taken on: machine, kernel, versions. Reads only; a fact that is not to be had is
None, never a guess."""

import datetime
import hashlib
import os
import platform
import re
import shutil
import subprocess

REPOSITORY = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))


def facts(programs, world):
    """Everything that a reader needs to judge the figures."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "kernel": platform.release(), "architecture": platform.machine(), "cores": os.cpu_count(),
            "processor": processor(), "memory_mb": memory_mb(), "congestion_control": world.congestion_control(),
        },
        "versions": versions(programs),
        "commit": commit(),
        "binary_sha256": digest(programs["tapgate"]),
    }


def versions(programs):
    return {
        "tapgate": said_by(programs["tapgate"], "--version").split("\n")[0] or None,
        "iperf3": said_by(programs["iperf3"], "--version").split("\n")[0] or None,
        "slirp4netns": slirp4netns(said_by(programs["slirp4netns"], "--version")),
        "pasta": pasta(programs["pasta"]),
    }


def said_by(program, argument):
    """What a program says to one argument, or nothing."""
    if not program:
        return ""
    try:
        ended = subprocess.run([program, argument], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                               timeout=20, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout + ended.stderr


def slirp4netns(said):
    found = re.search(r"^slirp4netns version (\S+)", said), re.search(r"libslirp: (\S+)", said)
    return f"{found[0].group(1)} (libslirp {found[1].group(1)})" if all(found) else None


def pasta(program):
    """pasta's own word, or the distribution's where it does not know."""
    said = said_by(program, "--version").split("\n")[0].replace("pasta ", "")
    if "unknown" in said and shutil.which("dpkg-query"):
        package = subprocess.run(["dpkg-query", "-W", "-f", "${Version}", "passt"], capture_output=True, text=True)
        said = f"Debian's passt {package.stdout}" if package.returncode == 0 else said
    return said or None


def commit():
    """The commit of the tree that this program lies in, with a mark when sources were changed."""
    git = ["git", "-c", "safe.directory=*", "-C", REPOSITORY]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=20)
        changed = subprocess.run([*git, "status", "--porcelain", "--", "src", "Cargo.lock"],
                                 capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def digest(program):
    if not program:
        return None
    with open(program, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()[:16]


def processor():
    found = re.search(r"^model name\s*:\s*(.+)$", read("/proc/cpuinfo"), re.MULTILINE)
    return found.group(1).strip() if found else None


def memory_mb():
    found = re.search(r"^MemTotal:\s+(\d+) kB", read("/proc/meminfo"), re.MULTILINE)
    return int(found.group(1)) // 1024 if found else None


def read(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
