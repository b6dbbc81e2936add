"""Which bytes of which part files become which shard, and the list of what was refused."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from llava_steps.core.errors import InputError
from llava_steps.data.samples.sample import SampleError


@dataclass(frozen=True)
class Refused:
    """A record that did not become a sample."""

    index: int
    file: str
    place: int
    """Number of the record in its file."""
    id: str
    message: str


@dataclass(frozen=True)
class Written:
    """A sample in a part file."""

    index: int
    id: str
    end: int
    """Offset after its members; it starts where the one before ends."""


@dataclass(frozen=True)
class Part:
    """What a worker made of one chunk of records."""

    path: Path
    records: int
    samples: tuple[Written, ...]
    refused: tuple[Refused, ...]
    sha256: str
    """Of the part file, which is a whole archive."""


@dataclass(frozen=True)
class Range:
    """Bytes [start, end) of a part file."""

    path: Path
    start: int
    end: int


@dataclass(frozen=True)
class Shard:
    """One tar to be: the bytes of its samples in order."""

    number: int
    samples: int
    ranges: tuple[Range, ...]
    sha256: str | None
    """Set when a whole part file is the shard."""
    last_of: tuple[Path, ...]
    """Part files that no later shard needs."""


@dataclass(frozen=True)
class _Kept:
    """The accepted samples of a part: their borders, two numbers each."""

    part: Path
    borders: array[int]
    sha256: str
    """Of the part file."""


class Plan:
    """Collects parts in source order, then gives the shards.

    Args:
        samples_per_shard: samples in every shard but the last.
    """

    def __init__(self, samples_per_shard: int) -> None:
        self._size = samples_per_shard
        self._kept: list[_Kept] = []
        self._ids: dict[bytes, bool] = {}
        self.records = self.written = self.refused = 0
        self.duplicate_ids = 0
        self.reasons: Counter[str] = Counter()

    def add(self, part: Part) -> list[Refused]:
        """Take in the next part; returns its refused records in order.

        Samples may share an id: the mixes that people publish are full of them. They are counted,
        and distinguished by their keys.
        """
        borders, start = array("Q"), 0
        for sample in part.samples:
            # Hashed, so that a hundred million ids fit into memory.
            key = hashlib.blake2b(sample.id.encode(), digest_size=12).digest()
            again = self._ids.get(key)
            self.duplicate_ids += again is False
            self._ids[key] = again is not None
            borders.extend((start, sample.end))
            start = sample.end
        kept = len(borders) // 2
        self._kept.append(_Kept(part.path, borders, part.sha256))
        self.records += part.records
        self.written += kept
        self.refused += len(part.refused)
        self.reasons.update(SampleError(item.message).reason for item in part.refused)
        if part.records != kept + len(part.refused):
            raise AssertionError(f"{part.path}: samples in are not samples out plus quarantined")
        return sorted(part.refused, key=lambda item: item.index)

    def check(self, limit: float, source: Path, quarantine: Path) -> None:
        """Raise InputError when too much was refused or nothing is left."""
        if self.records == 0:
            raise InputError(f"{source} holds no records")
        share = self.refused / self.records
        if share > limit or self.written == 0:
            common = "; ".join(f"{count} x {why}" for why, count in self.reasons.most_common(10))
            raise InputError(
                f"{self.refused} of {self.records} samples of {source} cannot be used "
                f"({share:.2%}, quarantine_limit is {limit:.2%}): {common}. Each is listed in "
                f"{quarantine}; correct the data or raise quarantine_limit"
            )

    def shards(self) -> Iterator[Shard]:
        """Shards in order, each with `samples_per_shard` samples, the last with the rest."""
        number = samples = 0
        ranges: list[Range] = []
        done: list[Path] = []
        whole: str | None = None
        for kept in self._kept:
            count = len(kept.borders) // 2
            for index in range(count):
                start, end = kept.borders[2 * index], kept.borders[2 * index + 1]
                if ranges and ranges[-1].path == kept.part and ranges[-1].end == start:
                    ranges[-1] = replace(ranges[-1], end=end)
                else:
                    ranges.append(Range(kept.part, start, end))
                samples += 1
                whole = None
                if index + 1 == count:
                    done.append(kept.part)
                    if samples == count:
                        whole = kept.sha256
                if samples == self._size:
                    yield Shard(number, samples, tuple(ranges), whole, tuple(done))
                    number, samples, ranges, done, whole = number + 1, 0, [], [], None
        if samples:
            yield Shard(number, samples, tuple(ranges), whole, tuple(done))
