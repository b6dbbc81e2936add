"""Shares of a source, made by separate jobs, that a last call joins.

Share i of n takes every n-th chunk of records. Its result is one part file a chunk, byte for byte
what the workers of an undivided call write, and `parts.json` with the counts; so the shards are the
same as those of an undivided call, in every byte.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from llava_steps.core import filesystem
from llava_steps.core.errors import InputError, LockedError
from llava_steps.data import pool
from llava_steps.data.shards import writer
from llava_steps.data.shards.plan import Part, Refused, Written
from llava_steps.data.sources import Chunk
from llava_steps.store import lease, store
from llava_steps.store.registry import registered
from llava_steps.store.run import FORCE_REQUEST
from llava_steps.store.shown import shown

BOOKS = "parts.json"


def share_size(records: int, samples_per_shard: int, share: str) -> int:
    """Records of share "i/n" of a source with so many records."""
    number, _, count = share.partition("/")
    starts = range((int(number) - 1) * samples_per_shard, records, int(count) * samples_per_shard)
    return sum(min(samples_per_shard, records - start) for start in starts)


def write_share(
    settings: writer.Settings,
    share: str,
    workers: int,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Write the part files of share "i/n" and their counts into `settings.entry`.

    Returns:
        Metrics: samples_in, samples_written and samples_quarantined of this share.

    Raises:
        InputError: there are fewer chunks of records than shares.
    """
    number, _, count = share.partition("/")
    chunks = settings.source.chunks(settings.samples_per_shard)
    own = islice(chunks, int(number) - 1, None, int(count))
    rows = []
    for part in pool.ordered(partial(writer.make_part, settings), own, workers):
        start = part.path.name.removeprefix(f"{filesystem.TEMPORARY}part-")
        part.path.rename(settings.entry / f"part-{start}.tar")
        name = f"part-{start}.tar"
        rows.append({"start": int(start)} | asdict(part) | {"path": name})
        advance(part.records)
    if not rows:
        raise InputError(
            f"{settings.source.path} has too few records for {count} shares of whole shards; "
            "take fewer shares or a smaller samples_per_shard"
        )
    filesystem.write_json(settings.entry / BOOKS, rows)
    return {
        "samples_in": sum(row["records"] for row in rows),
        "samples_written": sum(len(row["samples"]) for row in rows),
        "samples_quarantined": sum(len(row["refused"]) for row in rows),
    }


def read_shares(
    folder: Path, config: Mapping[str, Any], digest: str, code: str, chunks: Iterator[Chunk]
) -> Iterator[Part]:
    """The parts of all shares below `folder`, in the order of `chunks`.

    Args:
        folder: each directory in it is the result of one share.
        config: settings that the shares must have been made with.
        digest: content of the source that they must have been made from.
        code: version of the code that they must have been made with.
        chunks: all chunks of the source.

    Raises:
        InputError: records are in no share that was made from these data, with these settings.
        IntegrityError: a share is not what its manifest says.
    """
    parts: dict[int, Part] = {}
    useless = []
    for directory in sorted(path for path in folder.iterdir() if path.is_dir()):
        manifest = store.read_manifest(directory)
        if manifest is None:
            useless.append(f"{directory} is not finished")
            continue
        if not manifest["config"].get("part"):
            useless.append(f"{directory} is not a share")
            continue
        if differing := _differing(manifest, config, digest, code):
            # Of an earlier try: shares of another number of jobs can be beside the present ones.
            why = f"was made from other settings or data: {', '.join(differing)} differ"
            useless.append(f"{directory} {why}")
            continue
        entry = store.entry_of(directory, manifest)
        store.check(entry, manifest)
        for row in json.loads((entry / BOOKS).read_bytes()):
            parts[row["start"]] = Part(
                entry / row["path"],
                row["records"],
                tuple(Written(**sample) for sample in row["samples"]),
                tuple(Refused(**refused) for refused in row["refused"]),
                row["sha256"],
            )
    for chunk in chunks:
        part = parts.get(chunk.start)
        if part is None or part.records != chunk.size:
            raise InputError(
                f"{folder} has no share with the records from {chunk.start} on; run the shares "
                "that are missing (with Snakemake: --forcerun tar_shards)"
                + "".join(f"; {reason}" for reason in useless)
            )
        yield part


def _differing(
    manifest: Mapping[str, Any], config: Mapping[str, Any], digest: str, code: str
) -> list[str]:
    """What a share was made from that is different now."""
    made = {key: manifest["config"].get(key) for key in config}
    differing = sorted(key for key in config if made[key] != config[key])
    if manifest.get("inputs", {}).get("source", {}).get("digest") != digest:
        differing.append("the data")
    if manifest.get("code") != code:
        differing.append("the code")
    return differing


def remove_shares(folder: Path) -> None:
    """Remove the results of shares below `folder` and their store entries, if there are any.

    What a live process writes stays, and so does what is not a share. An entry that other results
    show too stays for them.
    """
    for results in sorted(path for path in folder.glob("*") if path.is_dir()):
        links = [path for path in results.iterdir() if path.is_symlink()]
        entries = [entry for entry in {*map(_entry, links)} if _is_share(entry)]
        removed = [_removed(entry, folder) for entry in entries]
        if all(removed):
            for path in (*links, results / store.MANIFEST, results / FORCE_REQUEST):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds something else too
            results.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _removed(entry: Path, folder: Path) -> bool:
    """Remove an entry that nothing outside of `folder` shows; False if a live process writes it."""
    root = entry.parent.parent
    doomed = store.removed_name(entry)
    try:
        with lease.Lease(entry / store.WORK) as held:
            others = shown(root, registered(root), without=[folder])
            if (entry.parent.name, entry.name) in others.values | others.works:
                return True
            if not held.rename(entry, doomed):
                return False
    except LockedError:
        return False
    except FileNotFoundError:
        return True  # another run that shared it has just removed it
    filesystem.remove(doomed)
    return True


def _entry(link: Path) -> Path:
    """The store entry that a published link leads to, or the link `work` of an unfinished one."""
    target = link.resolve()
    return target if link.name == "work" else target.parent


def _is_share(entry: Path) -> bool:
    manifest = store.read_manifest(entry)
    if manifest is not None:
        return bool(manifest["config"].get("part"))
    return any(entry.glob("part-*.tar")) or any(entry.glob(f"{filesystem.TEMPORARY}part-*"))
