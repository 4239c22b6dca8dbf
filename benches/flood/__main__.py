"""A guest floods its network while it, and a published port, carry iperf3: how much of their rate do they keep?

    cargo build --release --bins
    python3 benches/flood                      every kind of flood, in a minute and a half
    python3 benches/flood --kinds syn,rst      some of them

Of each kind both flows are measured alone and then in the flood, which comes as fast as the guest can send. A flow
that ends, and more memory than the quotas allow, are failures; what is kept of the rate is printed, and with
`--least RATIO` less of it is a failure, too. Needs Python 3.9 and iperf3; as root it steps down as benches/report
does, whose parts it uses.
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
sys.path[:0] = [os.path.join(os.path.dirname(HERE), "report")]

from machine import REPOSITORY  # noqa: E402: benches/report has it
from measure import Lab, say  # noqa: E402
from measures import BULK  # noqa: E402
from processes import Failed, find  # noqa: E402
from stacks import OTHER_ADDRESS, PUBLISHED, make  # noqa: E402

KINDS = ("syn", "udp", "fragments", "arp", "rst", "all")
MTU = 1500
# The flow that a flood of RST is aimed at.
CLIENT_PORT = 40_000
# What the quotas allow together, megabytes: buffers, 65,536 flows of 2 kB, reassembly, the program itself.
QUOTAS = 256 + 128 + 4 + 32


def main():
    options = parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    programs = {name: find(getattr(options, name)) for name in ("tapgate", "iperf3")}
    for name, program in programs.items():
        if not program:
            raise Failed(f"{name}: no such program; build or install it, or say where it is with --{name}")
    lab = Lab(programs, {"seconds": options.seconds})
    failures = []
    try:
        lab.open()
        flooder = lab.stage(os.path.join(HERE, "flooder.py"))
        for kind in options.kinds:
            failures += flood(lab, flooder, kind, options.least)
    finally:
        lab.close()
    for failure in failures:
        say(f"flood: {failure}")
    return 1 if failures else 0


def flood(lab, flooder, kind, least):
    """Both flows alone, then in the flood; prints what they keep, gives what went wrong."""
    stack = make(lab, "tapgate", MTU)
    try:
        alone, _ = carry(lab, stack)
        command = stack.inside(["/usr/bin/python3", "-I", flooder, kind, str(CLIENT_PORT)])
        sender = lab.runner.start(command)
        try:
            before = queue(stack)
            flooded, peak = carry(lab, stack)
            after = queue(stack)
            if sender.poll() is not None:
                raise Failed(f"the flood ended by itself: {sender.stderr.read()}")
        finally:
            sender.send_signal(signal.SIGTERM)
            sent = sender.communicate(timeout=10)[0]
            lab.runner.end(sender)
        taken, lost = (there - earlier for there, earlier in zip(after, before))
        rate = f"{float(sent) / 1000:.0f} frames/ms, of which the tap lost {lost / (taken + lost):.0%}"
        say(shown(kind, alone, flooded, rate, f"{peak:.0f} MB"))
        wrong = [f"{kind}: {peak:.0f} MB are more than the quotas' {QUOTAS}"] if peak > QUOTAS else []
        for name, rate in flooded.items():
            if least and rate < least * alone[name]:
                wrong.append(f"{kind}: {name} keeps {rate / alone[name]:.2f} of its rate, {least:g} are wanted")
        return wrong
    except Failed as failure:
        return [f"{kind}: {failure}"]
    finally:
        stack.end()


def queue(stack):
    """What the tap has taken from the guest and handed on, and what it had no room for."""
    link = json.loads(stack.guest.script("ip -s -j link show dev tap0")[0])[0]
    return link["stats64"]["tx"]["packets"], link["stats64"]["tx"]["dropped"]


def shown(kind, alone, flooded, *rest):
    kept = [f"{name} {alone[name]:.2f} alone, {rate:.2f} Gbit/s in it ({rate / alone[name]:.2f})"
            for name, rate in flooded.items()]
    return "; ".join([f"{kind}: {kept[0]}", *kept[1:], *rest])


def carry(lab, stack):
    """A flow of the guest's and one to its published port at once; gives their rates, and the most memory."""
    with contextlib.ExitStack() as ends:
        def iperf3(enter, *arguments):
            command = enter([lab.programs["iperf3"], *map(str, arguments)])
            process = lab.runner.start(command)
            ends.callback(lab.runner.end, process)
            return process
        servers = [iperf3(enter, "--server", "--one-off", "--forceflush", "--port", port)
                   for enter, port in ((lab.world.enter, BULK), (stack.inside, PUBLISHED))]
        for server in servers:
            while "Server listening" not in (line := server.stdout.readline()):
                if not line:
                    raise Failed("iperf3 --server does not listen")
        length = ["--time", max(1, round(lab.settings["seconds"])), "--json"]
        clients = {
            "own flow": iperf3(stack.inside, "--client", stack.gateway, "--port", BULK, "--cport", CLIENT_PORT, *length),
            "published": iperf3(lab.world.enter, "--client", OTHER_ADDRESS, "--port", PUBLISHED, *length),
        }
        peak = 0
        deadline = time.monotonic() + lab.settings["seconds"] + 30
        while any(client.poll() is None for client in clients.values()):
            peak = max(peak, stack.resident_kb() / 1000)
            if time.monotonic() > deadline:
                raise Failed("iperf3 does not come to its end")
            time.sleep(0.1)
        return {name: carried(name, client) for name, client in clients.items()}, peak


def carried(name, client):
    """What an iperf3 client carried, Gbit/s; a connection that was reset is a failure."""
    said = client.stdout.read()
    result = json.loads(said) if said else {}
    if client.returncode != 0 or "error" in result:
        raise Failed(f"{name}: {result.get('error', client.stderr.read())}")
    return result["end"]["sum_received"]["bits_per_second"] / 1e9


def parser():
    def kinds(text):
        found = text.split(",")
        for name in found:
            if name not in KINDS:
                raise argparse.ArgumentTypeError(f"no flood {name!r}; there are {', '.join(KINDS)}")
        return found
    top = argparse.ArgumentParser(prog="python3 benches/flood", description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--kinds", type=kinds, default=KINDS, metavar="KIND,...", help=f"of {','.join(KINDS)}")
    top.add_argument("--seconds", type=float, default=4, help="length of each measurement")
    top.add_argument("--least", type=float, metavar="RATIO", help="fail where a flow keeps less of its rate")
    top.add_argument("--tapgate", default=os.path.join(REPOSITORY, "target", "release", "tapgate"), metavar="PROGRAM")
    top.add_argument("--iperf3", default="iperf3", metavar="PROGRAM")
    return top


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Failed, OSError, ValueError) as failure:
        print(f"flood: {failure}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
