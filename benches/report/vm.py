"""`vm`: idle connections in a virtual machine of our own, where a process may have as many descriptors as
it takes; many machines allow no more than 20,000.

In: the options of the command line. Out: a data file of one set, `crowd`, which is what `idle` finds when
`measure` runs in there, as root that steps down to an ordinary user. The machine is qemu with Debian's
kernel, and programs of this machine for its root; it has no disk and no network, and this program says
nothing to it: it runs, sends what it found over a serial line, and turns itself off. Where the processor's
own virtualisation can't be had it is emulated, which is several times slower: times in there compare with
each other only.
"""

import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time

import data
import machine
from initramfs import SYSTEM, Archive, libraries
from processes import Failed, Lines, find, last_line

SET = "crowd"
QEMU = "qemu-system-x86_64"
TOOLS = {QEMU: "qemu-system-x86", "busybox": "busybox-static", "apt-get": "apt", "apt-cache": "apt", "dpkg": "dpkg",
         "ldd": "libc-bin"}
KERNEL = "linux-image-cloud-amd64"
MODULES = ("tun", "veth")
# What `measure` itself runs, beside the programs that its options name.
USED = ("sh", "env", "cat", "ip", "unshare", "nsenter")
NEEDED, PEERS = ("tapgate", "load", "iperf3"), ("slirp4netns", "pasta")
KINDS = (*PEERS, "tapgate")
SETTINGS = {"rounds": 1, "connections": [1000, 10000, 25000, 50000], "block": 1000, "wait": 60, "open_limit": 600}
# Of Python's own library.
UNUSED = ("__pycache__", "test", "dist-packages", "site-packages", "ensurepip", "idlelib", "lib2to3", "tkinter")
MEMORY_MB, CORES = 4096, 2
# Until the first program in the machine speaks. A processor that promises virtualisation and then does
# not get there in that time is given up for emulation, which has to bear a busy machine.
BOOT_LIMITS = {"kvm": 60, "tcg": 300}
END_LIMIT = 60
# What a kind may take to start and to end.
KIND_LIMIT = 120
BEGUN, ENDED = "the machine has begun", "measure has ended with status"

# Two stages: what the kernel unpacked is copied to a root of its own; see `initramfs`.
FIRST = f"""#!/bin/busybox sh
busybox() {{ /bin/busybox "$@"; }}
busybox mkdir /new
busybox mount -t tmpfs -o mode=755 root /new
busybox cp -a {SYSTEM}/. /new/
exec /bin/busybox switch_root /new /init
"""
SECOND = f"""#!/bin/busybox sh
busybox() {{ /bin/busybox "$@"; }}
busybox mkdir -p /proc /sys /dev /tmp /root
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
busybox mount -t tmpfs -o mode=1777 tmp /tmp
for module in /modules/*.ko; do busybox insmod "$module"; done
busybox chmod 666 /dev/net/tun
busybox stty -F /dev/ttyS1 raw
echo {BEGUN}
COMMAND --data /tmp/found.json
echo {ENDED} $?
busybox cat /tmp/found.json >/dev/ttyS1
busybox poweroff -f
"""


def main(options):
    """The whole of `vm`; gives the exit status."""
    programs = {name: find(getattr(options, name)) for name in (*NEEDED, *PEERS)}
    check(programs)
    # Opening may take its limit, and so may the last echo.
    limit = options.rounds * len(options.kinds) * (2 * options.open_limit + options.wait + KIND_LIMIT)
    folder = tempfile.mkdtemp(prefix="tapgate-report-vm-")
    try:
        kernel, modules = fetch_kernel(folder)
        root = os.path.join(folder, "root")
        with open(root, "wb") as file:
            fill(Archive(file), programs, modules, words(options))
        found, accelerator = boot(folder, kernel, root, limit)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = signed(found, options, programs, accelerator)
    summarise(found)
    data.write_aside(options.data, data.encode(data.with_other_kinds(found, options.data)))
    return 0


def check(programs):
    """All that is missing, in one line."""
    missing = [f"{name} (apt-get install {package})" for name, package in TOOLS.items() if not find(name)]
    missing += [f"{name} (build or install it, or say where it is with --{name})"
                for name in NEEDED if not programs[name]]
    missing += [f"{name} in the system's folders" for name in USED if not find(name)]
    if not missing and libraries(find("busybox")):
        missing.append("a busybox without libraries (apt-get install busybox-static)")
    if os.uname().machine != "x86_64":
        missing.append("a machine of x86_64")
    if missing:
        raise Failed(f"vm needs {', '.join(missing)}")


def words(options):
    """The command line in the machine."""
    numbers = ",".join(map(str, options.connections))
    return ["env", f"PYTHONHOME={sys.base_prefix}", "python3", "/repository/benches/report", "measure", "--sets", "idle", "--rounds", str(options.rounds),
            "--connections", numbers, "--block", str(options.block), "--wait", f"{options.wait:g}",
            "--open-limit", f"{options.open_limit:g}", "--kinds", ",".join(options.kinds),
            "--tapgate", "/usr/bin/tapgate", "--load", "/usr/bin/load"]


# --- kernel and root -----------------------------------------------------------------------------

