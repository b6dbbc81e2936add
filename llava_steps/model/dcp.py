"""torch_dist checkpoints (megatron-core's format) without a model, without process groups.

`write` plans a checkpoint from names and shapes and asks for each tensor when the writer has come
to it; `Reader` gives back one tensor, or one layer of a stacked tensor, at a time, whatever layout
the checkpoint was saved from. Memory stays at a few tensors.

A checkpoint of unknown origin cannot run code here: see dcp_metadata.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    FileSystemReader,
    FileSystemWriter,
    _StorageInfo,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from llava_steps.core.errors import InputError, IntegrityError
from llava_steps.model.dcp_metadata import read_metadata

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """A block of a stored tensor: `shape` values at `offsets` of a tensor of size `whole`."""

    name: str
    whole: Shape
    offsets: Shape
    shape: Shape
    dtype: torch.dtype


def layer_chunk(
    name: str, layer: int | None, shape: Shape, layers: int, dtype: torch.dtype
) -> Chunk:
    """The chunk of one layer of a stacked tensor, or (layer None) of a whole tensor."""
    if layer is None:
        return Chunk(name, shape, (0,) * len(shape), shape, dtype)
    return Chunk(name, (layers, *shape), (layer, *(0,) * len(shape)), (1, *shape), dtype)


class _StreamPlanner(DefaultSavePlanner):
    """Plans the chunks as given and resolves each when the writer asks for it."""

    def __init__(self, chunks: list[Chunk], resolve: Callable[[Chunk], Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._resolve = resolve
        self._chunks = {(chunk.name, chunk.offsets): chunk for chunk in chunks}

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(chunk) for chunk in self._chunks.values()])

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        index = write_item.index
        assert index.offset is not None
        chunk = self._chunks[(index.fqn, tuple(index.offset))]
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
    """Writes one file per rank that has chunks, and lets each tensor go once it is written.

    The metadata depends on the content alone, not on the path or a random id.
    """

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        if plan.items:
            name = f"{plan.storage_data.prefix}0.distcp"
            with (Path(self.path) / name).open("wb") as stream:
                for item in plan.items:
                    start = stream.tell()
                    value = planner.resolve_data(item)
                    assert isinstance(value, Tensor)
                    torch.save(_alone(value), stream)
                    del value
                    size = stream.tell() - start
                    results.append(WriteResult(item.index, size, _StorageInfo(name, start, size)))
                stream.flush()
                os.fsync(stream.fileno())
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _alone(value: Tensor) -> Tensor:
    """The tensor on CPU with no more storage than its own: torch.save writes whole storages."""
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
    dtype and number of values. With `collective` every rank of the world brings chunks of its own,
    which together must cover each tensor exactly once. Equal input gives equal bytes.
    """
    first = not collective or dist.get_rank() == 0
    if first:
        directory.mkdir(parents=True, exist_ok=True)
    if collective:
        dist.barrier()
    writer = _PlainWriter(directory, single_file_per_rank=True, overwrite=False)
    planner = _StreamPlanner(chunks, resolve)
    save({}, storage_writer=writer, planner=planner, no_dist=not collective)
    if first:
        torch.save({}, directory / "common.pt")
        # Last: this file is what makes the directory a checkpoint for megatron-core.
        (directory / "metadata.json").write_text(json.dumps(FORMAT), encoding="utf-8")
    if collective:
        dist.barrier()


class _OneTensor(LoadPlanner):
    """Receives what the reader finds for one target."""

    def __init__(self, target: Tensor) -> None:
        self._target = target
        self.values = 0

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        out = self._target
        for dim, (offset, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            out = out.narrow(dim, offset, length)
        return out

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        self.values += tensor.numel()

    def set_up_planner(self, *_: Any, **__: Any) -> None: ...

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        raise NotImplementedError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        raise NotImplementedError

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise NotImplementedError


class Reader:
    """Random access to the tensors of a torch_dist checkpoint."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not (self.directory / "metadata.json").is_file():
            raise InputError(
                f"{self.directory} is no Megatron checkpoint: metadata.json is missing"
            )
        # Damaged bytes make json, pickle and torch raise whatever comes first.
        try:
            form = json.loads((self.directory / "metadata.json").read_bytes())
            backend = form["sharded_backend"]
        except Exception as error:
            raise IntegrityError(
                f"{self.directory / 'metadata.json'} cannot be read: {error!r}"
            ) from error
        if backend != FORMAT["sharded_backend"]:
            raise InputError(
                f"{self.directory}: format {backend!r} is not supported; "
                f"supported: {FORMAT['sharded_backend']!r}"
            )
        try:
            metadata = read_metadata(self.directory / ".metadata")
            self._reader = FileSystemReader(self.directory)
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
            self.tensors: dict[str, TensorStorageMetadata] = {
                name: stored
                for name, stored in metadata.state_dict_metadata.items()
                if isinstance(stored, TensorStorageMetadata)
            }
            self._shapes = {
                name: tuple(int(size) for size in stored.size)
                for name, stored in self.tensors.items()
            }
        except Exception as error:
            raise IntegrityError(
                f"{self.directory / '.metadata'} cannot be read: {error!r}"
            ) from error

    def shapes(self) -> dict[str, Shape]:
        """Name -> whole shape of every stored tensor."""
        return dict(self._shapes)

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """A whole tensor, or layer `layer` of a stacked one. IntegrityError if it has holes."""
        stored, whole = self.tensors[name], self._shapes[name]
        offsets = (0,) * len(whole) if layer is None else (layer, *(0,) * (len(whole) - 1))
        shape = whole if layer is None else (1, *whole[1:])
        try:
            target = torch.empty(shape, dtype=stored.properties.dtype)
            wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
            items = create_read_items_for_chunk_list(name, stored, [wanted])
            planner = _OneTensor(target)
            self._reader.read_data(LoadPlan(list(items)), planner)
        except Exception as error:  # see __init__
            raise IntegrityError(f"{self.directory}: {name!r} cannot be read: {error!r}") from error
        if planner.values != target.numel():
            raise IntegrityError(
                f"{self.directory}: {planner.values} of {target.numel()} values of {name!r} found"
            )
        return target if layer is None else target[0]


def total(chunks: Iterable[Chunk]) -> int:
    """Bytes of the chunks' values."""
    return sum(torch.Size(c.shape).numel() * c.dtype.itemsize for c in chunks)
