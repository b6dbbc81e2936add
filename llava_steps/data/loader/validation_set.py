"""The first samples of a split, in rows: what validation reads, the same at every call.

Nothing here has a state, so validation leaves the training loader where it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from llava_steps.core.errors import InputError
from llava_steps.data.loader.batch import MicroBatch, pad, round_up
from llava_steps.data.loader.corpus import Corpus
from llava_steps.data.loader.row_builder import RowBuilder
from llava_steps.data.loader.spec import LoaderSpec
from llava_steps.data.samples.encoded import IGNORED


class ValidationSet:
    """At most `samples` of a split, each once, in rows, of which a rank has its own.

    Args:
        spec: what to read; rows hold `micro_batch_size` samples, and of all rows a rank has rows
            dp_rank, dp_rank + dp_size, ...; possibly none.
        samples: how many to take, from the beginning of the split's order.

    Raises:
        ConfigError, InputError: no such split, nothing in it, or a sample that cannot be used.
    """

    def __init__(self, spec: LoaderSpec, samples: int) -> None:
        corpus = Corpus(spec.dataset, spec.split, spec.seed)
        self.samples = min(samples, len(corpus))
        if not self.samples:
            raise InputError(
                f"{spec.dataset}: the split {spec.split} has no samples to validate on"
            )
        self.datasets = [member.name for member in corpus.members]
        size = spec.micro_batch_size
        starts = range(spec.dp_rank * size, self.samples, spec.dp_size * size)
        self._rows = [range(i, min(i + size, self.samples)) for i in starts]
        self._builder = RowBuilder(corpus, spec)
        # What cannot be used is reported now, not after an hour of training.
        texts = RowBuilder(corpus, replace(spec, need_pixels=False))
        for row in self._rows:
            texts.row(0, row, None)
        self.encoder = self._builder.encoder()

    def groups(self, size: int, multiple: int, full: bool = False) -> Iterator[list[MicroBatch]]:
        """The rows, `size` at a time; those of a group have one length, a multiple of `multiple`.

        With `full` the last group is filled up with rows in which nothing is supervised.
        """
        for start in range(0, len(self._rows), size):
            rows = [self._builder.row(0, row, None) for row in self._rows[start : start + size]]
            longest = round_up(max(row.tokens.shape[1] for row in rows), multiple)
            group = [pad(row, longest, self.encoder.pad_id) for row in rows]
            while full and len(group) < size:
                nothing = torch.full_like(group[0].labels, IGNORED)
                group.append(
                    replace(group[0], labels=nothing, num_supervised=0, num_tokens=0, keys=[],
                            sample_ids=[], slots=[], datasets=[])
                )  # fmt: skip
            yield group
