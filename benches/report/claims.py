"""What the document claims: ratios and numbers, each with the target that the project set itself.

In: the data. Out: for each claim the figure with its least and most over the rounds, and whether the
target is held. A figure that was not measured is None, never assumed.
"""

import statistics
from dataclasses import dataclass

from data import LESS_IS_BETTER, ratio

PEERS = ("slirp4netns", "pasta")
WORKERS, APART = "tapgate --workers 2", "tapgate --workers 2 pinned"


@dataclass(frozen=True)
class Claim:
    """`figure(data)` gives (median, least, most) or None; the target is an upper or a lower bound."""

    name: str
    of_set: str
    figure: object
    target: float
    at_most: bool = False
    unit: str = " times"

    def is_held(self, value):
        return value <= self.target if self.at_most else value >= self.target


def against(of_set, metric, peers, smallest=False, **where):
    """tapgate's figure over the best peer's; the best is the one with the best median."""
    def figure(data):
        medians = {peer: data.median(of_set, peer, metric, **where) for peer in peers}
        measured = {peer: median for peer, median in medians.items() if median}
        if not measured:
            return None
        best = (min if smallest else max)(measured, key=lambda peer: (measured[peer], peer))
        return ratio(data.values(of_set, "tapgate", metric, **where), data.values(of_set, best, metric, **where))
    return figure


def streams_over_one(way):
    def figure(data):
        where = {"mtu": 1500, "way": way}
        return ratio(data.values("streams", "tapgate", "gbit_per_s", streams=16, **where),
                     data.values("streams", "tapgate", "gbit_per_s", streams=1, **where))
    return figure


def with_workers(of_set, metric, kind=WORKERS, less=False, **where):
    """tapgate with workers over tapgate with one, so that more is better."""
    def figure(data):
        many, one = (data.values(of_set, which, metric, **where) for which in (kind, "tapgate"))
        return ratio(one, many) if less else ratio(many, one)
    return figure


def absolute(of_set, metric, factor=1, worst=None, **where):
    """tapgate's own figure; with `worst`, of all the places where it was taken."""
    def figure(data):
        if worst is None:
            values = [value * factor for value in data.values(of_set, "tapgate", metric, **where).values()]
            return (statistics.median(values), min(values), max(values)) if values else None
        key, choose = worst
        places = [data.median(of_set, "tapgate", metric, **{key: value}) for value in data.axis(of_set, key)]
        places = [place * factor for place in places if place is not None]
        return (choose(places), min(places), max(places)) if places else None
    return figure


def most_idle(of_set, of_record):
    """Something about the record with the most idle connections that tapgate came to, of each round."""
    def figure(data):
        found = [of_record(record) for record in last_of_rounds(data, of_set, "connections")]
        found = [value for value in found if value is not None]
        return (statistics.median(found), min(found), max(found)) if found else None
    return figure


def last_of_rounds(data, of_set, key):
    """tapgate's record of a set of idle connections with the largest value of a key, of each round."""
    last = {}
    for record in data.records:
        before = last.get(record["round"], {}).get(key, 0)
        if (record["set"], record["kind"]) == (of_set, "tapgate") and record.get(key, 0) > before:
            last[record["round"]] = record
    return list(last.values())


def opening_rate(of_set):
    """The last block's rate over the first's, of each round."""
    def figure(data):
        blocks = data.axis(of_set, "block")
        first = data.values(of_set, "tapgate", "opened_per_s", block=blocks[0]) if blocks else {}
        last = {record["round"]: record["opened_per_s"] for record in last_of_rounds(data, of_set, "block")
                if record["block"] > blocks[0]}
        return ratio(last, first)
    return figure


def alive(record):
    return 100 * record["alive"] / record["opened"] if record.get("alive") is not None and record["opened"] else None


def both_ways(name, of_set, metric, peers, ways, target, **rest):
    where = rest.pop("where", {})
    smallest = rest.get("at_most", False)
    return [Claim(f"{name}, {way}", of_set, against(of_set, metric, peers, smallest, way=way, **where), target, **rest)
            for way in ways]


UP_DOWN, IN_OUT = ("up", "down"), ("in", "out")
SMALL, LARGE = {"mtu": 1500}, {"mtu": 65520}


def published(mtu):
    return [
        *both_ways(f"MTU {mtu}, port published on the host's loopback over pasta", "publish", "gbit_per_s", ("pasta",),
                   IN_OUT, 1, where={"mtu": mtu, "via": "loopback"}),
        *both_ways(f"MTU {mtu}, port published on another address over slirp4netns", "publish", "gbit_per_s",
                   ("slirp4netns",), IN_OUT, 5, where={"mtu": mtu, "via": "address"}),
    ]


