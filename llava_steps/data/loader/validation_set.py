"""The first samples of a split, in rows: what validation looks at, the same at every call.

Nothing here has a state, so looking at held-out data leaves the training loader where it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from llava_steps.core.errors import InputError
from llava_steps.data.loader.batch import MicroBatch, pad, round_up
from llava_steps.data.loader.corpus import Corpus
from llava_steps.data.loader.row_builder import RowMaker
from llava_steps.data.samples.conversation import IGNORE


class HeldOut:
    """At most `samples` of a split, each once; rows of `row_samples`, of which a rank has its own.

    Args:
        dataset, split, hf_dir, seq_length, seed: as for `TrainLoader`.
        samples: how many to take, from the beginning of the split's order.
        row_samples: samples of one row.
        part, parts: this rank's share: rows part, part + parts, ...; possibly none.
        need_pixels, image_part, image_parts, truncate: as for `TrainLoader`.

    Raises:
        ConfigError, InputError: no such split, nothing in it, or a sample that cannot be used.
    """

    def __init__(
        self,
        dataset: Path,
        split: str,
        hf_dir: Path,
        seq_length: int,
        seed: int,
        samples: int,
        row_samples: int,
        part: int,
        parts: int,
        need_pixels: bool,
        image_part: int = 0,
        image_parts: int = 1,
        truncate: bool = False,
    ) -> None:
        corpus = Corpus(dataset, split, seed)
        self.samples = min(samples, len(corpus))
        if not self.samples:
            raise InputError(f"{dataset}: the split {split} has no samples to look at")
        self.datasets = [member.name for member in corpus.members]
        starts = range(part * row_samples, self.samples, parts * row_samples)
        self._rows = [range(i, min(i + row_samples, self.samples)) for i in starts]
        arguments = (corpus, hf_dir, seq_length, None)
        self._maker = RowMaker(*arguments, need_pixels, image_part, image_parts, truncate)
        # What cannot be used is told now, not after an hour of training.
        texts = RowMaker(*arguments, False, 0, 1, truncate)
        for row in self._rows:
            texts.row(0, row, None)
        self.encoder = self._maker.encoder()

    def groups(self, size: int, multiple: int, full: bool = False) -> Iterator[list[MicroBatch]]:
        """The rows, `size` at a time; those of a group have one length, a multiple of `multiple`.

        With `full` the last group is filled up with rows in which nothing is supervised.
        """
        for start in range(0, len(self._rows), size):
            rows = [self._maker.row(0, row, None) for row in self._rows[start : start + size]]
            longest = round_up(max(row.tokens.shape[1] for row in rows), multiple)
            group = [pad(row, longest, self.encoder.pad_id) for row in rows]
            while full and len(group) < size:
                nothing = torch.full_like(group[0].labels, IGNORE)
                group.append(
                    replace(group[0], labels=nothing, num_supervised=0, num_tokens=0, keys=[],
                            sample_ids=[], places=[], datasets=[])
                )  # fmt: skip
            yield group
