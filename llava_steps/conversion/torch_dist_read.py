"""Reads a torch_dist checkpoint, one tensor at a time, without executing code from it.

torch defines `.metadata` as a pickle. Only the few classes that describe tensors are allowed here:
a checkpoint of unknown origin can at worst be refused.
"""

from __future__ import annotations

import enum
import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from llava_steps.core.errors import InputError, IntegrityError

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
Shape = tuple[int, ...]


CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
}
"""All that the `.metadata` of torch and of megatron-core refer to, besides dtypes."""


def _enum_member(kind: Any, name: str) -> Any:
    """getattr, for members of enums only."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise pickle.UnpicklingError(f"{name!r} of {kind!r} is not allowed in a checkpoint")
    return kind[name]


class _Unpickler(pickle.Unpickler):
    """Loads CLASSES and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # how Python 3.11.0 to 3.11.3 pickle members of enums
        if name not in CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """The metadata in `path`; raises what pickle raises if it is damaged or refers to more."""
    metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}, not Metadata")
    return metadata


class _OneTensor(LoadPlanner):
    """Receives the values of one target from the reader."""

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
                f"{self.directory} is not a Megatron checkpoint: metadata.json is missing"
            )
        # Damaged bytes make json, pickle and torch raise many kinds of errors.
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
                f"{self.directory}: {planner.values} of {target.numel()} values of {name!r} exist; "
                "restore the checkpoint"
            )
        return target if layer is None else target[0]
