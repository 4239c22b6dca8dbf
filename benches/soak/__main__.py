"""The soak: a release build carries everything at once for as long as asked, and must not change by it.

    cargo build --release --bins --examples
    python3 benches/soak --minutes 20          iperf3 both ways, 100 new connections and 100 queries a second, UDP from
                                               new ports, ports published and taken back; doc/soak.json, doc/soak.svg
    python3 benches/soak --judge doc/soak.json judges and draws what was taken before

Memory and descriptors of all processes, the sizes of tables and queues that the program tells in its log, and the latency of
a TCP round trip under that load, are sampled. It fails on any error, where one of the sizes climbs, and where latency at the end is worse than at the start (verdict.py
says what counts as noise). Needs Python 3.9 and iperf3; as root it steps down as benches/report does, whose parts it
uses. Descriptors can be counted by root alone: the sandbox hides the process from everybody else.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import time

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(os.path.dirname(HERE), "report")]

import machine  # noqa: E402: benches/report has it
from data import rounded, write_aside  # noqa: E402
from measure import Lab, say  # noqa: E402
from measures import BULK, ECHO, ECHO_PORTS, echo_server, load  # noqa: E402
from picture import draw  # noqa: E402
from processes import Failed, Lines, find, last_line  # noqa: E402
from stacks import LOOPBACK, Tapgate, ask  # noqa: E402
from verdict import judge  # noqa: E402

DATA = os.path.join(machine.REPOSITORY, "doc", "soak.json")
BUILT = os.path.join(machine.REPOSITORY, "target", "release")
RESOLVER_PORT, FORWARD_PORTS = 5353, 7000
# As many forwards are there at once, and as many are exchanged at each sample.
FORWARDS = 20
# What iperf3 sends each way: enough to keep everything moving, little enough to leave processors for the rest.
BITRATE = "500M"


class Soaked(Tapgate):
    """tapgate with an API socket and a resolver of our own."""

    @property
    def options(self):
        return ("--api-socket", self.api, "--dns", f"{LOOPBACK}:{RESOLVER_PORT}", "-vv", "--log-format", "json")

    @property
    def api(self):
        return os.path.join(self.folder, "api")


def main():
    options = parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.judge:
        with open(options.judge) as file:
            return told(json.load(file), options.judge)
    programs = {name: find(getattr(options, name)) for name in ("tapgate", "load", "iperf3")}
    for name, program in programs.items():
        if not program:
            raise Failed(f"{name}: no such program; build or install it, or say where it is with --{name}")
    seconds = options.minutes * 60
    every = options.every or min(10, seconds / 6)
    lab = Lab(dict(programs), {"seconds": every})
    try:
        lab.open()
        facts = machine.facts({**programs, "slirp4netns": None, "pasta": None}, lab.world)
        taken = {"command": f"python3 benches/soak --minutes {options.minutes:g}", **facts, **soak(lab, seconds)}
    finally:
        lab.close()
    stored = encode(taken)
    write_aside(options.data, stored)
    # The picture is what the stored figures make, which are rounded.
    return told(json.loads(stored), options.data)


def told(taken, path):
    """Draws, and says what is wrong."""
    picture = os.path.splitext(path)[0] + ".svg"
    write_aside(picture, draw(taken))
    wrong = judge(taken)
    for line in wrong:
        say(f"soak: {line}")
    counts = ", ".join(f"{count} {name}" for name, count in taken["counts"].items())
    say(f"{path} and {picture}: {len(taken['samples'])} samples; {counts}; {'failed' if wrong else 'nothing changed'}")
    return 1 if wrong else 0


def soak(lab, seconds):
    """Runs everything at once and samples; gives the samples, what was done, and every error."""
    errors, samples = [], []
    with contextlib.ExitStack() as ends:
        stack = Soaked(lab, 1500)
        ends.callback(stack.end)
        ends.enter_context(echo_server(lab))
        resolver = start(lab, ends, lab.world.enter, "resolver.py", RESOLVER_PORT)
        clients = start(lab, ends, stack.inside, "clients.py", stack.gateway, ECHO, ECHO_PORTS)
        bulk = start_bulk(lab, ends, stack, seconds)
        said, forwards, begun = Lines(clients, "clients.py"), Forwards(stack.api), time.monotonic()
        while (elapsed := time.monotonic() - begun) < seconds:
            try:
                errors += forwards.exchange()
                latency = load(lab, stack, "rr", lab.settings["seconds"])
                sample = {"s": round(elapsed + lab.settings["seconds"], 1), **sizes(stack),
                          "p50_us": latency["p50_us"], "p99_us": latency["p99_us"], "round_trips_per_s": latency["per_s"]}
                samples.append(sample)
                say(" ".join(f"{name}={value:.5g}" for name, value in sample.items()))
            except Failed as failure:
                errors.append(f"{elapsed:.0f} s: {failure}")
                if len(errors) > 20:
                    break
            if any(process.poll() is not None for process in (clients, resolver, stack.process)):
                errors.append(f"{elapsed:.0f} s: a process has ended: {last_line(stack.said())}")
                break
        counts = last_count(clients, said)
        errors += counts.pop("errors")
        counts["forwards"] = forwards.exchanged
        for direction, client in bulk.items():
            counts[f"bytes_{direction}"] = ended_bulk(client, direction, errors)
        errors += forwards.remove_all()
        final = {"at_rest": sizes(stack)}
    return {"samples": samples, "counts": counts, "errors": errors, **final}


def start(lab, ends, enter, program, *arguments):
    """Starts one of the programs beside this file, on the host or inside."""
    command = enter(["/usr/bin/python3", "-I", lab.stage(os.path.join(HERE, program)), *map(str, arguments)])
    process = lab.runner.start(command)
    ends.callback(lab.runner.end, process)
    if "ready" not in process.stdout.readline():
        raise Failed(f"{program}: {last_line(process.stderr.read())}")
    return process


def start_bulk(lab, ends, stack, seconds):
    """One iperf3 to the host and one from it for the whole time; its --bidir may mix up which of its two connections is
    which (esnet/iperf #2029). Gives both clients by direction. Nobody reads what the servers say: a line a second would
    fill a pipe in a quarter of an hour, and then they stand still."""
    clients = {}
    for number, (direction, flags) in enumerate((("up", ()), ("down", ("--reverse",)))):
        port = BULK + number
        server = lab.runner.start(lab.world.enter(
            [lab.programs["iperf3"], "--server", "--one-off", "--forceflush", "--interval", 0, "--port", port]))
        ends.callback(lab.runner.end, server)
        Lines(server, "iperf3 --server").until("Server listening")
        clients[direction] = lab.runner.start(stack.inside(
            [lab.programs["iperf3"], "--client", stack.gateway, "--port", port, *flags, "--bitrate", BITRATE,
             "--time", round(seconds) + 5, "--interval", min(10, max(1, round(seconds / 6))), "--json"]))
        ends.callback(lab.runner.end, clients[direction])
    return clients


def ended_bulk(client, direction, errors):
    """The bytes that an iperf3 has carried; that it could not, or that they stood still, is an error."""
    said, complaint = client.communicate(timeout=60)
    result = json.loads(said) if said else {}
    if client.returncode != 0 or "error" in result:
        errors.append(f"iperf3 {direction}: {result.get('error') or last_line(complaint)}")
    sums = [interval["sum"] for interval in result.get("intervals", [])]
    # The last may be a moment only.
    errors += [f"iperf3 {direction}: stood still from {one['start']:.0f} to {one['end']:.0f} s"
               for one in sums[:-1] if not one["bytes"]]
    return sum(one["bytes"] for one in sums)


def told_sizes(stack):
    """What the program has told last of its tables and queues, those of all its workers together."""
    told = {}
    with open(os.path.join(stack.folder, "log")) as file:
        for line in file:
            if '"sizes"' in line:
                fields = json.loads(line)["fields"]
                told[fields["worker"]] = {"flows": fields["flows"], "ready": fields["ready"],
                                          "engines": fields["engines"], "buffers_kb": fields["buffers"] / 1000}
    return {name: sum(one[name] for one in told.values()) for name in next(iter(told.values()), {})}


def sizes(stack):
    """Memory of all processes, what it is for, and their descriptors where those may be seen."""
    found = {"resident_kb": stack.resident_kb(), **told_sizes(stack)}
    pids, descriptors = stack.processes(), 0
    for pid in pids:
        try:
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
        except PermissionError:
            return found
    return {**found, "descriptors": descriptors}


def last_count(clients, said):
    """Has the clients end; gives what they did."""
    clients.send_signal(signal.SIGTERM)
    return json.loads(said.next(30))


class Forwards:
    """Ports that are published and taken back by the API."""

    def __init__(self, api):
        self.api, self.ids, self.exchanged, self.next = api, [], 0, 0
        self.before = self.listed()

    def listed(self):
        return {entry["id"] for entry in ask(self.api, {"execute": "list_hostfwd"})["entries"]}

    def exchange(self):
        """Publishes some, takes the oldest back, and looks whether the list says so; gives what is wrong."""
        try:
            for _ in range(FORWARDS):
                self.next += 1
                added = ask(self.api, {"execute": "add_hostfwd", "arguments": {
                    "proto": ("tcp", "udp")[self.next % 2], "host_addr": LOOPBACK,
                    "host_port": FORWARD_PORTS + self.next % (4 * FORWARDS), "guest_port": 80}})
                self.ids.append(added["return"]["id"])
            while len(self.ids) > FORWARDS:
                ask(self.api, {"execute": "remove_hostfwd", "arguments": {"id": self.ids.pop(0)}})
                self.exchanged += 1
            listed = self.listed() - self.before
            return [] if listed == set(self.ids) else [f"API: {sorted(listed)} are listed, {self.ids} are there"]
        except (Failed, OSError, ValueError, KeyError) as failure:
            return [f"API: {type(failure).__name__}: {failure}"]

    def remove_all(self):
        try:
            for number in self.ids:
                ask(self.api, {"execute": "remove_hostfwd", "arguments": {"id": number}})
            return []
        except (Failed, OSError, ValueError) as failure:
            return [f"API: {failure}"]


def encode(taken):
    """JSON with one sample a line, so that a diff shows what changed."""
    head = {name: value for name, value in taken.items() if name != "samples"}
    lines = ",\n".join(json.dumps(rounded(sample)) for sample in taken["samples"])
    return json.dumps(head, indent=1)[:-2] + f',\n "samples": [\n{lines}\n]}}\n'


def parser():
    top = argparse.ArgumentParser(prog="python3 benches/soak", description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--minutes", type=float, default=20)
    top.add_argument("--every", type=float, metavar="SECONDS", help="length of a sample (10, or a sixth of the whole)")
    top.add_argument("--judge", metavar="FILE", help="take nothing: judge and draw this")
    top.add_argument("--data", default=DATA, metavar="FILE", help="where to store (doc/soak.json); the plot lies beside")
    top.add_argument("--tapgate", default=os.path.join(BUILT, "tapgate"), metavar="PROGRAM")
    top.add_argument("--load", default=os.path.join(BUILT, "examples", "load"), metavar="PROGRAM")
    top.add_argument("--iperf3", default="iperf3", metavar="PROGRAM")
    return top


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Failed, OSError, ValueError) as failure:
        print(f"soak: {failure}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
