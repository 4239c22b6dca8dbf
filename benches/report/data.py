"""The data file: runs, and the records that they took.

`{"format": 1, "runs": [RUN, ...], "records": [RECORD, ...]}`. A record names its run by number, so that
one set can be taken again without the others: a new run's records take the place of the old ones of the
same set after its first round. Reading gives `Data`, which answers with medians and ratios.
"""

import json
import os
import statistics

from measures import KEYS
from stacks import KINDS, ON_LOOPBACK

FORMAT = 1


class Store:
    """Writes the file anew, by rename, with every record that is added."""

    def __init__(self, path, run):
        self.path, self.run = path, run
        self.old = read(path) if os.path.exists(path) else {"format": FORMAT, "runs": [], "records": []}
        self.added, self.whole = [], set()

    def add(self, record):
        self.added.append(record)
        self.write()

    def end_of_round(self, sets):
        """These sets have a round in full: what was there before gives way."""
        self.whole.update(sets)
        self.write()

    def write(self):
        old = [record for record in self.old["records"] if record["set"] not in self.whole]
        held = {record["set"] for record in old}
        # Until then the new ones wait in a list of their own: nothing that was taken is lost.
        new = [record for record in self.added if record["set"] not in held]
        waiting = [record for record in self.added if record["set"] in held]
        numbers = sorted({record["run"] for record in old})
        runs = [self.old["runs"][number] for number in numbers]
        old = [{**record, "run": numbers.index(record["run"])} for record in old]
        new, waiting = ([{"run": len(runs), **record} for record in some] for some in (new, waiting))
        content = {"format": FORMAT, "runs": [*runs, self.run], "records": old + new}
        if waiting:
            content["unfinished"] = waiting
        write_aside(self.path, encode(content))


def with_other_kinds(found, path):
    """What one run has found, and behind it what was found before of the kinds that it has not measured."""
    if not os.path.exists(path):
        return found
    old, own = read(path), {record["kind"] for record in found["records"]}
    others = [record for record in old["records"] if record["kind"] not in own]
    numbers = sorted({record["run"] for record in others})
    count = len(found["runs"])
    others = [{**record, "run": count + numbers.index(record["run"])} for record in others]
    return {**found, "runs": [*found["runs"], *(old["runs"][number] for number in numbers)],
            "records": [*found["records"], *others]}


def encode(content):
    """JSON with one record a line, so that a diff shows what changed."""
    lines = ['{"format": %d,' % content["format"]]
    for name in ("runs", "records", "unfinished"):
        if name in content:
            items = ",\n".join(json.dumps(rounded(item)) for item in content[name])
            lines.append(f'"{name}": [\n{items}\n],')
    return "\n".join(lines).rstrip(",") + "\n}\n"


def rounded(item):
    """Six significant digits are more than any figure has."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in item.items()}


def write_aside(path, text):
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(path + ".new", "w") as file:
        file.write(text)
    os.replace(path + ".new", path)


def read(path):
    with open(path) as file:
        content = json.load(file)
    if content.get("format") != FORMAT:
        raise ValueError(f"{path}: format {content.get('format')}, this program reads {FORMAT}")
    return content


class Data:
    """The records of one file or several, by where they were taken."""

    def __init__(self, content):
        self.runs, self.records = content["runs"], content["records"]

    @classmethod
    def load(cls, *paths):
        """All of several files, whose sets are not the same; the runs are counted on."""
        runs, records = [], []
        for content in map(read, paths):
            records += [{**record, "run": record["run"] + len(runs)} for record in content["records"]]
            runs += content["runs"]
        return cls({"runs": runs, "records": records})

    def kinds(self, of_set):
        """The kinds that a set was measured for, in the order of the runs."""
        found = []
        for record in self.records:
            if record["set"] == of_set and record["kind"] not in found:
                found.append(record["kind"])
        order = {kind: place for place, kind in enumerate(KINDS)}
        return sorted(found, key=lambda kind: (order.get(kind, len(order)), kind))

    def run(self, of_set):
        """The run that took a set, or None."""
        return next((self.runs[record["run"]] for record in self.records if record["set"] == of_set), None)

    def axis(self, of_set, key, **fixed):
        """The values of a key that a set was measured at, for kinds that have it."""
        return sorted({record[key] for record in self.records
                       if record["set"] == of_set and key in record and record["kind"] not in ON_LOOPBACK
                       and all(record.get(name) == value for name, value in fixed.items())})

    def values(self, of_set, kind, metric, **where):
        """A metric of every round: `{round: value}`. What is on the loopback has no MTU to ask for."""
        if kind in ON_LOOPBACK:
            where = {name: value for name, value in where.items() if name != "mtu"}
        return {record["round"]: record[metric] for record in self.records
                if record["set"] == of_set and record["kind"] == kind and record.get(metric) is not None
                and all(record.get(name) == value for name, value in where.items())}

    def median(self, of_set, kind, metric, **where):
        found = self.values(of_set, kind, metric, **where).values()
        return statistics.median(found) if found else None

    def errors(self, of_set):
        """What failed: (kind, where, reason), each once."""
        found = {}
        for record in self.records:
            if record["set"] == of_set and ("error" in record or "note" in record):
                where = in_words({key: record[key] for key in KEYS if key in record})
                found[(record["kind"], where)] = record.get("error") or record["note"]
        return [(kind, where, reason) for (kind, where), reason in found.items()]


# What is compared from place to place; of the second kind less is better.
MORE_IS_BETTER = ("gbit_per_s", "connections_per_s", "operations_per_s", "echoed_per_s", "opened_per_s")
LESS_IS_BETTER = ("cpu_s_per_gb", "p50_us", "kb_per_connection", "resident_kb", "ready_ms")


def places(data, kind="tapgate"):
    """Every place and metric of a kind, each once: (set, where, metric)."""
    found = {}
    for record in data.records:
        where = {key: record[key] for key in KEYS if key in record}
        for metric in (*MORE_IS_BETTER, *LESS_IS_BETTER):
            if record["kind"] == kind and metric in record:
                found[(record["set"], *where.items(), metric)] = (record["set"], where, metric)
    return list(found.values())


def in_words(where):
    return ", ".join(f"{key} {value}" for key, value in where.items())


def ratio(above, below):
    """The median over rounds of one value over another of the same round, its least and its most.

    Rounds are interleaved, so what disturbs a round disturbs both. Where no round has both, the medians'
    ratio; None where one was not measured at all.
    """
    rounds = [above[number] / below[number] for number in above if below.get(number)]
    if rounds:
        return statistics.median(rounds), min(rounds), max(rounds)
    if above and any(below.values()):
        one = statistics.median(above.values()) / statistics.median(below.values())
        return one, one, one
    return None
