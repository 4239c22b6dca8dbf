"""Which plots the document has, and what is in each. In: the data. Out: pictures by file name."""

import statistics

from svg import BarPanel, LinePanel, Picture, Series, number

NAMES = {"host": "loopback", "veth": "veth pair", "relay": "bare relay"}
WAYS = {"up": "namespace to host (up)", "down": "host to namespace (down)",
        "in": "into the namespace", "out": "out of the namespace"}
VIAS = {"loopback": "from the host's loopback", "address": "from another address of the host"}


def shown(kind):
    return NAMES.get(kind, kind)


def all_plots(data):
    """`{name: Picture}`, of the sets that were measured."""
    plots = {"mtu": mtu, "processor": processor, "streams": streams, "publish": publish, "latency": latency,
             "rates": rates, "datagrams": datagrams, "idle": idle, "opening": opening, "crowd": crowd,
             "crowd_opening": crowd_opening, "start": start}
    found = {name: plot(data) for name, plot in plots.items()}
    return {name: picture for name, picture in found.items() if picture.panels}


def point(data, of_set, kind, metric, factor=1, **where):
    """Median, least and most, or None."""
    values = [value * factor for value in data.values(of_set, kind, metric, **where).values()]
    return (statistics.median(values), min(values), max(values)) if values else None


def lines(data, of_set, metric, key, **where):
    """A series for each kind; the loopback, which has one MTU, is the same at every MTU."""
    axis, found = data.axis(of_set, key, **where), []
    for kind in data.kinds(of_set):
        places = ((value, point(data, of_set, kind, metric, **where, **{key: value})) for value in axis)
        found.append(Series(shown(kind), [(value, *place) for value, place in places if place and place[0] > 0]))
    return found


def bars(data, of_set, metric, factor=1, note=None, **where):
    found = []
    for kind in data.kinds(of_set):
        place = point(data, of_set, kind, metric, factor, **where)
        if place:
            found.append((Series(shown(kind), []), place, note(kind, place[0]) if note else None))
    return found


def mtu(data):
    return by_mtu(data, "Throughput by MTU, one stream", "gbit_per_s", "Gbit/s")


def processor(data):
    return by_mtu(data, "Processor time of the stack itself for each gigabyte, by MTU", "cpu_s_per_gb", "seconds per GB")


def by_mtu(data, title, metric, unit):
    picture = Picture(title, 2)
    for way in ("up", "down") if data.kinds("mtu") else ():
        series = lines(data, "mtu", metric, "mtu", way=way)
        picture.add(LinePanel(WAYS[way], ("MTU, bytes", unit), series))
    return picture


def streams(data):
    picture = Picture("Throughput by number of streams", 2)
    for size in data.axis("streams", "mtu"):
        for way in ("up", "down"):
            series = lines(data, "streams", "gbit_per_s", "streams", mtu=size, way=way)
            picture.add(LinePanel(f"MTU {size}, {WAYS[way]}", ("streams", "Gbit/s"), series))
    return picture


def publish(data):
    picture = Picture("Throughput of published ports, one stream, into the namespace and out of it", 2)
    for size in data.axis("publish", "mtu"):
        for via in ("loopback", "address"):
            for way in ("in", "out"):
                found = bars(data, "publish", "gbit_per_s", mtu=size, via=via, way=way)
                picture.add(BarPanel(f"MTU {size}, {VIAS[via]}, {way}", "Gbit/s", found))
    return picture


def latency(data):
    picture = Picture("One byte there and back: the median, and in brackets 99 of 100", 2)
    for protocol in data.axis("latency", "protocol"):
        def both(kind, median, protocol=protocol):
            high = data.median("latency", kind, "p99_us", protocol=protocol)
            return f"{number(median)} ({number(high)})"
        found = bars(data, "latency", "p50_us", note=both, protocol=protocol)
        picture.add(BarPanel(protocol.upper(), "microseconds", found))
    return picture


def rates(data):
    picture = Picture("Connections, and small operations on 64 connections", 2)
    if data.kinds("rates"):
        picture.add(BarPanel("connect, one byte there and back, close", "a second", bars(data, "rates", "connections_per_s")))
        picture.add(BarPanel("1 KiB there and back on each of 64", "a second", bars(data, "rates", "operations_per_s")))
    return picture


def datagrams(data):
    sizes = data.axis("datagrams", "size")
    picture = Picture("Datagrams echoed under flood", max(1, min(3, len(sizes))))
    for size in sizes:
        found = bars(data, "datagrams", "echoed_per_s", size=size)
        picture.add(BarPanel(f"{size} bytes", "echoed a second", found))
    return picture


def idle(data, of_set="idle", where=""):
    picture = Picture(f"Memory by number of idle connections{where}", 2)
    if data.axis(of_set, "connections"):
        series = lines(data, of_set, "resident_kb", "connections")
        for one in series:
            one.points = [(x, *(value / 1000 for value in rest)) for x, *rest in one.points]
        picture.add(LinePanel("all of it", ("connections", "resident, MB"), series))
        series = lines(data, of_set, "kb_per_connection", "connections")
        picture.add(LinePanel("for each connection, less what is held at rest", ("connections", "kB"), series))
    return picture


def opening(data, of_set="idle", where=""):
    picture = Picture(f"Connections opened one after the other, by how many are open{where}", 1)
    if data.axis(of_set, "block"):
        series = lines(data, of_set, "opened_per_s", "block")
        picture.add(LinePanel("each with a byte there and back", ("connections open", "opened a second"), series, (False, True)))
    return picture


def crowd(data):
    return idle(data, "crowd", ", in a virtual machine")


def crowd_opening(data):
    return opening(data, "crowd", ", in a virtual machine")


def start(data):
    picture = Picture("Start, and memory at rest", 2)
    if data.kinds("start"):
        picture.add(BarPanel("from start to its own sign that it is ready", "milliseconds", bars(data, "start", "ready_ms")))
        picture.add(BarPanel("resident at rest", "MB", bars(data, "start", "resident_kb", 1 / 1000)))
    return picture
