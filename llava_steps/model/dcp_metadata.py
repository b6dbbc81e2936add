"""The `.metadata` of a torch_dist checkpoint, read without the power to run code.

torch defines it as a pickle. Only the few classes that describe tensors are known here, so that a
checkpoint of unknown origin can at worst be refused.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

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
"""All that the `.metadata` of torch and of megatron-core refer to, beside dtypes."""


class _Unpickler(pickle.Unpickler):
    """Knows CLASSES and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no business in a checkpoint")
        return super().find_class(module, name)


def read_metadata(path: Path) -> Metadata:
    """The metadata in `path`; whatever pickle raises when it is damaged or refers to more."""
    metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
    return metadata