def fetch_kernel(folder):
    """Debian's kernel for virtual machines, unpacked; gives the paths of kernel and modules."""
    depends = said(["apt-cache", "depends", "--no-recommends", "--no-suggests", KERNEL])
    package = re.search(r"Depends: (linux-image-\S+)", depends)
    if not package:
        raise Failed(f"{KERNEL}: apt knows no such package: run apt-get update, or see /etc/apt/sources.list")
    said(["apt-get", "download", "-o", "APT::Sandbox::User=root", package.group(1)], cwd=folder)
    said(["dpkg", "-x", *glob.glob(os.path.join(folder, "*.deb")), os.path.join(folder, "kernel")])
    paths = {}
    for name in ("vmlinuz-*", *(f"{module}.ko" for module in MODULES)):
        found = glob.glob(os.path.join(folder, "kernel", "**", name), recursive=True)
        if not found:
            raise Failed(f"{package.group(1)}: has no {name}")
        paths[name] = found[0]
    return paths.pop("vmlinuz-*"), list(paths.values())


def said(command, **options):
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    if ended.returncode != 0:
        raise Failed(f"{' '.join(command[:2])}: {last_line(ended.stderr)}")
    return ended.stdout


def fill(archive, programs, modules, command):
    """Both stages, and all that `measure` needs in the second."""
    for stage in ("", SYSTEM):
        archive.copy(find("busybox"), f"{stage}/bin/busybox")
    archive.folder("/dev")
    archive.text("/init", FIRST, 0o755)
    archive.text(f"{SYSTEM}/init", SECOND.replace("COMMAND", shlex.join(command)), 0o755)
    archive.text(f"{SYSTEM}/etc/passwd", "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
    for module in modules:
        archive.copy(module, f"{SYSTEM}/modules/{os.path.basename(module)}")
    for name, path in programs.items():
        if path:
            archive.program(path, f"{SYSTEM}/usr/bin/{name}")
    for name in USED:
        archive.program(find(name), f"{SYSTEM}/usr/bin/{name}")
    archive.program(sys.executable, f"{SYSTEM}/usr/bin/python3")
    library = sysconfig.get_path("stdlib")
    archive.tree(library, SYSTEM + library, UNUSED)
    archive.tree(os.path.dirname(os.path.abspath(__file__)), f"{SYSTEM}/repository/benches/report", ("__pycache__",))
    archive.end()


# --- the machine ---------------------------------------------------------------------------------

def boot(folder, kernel, root, limit):
    """Runs the machine to its end; gives the data file it wrote, and what drove it."""
    for accelerator in ("kvm", "tcg"):
        if accelerator == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
            continue
        answer = os.path.join(folder, f"answer-{accelerator}")
        qemu = subprocess.Popen(command_line(accelerator, kernel, root, answer), stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            lines = Lines(qemu, QEMU)
            try:
                lines.until(BEGUN, BOOT_LIMITS[accelerator])
            except Failed as failure:
                if accelerator == "tcg":
                    raise
                tell(f"{failure}; now without /dev/kvm")
                continue
            follow(lines, limit)
            qemu.wait(END_LIMIT)
        finally:
            qemu.kill()
            qemu.communicate()
        return data.read(answer), accelerator
    raise Failed("no way to run a machine")


def command_line(accelerator, kernel, root, answer):
    processor = {"kvm": "host", "tcg": "max"}[accelerator]
    return [QEMU, "-accel", accelerator, "-cpu", processor, "-smp", str(CORES), "-m", str(MEMORY_MB),
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-kernel", kernel, "-initrd", root,
            "-append", "console=ttyS0 quiet panic=-1", "-serial", "stdio", "-serial", f"file:{answer}"]


def follow(lines, limit):
    """Passes on what the machine says until it has measured."""
    deadline = time.monotonic() + limit
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise Failed(f"the machine: no end after {limit:.0f} s")
        line = lines.next(left).strip()
        if line.startswith(ENDED):
            break
        tell(line)
    if line.split()[-1] != "0":
        raise Failed("measure failed in the machine; its last words are above")


def signed(found, options, programs, accelerator):
    """The data file, with what only this side knows of the run."""
    [run] = found["runs"]
    run["settings"] = {name: run["settings"][name] for name in SETTINGS}
    version = re.search(r"version (\S+)", machine.said_by(find(QEMU), "--version"))
    drives = {"kvm": "run by KVM", "tcg": "emulated in software"}[accelerator]
    run["machine"]["processor"] = (
        f"virtual machine {drives}, qemu {version.group(1) if version else ''}, on {machine.processor()}")
    run.update(command=options.command, commit=machine.commit(), versions=machine.versions(programs), sets=[SET])
    return {**found, "records": [{**record, "set": SET} for record in found["records"]]}


def summarise(found):
    """What came of each kind, a line for each round."""
    settings, block = found["runs"][0]["settings"], found["runs"][0]["settings"]["block"]
    for place in dict.fromkeys((record["round"], record["kind"]) for record in found["records"]):
        own = [record for record in found["records"] if (record["round"], record["kind"]) == place]
        rates = [record["opened_per_s"] for record in own if "opened_per_s" in record]
        for record in own:
            if "error" in record or "note" in record:
                print(f"{place[1]}: {record.get('error') or record['note']}")
            if "alive" in record:
                each = f", {record['kb_per_connection'] * 1000:.0f} bytes each" if record.get("kb_per_connection") else ""
                print(f"{place[1]}: {record['opened']} connections opened{each}; "
                      f"{record['alive']} echo again after {settings['wait']:g} s")
        if rates:
            print(f"{place[1]}: the first {block} took {block / rates[0]:.2f} s, the last {block / rates[-1]:.2f} s")


def tell(text):
    print(text, file=sys.stderr, flush=True)
