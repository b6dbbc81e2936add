"""torch_dist checkpoints (megatron-core's format) without a model, without process groups.

`write` plans a checkpoint from names and shapes and requests each tensor when the writer needs it.
`Reader` (torch_dist_read.py) reads one tensor, or one layer of a stacked tensor, at a time, from
any layout. Memory stays at a few tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from llava_steps.conversion.torch_dist_read import FORMAT, Shape
from llava_steps.conversion.torch_dist_read import Reader as Reader
from llava_steps.core.errors import IntegrityError


@dataclass(frozen=True)
class Chunk:
    """A block of a stored tensor: `shape` values at `offsets` of a tensor of size `whole`.

    It goes to the file of rank `rank`, counted from the rank that writes.
    """

    name: str
    whole: Shape
    offsets: Shape
    shape: Shape
    dtype: torch.dtype
    rank: int = 0


class _StreamPlanner(DefaultSavePlanner):
    """Plans the chunks as given and resolves each when the writer asks for it."""

    def __init__(self, chunks: list[Chunk], resolve: Callable[[Chunk], Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._resolve = resolve
        self._chunks = {(chunk.name, chunk.offsets): chunk for chunk in chunks}

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(chunk) for chunk in self._chunks.values()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        # torch always checks for overlaps, but for holes only if there are several ranks.
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            planned = sum(chunk.sizes.numel() for chunk in stored.chunks)
            if planned != stored.size.numel():
                raise ValueError(
                    f"{planned} of {stored.size.numel()} values of {name!r} are planned"
                )
        return plans, metadata

    def chunk(self, item: WriteItem) -> Chunk:
        """The chunk of an item of the plan."""
        assert item.index.offset is not None
        return self._chunks[(item.index.fqn, tuple(item.index.offset))]

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        chunk = self.chunk(write_item)
        value = self._resolve(chunk)
        if value.dtype != chunk.dtype or value.numel() != torch.Size(chunk.shape).numel():
            raise IntegrityError(
                f"{chunk.name}: got {value.dtype} {list(value.shape)}, planned {chunk.dtype} "
                f"{list(chunk.shape)}"
            )
        return value.reshape(chunk.shape)


def _write_item(chunk: Chunk) -> WriteItem:
    offsets, size = torch.Size(chunk.offsets), torch.Size(chunk.whole)
    return WriteItem(
        index=MetadataIndex(chunk.name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, torch.Size(chunk.shape)),
            properties=TensorProperties(dtype=chunk.dtype),
            size=size,
        ),
    )


class _PlainWriter(FileSystemWriter):
    """Writes one file for each rank that has chunks, and frees a tensor once it is written.

    The metadata depends only on the content, not on the path or a random id.
    """

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        assert isinstance(planner, _StreamPlanner)
        results = []
        own = int(plan.storage_data.prefix.strip("_"))  # the rank that writes
        with ExitStack() as stack:
            streams: dict[str, BinaryIO] = {}
            for item in plan.items:
                name = f"__{own + planner.chunk(item).rank}_0.distcp"
                if name not in streams:
                    streams[name] = stack.enter_context((Path(self.path) / name).open("wb"))
                stream = streams[name]
                start = stream.tell()
                value = planner.resolve_data(item)
                torch.save(_own_storage(value), stream)
                del value
                size = stream.tell() - start
                results.append(WriteResult(item.index, size, _StorageInfo(name, start, size)))
            for stream in streams.values():
                stream.flush()
                os.fsync(stream.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _own_storage(value: Tensor) -> Tensor:
    """The tensor on CPU in a storage of its size, because torch.save writes whole storages."""
    value = value.detach().cpu()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def write(
    directory: Path,
    chunks: list[Chunk],
    resolve: Callable[[Chunk], Tensor],
    collective: bool = False,
) -> None:
    """Write a torch_dist checkpoint of `chunks` into `directory`, which must not hold one.

    `resolve(chunk)` is called once per chunk, in their order, and returns a tensor of the chunk's
    dtype and number of values. With `collective` every rank of the world has its own chunks,
    which together must cover each tensor exactly once. Equal input gives equal bytes.

    Raises on every rank what the first failing rank raised (a step error of `resolve`, OSError when
    the disk is full); IntegrityError when the chunks do not cover the tensors.
    """
    first = not collective or dist.get_rank() == 0
    if first:
        directory.mkdir(parents=True, exist_ok=True)
    if collective:
        dist.barrier()
    writer = _PlainWriter(directory, single_file_per_rank=True, overwrite=False)
    planner = _StreamPlanner(chunks, resolve)
    try:
        save({}, storage_writer=writer, planner=planner, no_dist=not collective)
    except CheckpointException as error:  # no subclass of Exception
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, ValueError):  # torch raises it for holes and overlaps
            cause = IntegrityError(f"{directory}: {cause}")
        raise cause from error
    if first:
        torch.save({}, directory / "common.pt")
        # Last: this file is what makes the directory a checkpoint for megatron-core.
        (directory / "metadata.json").write_text(json.dumps(FORMAT), encoding="utf-8")
    if collective:
        dist.barrier()


def total(chunks: Iterable[Chunk]) -> int:
    """Bytes of the chunks' values."""
    return sum(torch.Size(c.shape).numel() * c.dtype.itemsize for c in chunks)
