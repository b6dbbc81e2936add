"""Sizes, counts and times as text."""

from __future__ import annotations

import math


def memory(number: float) -> str:
    """Bytes as KiB, MiB or GiB, as memory is sold."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number / 1024:.1f} KiB"


def size(number: float) -> str:
    """Bytes as kB, MB, GB or TB, as disks are sold."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def amount(number: float) -> str:
    """A count with k, M or G."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """A measured time as 48 s, 6 min 43 s or 3 h 20 min."""
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def estimate(hours: float) -> str:
    """An estimated time, rounded: 30.0 min, 3.3 h or 2.5 days."""
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
