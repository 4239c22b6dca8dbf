"""Plots as SVG, written by hand: line panels and bar panels, side by side in one picture.

In: numbers and words. Out: text, the same for the same input. A picture has its own light background, so
it reads the same on a dark page; series differ in colour, marker and a label at their end; an axis names
its unit and says when its scale is logarithmic; every value also stands in the picture's description.
"""

import math
import zlib
from xml.sax.saxutils import escape, quoteattr

WIDTH = 860
PANEL_HEIGHT = 290
INK, FAINT, PAPER = "#222222", "#d9d9d9", "#ffffff"
# Dark enough to be read as text on white, and told apart by the colour-blind.
LOOKS = {
    "loopback": ("#666666", "circle", "6 3"), "veth pair": ("#7a3e9d", "square", "2 3"),
    "slirp4netns": ("#b34700", "triangle", ""), "pasta": ("#0065a3", "diamond", ""),
    "tapgate": ("#007a5a", "circle", ""),
}
# For tapgate with options, by its name: the same in every picture.
OTHER_LOOKS = (("#a3195b", "square", "8 3 2 3"), ("#5c5c00", "diamond", "5 2"), ("#004f4f", "triangle", "8 3"))
LABEL_STEP = 14


def number(value):
    """Three significant digits."""
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value)) + 1e-9))
    return f"{value:.{places}f}" if places else tick_text(float(f"{value:.3g}"))


def tick_text(value):
    """A round number: a tick, an MTU. Four digits stay together, as in "MTU 1500"."""
    if value < 10_000:
        return f"{value:.10g}"
    return f"{value:,.0f}"


def text_width(text, size):
    return 0.58 * size * len(text)


class Series:
    """A named row of points: (x, y, least, most)."""

    def __init__(self, name, points):
        self.name, self.points = name, points

    @property
    def look(self):
        return LOOKS.get(self.name) or OTHER_LOOKS[zlib.crc32(self.name.encode()) % len(OTHER_LOOKS)]


class Axis:
    """From values to pixels."""

    def __init__(self, values, pixels, log, ticks=None):
        self.log, (self.start, self.end) = log, pixels
        if log:
            self.low, self.high = outward(min(values), max(values)) if ticks is None else (min(values), max(values))
        else:
            self.low, self.high = 0, max(values)
        if self.low == self.high:
            self.low, self.high = (self.low / 2, self.high * 2) if log else (0, self.high or 1)
        self.ticks = ticks if ticks is not None else self.round_ticks()
        if not log:
            self.high = max(self.high, self.ticks[-1])

    def at(self, value):
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def round_ticks(self):
        if not self.log:
            step = nice(self.high / 4)
            return [step * count for count in range(math.ceil(self.high / step - 1e-9) + 1)]
        few = math.log10(self.high / self.low) < 3.2
        first, last = math.floor(math.log10(self.low) + 1e-9), math.ceil(math.log10(self.high) - 1e-9)
        found = [factor * 10.0 ** power for power in range(first, last + 1) for factor in ((1, 2, 5) if few else (1,))]
        return [tick for tick in found if self.low * 0.999 <= tick <= self.high * 1.001]


