"""The performance report: measures networks for namespaces side by side, draws, compares.

    cargo build --release --bins --examples
    python3 benches/report measure --quick     takes the figures, in minutes (--full: an hour)
    python3 benches/report draw                makes plots and tables of doc/performance.md from them
    python3 benches/report check OLD NEW       do two data files tell the same ratios, within 20 %?
    python3 benches/report vm                  idle connections, more than a process may have here, in a virtual
                                               machine (needs qemu-system-x86, busybox-static and Debian's packages)

Needs Python 3.9 and iperf3; kinds whose program is missing are left out, and said. As root it steps down
to the user tapgate-test (or nobody) for all that it starts, which allows enough descriptors for 50,000
connections; nothing that it measures needs root.
"""

import argparse
import os
import shlex
import signal
import sys

sys.dont_write_bytecode = True

import check  # noqa: E402: nothing is to be written beside the sources
import document  # noqa: E402
import measure  # noqa: E402
import vm  # noqa: E402
from machine import REPOSITORY  # noqa: E402
from measures import SETS  # noqa: E402
from processes import Failed  # noqa: E402
from stacks import KINDS  # noqa: E402

DATA = os.path.join(REPOSITORY, "doc", "performance", "measured.json")
CROWD = os.path.join(REPOSITORY, "doc", "performance", "vm.json")
DOCUMENT = os.path.join(REPOSITORY, "doc", "performance.md")
BUILT = os.path.join(REPOSITORY, "target", "release")


def numbers(text):
    found = [int(number) for number in text.split(",")]
    if not found or min(found) < 1 or found != sorted(set(found)):
        raise argparse.ArgumentTypeError(f"{text!r}: numbers from 1, growing, with commas between")
    return found


def above_zero(text):
    if float(text) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: more than 0 is needed")
    return float(text)


def one_of(known, what):
    def chosen(text):
        found = text.split(",")
        for name in found:
            if name.partition(" ")[0] not in known or (" " in name and not name.startswith("tapgate ")):
                raise argparse.ArgumentTypeError(f"no {what} {name!r}; there are {', '.join(known)}")
        return found
    return chosen


# Each stands for the setting of the same name; the lists of numbers are what is measured at.
LISTS = {"mtus": "MTUs of the set mtu", "streams": "numbers of streams", "stream_mtus": "MTUs of streams and publish",
         "sizes": "bytes in a datagram", "connections": "numbers of idle connections"}
NUMBERS = {"seconds": "length of each measurement", "flood_seconds": "the same of datagrams, under which some collapse",  "wait": "seconds that idle connections are left alone",
           "open_limit": "seconds that opening them may take"}
COUNTS = {"rounds": "rounds", "block": "idle connections whose rate is taken together",
          "starts": "starts of each kind"}


KNOWN = {**{name: (numbers, "N,...", what) for name, what in LISTS.items()},
         **{name: (above_zero, "SECONDS", what) for name, what in NUMBERS.items()},
         **{name: (int, "N", what) for name, what in COUNTS.items()}}


def parser():
    top = argparse.ArgumentParser(prog="python3 benches/report", description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = top.add_subparsers(dest="action", required=True)
    taking = actions.add_parser("measure", help="take the figures", description=measure.__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    length = taking.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="one round, short (the default)")
    length.add_argument("--full", action="store_true", help="what doc/performance.md should be made from")
    taking.add_argument("--kinds", type=one_of(KINDS, "kind"), default=list(KINDS), metavar="KIND,...",
                        help=f"of {','.join(KINDS)}; 'tapgate OPTION...' is tapgate with options")
    taking.add_argument("--sets", type=one_of(SETS, "set"), default=list(SETS), metavar="SET,...",
                        help=f"of {','.join(SETS)}; the others stay as they are in the file")
    for name, (form, metavar, what) in KNOWN.items():
        taking.add_argument(option(name), type=form, metavar=metavar, help=what)
    taking.add_argument("--data", default=DATA, metavar="FILE", help="where to store (doc/performance/measured.json)")
    add_programs(taking)
    crowding = actions.add_parser("vm", help="take idle connections in a virtual machine", description=vm.__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    crowding.add_argument("--kinds", type=one_of(KINDS, "kind"), default=list(vm.KINDS), metavar="KIND,...",
                          help="the others stay as they are in the file")
    for name, default in vm.SETTINGS.items():
        crowding.add_argument(option(name), type=KNOWN[name][0], metavar=KNOWN[name][1], default=default,
                              help=f"{KNOWN[name][2]} ({shown(default)})")
    crowding.add_argument("--data", default=CROWD, metavar="FILE", help="where to store (doc/performance/vm.json)")
    add_programs(crowding)
    drawing = actions.add_parser("draw", help="make plots and tables")
    drawing.add_argument("--data", default=DATA, metavar="FILE")
    drawing.add_argument("--crowd", metavar="FILE", help="what `vm` took (vm.json beside the data, if it is there)")
    drawing.add_argument("--document", default=DOCUMENT, metavar="FILE", help="its plots lie in a folder beside it")
    comparing = actions.add_parser("check", help="compare the ratios of two data files")
    comparing.add_argument("old")
    comparing.add_argument("new")
    comparing.add_argument("--within", type=above_zero, default=20, metavar="PERCENT")
    return top


def add_programs(action):
    action.add_argument("--tapgate", default=os.path.join(BUILT, "tapgate"), metavar="PROGRAM")
    action.add_argument("--load", default=os.path.join(BUILT, "examples", "load"), metavar="PROGRAM")
    for peer in ("iperf3", "slirp4netns", "pasta"):
        action.add_argument(f"--{peer}", default=peer, metavar="PROGRAM")


def option(name):
    return "--" + name.replace("_", "-")


def shown(value):
    return ",".join(map(str, value)) if isinstance(value, list) else f"{value:g}"


def repeatable(options, words, kinds):
    """The options that say what was measured, for the reader to run again."""
    words = ["python3 benches/report", options.action, *words]
    for name, value in options.given.items():
        words += [option(name), shown(value)]
    if options.kinds != list(kinds):
        words += ["--kinds", shlex.quote(",".join(options.kinds))]
    return " ".join(words)


def main():
    options = parser().parse_args()
    # An end from outside is an end like any other: what was started is ended first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.action == "draw":
        return document.main(options)
    if options.action == "check":
        return check.main(options)
    if options.action == "vm":
        options.given = {name: getattr(options, name) for name, default in vm.SETTINGS.items()
                         if getattr(options, name) != default}
        options.command = repeatable(options, [], vm.KINDS)
        return vm.main(options)
    options.given = {name: getattr(options, name) for name in KNOWN if getattr(options, name) is not None}
    options.command = repeatable(options, ["--full" if options.full else "--quick"], KINDS)
    return measure.main(options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Failed, OSError, ValueError) as failure:
        print(f"report: {failure}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
