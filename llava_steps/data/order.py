"""The order of training samples: a pure function of (seed, dataset digest, epoch, position).

Each epoch is a permutation of the samples, made by a small Feistel network that is walked until it
falls inside the range. Looking up one position costs some microseconds and no memory whatever the
number of samples, so the loader's whole state is one integer: the samples consumed so far.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

ROUNDS = 8


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


@lru_cache(maxsize=4)
def _round_keys(name: str, epoch: int) -> tuple[bytes, ...]:
    return tuple(
        blake2b(f"{name}:{epoch}:{number}".encode(), digest_size=32).digest()
        for number in range(ROUNDS)
    )