def nice(step):
    """The round number at or above a step."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * 0.999)


def outward(low, high):
    """Round bounds around two values, for a logarithmic axis."""
    def rounds(power):
        return [factor * 10.0 ** power for factor in (1, 2, 5)]
    below = [one for power in range(math.floor(math.log10(low)) - 1, math.floor(math.log10(low)) + 1)
             for one in rounds(power) if one <= low * 1.0001]
    above = [one for power in range(math.floor(math.log10(high)), math.floor(math.log10(high)) + 2)
             for one in rounds(power) if one >= high * 0.9999]
    return max(below), min(above)


class Picture:
    """Panels in a grid, under a title."""

    def __init__(self, title, columns):
        self.title, self.columns, self.panels = title, columns, []

    def add(self, panel):
        self.panels.append(panel)

    def render(self):
        rows = math.ceil(len(self.panels) / self.columns)
        heights = [max(panel.height for panel in self.panels[row * self.columns:(row + 1) * self.columns])
                   for row in range(rows)]
        height = 46 + sum(heights)
        width = WIDTH / self.columns
        described = "; ".join(panel.described() for panel in self.panels)
        out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
               'role="img" aria-labelledby="title description" font-family="system-ui, sans-serif" font-size="12">',
               f'<title id="title">{escape(self.title)}</title>', f'<desc id="description">{escape(described)}</desc>',
               f'<rect width="{WIDTH}" height="{height}" rx="6" fill="{PAPER}" stroke="{FAINT}"/>',
               words(self.title, 16, 27, size=15, weight="600")]
        for index, panel in enumerate(self.panels):
            row, column = divmod(index, self.columns)
            out.append(f'<g transform="translate({column * width:.1f} {40 + sum(heights[:row])})">')
            out += panel.draw(width)
            out.append("</g>")
        return "\n".join([*out, "</svg>"]) + "\n"


class LinePanel:
    """Values along an axis, one line for each series."""

    height = PANEL_HEIGHT

    def __init__(self, title, axes, series, log=(True, True)):
        self.title, (self.x_name, self.y_name), self.log = title, axes, log
        self.series = [one for one in series if one.points]

    def described(self):
        rows = (f"{one.name}: " + ", ".join(f"{number(y)} at {tick_text(x)}" for x, y, _, _ in one.points)
                for one in self.series)
        return f"{self.title}, {self.y_name} by {self.x_name}: " + " / ".join(rows)

    def draw(self, width):
        longest = max([text_width(one.name, 12) for one in self.series] or [0])
        left, right, top, bottom = 58, width - max(100, longest + 16), 50, self.height - 50
        out = [words(self.title, left - 42, 16, weight="600"), words(scaled(self.y_name, self.log[1]), left - 42, 34)]
        if not self.series:
            return [*out, words("not measured", left, 100)]
        points = [point for one in self.series for point in one.points]
        values = sorted({point[0] for point in points})
        x = Axis(values, (left + 8, right - 6), self.log[0], values if self.log[0] else None)
        y = Axis([edge for point in points for edge in point[1:]], (bottom, top), self.log[1])
        for tick in y.ticks:
            at = y.at(tick)
            out += [rule(left, at, right, at), words(tick_text(tick), left - 6, at + 4, anchor="end")]
        out += self.x_ticks(x, bottom)
        middle = (left + right) / 2
        out.append(words(scaled(self.x_name, self.log[0]), middle, bottom + 38, anchor="middle"))
        for one in self.series:
            out += draw_series(one, x, y)
        return out + end_labels(self.series, (x, y), (right, top, bottom))

    @staticmethod
    def x_ticks(x, bottom):
        out, taken = [rule(x.start - 8, bottom, x.end + 6, bottom, INK)], []
        out += [rule(x.at(tick), bottom, x.at(tick), bottom + 4, INK) for tick in x.ticks]
        # Where there is no room for all, the ends and the usual MTU come first.
        first = [x.ticks[-1], *(tick for tick in x.ticks if tick == 1500), x.ticks[0]]
        for tick in dict.fromkeys([*first, *x.ticks]):
            text, at = tick_text(tick), x.at(tick)
            half = text_width(text, 12) / 2 + 3
            if all(at + half <= low or at - half >= high for low, high in taken):
                taken.append((at - half, at + half))
                out.append(words(text, at, bottom + 18, anchor="middle"))
        return out


class BarPanel:
    """One bar for each series, from zero."""

    BAR, STEP = 16, 26

    def __init__(self, title, unit, bars):
        self.title, self.unit, self.bars = title, unit, bars
        self.height = 62 + self.STEP * max(1, len(bars))

    def described(self):
        return f"{self.title}, {self.unit}: " + ", ".join(f"{series.name} {note or number(value[0])}"
                                                         for series, value, note in self.bars)

    def draw(self, width):
        left, right = 16 + max([text_width(series.name, 12) for series, _, _ in self.bars] or [0]), width
        out = [words(self.title, 16, 16, weight="600"), words(self.unit, 16, 34)]
        if not self.bars:
            return [*out, words("not measured", 16, 60)]
        room = max(text_width(note or number(value[0]), 12) for _, value, note in self.bars) + 24
        scale = (right - room - left - 8) / (max(most for _, (_, _, most), _ in self.bars) or 1)
        for index, (series, (value, least, most), note) in enumerate(self.bars):
            top, middle = 44 + index * self.STEP, 44 + index * self.STEP + self.BAR / 2
            colour, end = series.look[0], left + 8 + value * scale
            out += [words(series.name, left, middle + 4, anchor="end", colour=colour, weight=weight(series)),
                    f'<rect x="{left + 8:.1f}" y="{top}" width="{max(0.5, value * scale):.1f}" height="{self.BAR}" fill="{colour}"/>']
            if most > least:
                low, high = left + 8 + least * scale, left + 8 + most * scale
                out += [rule(low, middle, high, middle, INK), rule(low, middle - 4, low, middle + 4, INK),
                        rule(high, middle - 4, high, middle + 4, INK)]
                end = max(end, high)
            out.append(words(note or number(value), end + 6, middle + 4))
        return out


def draw_series(series, x, y):
    colour, shape, dashes = series.look
    places = [(x.at(point[0]), y.at(point[1])) for point in series.points]
    path = " ".join(f"{'L' if index else 'M'}{across:.1f} {down:.1f}" for index, (across, down) in enumerate(places))
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    out = [f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{2.4 if series.name == "tapgate" else 1.6}"{dashed}/>']
    crowded = len(places) > 20
    for (across, down), (_, _, least, most) in zip(places, series.points):
        if most > least and not crowded:
            out.append(rule(across, y.at(least), across, y.at(most), colour))
        if not crowded:
            out.append(marker(shape, across, down, colour))
    return out


def end_labels(series, axes, frame):
    """The names at the ends of the lines, moved apart where lines end together."""
    (x, y), (right, top, bottom) = axes, frame
    ends = sorted(((y.at(one.points[-1][1]), one) for one in series), key=lambda end: (end[0], end[1].name))
    places = [max(top, end[0]) for end in ends]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + LABEL_STEP)
    over = max(0, places[-1] - bottom) if places else 0
    for index in reversed(range(len(places))):
        limit = bottom if index == len(places) - 1 else places[index + 1] - LABEL_STEP
        places[index] = min(places[index], limit) if over else places[index]
    out = []
    for place, (down, one) in zip(places, ends):
        colour, across = one.look[0], x.at(one.points[-1][0])
        out += [f'<path d="M{across + 5:.1f} {down:.1f} L{right + 8:.1f} {place:.1f}" stroke="{colour}" '
                'stroke-width="0.8" stroke-dasharray="1 2" fill="none"/>',
                words(one.name, right + 11, place + 4, colour=colour, weight=weight(one))]
    return out


def marker(shape, x, y, colour):
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" fill="{colour}"/>'
    corners = {"square": ((-3.3, -3.3), (3.3, -3.3), (3.3, 3.3), (-3.3, 3.3)), "triangle": ((0, -4.4), (4.2, 3.2), (-4.2, 3.2)),
               "diamond": ((0, -4.6), (4.6, 0), (0, 4.6), (-4.6, 0))}[shape]
    path = " ".join(f"{x + across:.1f},{y + down:.1f}" for across, down in corners)
    return f'<polygon points="{path}" fill="{colour}"/>'


def rule(x1, y1, x2, y2, colour=FAINT):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def words(text, x, y, anchor="start", size=12, weight="400", colour=INK):
    return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" '
            f'fill={quoteattr(colour)}>{escape(text)}</text>')


def weight(series):
    return "600" if series.name == "tapgate" else "400"


def scaled(name, log):
    return f"{name} (log scale)" if log else name
