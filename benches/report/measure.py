"""`measure`: takes the figures and stores each as soon as it is there.

In: the options of the command line. Out: a data file, written anew after every record. Rounds are
interleaved: at each point every kind has its turn before the next point, and every point before the
next round, so that noise on the machine hits all alike. What fails is a record as well, with the
reason, and ends nothing else.
"""

import os
import shutil
import stat
import sys
import tempfile
import time

import data
import machine
from measures import KEYS, SETS, USUAL_MTU
from processes import Failed, Runner, find
from stacks import ON_LOOPBACK, is_pinned, make
from world import World

LOOPBACK_MTU = 65536
# What a stack, a server or a client has open beside its connections.
SPARE_DESCRIPTORS = 200

FULL = {
    "seconds": 4, "flood_seconds": 8, "rounds": 3, "mtus": [576, 1280, 1500, 4000, 9000, 16000, 65520], "streams": [1, 2, 4, 16, 64],
    "stream_mtus": [1500, 65520], "sizes": [64, 512, 1400], "connections": [100, 1000, 10000, 50000], "block": 1000,
    "wait": 60, "open_limit": 120, "starts": 11,
}
QUICK = {
    **FULL, "seconds": 1, "flood_seconds": 1, "rounds": 1, "mtus": [1280, 1500, 9000, 65520], "streams": [1, 4, 16],
    "stream_mtus": [1500], "connections": [100, 1000, 5000], "block": 500, "wait": 2, "open_limit": 20, "starts": 3,
}
# What a kind can't be run without.
NEEDS = {"slirp4netns": "slirp4netns", "pasta": "pasta", "tapgate": "tapgate"}


class Lab:
    """What every measurement uses."""

    def __init__(self, programs, settings):
        self.programs, self.settings = programs, settings
        self.runner = Runner()
        self.folder = tempfile.mkdtemp(prefix="tapgate-report-")
        os.chmod(self.folder, 0o755)
        self.world, self.pasta_help = None, ""

    def hold_to_descriptors(self, skipped):
        """A connection is a descriptor in every process: more than allowed are not tried."""
        most = (self.runner.descriptors - SPARE_DESCRIPTORS) // 1000 * 1000
        wanted = self.settings["connections"]
        able = [number for number in wanted if number <= most]
        if able != wanted:
            self.settings["connections"] = sorted({*able, most})
            skipped[f"idle, {wanted[-1]} connections"] = (
                f"{most} at most: a process may have {self.runner.descriptors} descriptors here")

    def open(self):
        for name in ("tapgate", "load"):
            if self.programs.get(name):
                self.programs[name] = self.stage(self.programs[name])
        if self.programs.get("pasta"):
            self.pasta_help = machine.said_by(self.programs["pasta"], "--help")
        self.world = World(self.runner)

    def stage(self, program):
        """Copies a program to where the unprivileged user may run it."""
        staged = os.path.join(self.folder, os.path.basename(program))
        shutil.copyfile(program, staged)
        os.chmod(staged, stat.S_IRWXU | stat.S_IRGRP | stat.S_IXGRP | stat.S_IROTH | stat.S_IXOTH)
        return staged

    def close(self):
        self.runner.end_all()
        shutil.rmtree(self.folder, ignore_errors=True)


def main(options):
    """The whole of `measure`; gives the exit status."""
    settings = {**(FULL if options.full else QUICK), **options.given}
    programs = {name: find(getattr(options, name)) for name in ("tapgate", "load", "iperf3", "slirp4netns", "pasta")}
    for name, option in (("load", "--load"), ("iperf3", "--iperf3")):
        if not programs[name]:
            raise Failed(f"{name}: no such program; build or install it, or say where it is with {option}")
    kinds, skipped = runnable(options.kinds, programs)
    if not kinds:
        raise Failed(f"--kinds: none of them can be run here: {skipped}")
    lab = Lab(dict(programs), settings)
    try:
        lab.open()
        lab.hold_to_descriptors(skipped)
        run = {"command": options.command, "settings": settings, "kinds": kinds, "skipped": skipped,
               **machine.facts(programs, lab.world)}
        kinds = without_unmeasurable(lab, kinds, skipped)
        take_all(lab, data.Store(options.data, run), kinds, options.sets)
    finally:
        lab.close()
    return 0


def runnable(wanted, programs):
    """The kinds whose programs are there, and the others with the reason."""
    kinds, skipped = [], {}
    for kind in wanted:
        needed = NEEDS.get(kind.partition(" ")[0])
        if needed and not programs[needed]:
            skipped[kind] = "no such program"
            say(f"skipped: {kind}: no such program")
        else:
            kinds.append(kind)
    return kinds, skipped


def without_unmeasurable(lab, kinds, skipped):
    """Leaves out what this machine can't do at all, such as a veth pair on a kernel without."""
    able = []
    for kind in kinds:
        try:
            make(lab, kind, USUAL_MTU).end()
            able.append(kind)
        except Failed as failure:
            skipped[kind] = str(failure)
            say(f"skipped: {kind}: {failure}")
    return able


def take_all(lab, store, kinds, sets):
    begun = time.monotonic()
    for number in range(1, lab.settings["rounds"] + 1):
        for name in sets:
            for point in SETS[name].points(lab.settings):
                for kind in kinds:
                    if is_measured(lab.settings, SETS[name], point, kind):
                        take(lab, store, {"round": number, "set": name, "kind": kind}, point)
        store.end_of_round(sets)
        say(f"round {number} of {lab.settings['rounds']}: {time.monotonic() - begun:.0f} s")


def is_measured(settings, of_set, point, kind):
    """The loopback has one MTU: what is on it is measured once for all of them; what is pinned, in one set only."""
    first = of_set.points(settings)[0]["mtu"]
    wanted = kind not in of_set.without and (of_set.pinned or not is_pinned(kind))
    return wanted and (kind not in ON_LOOPBACK or point["mtu"] == first)


def take(lab, store, where, point):
    """Measures one kind at one point."""
    point = {**point, "mtu": LOOPBACK_MTU} if where["kind"] in ON_LOOPBACK else point
    try:
        stack = make(lab, where["kind"], point["mtu"])
        stack.kind = where["kind"]
        try:
            for found in SETS[where["set"]].take(lab, stack, point):
                record = {**where, **point, **found}
                store.add(record)
                say(in_words(record))
        finally:
            stack.end()
    except (Failed, OSError, ValueError, KeyError) as failure:
        record = {**where, **point, "error": f"{type(failure).__name__}: {failure}"[:300]}
        store.add(record)
        say(in_words(record))


def in_words(record):
    where = " ".join(f"{key}={record[key]}" for key in KEYS if key in record)
    found = {name: value for name, value in record.items() if name not in (*KEYS, "round", "set", "kind")}
    shown = " ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
                     for name, value in found.items())
    return f"{record['round']} {record['set']} {record['kind']} {where}: {shown}"


def say(text):
    print(text, file=sys.stderr, flush=True)
