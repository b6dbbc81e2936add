"""Whole numbers in proportion."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def largest_remainder(weights: Sequence[float] | Sequence[Fraction], total: int) -> list[int]:
    """`total` divided in proportion to `weights`: rounded down, the rest to the largest remainders.

    Equal remainders go to the first. Fractions are divided exactly.
    """
    whole = sum(weights)
    exact = [weight / whole * total for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return counts
