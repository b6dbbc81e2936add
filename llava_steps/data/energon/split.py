"""Tars to train, val and test."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from llava_steps.core.apportion import largest_remainder
from llava_steps.core.errors import ConfigError

PARTS = ("train", "val", "test")


def split(names: Sequence[str], ratio: Sequence[int]) -> dict[str, list[str]]:
    """Consecutive tars for train, val and test in the proportion `ratio`.

    Every tar goes somewhere: largest remainder, ties to the earlier part. Train is never empty;
    a part with ratio 0 is.

    Raises:
        ConfigError: train has ratio 0, or there are no tars.
    """
    if len(ratio) != len(PARTS) or ratio[0] <= 0 or min(ratio) < 0:
        raise ConfigError(f"split is {list(ratio)}; it needs three parts and train above 0")
    if not names:
        raise ConfigError("there are no tars to split")
    counts = largest_remainder([Fraction(part) for part in ratio], len(names))
    if counts[0] == 0:
        counts[counts.index(max(counts))] -= 1
        counts[0] = 1
    assigned, start = {}, 0
    for part, count in zip(PARTS, counts, strict=True):
        assigned[part] = list(names[start : start + count])
        start += count
    return assigned
