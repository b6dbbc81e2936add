"""Which rank's file holds which part of a converted checkpoint.

A checkpoint loads in every layout, however it is split. One converted for tp x pp has the files
that a training with tensor parallel size tp and pipeline parallel size pp writes: each rank reads
little more than its own file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llava_steps.conversion.mapping import Entry, Shape
from llava_steps.geometry.geometry import Geometry
from llava_steps.geometry.layout import check_layout, even_split


@dataclass(frozen=True)
class Part:
    """A block of an entry's tensor, and the rank (tensor parallel ranks side by side) it is for."""

    rank: int
    offsets: Shape
    shape: Shape


class Cuts:
    """The parts of a model's entries. ConfigError if the model cannot be split for tp and pp."""

    def __init__(self, geometry: Geometry, tp: int, pp: int) -> None:
        check_layout(geometry, tp, pp)
        self.tp, self.pp = tp, pp
        self._stage = [
            stage
            for stage, count in enumerate(even_split(geometry.layers, pp))
            for _ in range(count)
        ]

    def parts(self, entry: Entry) -> Iterator[Part]:
        """The parts of one tensor, which together cover it."""
        if entry.layer is not None:
            stage = self._stage[entry.layer]
        else:
            stage = self.pp - 1 if entry.row.last else 0
        first = stage * self.tp
        if not entry.row.cut:
            yield Part(first, (0,) * len(entry.shape), entry.shape)
            return
        axis = 0 if entry.row.cut == "rows" else 1
        # Gate and up projection are stacked: a rank has a part of each.
        blocks = self.tp * (len(entry.hf) if entry.transform == "gate_up" else 1)
        length = entry.shape[axis] // blocks
        shape = (*entry.shape[:axis], length, *entry.shape[axis + 1 :])
        for block in range(blocks):
            offsets = [0] * len(shape)
            offsets[axis] = block * length
            yield Part(first + block % self.tp, tuple(offsets), shape)
