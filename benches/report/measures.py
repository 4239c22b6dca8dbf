"""What is measured, and how one figure is taken.

A set is a row of points; at each point every kind is measured by a fresh stack, and gives one record or
several. A record says where it was taken (its keys) and what came out (its metrics); the units are in
the metrics' names. Nothing here repeats, compares or stores.
"""

import contextlib
import json
import statistics
import subprocess
import time

from processes import Failed, Lines
from stacks import BULK, ECHO, ECHO_PORTS, ON_LOOPBACK, PUBLISHED, make

MANY = 64
USUAL_MTU = 1500
# Seconds after which connections that are left alone hold no more than they will.
SETTLED = 5

# What tells two records of a set and a kind apart.
KEYS = ("mtu", "streams", "way", "via", "protocol", "size", "connections", "block")


# --- the points of each set ----------------------------------------------------------------------

def mtu_points(settings):
    return [{"mtu": mtu} for mtu in settings["mtus"]]


def stream_points(settings):
    return [{"mtu": mtu, "streams": streams} for mtu in settings["stream_mtus"] for streams in settings["streams"]]


def publish_points(settings):
    return [{"mtu": mtu, "via": via} for mtu in settings["stream_mtus"] for via in ("loopback", "address")]


def latency_points(_):
    return [{"mtu": USUAL_MTU, "protocol": protocol} for protocol in ("tcp", "udp")]


def one_point(_):
    return [{"mtu": USUAL_MTU}]


def size_points(settings):
    return [{"mtu": USUAL_MTU, "size": size} for size in settings["sizes"]]


# --- how a point is measured ---------------------------------------------------------------------

def take_bulk(lab, stack, point):
    """Both ways between the inside and a server on the host."""
    for way, flags in (("up", []), ("down", ["--reverse"])):
        with bulk_server(lab, lab.world.enter, BULK):
            client = stack.inside(bulk_client(lab, stack.gateway, stack.port(BULK), point, flags))
            yield {"way": way, **bulk(lab, stack, client)}


def take_publish(lab, stack, point):
    """Both ways between a client on the host and a server inside."""
    for way, flags in (("in", []), ("out", ["--reverse"])):
        with bulk_server(lab, stack.inside, PUBLISHED):
            address = stack.published_at[point["via"]]
            client = lab.world.enter(bulk_client(lab, address, PUBLISHED, point, flags))
            yield {"way": way, **bulk(lab, stack, client)}


def take_latency(lab, stack, point):
    mode = {"tcp": "rr", "udp": "urr"}[point["protocol"]]
    with echo_server(lab):
        found = load(lab, stack, mode, lab.settings["seconds"])
    yield {name: found[name] for name in ("p50_us", "p99_us", "per_s")}


def take_rates(lab, stack, _):
    seconds = lab.settings["seconds"]
    with echo_server(lab):
        connections = load(lab, stack, "crr", ECHO_PORTS, seconds)
        operations = load(lab, stack, "many", MANY, seconds)
    yield {"connections_per_s": connections["per_s"], "operations_per_s": operations["per_s"]}


def take_datagrams(lab, stack, point):
    with echo_server(lab):
        found = load(lab, stack, "pps", point["size"], lab.settings["flood_seconds"])
    yield {"sent_per_s": found["sent_per_s"], "echoed_per_s": found["echoed_per_s"]}


def take_idle(lab, stack, _):
    """Memory at each number of open connections, the rate of each block of them, and who is alive."""
    settings = lab.settings
    numbers, block = settings["connections"], settings["block"]
    at_rest = stack.resident_kb()
    with echo_server(lab):
        words = ["idle", stack.gateway, ECHO, ECHO_PORTS, block, settings["open_limit"], *numbers]
        client = lab.runner.start(stack.inside([lab.programs["load"], *words]), stdin=subprocess.PIPE)
        try:
            yield from watch_idle(lab, stack, client, at_rest)
        finally:
            lab.runner.end(client)


def watch_idle(lab, stack, client, at_rest):
    settings, lines = lab.settings, Lines(client, "load idle")
    for number in settings["connections"]:
        found = json.loads(lines.next(settings["open_limit"] + 30))
        record = {"connections": number, "opened": found["opened"]}
        # What has just echoed is not idle yet.
        time.sleep(min(settings["wait"], SETTLED))
        resident = stack.resident_kb()
        if resident is not None and found["opened"]:
            record["resident_kb"] = resident
            record["anonymous_kb"] = stack.resident_kb("RssAnon")
            record["kb_per_connection"] = (resident - at_rest) / found["opened"]
        last = number == settings["connections"][-1] or found["failed"]
        # Without a stack in between there is nobody who could give a connection up.
        if last and resident is not None:
            record["wait_s"] = settings["wait"]
            time.sleep(settings["wait"])
        client.stdin.write("\n")
        client.stdin.flush()
        if found["failed"]:
            record["note"] = found["failed"]
        if last:
            ask_who_is_alive(lines, settings["open_limit"], record)
        yield record
        if last:
            break
    for index, rate in enumerate(found["block_per_s"]):
        yield {"block": (index + 1) * settings["block"], "opened_per_s": rate}


