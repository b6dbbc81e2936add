"""Which samples of a global batch share a row: a pure function of their lengths.

Every rank computes the same plan, so nothing has to be agreed upon.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapify, heapreplace

_EXCHANGES, _PARTNERS = 4, 32
"""Exchanges tried for each row, and the shortest rows that the longest one may exchange with."""


def pack(lengths: Sequence[int], capacity: int, ranks: int) -> list[list[int]]:
    """Rows of samples, each row at most `capacity` tokens; their number is a multiple of `ranks`.

    Best fit decreasing (longest sample first, each to the fullest row that takes it; Johnson 1974)
    says how many rows are needed. Longest processing time first (each to the emptiest row; Graham
    1969) then fills as many rows evenly; its rows are taken when they fit, else those of the first.
    Last, the longest row exchanges samples with shorter ones as long as it gets shorter, so that
    rows which have to be padded to one length waste little.

    Args:
        lengths: tokens of each sample, 1 to `capacity`; their number a multiple of `ranks`.
        capacity: tokens of a row.
        ranks: data parallel size.

    Returns:
        Numbers of samples, rising within a row; rows in the order of their first samples, none
        empty. Every number occurs once.

    Raises:
        ValueError: a length does not fit, or the samples cannot be shared by the ranks.
    """
    if not lengths or len(lengths) % ranks:
        raise ValueError(f"{len(lengths)} samples cannot be shared by {ranks} ranks")
    if not 0 < min(lengths) <= max(lengths) <= capacity:
        raise ValueError(f"lengths from {min(lengths)} to {max(lengths)} in rows of {capacity}")
    falling = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows = _fullest_first(falling, lengths, capacity)
    count = -(-len(rows) // ranks) * ranks
    rows = _emptiest_first(falling, lengths, capacity, count) or _spread(rows, count)
    return sorted(sorted(row) for row in _level(rows, lengths))


def _fullest_first(
    falling: Sequence[int], lengths: Sequence[int], capacity: int
) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []
    """(tokens left, row), rising."""
    for number in falling:
        length = lengths[number]
        index = bisect_left(room, (length, -1))
        if index == len(room):
            rows.append([])
            left, row = capacity, len(rows) - 1
        else:
            left, row = room.pop(index)
        rows[row].append(number)
        insort(room, (left - length, row))
    return rows


def _emptiest_first(
    falling: Sequence[int], lengths: Sequence[int], capacity: int, count: int
) -> list[list[int]] | None:
    rows: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, row) for row in range(count)]
    heapify(loads)
    for number in falling:
        load, row = loads[0]
        if load + lengths[number] > capacity:
            return None
        rows[row].append(number)
        heapreplace(loads, (load + lengths[number], row))
    return rows


def _spread(rows: list[list[int]], count: int) -> list[list[int]]:
    """`rows` and further ones up to `count`, each with one sample of the row that has most."""
    rows = [list(row) for row in rows]
    while len(rows) < count:
        rows.append([max(rows, key=len).pop()])
    return rows


def _level(rows: list[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    """`rows` after exchanges of one sample for a shorter one or none with the longest row."""
    rows = [list(row) for row in rows]
    loads = [sum(lengths[i] for i in row) for row in rows]
    for _ in range(_EXCHANGES * len(rows)):
        longest = max(range(len(rows)), key=loads.__getitem__)
        best = min(
            (
                (max(loads[longest] - change, loads[other] + change), other, give, take)
                for other in sorted(range(len(rows)), key=loads.__getitem__)[:_PARTNERS]
                for give in rows[longest]
                for take, short in [(-1, 0), *((i, lengths[i]) for i in rows[other])]
                if 0 < (change := lengths[give] - short) < loads[longest] - loads[other]
            ),
            default=None,
        )
        # A row of one sample that is the longest has nothing to give: it would be left empty.
        if best is None or len(rows[longest]) == 1:
            break
        _, other, give, take = best
        rows[longest].remove(give)
        rows[other].append(give)
        change = lengths[give]
        if take >= 0:
            rows[other].remove(take)
            rows[longest].append(take)
            change -= lengths[take]
        loads[longest] -= change
        loads[other] += change
    return rows
