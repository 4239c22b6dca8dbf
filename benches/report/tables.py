"""The generated parts of the document, as Markdown: a plot, its table, how the figures grow, the command,
and what failed. In: the data. Out: text by name; the same for the same data."""

import statistics

from claims import CLAIMS
from data import LESS_IS_BETTER, in_words, places, ratio
from plots import VIAS, WAYS, shown
from stacks import ON_LOOPBACK
from svg import number, tick_text


def blocks(data, plots, folder):
    """`{name: Markdown}`; the pictures lie by their names in the folder beside the document."""
    tables = {"mtu": mtu, "processor": processor, "streams": streams, "publish": publish, "latency": latency,
              "rates": rates, "datagrams": datagrams, "idle": idle, "opening": opening, "crowd": crowd,
              "crowd_opening": crowd_opening, "start": start}
    found = {"machine": machine(data), "claims": claims(data), "options": options(data)}
    for name, table in tables.items():
        of_set = {"processor": "mtu", "opening": "idle", "crowd_opening": "crowd"}.get(name, name)
        parts = [f"![{plots[name].title}]({folder}/{name}.svg)"] if name in plots else []
        parts += [part for part in table(data) if part]
        parts += [failures(data, of_set), command(data, of_set)]
        found[name] = "\n\n".join(part for part in parts if part) if data.kinds(of_set) else "Not measured."
    return found


# --- what it was taken on, and what is claimed ----------------------------------------------------

def machine(data):
    """One row for each fact, one column for each run."""
    rows = {}
    for run in data.runs:
        place, version = run["machine"], run["versions"]
        facts = {
            "date": run["date"], "kernel": f"Linux {place['kernel']}, {place['architecture']}",
            "processor": f"{place['processor']}, {place['cores']} cores", "memory": f"{number(place['memory_mb'] / 1024)} GiB",
            "TCP congestion control": place["congestion_control"],
            "rounds": rounds(run["settings"]),
            "tapgate": f"{version['tapgate']}, commit {run['commit']}, binary {run['binary_sha256']}",
            "slirp4netns": version["slirp4netns"], "pasta": version["pasta"], "iperf3": version["iperf3"],
            "left out": "; ".join(f"{kind} ({why})" for kind, why in run["skipped"].items()) or "nothing",
            "command": f"`{run['command']}`",
        }
        for name, value in facts.items():
            rows.setdefault(name, []).append("not found" if value is None else value)
    heads = ["| | " + " | ".join(f"run {index + 1}" for index in range(len(data.runs))) + " |",
             "|---" * (len(data.runs) + 1) + "|"]
    return "\n".join(heads + [f"| {name} | " + " | ".join(values) + " |" for name, values in rows.items()])


def rounds(settings):
    """How often, and how long where a measurement lasts as long as it is told."""
    length = f", of {settings['seconds']:g} s a measurement" if "seconds" in settings else ""
    return f"{settings['rounds']}{length}"


def claims(data):
    """Every claim, its figure, its target, and the command that takes it."""
    lines = ["| claim | measured | least to most | target | held | set |", "|---|---|---|---|---|---|"]
    held = 0
    for claim in CLAIMS:
        figure = claim.figure(data)
        target = f"{'at most' if claim.at_most else 'at least'} {claim.target:,g}{claim.unit}"
        if figure is None:
            lines.append(f"| {claim.name} | not measured | | {target} | | {claim.of_set} |")
            continue
        median, least, most = figure
        verdict = claim.is_held(median)
        held += verdict
        lines.append(f"| {claim.name} | {number(median)}{claim.unit} | {number(least)} to {number(most)} | {target} | "
                     f"{'yes' if verdict else '**no**'} | {claim.of_set} |")
    lines += ["", f"{held} of {len(CLAIMS)} targets are held. A claim's command is that of its set:", ""]
    sets = dict.fromkeys(claim.of_set for claim in CLAIMS if data.kinds(claim.of_set))
    return "\n".join(lines + [f"- {of_set}: `{repeated(data, of_set)}`" for of_set in sets])


def options(data):
    """tapgate with options over tapgate without: for each metric of a set the median place and the worst."""
    with_options = sorted({record["kind"] for record in data.records if record["kind"].startswith("tapgate ")})
    lines = ["| with | set, metric | times as good | worst place | there |", "|---|---|---:|---|---:|"]
    for kind in with_options:
        found = {}
        for of_set, where, metric in places(data, kind):
            figure = ratio(*(data.values(of_set, one, metric, **where) for one in (kind, "tapgate")))
            if figure and figure[0]:
                good = 1 / figure[0] if metric in LESS_IS_BETTER else figure[0]
                found.setdefault((of_set, metric), []).append((good, in_words(where)))
        for (of_set, metric), figures in found.items():
            worst, place = min(figures)
            median = statistics.median(good for good, _ in figures)
            lines.append(f"| `{kind.partition(' ')[2]}` | {of_set}, {metric} | {number(median)} | {place} | {number(worst)} |")
    return "\n".join(lines) if with_options else "None was measured."


def command(data, of_set):
    return f"Taken by `{repeated(data, of_set)}`." if data.kinds(of_set) else None


def repeated(data, of_set):
    """The command line that takes a set again as it was taken."""
    run = data.run(of_set)
    return run["command"] if run.get("sets") == [of_set] else f"{run['command']} --sets {of_set}"


