"""Curves and histograms as inline SVG. Colours are CSS classes, so that CSS does dark mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from llava_steps.reporting.html import clean

WIDTH, HEIGHT = 440, 216
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 34
POINTS = 220
"""Largest number of points of a curve; with more steps each point summarises several."""


@dataclass(frozen=True)
class Point:
    """One point of a curve: several consecutive steps."""

    x: float
    low: float
    mean: float
    high: float


def thin(xs: Sequence[float], ys: Sequence[float], count: int = POINTS) -> list[Point]:
    """At most `count` points in order; each has the smallest, mean and largest value it covers.

    Values that are not finite are left out.
    """
    kept = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    size = max(1, math.ceil(len(kept) / count))
    points = []
    for start in range(0, len(kept), size):
        part = kept[start : start + size]
        values = [y for _, y in part]
        middle = sum(x for x, _ in part) / len(part)
        points.append(Point(middle, min(values), sum(values) / len(values), max(values)))
    return points


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover [low, high], about `count` of them."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A short number for an axis: 0.002 as 2e-3, 12000 as 12k."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 0.01:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    for limit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.4g}{sign}"
    return f"{value:.4g}"


def curve(
    title: str, xs: Sequence[float], ys: Sequence[float], kind: str, from_zero: bool = True
) -> Markup:
    """A curve over steps; where a point stands for several steps a band shows their range.

    Args:
        title: start of the label for screen readers.
        xs, ys: steps, counted from 1, and values; values that are not finite are left out.
        kind: CSS class of the colour.
        from_zero: whether the axis begins at 0.
    """
    points = thin(xs, ys)
    if not points:
        return Markup("")
    low = min(point.low for point in points)
    high = max(point.high for point in points)
    scale_y = ticks(min(0.0, low) if from_zero else low, high)
    scale_x = [x for x in ticks(0, max(xs)) if x <= max(xs) * 1.0001]
    x, y = scales(0, max(max(xs), 1), scale_y[0], scale_y[-1])
    line = " ".join(f"{x(p.x):.1f},{y(p.mean):.1f}" for p in points)
    upper = [f"{x(p.x):.1f},{y(p.high):.1f}" for p in points]
    lower = [f"{x(p.x):.1f},{y(p.low):.1f}" for p in reversed(points)]
    band = f'<polygon class="band {kind}" points="{" ".join(upper + lower)}"/>'
    last = points[-1]
    body = (
        grid(scale_x, scale_y, x, y)
        + (band if len(points) < len(ys) else "")
        + f'<polyline class="curve {kind}" points="{line}"/>'
        + f'<circle class="dot {kind}" cx="{x(last.x):.1f}" cy="{y(last.mean):.1f}" r="3.5"/>'
    )
    label = f"{title}: {number(points[0].mean)} at the beginning, {number(last.mean)} at the end"
    label += f", between {number(low)} and {number(high)}, over {len(ys)} steps"
    return drawing(label, body + axis("step"))


def histogram(title: str, rows: Sequence[tuple[float, float, int]], unit: str) -> Markup:
    """Bars of [from, to) and a count."""
    if not rows:
        return Markup("")
    scale_y = ticks(0, max(count for _, _, count in rows))
    low, high = rows[0][0], rows[-1][1]
    scale_x = [x for x in ticks(low, high, 5) if low <= x <= high]
    x, y = scales(low, high, scale_y[0], scale_y[-1])
    bars = "".join(
        f'<rect class="bar" x="{x(a) + 1:.1f}" y="{y(count):.1f}" '
        f'width="{max(x(b) - x(a) - 2, 1):.1f}" height="{y(0) - y(count):.1f}" rx="2">'
        f"<title>{number(a)} to {number(b - 1)}: {count}</title></rect>"
        for a, b, count in rows
    )
    total = sum(count for _, _, count in rows)
    label = f"{title}: {total} between {number(low)} and {number(high - 1)} {unit}"
    return drawing(label, grid(scale_x, scale_y, x, y) + bars + axis(unit))


Scale = Callable[[float], float]


def scales(x0: float, x1: float, y0: float, y1: float) -> tuple[Scale, Scale]:
    """From values to places in the drawing, for [x0, x1] and [y0, y1]."""
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    return (
        lambda value: LEFT + (value - x0) / (x1 - x0) * wide,
        lambda value: TOP + (1 - (value - y0) / (y1 - y0)) * high,
    )


def grid(xs: Sequence[float], ys: Sequence[float], x: Scale, y: Scale) -> str:
    """Lines at `ys`, and the numbers of both axes."""
    lines = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text class="tick end" x="{LEFT - 8}" y="{y(v) + 4:.1f}">{number(v)}</text>'
        for v in ys
    )
    below = HEIGHT - BOTTOM + 17
    return lines + "".join(
        f'<text class="tick middle" x="{x(v):.1f}" y="{below}">{number(v)}</text>' for v in xs
    )


def axis(text: str) -> str:
    """What the lower axis counts."""
    return f'<text class="tick end" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}">{escape(text)}</text>'


def drawing(label: str, body: str) -> Markup:
    """A chart with a label for screen readers; `body` is already escaped."""
    return Markup(  # noqa: S704  numbers, and texts escaped above
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(clean(label))}">{body}</svg>'
    )
