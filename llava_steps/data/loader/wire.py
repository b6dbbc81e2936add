"""Microbatches on their way from a loader worker: one anonymous file in memory for each.

The file's descriptor is sent over a Unix socket and mapped at the other end, so that no pixel is
copied. Such files need neither /dev/shm nor a name, and end with the last process that has them.
"""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from llava_steps.data.loader.batch import MicroBatch

_ALIGN = 64
_HEADER = 8


def to_file(batch: MicroBatch) -> int:
    """A descriptor of a file that holds `batch`; the caller closes it.

    Layout: length of the JSON (8 bytes, little endian), JSON of the plain fields and of dtype,
    shape and offset of each tensor, then the tensors.
    """
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = {key: value.numpy() for key, value in values.items() if torch.is_tensor(value)}
    plain = {key: value for key, value in values.items() if key not in tensors}
    table: dict[str, tuple[str, list[int], int]] = {}
    end = 0
    for key, array in tensors.items():
        table[key] = (array.dtype.str, list(array.shape), end)
        end += -(-array.nbytes // _ALIGN) * _ALIGN
    text = json.dumps([plain, table]).encode()
    start = _start(len(text))
    descriptor = os.memfd_create("llava-steps-row")
    try:
        os.ftruncate(descriptor, start + end)
        with mmap.mmap(descriptor, start + end) as memory:
            memory[:_HEADER] = len(text).to_bytes(_HEADER, "little")
            memory[_HEADER : _HEADER + len(text)] = text
            for key, array in tensors.items():
                if not array.size:
                    continue
                target = np.frombuffer(memory, array.dtype, array.size, start + table[key][2])
                target[:] = array.reshape(-1)
                del target
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def from_file(descriptor: int) -> MicroBatch:
    """The microbatch that `to_file` wrote; its tensors are the file's own memory."""
    memory = mmap.mmap(descriptor, 0)
    size = int.from_bytes(memory[:_HEADER], "little")
    plain, table = json.loads(memory[_HEADER : _HEADER + size])
    values: dict[str, Any] = dict(plain)
    for key, (dtype, shape, offset) in table.items():
        count = int(np.prod(shape))
        array = np.empty(0, dtype)
        if count:
            array = np.frombuffer(memory, np.dtype(dtype), count, _start(size) + offset)
        values[key] = torch.from_numpy(array.reshape(shape))
    return MicroBatch(**values)


def _start(size: int) -> int:
    return -(-(_HEADER + size) // _ALIGN) * _ALIGN
