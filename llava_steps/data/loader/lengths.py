"""Lengths of samples in tokens, shared by the processes of a node while a training runs.

Planning a packed global batch takes the lengths of all its samples on every rank. The first process
that needs one finds it out and leaves it here. A length is one aligned word that every process
would write alike, so there is nothing to lock; where a word is not seen in time (another node, say)
it is computed once more.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np


class Lengths:
    """A table int32 [count] in a file; 0 where nothing is known yet.

    Args:
        directory: of this attempt of the training; the file is made in it.
        key: what the lengths depend on; another key has another table.
        count: samples.
    """

    def __init__(self, directory: Path, key: str, count: int) -> None:
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        self._path = directory / f"lengths-{name}.i32"
        self._count = count
        self._table: np.memmap[tuple[int], np.dtype[np.int32]] | None = None

    def _open(self) -> np.memmap[tuple[int], np.dtype[np.int32]]:
        if self._table is None:
            with open(self._path, "ab") as file:
                file.truncate(4 * self._count)
            self._table = np.memmap(self._path, np.int32, "r+", shape=(self._count,))
        return self._table

    def __getitem__(self, number: int) -> int:
        """Length of sample `number`, or 0."""
        return int(self._open()[number])

    def __setitem__(self, number: int, length: int) -> None:
        self._open()[number] = length
