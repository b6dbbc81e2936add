"""The training data loader: exact, and elastic in data parallel size and worker processes.

The stream of samples is that of `Corpus`, which knows nothing of ranks and workers. Global batch k
is its k-th run of `global_batch_size` samples. Without packing, microbatch j of rank r takes the
samples [(j * dp_size + r) * mbs, ... + mbs) of it; with packing the samples are put into rows
(packing.py), of which rank r takes every dp_size-th. So every global batch is the same whatever the
layout, and the whole state of the loader is the number of consumed samples.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_steps.core.errors import ConfigError, InputError
from llava_steps.data.loader.batch import MicroBatch, pad, round_up
from llava_steps.data.loader.corpus import Corpus
from llava_steps.data.loader.feed import Feed, serial
from llava_steps.data.loader.lengths import Lengths
from llava_steps.data.loader.row_builder import RowBuilder
from llava_steps.data.loader.spec import LoaderSpec
from llava_steps.data.loader.workers import Workers, start_server


class TrainLoader:
    """Iterates for ever over training steps; each item is this rank's list of microbatches.

    Args:
        spec: what to read, and which part of it is this rank's.
        start_samples: samples that training has consumed before, over all ranks.

    Raises:
        ConfigError, InputError: dataset or HF directory cannot be used.
    """

    def __init__(self, spec: LoaderSpec, start_samples: int = 0) -> None:
        if spec.num_workers:
            start_server()
        corpus = Corpus(spec.dataset, spec.split, spec.seed)
        self.samples_in_split = len(corpus)
        self.digest = corpus.digest
        self.datasets = list(dict.fromkeys(member.name for member in corpus.members))
        self.consumed_samples = start_samples
        self._spec = spec
        lengths = self._lengths(corpus, spec.scratch) if spec.packing else None
        self._builder = RowBuilder(corpus, spec, lengths)
        self._builder.check()
        self._pad_id = self._builder.encoder().pad_id

    def _lengths(self, corpus: Corpus, scratch: Path | None) -> Lengths:
        if scratch is None:
            self._own = tempfile.TemporaryDirectory(prefix="llava-steps-lengths-")
            scratch = Path(self._own.name)
        rounds = [member.max_turns for member in corpus.members]
        return Lengths(scratch, f"{corpus.digest} {rounds}", len(corpus))

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        """Steps from the current position on; one iteration at a time.

        Raises:
            InputError: a sample cannot be used; the message names tar and sample.
            StepError: a worker process died or hangs; the message names what it held.
        """
        spec = self._spec
        if not spec.num_workers:
            for step in serial(self._builder, spec, self.consumed_samples):
                yield self._finish(step)
            return
        workers = Workers(self._builder, spec.num_workers, spec.patience)
        feed = Feed(workers, spec, self.consumed_samples)
        try:
            for step in feed:
                yield self._finish(step)
        finally:
            feed.close()

    def _finish(self, step: list[MicroBatch]) -> list[MicroBatch]:
        """The step's rows padded, and the step counted as consumed."""
        spec = self._spec
        longest = max(row.tokens.shape[1] for row in step) if spec.equal_lengths else 0
        padded = []
        for row in step:
            length = max(row.tokens.shape[1], longest, spec.fixed_length)
            padded.append(pad(row, round_up(length, spec.pad_to_multiple), self._pad_id))
        self.consumed_samples += spec.global_batch_size
        return padded

    def state(self) -> dict[str, Any]:
        """JSON-able state after the steps given out so far."""
        return {
            "consumed_samples": self.consumed_samples,
            "seed": self._spec.seed,
            "dataset": self.digest,
            "samples_in_split": self.samples_in_split,
            "global_batch_size": self._spec.global_batch_size,
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise unless this loader continues exactly where the one that gave `state` stopped.

        Raises:
            ConfigError: another seed or global batch size.
            InputError: another dataset, or a state that is not complete.
        """
        own = self.state()
        if missing := sorted(set(own) - set(state)):
            raise InputError(f"the loader state of the checkpoint lacks {missing}")
        for key in ("dataset", "samples_in_split"):
            if state[key] != own[key]:
                raise InputError(
                    f"the dataset is not the one that the checkpoint was trained on: {key} was "
                    f"{state[key]}, is {own[key]}; point data_path to the old dataset or start a "
                    "new training"
                )
        for key in ("seed", "global_batch_size"):
            if state[key] != own[key]:
                raise ConfigError(
                    f"{key} is {own[key]} but the checkpoint was trained with {state[key]}; the "
                    f"order of samples depends on it: set {key} back or start a new training"
                )
        if state["consumed_samples"] != self.consumed_samples:
            raise InputError(
                f"the loader starts at sample {self.consumed_samples}, the checkpoint stopped at "
                f"{state['consumed_samples']}"
            )