def ask_who_is_alive(lines, limit, record):
    """A stack that has grown slow may not get there; what it did until then is a figure all the same."""
    try:
        record["alive"] = json.loads(lines.next(limit))["alive"]
    except Failed as failure:
        record["note"] = "; ".join(filter(None, (record.get("note"), f"to echo again: {failure}")))


def take_start(lab, stack, point):
    """Several starts, one after the other: they publish the same port."""
    ready, resident = [stack.ready_ms], [stack.resident_kb()]
    stack.end()
    for _ in range(lab.settings["starts"] - 1):
        again = make(lab, stack.kind, point["mtu"])
        try:
            ready.append(again.ready_ms)
            resident.append(again.resident_kb())
        finally:
            again.end()
    yield {"ready_ms": statistics.median(ready), "resident_kb": statistics.median(resident)}


class Set:
    """A row of points, how each is measured, and for which kinds there is something to measure."""

    def __init__(self, points, take, without=(), pinned=False):
        self.points, self.take, self.without, self.pinned = points, take, without, pinned


SETS = {
    "mtu": Set(mtu_points, take_bulk),
    "streams": Set(stream_points, take_bulk, pinned=True),
    "publish": Set(publish_points, take_publish, without=ON_LOOPBACK),
    "latency": Set(latency_points, take_latency, without=("relay",)),
    "rates": Set(one_point, take_rates),
    "datagrams": Set(size_points, take_datagrams, without=("relay",)),
    "idle": Set(one_point, take_idle, without=("relay",)),
    "start": Set(one_point, take_start, without=("host", "veth", "relay")),
}


# --- servers and clients -------------------------------------------------------------------------

@contextlib.contextmanager
def echo_server(lab):
    """The echo server, on the host."""
    command = lab.world.enter([lab.programs["load"], "serve", "0.0.0.0", ECHO, ECHO_PORTS])
    server = lab.runner.start(command, stdin=subprocess.PIPE)
    try:
        Lines(server, "load serve").until("ready")
        yield
    finally:
        lab.runner.end(server)


@contextlib.contextmanager
def bulk_server(lab, enter, port):
    """iperf3's server for one test, on the host or inside."""
    command = enter([lab.programs["iperf3"], "--server", "--one-off", "--forceflush", "--port", port])
    server = lab.runner.start(command, stderr=subprocess.STDOUT)
    try:
        Lines(server, "iperf3 --server").until("Server listening")
        yield
    finally:
        lab.runner.end(server)


def bulk_client(lab, address, port, point, flags):
    return [lab.programs["iperf3"], "--client", address, "--port", port, "--time", whole_seconds(lab),
            "--parallel", point.get("streams", 1), "--json", *flags]


def whole_seconds(lab):
    """iperf3 counts in whole seconds, and takes none for ever."""
    return max(1, round(lab.settings["seconds"]))


def bulk(lab, stack, command):
    """Runs an iperf3 client; gives the throughput and what a gigabyte cost."""
    before = stack.processor_seconds()
    said = json.loads(lab.runner.run(command, limit=lab.settings["seconds"] + 20))
    after = stack.processor_seconds()
    received, processor = said["end"]["sum_received"], said["end"]["cpu_utilization_percent"]
    gigabytes = received["bytes"] / 1e9
    if not gigabytes:
        raise Failed("iperf3: not a byte arrived")
    ends = (processor["host_total"] + processor["remote_total"]) / 100 * received["seconds"]
    own = None if before is None else after - before
    record = {"gbit_per_s": received["bits_per_second"] / 1e9, "whole_cpu_s_per_gb": (ends + (own or 0)) / gigabytes}
    if own is not None:
        record["cpu_s_per_gb"] = own / gigabytes
    return record


def load(lab, stack, mode, *numbers):
    """Runs a client of the load generator inside; gives what it measured."""
    command = stack.inside([lab.programs["load"], mode, stack.gateway, stack.port(ECHO), *numbers])
    longest = max(lab.settings["seconds"], lab.settings.get("flood_seconds", 0))
    return json.loads(lab.runner.run(command, limit=longest + 20))