def idle_connections(of_set, where):
    return [
        Claim(f"memory of an idle connection{where}, at the number where it is most", of_set,
              absolute(of_set, "kb_per_connection", worst=("connections", max)), 4, at_most=True, unit=" kB"),
        Claim(f"idle connections alive after the wait{where}", of_set, most_idle(of_set, alive), 100, unit=" %"),
        Claim(f"rate of the last block opened over the first's{where}", of_set, opening_rate(of_set), 0.5),
    ]


def workers():
    """That a second loop costs nothing on a machine that has no use for it."""
    named = [
        *[(f"one stream, {way}", "mtu", "gbit_per_s", {"way": way, **SMALL}) for way in UP_DOWN],
        *[(f"16 streams, {way}", "streams", "gbit_per_s", {"way": way, "streams": 16, **SMALL}) for way in UP_DOWN],
        *[(f"processor time for a gigabyte, {way}", "mtu", "cpu_s_per_gb", {"way": way, **SMALL}) for way in UP_DOWN],
        *[(f"port published on the host's loopback, {way}", "publish", "gbit_per_s",
           {"way": way, "via": "loopback", **SMALL}) for way in IN_OUT],
        *[(f"{protocol.upper()} round trip", "latency", "p50_us", {"protocol": protocol}) for protocol in ("tcp", "udp")],
        ("connections a second", "rates", "connections_per_s", {}),
        ("operations on 64 connections", "rates", "operations_per_s", {}),
        *[(f"datagrams of {size} bytes", "datagrams", "echoed_per_s", {"size": size}) for size in (64, 1400)],
        ("from start to ready", "start", "ready_ms", {}),
        ("resident at rest", "start", "resident_kb", {}),
    ]
    apart = [Claim(f"`--workers 2` pinned apart over one, 16 streams, {way}", "streams",
                   with_workers("streams", "gbit_per_s", APART, way=way, streams=16, **SMALL), 1) for way in UP_DOWN]
    return [Claim(f"`--workers 2` over one, {name}", of_set,
                  with_workers(of_set, metric, less=metric in LESS_IS_BETTER, **where), 0.9)
            for name, of_set, metric, where in named] + apart


CLAIMS = [
    Claim("MTU 1500 over slirp4netns, up", "mtu", against("mtu", "gbit_per_s", ("slirp4netns",), way="up", **SMALL), 25),
    Claim("MTU 1500 over slirp4netns, down", "mtu", against("mtu", "gbit_per_s", ("slirp4netns",), way="down", **SMALL), 10),
    Claim("MTU 1500 over pasta, down", "mtu", against("mtu", "gbit_per_s", ("pasta",), way="down", **SMALL), 15),
    *both_ways("MTU 1500 over a veth pair", "mtu", "gbit_per_s", ("veth",), UP_DOWN, 0.7, where=SMALL),
    *[Claim(f"MTU 1500, 16 streams over one, {way}", "streams", streams_over_one(way), 0.8) for way in UP_DOWN],
    *both_ways("MTU 65520 over the better peer", "mtu", "gbit_per_s", PEERS, UP_DOWN, 1.2, where=LARGE),
    *published(1500), *published(65520),
    Claim("TCP round trip over the better peer's", "latency",
          against("latency", "p50_us", PEERS, True, protocol="tcp"), 0.9, at_most=True),
    Claim("UDP round trip over the better peer's", "latency",
          against("latency", "p50_us", PEERS, True, protocol="udp"), 0.9, at_most=True),
    Claim("connections a second over the better peer's", "rates", against("rates", "connections_per_s", PEERS), 1.5),
    Claim("operations on 64 connections over the better peer's", "rates", against("rates", "operations_per_s", PEERS), 1.5),
    *[Claim(f"datagrams of {size} bytes over the better peer's", "datagrams",
            against("datagrams", "echoed_per_s", PEERS, size=size), 4) for size in (64, 1400)],
    *both_ways("MTU 1500, processor time for a gigabyte over the better peer's", "mtu", "cpu_s_per_gb", PEERS, UP_DOWN,
               0.2, where=SMALL, at_most=True),
    *both_ways("MTU 65520, processor time for a gigabyte over the better peer's", "mtu", "cpu_s_per_gb", PEERS, UP_DOWN,
               1.1, where=LARGE, at_most=True),
    Claim("from start to ready", "start", absolute("start", "ready_ms"), 10, at_most=True, unit=" ms"),
    Claim("resident at rest", "start", absolute("start", "resident_kb", 1 / 1000), 8, at_most=True, unit=" MB"),
    *idle_connections("idle", ""),
    *workers(),
    Claim("idle connections opened in a virtual machine, each with an echo", "crowd",
          most_idle("crowd", lambda record: record["opened"]), 50_000, unit=""),
    *idle_connections("crowd", " in a virtual machine"),
]
