"""The performance report: measures networks for namespaces side by side, draws, compares.

    cargo build --release --bins --examples
    python3 benches/report measure --quick     takes the figures, in minutes (--full: an hour)
    python3 benches/report draw                makes plots and tables of doc/performance.md from them
    python3 benches/report check OLD NEW       do two data files tell the same ratios, within 20 %?

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
from machine import REPOSITORY  # noqa: E402
from measures import SETS  # noqa: E402
from processes import Failed  # noqa: E402
from stacks import KINDS  # noqa: E402

DATA = os.path.join(REPOSITORY, "doc", "performance", "measured.json")
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
NUMBERS = {"seconds": "length of each measurement", "wait": "seconds that idle connections are left alone",
           "open_limit": "seconds that opening them may take"}
COUNTS = {"rounds": "rounds", "block": "idle connections whose rate is taken together",
          "starts": "starts of each kind"}


def parser():
    top = argparse.ArgumentParser(prog="python3 benches/report", description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = top.add_subparsers(dest="action", required=True)
    taking = actions.add_parser("measure", help="take the figures", description=measure.__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    form = taking.add_mutually_exclusive_group()
    form.add_argument("--quick", action="store_true", help="one round, short (the default)")
    form.add_argument("--full", action="store_true", help="what doc/performance.md should be made from")
    taking.add_argument("--kinds", type=one_of(KINDS, "kind"), default=list(KINDS), metavar="KIND,...",
                        help=f"of {','.join(KINDS)}; 'tapgate OPTION...' is tapgate with options")
    taking.add_argument("--sets", type=one_of(SETS, "set"), default=list(SETS), metavar="SET,...",
                        help=f"of {','.join(SETS)}; the others stay as they are in the file")
    for name, what in LISTS.items():
        taking.add_argument(option(name), type=numbers, metavar="N,...", help=what)
    for name, what in NUMBERS.items():
        taking.add_argument(option(name), type=above_zero, metavar="SECONDS", help=what)
    for name, what in COUNTS.items():
        taking.add_argument(option(name), type=int, metavar="N", help=what)
    taking.add_argument("--data", default=DATA, metavar="FILE", help="where to store (doc/performance/measured.json)")
    taking.add_argument("--tapgate", default=os.path.join(BUILT, "tapgate"), metavar="PROGRAM")
    taking.add_argument("--load", default=os.path.join(BUILT, "examples", "load"), metavar="PROGRAM")
    for peer in ("iperf3", "slirp4netns", "pasta"):
        taking.add_argument(f"--{peer}", default=peer, metavar="PROGRAM")
    drawing = actions.add_parser("draw", help="make plots and tables")
    drawing.add_argument("--data", default=DATA, metavar="FILE")
    drawing.add_argument("--document", default=DOCUMENT, metavar="FILE", help="its plots lie in a folder beside it")
    comparing = actions.add_parser("check", help="compare the ratios of two data files")
    comparing.add_argument("old")
    comparing.add_argument("new")
    comparing.add_argument("--within", type=above_zero, default=20, metavar="PERCENT")
    return top


def option(name):
    return "--" + name.replace("_", "-")


def repeatable(options):
    """The options of `measure` that say what was measured, for the reader to run again."""
    words = ["--full" if options.full else "--quick"]
    for name, value in options.given.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else f"{value:g}"
        words += [option(name), text]
    if options.kinds != list(KINDS):
        words += ["--kinds", shlex.quote(",".join(options.kinds))]
    return "python3 benches/report measure " + " ".join(words)


def main():
    options = parser().parse_args()
    # An end from outside is an end like any other: what was started is ended first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.action == "draw":
        return document.main(options)
    if options.action == "check":
        return check.main(options)
    named = (*LISTS, *NUMBERS, *COUNTS)
    options.given = {name: getattr(options, name) for name in named if getattr(options, name) is not None}
    options.command = repeatable(options)
    return measure.main(options)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Failed, OSError, ValueError) as failure:
        print(f"report: {failure}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
