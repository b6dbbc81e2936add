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
from typing import Any, Literal

from llava_steps.core.errors import ConfigError, InputError
from llava_steps.data.loader.batch import MicroBatch, pad, round_up
from llava_steps.data.loader.corpus import Corpus
from llava_steps.data.loader.feed import Feed, Layout, serial
from llava_steps.data.loader.lengths import Lengths
from llava_steps.data.loader.row_builder import RowMaker
from llava_steps.data.loader.workers import Workers, start_server


class TrainLoader:
    """Iterates for ever over training steps; each item is this rank's list of microbatches.

    Args:
        dataset: prepared energon dataset, or the YAML file of a blend (settings/blend.py).
        split: its split, such as `train`.
        hf_dir: HF directory with tokenizer, chat template and image processor.
        seq_length: longest accepted sample in tokens.
        global_batch_size: samples of one step over all data parallel ranks.
        micro_batch_size: samples of one microbatch; 1 with packing.
        dp_rank, dp_size: this rank among the data parallel ranks.
        seed: of the sample order.
        num_workers: worker processes; 0 prepares batches in this process.
        start_samples: samples that training has consumed before, over all ranks.
        need_pixels: decode images; otherwise `pixel_values` is None everywhere.
        image_part, image_parts: decode only this part of each row's images (`batch.image_share`).
        pad_to_multiple: every row's length is a multiple of this.
        equal_lengths: all rows of a step get the same length (pipeline parallelism).
        packing: put as many samples into a row as fit; the number of rows varies between steps.
        pack_length: longest packed row in tokens; 0: seq_length.
        pad_to: `row` pads a row no further than the above needs, `budget` to pack_length.
        rows_multiple: the number of packed rows of a rank is a multiple of this.
        patience: seconds after which a worker that begins no further sample is an error.
        scratch: directory of this attempt that the processes of a node share.
        truncate: cut samples that are longer than seq_length; otherwise they are an error.

    Raises:
        ConfigError, InputError: sizes do not fit, or dataset or HF directory cannot be used.
    """

    def __init__(
        self,
        dataset: Path,
        split: str,
        hf_dir: Path,
        seq_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        num_workers: int,
        start_samples: int,
        need_pixels: bool,
        image_part: int = 0,
        image_parts: int = 1,
        pad_to_multiple: int = 1,
        equal_lengths: bool = False,
        packing: bool = False,
        pack_length: int = 0,
        pad_to: Literal["row", "budget"] = "row",
        rows_multiple: int = 1,
        patience: float = 600.0,
        scratch: Path | None = None,
        truncate: bool = False,
    ) -> None:
        share = micro_batch_size * dp_size
        if global_batch_size % share:
            raise ConfigError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size x "
                f"data parallel size = {share}"
            )
        if not 0 <= dp_rank < dp_size:
            raise ConfigError(f"dp_rank {dp_rank} is not in [0, {dp_size})")
        if packing and micro_batch_size != 1:
            raise ConfigError(
                f"packing fills each microbatch by itself: micro_batch_size is {micro_batch_size}, "
                "set it to 1"
            )
        capacity = pack_length or seq_length
        if packing and capacity < seq_length:
            raise ConfigError(f"pack_length {pack_length} is below seq_length {seq_length}")
        if num_workers:
            start_server()
        corpus = Corpus(dataset, split, seed)
        self.samples_in_split = len(corpus)
        self.digest = corpus.digest
        self.datasets = list(dict.fromkeys(member.name for member in corpus.members))
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.consumed_samples = start_samples
        self._multiple = pad_to_multiple
        self._equal = equal_lengths
        self._fixed = capacity if packing and pad_to == "budget" else 0
        self._num_workers = num_workers
        self._patience = patience
        self._layout = Layout(
            global_batch_size,
            micro_batch_size,
            dp_rank,
            dp_size,
            capacity if packing else None,
            (dp_rank * image_parts + image_part) / (dp_size * image_parts),
            rows_multiple,
        )
        self._maker = RowMaker(
            corpus, hf_dir, seq_length, self._lengths(corpus, scratch) if packing else None,
            need_pixels, image_part, image_parts, truncate,
        )  # fmt: skip
        self._maker.check()
        self._pad_id = self._maker.encoder().pad_id

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
        if self._num_workers == 0:
            for step in serial(self._maker, self._layout, self.consumed_samples):
                yield self._finish(step)
            return
        workers = Workers(self._maker, self._num_workers, self._patience)
        feed = Feed(workers, self._layout, self.consumed_samples)
        try:
            for step in feed:
                yield self._finish(step)
        finally:
            feed.close()

    def _finish(self, step: list[MicroBatch]) -> list[MicroBatch]:
        """The step's rows padded, and the step counted as consumed."""
        longest = max(row.tokens.shape[1] for row in step) if self._equal else 0
        padded = []
        for row in step:
            length = max(row.tokens.shape[1], longest, self._fixed)
            padded.append(pad(row, round_up(length, self._multiple), self._pad_id))
        self.consumed_samples += self.global_batch_size
        return padded

    def state(self) -> dict[str, Any]:
        """JSON-able state after the steps given out so far."""
        return {
            "consumed_samples": self.consumed_samples,
            "seed": self.seed,
            "dataset": self.digest,
            "samples_in_split": self.samples_in_split,
            "global_batch_size": self.global_batch_size,
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
