"""Draw charts as inline SVG. They scale with the page, need no script, and keep their text as text.

Matplotlib's SVG would be as large. But its colours and text sizes are fixed, while these follow the page's style: on a dark page, and
on a phone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 34
# Okabe and Ito's colours, which can be told apart with any kind of colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#b8a800")
# Larger numbers cannot be drawn, because the distance of two of them may be infinite.
LARGEST = 1e300
SMALLEST = 1e-280
# The most points of a line. A longer line is thinned out to the extremes of equal stretches, so that no peak is lost.
POINTS = 400


@dataclass(frozen=True)
class Line:
    label: str
    x: Sequence[float]
    y: Sequence[float]
    """The values. One that is not finite, or is larger than :data:`LARGEST`, is a gap."""


def line_chart(title: str, lines: Sequence[Line], x_label: str) -> str:
    """Return a figure with its legend, or the empty string if no value can be drawn."""
    lines = [line for line in lines if any(map(_drawable, line.y))]
    if not lines:
        return ""
    low, high = _range([y for line in lines for y in line.y if _drawable(y)])
    left, right = _range([x for line in lines for x in line.x], pad=0)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT),
            TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM),
        )

    parts = [_axes(place, left, right, low, high, x_label)]
    legend = []
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        dash = ' stroke-dasharray="5 3"' if number >= len(COLOURS) else ""
        for piece in _pieces(line):
            points = [place(x, y) for x, y in piece]
            if len(points) == 1:
                parts.append(f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="2.5" fill="{colour}"/>')
            else:
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
                parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dash}/>')
        legend.append(f'<span><i style="background:{colour}"></i>{escape(line.label)}</span>')
    return _figure(title, "".join(parts), WIDTH, HEIGHT, "".join(legend) if len(lines) > 1 else "")


def heatmap(title: str, rows: Sequence[tuple[str, Sequence[float]]], x: Sequence[float], centre: float, x_label: str) -> str:
    """Return a figure of values by row and column, or the empty string if no value is finite.

    Values above ``centre`` are blue, values below are orange. The last value of each row is also given in figures. There may be any
    number of rows; more than 60 columns are averaged down to 60.
    """
    columns = min(60, len(x))
    bounds = [len(x) * i // columns for i in range(columns + 1)]
    table = [(label, [_mean(values[a:b]) for a, b in itertools.pairwise(bounds)]) for label, values in rows]
    finite = [abs(value - centre) for _, values in table for value in values if math.isfinite(value)]
    if not finite:
        return ""
    reach = max(finite) or 1.0
    cell, left, right = max(14.0, min(20.0, 200 / len(table))), 66, 56
    height = TOP + cell * len(table) + BOTTOM
    step = (WIDTH - left - right) / columns
    parts = []
    for number, (label, values) in enumerate(table):
        y = TOP + number * cell
        middle = y + cell / 2 + 3.5
        parts.append(f'<text x="{left - 5}" y="{middle:.1f}" text-anchor="end">{escape(label)}</text>')
        for column, value in enumerate(values):
            if math.isfinite(value):
                share = (value - centre) / reach
                colour = COLOURS[0] if share > 0 else COLOURS[1]
                parts.append(
                    f'<rect x="{left + column * step:.2f}" y="{y:.2f}" width="{step + 0.3:.2f}" height="{cell + 0.3:.2f}" '
                    f'fill="{colour}" fill-opacity="{abs(share):.2f}"/>'
                )
        last = next((value for value in reversed(values) if math.isfinite(value)), math.nan)
        parts.append(f'<text x="{WIDTH - right + 5}" y="{middle:.1f}">{_number(last, 3)}</text>')
    bottom = TOP + cell * len(table) + 14
    parts.append(f'<text x="{left}" y="{bottom:.1f}">{_number(x[0])}</text>')
    parts.append(f'<text x="{WIDTH - right}" y="{bottom:.1f}" text-anchor="end">{_number(x[-1])}</text>')
    parts.append(f'<text x="{(left + WIDTH - right) / 2}" y="{bottom:.1f}" text-anchor="middle">{escape(x_label)}</text>')
    scale = "".join(
        f'<span><i style="background:{colour}"></i>{_number(value, 3)}</span>'
        for colour, value in ((COLOURS[1], centre - reach), ("transparent", centre), (COLOURS[0], centre + reach))
    )
    return _figure(title, "".join(parts), WIDTH, height, scale)


def intervals(title: str, rows: Sequence[tuple[str, float, float, float]], zero: float, x_label: str) -> str:
    """Return a figure of estimates with their intervals, or the empty string if there are no rows.

    Each row is (label, low, estimate, high). A stroke marks ``zero``, where there is no difference. Names and figures stand above
    their lines and may take the whole width, because a phone has no room for them beside the lines.
    """
    if not rows:
        return ""
    low, high = _range([value for row in rows for value in row[1:]] + [zero])
    left, line = RIGHT, 36
    height = TOP + line * len(rows) + BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - low) / (high - low) * (WIDTH - left - RIGHT), y

    axis = TOP + line * len(rows)
    parts = []
    for tick in _ticks(low, high, 4):
        x, _ = place(tick, 0)
        parts.append(f'<text x="{x:.1f}" y="{axis + 14}" text-anchor="middle">{_number(tick)}</text>')
    none, _ = place(zero, 0)
    for number, (label, first, estimate, last) in enumerate(rows):
        y = TOP + line * (number + 0.75)
        colour = COLOURS[0] if first > zero else COLOURS[1] if last < zero else COLOURS[6]
        a, b, c = (place(value, y)[0] for value in (first, estimate, last))
        figures = f"{_number(estimate, 3)} [{_number(first, 3)}, {_number(last, 3)}]"
        room = 52 - len(figures)
        shown = label if len(label) <= room else label[: room - 1] + "…"
        parts.append(f'<text x="{left}" y="{y - 10:.1f}">{escape(shown)}</text>')
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{y - 10:.1f}" text-anchor="end">{figures}</text>')
        parts.append(f'<line x1="{none:.1f}" x2="{none:.1f}" y1="{y - 7}" y2="{y + 7}" class="axis"/>')
        parts.append(f'<line x1="{a:.1f}" x2="{c:.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<circle cx="{b:.1f}" cy="{y}" r="4" fill="{colour}"/>')
    parts.append(f'<text x="{(left + WIDTH - RIGHT) / 2}" y="{axis + 29}" text-anchor="middle">{escape(x_label)}</text>')
    return _figure(title, "".join(parts), WIDTH, height, "")


def _figure(title: str, inside: str, width: float, height: float, legend: str) -> str:
    legend = f'<div class="legend">{legend}</div>' if legend else ""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">{inside}</svg>{legend}</figure>'
    )


def _axes(place, left: float, right: float, low: float, high: float, x_label: str) -> str:
    parts = []
    for tick in _ticks(low, high, 5):
        x, y = place(left, tick)
        parts.append(f'<line x1="{x:.1f}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="rule"/>')
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 3.5:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in _ticks(left, right, 5):
        x, y = place(tick, low)
        parts.append(f'<text x="{x:.1f}" y="{y + 14:.1f}" text-anchor="middle">{_number(tick)}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}" class="axis"/>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    return "".join(parts)


def _pieces(line: Line) -> list[list[tuple[float, float]]]:
    """Return the stretches of a line between its gaps, each thinned out."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if _drawable(y):
            pieces[-1].append((x, y))
        elif pieces[-1]:
            pieces.append([])
    return [_thin(piece) for piece in pieces if piece]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= POINTS:
        return points
    kept = [points[0]]
    stretches = POINTS // 2
    for number in range(stretches):
        stretch = points[len(points) * number // stretches : len(points) * (number + 1) // stretches]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return [*kept, points[-1]]


def _range(values: Sequence[float], pad: float = 0.05) -> tuple[float, float]:
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if high - low <= max(1e-12 * size, SMALLEST):  # the two are too close for ticks between them
        space = 0.1 * size if size > SMALLEST else 1.0
        return low - space, high + space
    return low - pad * (high - low), high + pad * (high - low)


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Return round numbers from ``low`` to ``high``, roughly ``about`` of them, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def _drawable(value: float) -> bool:
    return abs(value) <= LARGEST  # false for NaN


def _number(value: float, digits: int = 4) -> str:
    if abs(value) < 1e-12:
        return "0"
    return f"{value:.{digits}g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.2g}"


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if _drawable(value)]
    return sum(finite) / len(finite) if finite else math.nan
