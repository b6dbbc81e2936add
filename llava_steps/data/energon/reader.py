"""Random access to the samples of an energon dataset split.

Reading goes through energon's own tar reader, so that a sample is what energon would load;
order.py decides which is read when.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llava_steps.core import filesystem
from llava_steps.core.errors import InputError, reason
from llava_steps.data.energon import long_images
from llava_steps.data.energon.field_map import SEED, FieldMap
from llava_steps.data.energon.long_images import LongImage
from llava_steps.data.energon.metadata import SHARDS, read_metadata, split_shards
from llava_steps.data.samples.sample import Sample, SampleError, from_parts, is_image_part

OPEN_TARS = 64
"""Tars that a reader keeps open at the same time."""


@dataclass(frozen=True)
class RawSample:
    """The parts of one sample as they are in the tar."""

    shard: str
    key: str
    parts: dict[str, bytes]
    """Part name (the text after the key's dot) to bytes."""

    @property
    def where(self) -> str:
        """Tar and key, for messages."""
        return f"{self.shard}/{self.key}"


class SampleReader:
    """Samples of one split by index: 0 is the first sample of the split's first tar.

    Files are opened at the first read, so that an instance can be sent to another process.

    Raises:
        ConfigError: no such split.
        InputError: not a prepared dataset, refused metadata, tars or indices that disagree.
    """

    def __init__(self, root: Path, split: str) -> None:
        self.root = root
        self.split = split
        self._meta = read_metadata(root)
        # Crude datasets have no map: their samples are read as the seed's layout says.
        self._fields = FieldMap.parse(self._meta.field_map) if self._meta.field_map else SEED
        self.shards = split_shards(self._meta, split)
        self._size = sum(self._meta.shard_counts[name] for name in self.shards)
        self._reader: Any = None

    def __len__(self) -> int:
        return self._size

    @property
    def digest(self) -> str:
        """Hex sha256 of what the split holds and in which order; independent of its location.

        Made from the tars' sha256 where `shards.json` gives them; for other datasets from the
        names, sizes and sample offsets of the tars.
        """
        known = _listed(self.root / SHARDS)
        rows = []
        for name in self.shards:
            content = known.get(name)
            if content is None:
                index = _read(self.root / f"{name}.idx")
                content = f"{(self.root / name).stat().st_size}:{hashlib.sha256(index).hexdigest()}"
            rows.append([name, self._meta.shard_counts[name], content])
        return filesystem.sha256_json(rows)

    def raw(self, index: int, images: bool = True) -> RawSample:
        """The parts of sample `index` in [0, len(self)).

        Without `images` the image parts are empty; their bytes are not read.

        Raises:
            InputError: the tar or its index cannot be read there.
        """
        if not 0 <= index < self._size:
            raise IndexError(f"sample {index} of a split of {self._size}")
        if self._reader is None:
            self._reader = _open(self.root, self.shards, self._meta.shard_counts)
        passed: list[str] = []
        self._reader.part_filter = None if images else self._pass_by(passed)
        try:
            sample = self._reader[index]
        except Exception as error:
            raise InputError(
                f"sample {index} of split {self.split!r} in {self.root} cannot be read "
                f"({type(error).__name__}: {error}); its tar and .idx disagree, so prepare it again"
            ) from error
        parts = {name: data for name, data in sample.items() if not name.startswith("__")}
        parts |= dict.fromkeys(passed, b"")
        return RawSample(sample["__shard__"], sample["__key__"], parts)

    def long_images(self) -> list[LongImage]:
        """Images of this split that are many times as long as wide, as far as they are listed.

        Raises:
            InputError: the list is damaged.
        """
        shards = set(self.shards)
        return [image for image in long_images.read(self.root) if image.tar in shards]

    def _pass_by(self, names: list[str]) -> Callable[[str], bool]:
        """energon's filter that leaves image parts unread and notes their names."""

        def wanted(part: str) -> bool:
            if is_image_part(part, self._fields):
                names.append(part)
                return False
            return True

        return wanted

    def __getitem__(self, index: int) -> Sample:
        """Sample `index`, checked.

        Raises:
            InputError: unreadable or unusable; the message names tar and key.
        """
        raw = self.raw(index)
        try:
            return self.parse(raw)
        except SampleError as error:
            raise SampleError(f"{self.root / raw.where}: {error}") from error

    def parse(self, raw: RawSample) -> Sample:
        """The conversation and images in `raw`.

        Raises:
            SampleError: unusable; the message does not say where it is.
        """
        return from_parts(raw.key, raw.parts, self._fields)


def _listed(path: Path) -> dict[str, str]:
    """Name to sha256 of each tar in a `shards.json`; empty if that is missing."""
    if not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["shards"]
        return {str(row["name"]): str(row["sha256"]) for row in rows}
    except (ValueError, LookupError, TypeError, RecursionError, OSError) as error:
        raise InputError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {reason(error)}; prepare the dataset again"
        ) from error


def _open(root: Path, shards: list[str], counts: dict[str, int]) -> Any:
    """energon's reader over `shards`, with offsets looked up in mapped .idx files."""
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors.webdataset.itar import ITarSamplePointer
    from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader
    from megatron.energon.flavors.webdataset.structs import ShardInfo

    @lru_cache(maxsize=4096)
    def offsets(path: str) -> npt.NDArray[np.uint64]:
        table = np.memmap(f"{path}.idx", dtype=np.uint64, mode="r")
        if (table[1:] <= table[:-1]).any() or table[-1] > os.stat(path).st_size:
            raise ValueError(f"the offsets in {path}.idx do not increase within the tar")
        return table

    class Reader(ShardInfosITarReader):  # type: ignore[misc, unused-ignore]
        """energon's own offset cache opens the .idx file again at each random access."""

        def _get_itar_sample_pointer(self, idx: int) -> Any:
            shard = int(np.searchsorted(ends, idx, side="right"))
            info = self.shard_infos[shard]
            table = offsets(str(info.path))
            if len(table) != info.count + 1:
                raise ValueError(f"{info.path}.idx lists {len(table) - 1} of {info.count} samples")
            row = idx - int(ends[shard]) + info.count
            return ITarSamplePointer(
                tar_file_id=self.shard_tar_file_idxs[shard],
                byte_offset=int(table[row]),
                byte_size=int(table[row + 1]) - int(table[row]),
            )

    infos = [ShardInfo(name=n, path=EPath(root / n), count=counts[n]) for n in shards]
    ends = np.cumsum([info.count for info in infos])
    return Reader(base_path=EPath(root), shard_infos=infos, itar_cache_size=OPEN_TARS)
