"""safetensors directories: reading one tensor at a time, and writing files of a given layout.

Reads use `pread` into the tensor's own memory: every page read from a mapped file would count as
resident, and the memory of a conversion must not grow with the model. Nothing is pickled here.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llava_steps.core.errors import InputError, IntegrityError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies: `start` and `size` in bytes of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def read_header(path: Path) -> tuple[bytes, dict[str, Slot]]:
    """The raw header (length field included) and the slots of a safetensors file.

    IntegrityError when the header is damaged, or the tensors do not fill the file exactly.
    """
    try:
        with path.open("rb") as file:
            length_field = file.read(8)
            (length,) = struct.unpack("<Q", length_field)
            text = file.read(min(length, path.stat().st_size))
        entries: dict[str, Any] = json.loads(text)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing") from error
    except (struct.error, UnicodeDecodeError, json.JSONDecodeError, OverflowError) as error:
        raise IntegrityError(
            f"{path} is not a complete safetensors file: {error}; copy it again"
        ) from error
    base, end, slots = 8 + length, 0, {}
    for name, kind, shape, start, stop in _header_rows(path, entries):
        if kind not in DTYPES:
            advice = "the weights are quantized, give plain ones" if kind.startswith("F8") else ""
            supported = ", ".join(DTYPES)
            raise InputError(
                f"{path}: {name!r} has dtype {kind}; {advice or f'supported: {supported}'}"
            )
        dtype = DTYPES[kind]
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise IntegrityError(
                f"{path}: the bytes of {name!r} do not match its shape and offsets"
            )
        end = stop
        slots[name] = Slot(path, dtype, shape, base + start, stop - start)
    if base + end != path.stat().st_size:
        raise IntegrityError(
            f"{path} has {path.stat().st_size} bytes, its header describes {base + end}: "
            "copy it again"
        )
    return length_field + text, slots


def _header_rows(path: Path, entries: Any) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    """Name, dtype, shape, start and stop of each tensor, in the order of their bytes."""
    rows = []
    name = ""
    try:
        for name, info in entries.items():
            if name != "__metadata__":
                start, stop = info["data_offsets"]
                shape = tuple(int(size) for size in info["shape"])
                if start < 0 or min(shape, default=0) < 0:
                    raise ValueError("negative sizes")
                rows.append((name, str(info["dtype"]), shape, int(start), int(stop)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{path}: the header's entry {name!r} is damaged: {error!r}"
        ) from error
    return sorted(rows, key=lambda row: row[3:])


class TensorDirectory:
    """All tensors of an HF directory: `model.safetensors`, or the shards of its index."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.slots: dict[str, Slot] = {}
        self.headers: dict[str, bytes] = {}
        self.index: bytes | None = None
        self._open: dict[Path, int] = {}
        if (self.directory / INDEX).is_file():
            self._read_index()
        elif (self.directory / SINGLE).is_file():
            self.headers[SINGLE], self.slots = read_header(self.directory / SINGLE)
        else:
            raise InputError(
                f"{self.directory} holds neither {SINGLE} nor {INDEX}; "
                "save the model as safetensors"
            )

    def _read_index(self) -> None:
        path = self.directory / INDEX
        self.index = path.read_bytes()
        try:
            wanted = {str(k): str(v) for k, v in json.loads(self.index)["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"{path} is damaged: {error!r}") from error
        for file in wanted.values():
            # The export writes files of these names, which must stay in its directory.
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise IntegrityError(f"{path}: {file!r} is not the name of a file beside it")
        for file in sorted(set(wanted.values())):
            self.headers[file], slots = read_header(self.directory / file)
            for name, slot in slots.items():
                if wanted.get(name) != file:
                    raise IntegrityError(
                        f"{self.directory / file}: {name!r} is in this shard, "
                        f"but {INDEX} lists it in {wanted.get(name)}"
                    )
                self.slots[name] = slot
        for name, file in wanted.items():
            if name not in self.slots:
                raise IntegrityError(f"{self.directory / file}: {name!r} of {INDEX} is missing")

    def read(self, name: str) -> Tensor:
        """One tensor, in its own memory."""
        slot = self.slots[name]
        data = torch.empty(slot.size, dtype=torch.uint8)
        view, done = _bytes(data), 0
        while done < slot.size:
            got = os.preadv(self._descriptor(slot.file), [view[done:]], slot.start + done)
            if got == 0:
                raise IntegrityError(
                    f"{slot.file} ended within {name!r}: it was truncated while being read"
                )
            done += got
        return data.view(slot.dtype).view(slot.shape)

    def size(self, file: str) -> int:
        """Bytes of a weight file: its header and its tensors."""
        own = (slot.size for slot in self.slots.values() if slot.file.name == file)
        return len(self.headers[file]) + sum(own)

    def _descriptor(self, path: Path) -> int:
        if path not in self._open:
            self._open[path] = os.open(path, os.O_RDONLY)
        return self._open[path]

    def __enter__(self) -> TensorDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def renamed(template: TensorDirectory, rename: Callable[[str], str]) -> TensorDirectory:
    """The layout of `template` with other names of the tensors, for `LikeWriter` to write.

    It cannot be read, because the files that it describes do not exist yet.
    """
    layout = object.__new__(TensorDirectory)
    layout.directory, layout.slots, layout.headers = template.directory, {}, {}
    layout._open = {}
    for file, raw in template.headers.items():
        entries = json.loads(raw[8:])
        named = {k if k == "__metadata__" else rename(k): v for k, v in entries.items()}
        text = json.dumps(named, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        layout.headers[file] = struct.pack("<Q", len(text)) + text
        shift = len(layout.headers[file]) - len(raw)
        for name, slot in template.slots.items():
            if slot.file.name == file:
                layout.slots[rename(name)] = replace(slot, start=slot.start + shift)
    layout.index = None
    if template.index is not None:
        index = json.loads(template.index)
        index["weight_map"] = {rename(k): v for k, v in index["weight_map"].items()}
        layout.index = json.dumps(index, indent=2, sort_keys=True).encode()
    if len(layout.slots) != len(template.slots):
        raise IntegrityError(f"{template.directory}: two tensors would get one name")
    return layout


class LikeWriter:
    """Writes safetensors files like those of `template`: same names, shards, headers and dtypes.

    Tensors may come in any order, each exactly once. Leaving the context without an error raises
    IntegrityError if one is missing, and flushes the files to stable storage.
    """

    def __init__(self, template: TensorDirectory, directory: Path) -> None:
        self._template = template
        self._directory = directory
        self._open: dict[str, int] = {}
        self._written: set[str] = set()

    def __enter__(self) -> Callable[[str, Tensor], None]:
        for file, header in self._template.headers.items():
            path = self._directory / file
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            self._open[file] = descriptor
            _write_at(descriptor, memoryview(header), 0)
            os.ftruncate(descriptor, self._template.size(file))
        if self._template.index is not None:
            (self._directory / INDEX).write_bytes(self._template.index)
        return self.write

    def write(self, name: str, value: Tensor) -> None:
        """Write one tensor, cast to the template's dtype."""
        slot = self._template.slots.get(name)
        if slot is None or name in self._written:
            state = "is not in the template" if slot is None else "was written already"
            raise IntegrityError(f"{self._directory}: {name!r} {state}")
        if tuple(value.shape) != slot.shape:
            raise IntegrityError(
                f"{self._directory / slot.file.name}: {name!r} has shape {list(value.shape)}, "
                f"the template has {list(slot.shape)}"
            )
        value = value.to(slot.dtype).contiguous()
        data = _bytes(value.reshape(-1).view(torch.uint8))
        _write_at(self._open[slot.file.name], data, slot.start)
        self._written.add(name)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for descriptor in self._open.values():
            os.fsync(descriptor)
            os.close(descriptor)
        missing = sorted(self._template.slots.keys() - self._written)
        if error is None and missing:
            raise IntegrityError(
                f"{self._directory}: {missing[0]!r} was never written ({len(missing)} in all)"
            )


def _bytes(data: Tensor) -> memoryview:
    """The memory of a uint8 CPU tensor."""
    return memoryview(data.numpy().data)


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
