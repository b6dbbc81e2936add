"""Sizes, counts and durations as text."""

from __future__ import annotations

import math
from collections.abc import Sequence


def size(number: float) -> str:
    """Bytes as 999 bytes, 1.7 MiB or 64.3 GiB."""
    if number < 1024:
        return f"{number:.0f} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        number /= 1024
        if number < 1024:
            return f"{number:.1f} {unit}"
    return f"{number / 1024:.1f} TiB"


def count(number: float) -> str:
    """A count as 451,072, 6.63M or 1.81B."""
    for limit, sign in ((1e9, "B"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:.3g}{sign}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """A time as 0.4 s, 48 s, 6 min 43 s, 3 h 20 min or 2 d 12 h."""
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24:02d} h"


def listing(items: Sequence[str], most: int, separator: str = ", ") -> str:
    """The first `most` texts, and the number of the others."""
    more = f"{separator}and {len(items) - most} more" if len(items) > most else ""
    return separator.join(items[:most]) + more
