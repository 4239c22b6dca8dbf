"""The plot of a soak. In: its samples. Out: SVG, the same for the same samples."""

from svg import LinePanel, Picture, Series

PANELS = (
    ("Resident memory of all processes", "MB", (("resident_kb", "resident", 1000),)),
    ("Open descriptors of all processes", "descriptors", (("descriptors", "descriptors", 1),)),
    ("Flows, and those of them with something to do or buffers", "flows",
     (("flows", "flows", 1), ("ready", "in line", 1), ("engines", "with buffers", 1))),
    ("Buffers", "MB", (("buffers_kb", "buffers", 1000),)),
    ("A TCP round trip under load", "microseconds", (("p50_us", "median", 1), ("p99_us", "99 of 100", 1))),
)


def draw(taken):
    """The picture, as text."""
    minutes = taken["samples"][-1]["s"] / 60 if taken["samples"] else 0
    picture = Picture(f"A soak of {minutes:.3g} minutes", 1)
    for title, unit, lines in PANELS:
        series = [Series(name, points(taken["samples"], metric, factor)) for metric, name, factor in lines]
        series = [one for one in series if one.points]
        if series:
            picture.add(LinePanel(title, ("minutes", unit), series, (False, False)))
    return picture.render()


def points(samples, metric, factor):
    found = ((sample["s"] / 60, sample[metric] / factor) for sample in samples if metric in sample)
    return [(x, y, y, y) for x, y in found]
