"""A directory of tars to an energon dataset: what `energon prepare` gives, without its gaps.

Written are the files that energon itself writes, with the same content; `shards.json` besides, so
that every later reader knows the tars' digests.
"""

from __future__ import annotations

import json
import os
import uuid
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from llava_steps.core import filesystem
from llava_steps.core.errors import InputError, IntegrityError
from llava_steps.data import pool
from llava_steps.data.energon import long_images
from llava_steps.data.energon.field_map import FieldMap
from llava_steps.data.energon.index import TarIndex, index_tar
from llava_steps.data.energon.metadata import META, SHARDS
from llava_steps.data.energon.split import split
from llava_steps.data.samples.sample import is_image_part, text_parts

SAMPLE_TYPES = {"VQAWebdataset": "VQASample"}
"""energon renamed its classes; the config keeps the name that the seed's dialogue shows."""


def find_tars(root: Path) -> list[str]:
    """Names of the tars below `root` in order.

    Raises:
        InputError: there are none, or energon's metadata cannot hold a name.
    """
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.tar")
        if path.is_file() and not path.name.startswith(filesystem.TEMPORARY)
    )
    if not names:
        raise InputError(f"{root} holds no .tar files")
    if odd := [name for name in names if set(name) & set("{},$\\")]:
        raise InputError(f"{root}: rename {odd[:3]}; energon expands braces and commas in names")
    return names


def known_shards(root: Path) -> dict[str, dict[str, Any]] | None:
    """What `shards.json` says of each tar; None when the tars were made by others.

    Raises:
        IntegrityError: it cannot be read, or lists other tars than there are.
    """
    path = root / SHARDS
    if not path.is_file():
        return None
    try:
        rows = {row["name"]: row for row in json.loads(path.read_bytes())["shards"]}
    except (ValueError, LookupError, TypeError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}") from error
    if set(rows) != (tars := set(find_tars(root))):
        raise IntegrityError(
            f"{path} and the tars beside it differ: missing {sorted(set(rows) - tars)[:5]}, "
            f"not listed {sorted(tars - set(rows))[:5]}; run shard_tars again"
        )
    return rows


