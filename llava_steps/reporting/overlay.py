"""Several curves in one chart, with a legend."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from llava_steps.reporting import charts

TONES = 7
"""Colours of lines; after them the same colours are dashed."""


@dataclass(frozen=True)
class Line:
    """A curve and its name in the legend."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    tone: str
    """CSS classes of colour and dashes."""
    dots: bool = False
    """Whether each point is marked."""


def tone(position: int) -> str:
    """CSS classes for the line at a position, counted from 0."""
    dash = position // TONES % 4
    return f"tone-{1 + position % TONES}" + (f" dash-{dash}" if dash else "")


def chart(title: str, lines: Sequence[Line], from_zero: bool = True, unit: str = "step") -> Markup:
    """The lines over steps; those without a finite value are left out.

    Args:
        title: start of the label for screen readers.
        lines: in the order in which they are drawn, later ones above.
        from_zero: whether the axis begins at 0.
        unit: what the lower axis counts.
    """
    thinned = [(line, charts.thin(line.xs, line.ys)) for line in lines]
    drawn = [(line, points) for line, points in thinned if points]
    if not drawn:
        return Markup("")
    means = [point.mean for _, points in drawn for point in points]
    low, high = min(means), max(means)
    last = max(point.x for _, points in drawn for point in points)
    scale_y = charts.ticks(min(0.0, low) if from_zero else low, high)
    scale_x = [x for x in charts.ticks(0, last) if x <= last * 1.0001]
    x, y = charts.scales(0, max(last, 1), scale_y[0], scale_y[-1])
    body = charts.grid(scale_x, scale_y, x, y)
    ends = []
    for line, points in drawn:
        at = [(x(point.x), y(point.mean)) for point in points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
        body += f'<polyline class="curve {line.tone}" points="{path}"/>'
        dots = at if line.dots else at[-1:]
        body += "".join(
            f'<circle class="dot {line.tone}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in dots
        )
        ends.append(f"{line.name} {charts.number(points[-1].mean)}")
    label = f"{title}, at the end: {'; '.join(ends)}"
    return charts.drawing(label, body + charts.axis(unit))


def legend(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """A row for each line of a chart: name, classes, and whether it has values."""
    return [
        {"name": line.name, "tone": line.tone, "drawn": any(map(math.isfinite, line.ys))}
        for line in lines
    ]
