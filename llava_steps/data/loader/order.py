"""The order of training samples: a pure function of (seed, digest, epoch, position).

Each epoch is a permutation of the samples, made by a small Feistel network that is walked until it
falls inside the range. Looking up one position costs some microseconds and no memory whatever the
number of samples, so the loader's whole state is one integer: the samples consumed so far.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate
from typing import Protocol

from llava_steps.core.apportion import largest_remainder

ROUNDS = 8
BLOCK = 10_000
"""Positions in which a weighted blend keeps its proportions exactly."""


class Order(Protocol):
    """Endless sequence of (dataset, index of a sample in it)."""

    def __getitem__(self, position: int) -> tuple[int, int]:
        """The entry at `position` >= 0."""


class SampleOrder:
    """Endless sequence of sample indices: epoch after epoch, each a fresh permutation.

    Args:
        size: samples in the split, at least 1.
        seed: seed of the run.
        digest: digest of the dataset split (any text); another dataset has another order.
    """

    def __init__(self, size: int, seed: int, digest: str) -> None:
        if size < 1:
            raise ValueError(f"an order needs at least one sample, got {size}")
        self.size = size
        self._name = f"{seed}:{digest}"
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)

    def __getitem__(self, position: int) -> int:
        """Index of the sample at `position` >= 0; position // size is the epoch."""
        if position < 0:
            raise IndexError(f"positions start at 0, got {position}")
        epoch, value = divmod(position, self.size)
        keys = _round_keys(self._name, epoch)
        while True:
            value = self._encrypt(value, keys)
            if value < self.size:
                return value

    def _encrypt(self, value: int, keys: tuple[bytes, ...]) -> int:
        """One pass of the network: a bijection on [0, 4 ** half)."""
        mask = (1 << self._half) - 1
        left, right = value >> self._half, value & mask
        for key in keys:
            digest = blake2b(right.to_bytes(8, "little"), key=key, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        return left << self._half | right


class EpochOrder:
    """Datasets in one permutation per epoch, each of their samples `repetitions` times in it.

    Args:
        sizes: samples of each dataset, at least 1.
        repetitions: how often an epoch has each sample of a dataset, at least 1.
        seed, digest: as for `SampleOrder`; with one dataset and one repetition it is that order.
    """

    def __init__(
        self, sizes: Sequence[int], repetitions: Sequence[int], seed: int, digest: str
    ) -> None:
        self._sizes = tuple(sizes)
        counts = [size * times for size, times in zip(sizes, repetitions, strict=True)]
        self._starts = (0, *accumulate(counts))
        self._order = SampleOrder(self._starts[-1], seed, digest)
        self.size = self._order.size

    def __getitem__(self, position: int) -> tuple[int, int]:
        slot = self._order[position]
        dataset = bisect_right(self._starts, slot) - 1
        return dataset, (slot - self._starts[dataset]) % self._sizes[dataset]


class WeightedOrder:
    """Datasets in fixed proportions, each going through its own epochs.

    Every block of `BLOCK` positions holds a fixed number of samples of each dataset, its share of
    the weights rounded by largest remainder, at permuted slots.

    Args:
        sizes: samples of each dataset, at least 1.
        weights: positive; only their proportions count.
        seed, digest: as for `SampleOrder`.
        block: positions of a block.

    Raises:
        ValueError: a weight is so small that its dataset would never be seen; the message names
            the dataset's number.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int,
        digest: str,
        block: int = BLOCK,
    ) -> None:
        self.counts = largest_remainder(weights, block)
        if 0 in self.counts:
            raise ValueError(
                f"dataset {self.counts.index(0)} gets none of {block} samples; raise its weight"
            )
        self._starts = (0, *accumulate(self.counts))
        self._slots = SampleOrder(block, seed, f"{digest}:places")
        self._orders = [
            SampleOrder(size, seed, f"{digest}:{number}") for number, size in enumerate(sizes)
        ]
        self._block = block

    def __getitem__(self, position: int) -> tuple[int, int]:
        slot = self._slots[position]
        dataset = bisect_right(self._starts, slot) - 1
        before = position // self._block * self.counts[dataset]
        return dataset, self._orders[dataset][before + slot - self._starts[dataset]]


@lru_cache(maxsize=64)
def _round_keys(name: str, epoch: int) -> tuple[bytes, ...]:
    return tuple(
        blake2b(f"{name}:{epoch}:{number}".encode(), digest_size=32).digest()
        for number in range(ROUNDS)
    )
