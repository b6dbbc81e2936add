"""Samples to tar shards: deterministic, parallel, in one pass over the images.

Worker k turns the records [k * N, (k + 1) * N) into one file of tar members and reports where each
sample lies in it. As long as nothing was refused such a file is shard k and only gets its name;
from the first refused sample on, shards are put together from ranges of these files
(plan.py), so that shard k always holds the accepted samples [k * N, (k + 1) * N) and the
number of workers leaves no trace. A sample's key is the number of its record in the source: it
leads back to the data.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llava_steps.core import filesystem
from llava_steps.data import pool
from llava_steps.data.energon.metadata import SHARDS
from llava_steps.data.samples.sample import SampleError, to_parts
from llava_steps.data.shards import tars
from llava_steps.data.shards.plan import Part, Plan, Refused, Shard, Written
from llava_steps.data.sources import Chunk, Source

QUARANTINE = "quarantine.jsonl"
KEY_DIGITS = 9
_COPY = 1 << 22
_SMALL = 4096
_PIECES = 1000
"""Most that one `writev` takes."""


@dataclass(frozen=True)
class Settings:
    """What workers need to know; see `TarShards` for the meaning."""

    source: Source
    entry: Path
    samples_per_shard: int


def write_shards(
    settings: Settings,
    workers: int,
    quarantine_limit: float,
    advance: Callable[[int], None] = lambda _: None,
    made: Iterable[Part] | None = None,
) -> dict[str, Any]:
    """Write all shards, `quarantine.jsonl` and `shards.json` into `settings.entry`.

    Args:
        settings: source and destination.
        workers: processes.
        quarantine_limit: share of refused samples above which nothing is kept.
        advance: called with the number of records that were done.
        made: parts of all chunks that other jobs have made; they stay as they are.

    Returns:
        Metrics: samples_in, samples_written, samples_quarantined, quarantine_reasons, duplicate_ids
        (ids that occur more than once), shards and bytes.

    Raises:
        InputError: no usable sample, or a larger share of refused ones than `quarantine_limit`.
    """
    entry = settings.entry
    plan = Plan(settings.samples_per_shard)
    lines = []
    if made is None:
        chunks = settings.source.chunks(settings.samples_per_shard)
        parts: Iterable[Part] = pool.ordered(partial(make_part, settings), chunks, workers)
    else:
        parts = made
    # To stable storage beside the work; else the one who seals the entry waits for all of it.
    with ThreadPoolExecutor(1) as disk:
        flushed = []
        for part in parts:
            flushed.append(disk.submit(filesystem.fsync_path, part.path))
            for refused in plan.add(part):
                row = {
                    "file": refused.file, "place": refused.place, "index": refused.index,
                    "id": refused.id, "reason": refused.message,
                }  # fmt: skip
                lines.append(json.dumps(row, sort_keys=True) + "\n")
            advance(part.records)
        for done in flushed:
            done.result()
    filesystem.write_bytes(entry / QUARANTINE, "".join(lines).encode())
    plan.check(quarantine_limit, settings.source.path, entry / QUARANTINE)
    rows = _finish(entry, list(plan.shards()), workers, keep=made is not None)
    filesystem.remove_temporaries(entry)
    filesystem.write_json(entry / SHARDS, {"shards": rows})
    return {
        "samples_in": plan.records,
        "samples_written": plan.written,
        "samples_quarantined": plan.refused,
        "quarantine_reasons": dict(sorted(plan.reasons.items())),
        "duplicate_ids": plan.duplicate_ids,
        "shards": len(rows),
        "bytes": sum(row["size"] for row in rows),
    }


def make_part(settings: Settings, chunk: Chunk) -> Part:
    """Write the usable records of `chunk` to a part file, a whole tar; runs in a worker."""
    path = settings.entry / f"{filesystem.TEMPORARY}part-{chunk.start:0{KEY_DIGITS}d}"
    samples, refused = [], []
    with _Writer(path) as out:
        for item in settings.source.read(chunk):
            try:
                sample = settings.source.sample(item)
                parts = to_parts(sample)
            except SampleError as error:
                label = settings.source.label(item)
                refused.append(Refused(item.index, item.file, item.place, label, str(error)))
                continue
            key = f"{item.index:0{KEY_DIGITS}d}."
            out.write(_members(key, parts))
            samples.append(Written(item.index, sample.id, out.size))
        out.write([tars.ending(out.size)])
    return Part(path, chunk.size, tuple(samples), tuple(refused), out.sha256)


def _members(key: str, parts: list[tuple[str, bytes]]) -> list[bytes]:
    """What the parts look like in a tar; small pieces joined, large ones as they are."""
    pieces: list[bytes] = []
    small: list[bytes] = []
    for part, data in parts:
        header, _, padding = tars.member(key + part, data)
        if len(data) < _SMALL:
            small += (header, data, padding)
        else:
            pieces += (b"".join((*small, header)), data)
            small = [padding]
    pieces.append(b"".join(small))
    return pieces


class _Writer:
    """A file with its size and sha256."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  closed by __exit__
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, pieces: list[bytes]) -> None:
        """Append some pieces with one system call."""
        for piece in pieces:
            self._digest.update(piece)
        length = sum(map(len, pieces))
        if len(pieces) > _PIECES or os.writev(self._file.fileno(), pieces) != length:
            self._file.seek(self.size)  # a full disk says so here
            data = memoryview(b"".join(pieces))
            while data:
                data = data[self._file.write(data) :]
        self.size += length

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _finish(entry: Path, shards: list[Shard], workers: int, keep: bool) -> list[dict[str, Any]]:
    """Give shards their final names; their rows of `shards.json`.

    Whole parts only get a name; the others are put together by workers, if there are any. With
    `keep` the part files stay where they are.
    """
    torn = [shard for shard in shards if shard.sha256 is None]
    made = pool.ordered(partial(_assemble, entry), torn, workers) if torn else iter(())
    rows = []
    for shard in shards:
        final = entry / f"{shard.number:06d}.tar"
        digest = shard.sha256
        if digest is None:
            digest = next(made)
            os.replace(_temporary(entry, shard), final)
        elif keep:
            filesystem.link_or_copy(shard.ranges[0].path, final)
        else:
            os.replace(shard.ranges[0].path, final)
        for path in () if keep else shard.last_of:
            path.unlink(missing_ok=True)
        size = final.stat().st_size
        rows.append({"name": final.name, "samples": shard.samples, "size": size, "sha256": digest})
    filesystem.fsync_path(entry)
    return rows


def _temporary(entry: Path, shard: Shard) -> Path:
    return entry / f"{filesystem.TEMPORARY}{shard.number:06d}.tar"


def _assemble(entry: Path, shard: Shard) -> str:
    """Copy the shard's ranges to its temporary file and close the archive; hex sha256."""
    target, digest, size = _temporary(entry, shard), hashlib.sha256(), 0
    with open(target, "wb") as out:
        for piece in shard.ranges:
            with open(piece.path, "rb") as file:
                file.seek(piece.start)
                left = piece.end - piece.start
                while left:
                    data = file.read(min(left, _COPY))
                    if not data:
                        raise OSError(f"{piece.path} is shorter than when it was written")
                    digest.update(data)
                    size += out.write(data)
                    left -= len(data)
        end = tars.ending(size)
        digest.update(end)
        out.write(end)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()