def prepare(
    tar_dir: Path,
    entry: Path,
    ratio: list[int],
    sample_type: str,
    field_map: dict[str, str],
    workers: int,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Make `entry` an energon dataset of the tars in `tar_dir`, which stay as they are.

    Returns:
        Metrics: samples and shards of each split, bytes; parts_left_out, the number of parts of
        each name that no field is read from, if there are any.

    Raises:
        ConfigError: a field map or split that cannot be.
        InputError: tars that energon would misread, or unusable samples in tars of others.
        IntegrityError: tars that differ from their shards.json.
    """
    fields = FieldMap.parse(field_map)
    known = known_shards(tar_dir)
    names = find_tars(tar_dir)
    parts = split(names, ratio)
    meta = entry / META
    meta.mkdir()
    writer = _SqliteIndex(meta)
    rows: list[dict[str, Any]] = []
    held: Counter[str] = Counter()
    long: list[long_images.LongImage] = []
    look = partial(index_tar, tar_dir, fields, known is None)
    for number, index in enumerate(pool.ordered(look, names, workers)):
        if known is not None:
            _compare(tar_dir, index, known[index.name])
        writer.add(number, index)
        held.update(part.name for part in index.parts)
        long += index.long
        _link_into(tar_dir / index.name, entry / index.name)
        filesystem.write_bytes(entry / f"{index.name}.idx", index.offsets())
        rows.append(
            {"name": index.name, "samples": len(index.samples), "size": index.size,
             "sha256": index.sha256}
        )  # fmt: skip
        advance(1)
    writer.close()
    filesystem.write_json(entry / SHARDS, {"shards": rows})
    long_images.write(entry, long)
    counts = {row["name"]: row["samples"] for row in rows}
    kinds = {name.rpartition(".")[2] for name in held}
    images = [name for name in fields.image_parts if name in kinds] or fields.image_parts[:1]
    written = field_map | {"image": ",".join(images)}
    _write_metadata(meta, counts, parts, SAMPLE_TYPES[sample_type], written)
    identity = uuid.uuid5(uuid.NAMESPACE_OID, filesystem.sha256_json(rows))
    filesystem.write_bytes(meta / "index.uuid", str(identity).encode())
    metrics: dict[str, Any] = {
        "samples": {part: sum(counts[name] for name in parts[part]) for part in parts},
        "shards": {part: len(parts[part]) for part in parts},
        "bytes": sum(row["size"] for row in rows),
    }
    unread = {name for name in held if not is_image_part(name, fields)} - text_parts(fields)
    if unread:
        metrics["parts_left_out"] = {name: held[name] for name in sorted(unread)}
    return metrics


def _compare(tar_dir: Path, index: TarIndex, row: dict[str, Any]) -> None:
    actual = {"size": index.size, "sha256": index.sha256, "samples": len(index.samples)}
    for what, value in actual.items():
        if row.get(what) != value:
            raise IntegrityError(
                f"{tar_dir / index.name}: {what} is {value}, {SHARDS} says {row.get(what)}; it was "
                "changed after it was written: run shard_tars again"
            )


def _link_into(source: Path, target: Path) -> None:
    """Show a tar in the dataset."""
    target.parent.mkdir(parents=True, exist_ok=True)
    filesystem.link_or_copy(source, target)


def _write_metadata(
    meta: Path,
    counts: dict[str, int],
    parts: dict[str, list[str]],
    sample_class: str,
    field_map: dict[str, str],
) -> None:
    """The three files that training reads, byte for byte as energon writes them."""
    from megatron.energon import __version__
    from megatron.energon.bracecollapse import collapse

    info = json.dumps({"energon_version": __version__, "shard_counts": counts}, indent=2)
    filesystem.write_bytes(meta / ".info.json", info.encode())
    table = {
        "split_parts": {part: collapse(names, keep_order=True) for part, names in parts.items()},
        "exclude": [],
    }
    filesystem.write_bytes(meta / "split.yaml", yaml.dump(table, sort_keys=False).encode())
    dataset = {
        "sample_type": {"__module__": "megatron.energon", "__class__": sample_class},
        "field_map": field_map,
    }
    filesystem.write_bytes(meta / "dataset.yaml", yaml.dump(dataset, sort_keys=False).encode())


class _SqliteIndex:
    """`index.sqlite`, written by energon's own class, so that the tables are always its own."""

    def __init__(self, meta: Path) -> None:
        from megatron.energon.epathlib import EPath
        from megatron.energon.flavors.webdataset.indexing import SqliteIndexWriter

        self._path = meta / "index.sqlite"
        self._temporary = meta / f"{filesystem.TEMPORARY}index.sqlite"
        self._writer = SqliteIndexWriter(EPath(self._temporary))

    def add(self, number: int, index: TarIndex) -> None:
        """Rows of tar `number`; InputError when another tar has one of its keys."""
        from megatron.energon.flavors.webdataset.indexing import DuplicateSampleKeyError
        from megatron.energon.flavors.webdataset.prepare import IndexSample, IndexSamplePart

        try:
            self._writer.append_samples(
                [
                    IndexSample(
                        tar_file_id=number, sample_key=sample.key, sample_index=index_in_tar,
                        byte_offset=sample.start, byte_size=sample.size,
                    )
                    for index_in_tar, sample in enumerate(index.samples)
                ]
            )  # fmt: skip
        except DuplicateSampleKeyError as error:
            raise InputError(
                f"{index.name}: the key {error.sample_key!r} is in another tar too; keys must be "
                "unique in a dataset (`energon prepare --fix-duplicates` renames them)"
            ) from error
        self._writer.append_parts(
            [
                IndexSamplePart(
                    tar_file_id=number, sample_index=part.sample, part_name=part.name,
                    content_byte_offset=part.data, content_byte_size=part.size,
                )
                for part in index.parts
            ]
        )  # fmt: skip

    def close(self) -> None:
        self._writer.close()
        filesystem.fsync_path(self._temporary)
        os.replace(self._temporary, self._path)