def failures(data, of_set):
    found = data.errors(of_set)
    if not found:
        return None
    return "\n".join(["What did not go to its end:", "", *(f"- {shown(kind)}, {where}: {why}" for kind, where, why in found)])


# --- tables --------------------------------------------------------------------------------------

def table(data, of_set, metric, rows, head):
    """A row for each place, a column for each kind that has the metric; None if nothing was measured."""
    kinds = [kind for kind in data.kinds(of_set)
             if any(data.median(of_set, kind, metric, **where) is not None for _, where in rows)]
    if not kinds:
        return None
    lines = [f"| {head} | " + " | ".join(map(shown, kinds)) + " |", "|---" + "|---:" * len(kinds) + "|"]
    for name, where in rows:
        cells = [data.median(of_set, kind, metric, **where) for kind in kinds]
        lines.append(f"| {name} | " + " | ".join("-" if cell is None else number(cell) for cell in cells) + " |")
    return "\n".join(lines)


def grown(data, of_set, metric, rows, head):
    """The same, with how each grows from the first to the last row where it was measured."""
    text = table(data, of_set, metric, rows, head)
    if text is None or len(rows) < 2:
        return text
    cells = []
    for kind in data.kinds(of_set):
        found = [data.median(of_set, kind, metric, **where) for _, where in rows]
        found = [value for value in found if value]
        if found:
            cells.append("-" if kind in ON_LOOPBACK and "mtu" in rows[0][1] and "streams" not in rows[0][1]
                         else f"× {number(found[-1] / found[0])}")
    return f"{text}\n| *last over first* | " + " | ".join(cells) + " |"


def mtu(data):
    sizes = data.axis("mtu", "mtu")
    return [grown(data, "mtu", "gbit_per_s", [(tick_text(size), {"mtu": size, "way": way}) for size in sizes],
                  f"MTU; Gbit/s, {WAYS[way]}") for way in ("up", "down")]


def processor(data):
    sizes, parts = data.axis("mtu", "mtu"), []
    for metric, what in (("cpu_s_per_gb", "of the stack"), ("whole_cpu_s_per_gb", "of stack, client and server")):
        for way in ("up", "down"):
            rows = [(tick_text(size), {"mtu": size, "way": way}) for size in sizes]
            parts.append(grown(data, "mtu", metric, rows, f"MTU; seconds per GB {what}, {way}"))
    return parts


def streams(data):
    numbers, parts = data.axis("streams", "streams"), []
    for size in data.axis("streams", "mtu"):
        for way in ("up", "down"):
            rows = [(tick_text(many), {"mtu": size, "way": way, "streams": many}) for many in numbers]
            parts.append(grown(data, "streams", "gbit_per_s", rows, f"streams; MTU {size}, Gbit/s, {WAYS[way]}"))
    return parts


def publish(data):
    rows = [(f"{size}, {VIAS[via]}, {WAYS[way]}", {"mtu": size, "via": via, "way": way})
            for size in data.axis("publish", "mtu") for via in ("loopback", "address") for way in ("in", "out")]
    return [table(data, "publish", "gbit_per_s", rows, "MTU; Gbit/s"),
            table(data, "publish", "cpu_s_per_gb", rows, "MTU; seconds per GB of the stack")]


def latency(data):
    rows = [(protocol.upper(), {"protocol": protocol}) for protocol in data.axis("latency", "protocol")]
    return [table(data, "latency", "p50_us", rows, "median, microseconds"),
            table(data, "latency", "p99_us", rows, "99 of 100, microseconds")]


def rates(data):
    return [table(data, "rates", "connections_per_s", [("connections", {})], "a second"),
            table(data, "rates", "operations_per_s", [("operations of 1 KiB on 64 connections", {})], "a second")]


def datagrams(data):
    rows = [(tick_text(size), {"size": size}) for size in data.axis("datagrams", "size")]
    return [grown(data, "datagrams", "echoed_per_s", rows, "bytes; echoed a second"),
            table(data, "datagrams", "sent_per_s", rows, "bytes; sent a second")]


def idle(data, of_set="idle"):
    rows = [(tick_text(many), {"connections": many}) for many in data.axis(of_set, "connections")]
    wait = data.run(of_set)["settings"]["wait"] if data.run(of_set) else 0
    return [grown(data, of_set, "resident_kb", rows, "connections; resident, kB"),
            table(data, of_set, "anonymous_kb", rows, "connections; of it not of a file, kB"),
            grown(data, of_set, "kb_per_connection", rows, "connections; kB for each, less what is held at rest"),
            table(data, of_set, "opened", rows, "connections asked for; opened"),
            table(data, of_set, "alive", rows, f"connections asked for; echo again after {wait:g} s")]


def opening(data, of_set="idle"):
    every = data.axis(of_set, "block")
    # A table of fifty rows says less than its ends and its quarters; the plot has all.
    chosen = sorted({every[len(every) * part // 4 - (part > 0)] for part in range(5)}) if every else []
    rows = [(tick_text(block), {"block": block}) for block in chosen]
    return [grown(data, of_set, "opened_per_s", rows, "connections open; opened a second")] if rows else []


def crowd(data):
    return idle(data, "crowd")


def crowd_opening(data):
    return opening(data, "crowd")


def start(data):
    return [table(data, "start", "ready_ms", [("ready, milliseconds", {})], "start"),
            table(data, "start", "resident_kb", [("resident, kB", {})], "at rest")]
