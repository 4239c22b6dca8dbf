"""Whether a soak changed what it soaked. In: its samples. Out: what is wrong, a line each.

A figure climbs where even the flattest slope that its samples allow (Theil-Sen, 95 %, after a warm-up) makes it
grow over the run by more than its own noise. So one bad sample, or a noisy machine, is no failure, and a leak of a
few kilobytes a second is. Latency is judged by thirds as well: a step up in the middle is no slope.
"""

import statistics

# Seconds in which ports that were used once fill the table (each is kept for three minutes) and pools find their size;
# of a short run half of it.
WARM_UP = 240
# What a figure may grow by over a run: a part of itself, or so much, whichever is more.
ALLOWED = {"resident_kb": (0.03, 1000), "descriptors": (0.05, 10), "flows": (0.05, 50), "ready": (0.1, 50),
           "engines": (0.1, 50), "buffers_kb": (0.1, 2000), "p99_us": (0.1, 50)}
# So much worse may the last third's latency be than the first's.
WORSE = 1.25
# Datagrams may be lost, few.
LOST = 0.001
FEWEST = 12


def judge(taken):
    """Everything that is wrong with a soak."""
    wrong = list(taken["errors"])
    counts = taken["counts"]
    if counts["lost"] > LOST * counts["datagrams"]:
        wrong.append(f"{counts['lost']} of {counts['datagrams']} datagrams were lost")
    wrong += [f"no {name}" for name, count in counts.items() if not count and name != "lost"]
    samples = taken["samples"]
    begin = min(WARM_UP, samples[-1]["s"] / 2) if samples else 0
    samples = [sample for sample in samples if sample["s"] > begin]
    if len(samples) >= FEWEST:
        wrong += climbing(samples) + slower(samples)
    return wrong


def climbing(samples):
    wrong = []
    for name, (part, least) in ALLOWED.items():
        points = [(sample["s"], sample[name]) for sample in samples if name in sample]
        if len(points) < FEWEST:
            continue
        time = points[-1][0] - points[0][0]
        median = statistics.median(value for _, value in points)
        growth, surely = (slope * time for slope in slopes(points))
        if surely > max(part * median, least):
            wrong.append(f"{name} climbs: by {growth:.0f} in {time:.0f} s, {surely:.0f} at least, of {median:.0f}")
    return wrong


def slower(samples):
    third = len(samples) // 3
    ends = samples[:third], samples[-third:]
    first, last = (statistics.median(sample["p99_us"] for sample in some) for some in ends)
    if last > WORSE * first:
        return [f"p99 of a round trip is {last:.0f} us in the last third, {first:.0f} in the first"]
    return []


def slopes(points):
    """The median slope over all pairs (Theil-Sen), and the least that is likely (Sen 1968, 95 %)."""
    found = sorted((y2 - y1) / (x2 - x1) for at, (x1, y1) in enumerate(points) for x2, y2 in points[at + 1:] if x2 > x1)
    number = len(points)
    spread = 1.96 * (number * (number - 1) * (2 * number + 5) / 18) ** 0.5
    least = max(0, int((len(found) - spread) / 2))
    return statistics.median(found), found[least]
