"""The training data loader: exact, and elastic in data parallel size and worker processes.

The stream of samples is `SampleOrder`, which knows nothing of ranks and workers. Global batch k is
its k-th run of `global_batch_size` samples; within it, microbatch j of rank r takes the samples
[(j * dp_size + r) * mbs, ... + mbs). So every global batch is the same whatever the layout, and
the whole state of the loader is the number of consumed samples.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from llava_steps.core.errors import ConfigError, InputError, StepError
from llava_steps.data.batch import MicroBatch, join, pad, round_up
from llava_steps.data.conversation import ConversationEncoder
from llava_steps.data.order import SampleOrder
from llava_steps.data.reader import SampleReader
from llava_steps.data.samples import SampleError

_AHEAD = 4
"""Microbatches that each worker prepares ahead."""


class TrainLoader:
    """Iterates for ever over training steps; each item is this rank's list of microbatches.

    Args:
        dataset_dir: prepared energon dataset.
        split: its split, such as `train`.
        hf_dir: HF directory with tokenizer, chat template and image processor.
        seq_length: longest accepted sample in tokens.
        global_batch_size: samples of one step over all data parallel ranks.
        micro_batch_size: samples of one microbatch.
        dp_rank, dp_size: this rank among the data parallel ranks.
        seed: of the sample order.
        num_workers: worker processes; 0 prepares batches in this process.
        start_samples: samples that training has consumed before, over all ranks.
        need_pixels: decode images; otherwise `pixel_values` is None everywhere.
        pad_to_multiple: every row's length is a multiple of this.
        equal_lengths: all rows of a step get the same length (pipeline parallelism).

    Raises:
        ConfigError, InputError: sizes do not fit, or dataset or HF directory cannot be used.
    """

    def __init__(
        self,
        dataset_dir: Path,
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
        pad_to_multiple: int = 1,
        equal_lengths: bool = False,
    ) -> None:
        share = micro_batch_size * dp_size
        if global_batch_size % share:
            raise ConfigError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size x "
                f"data parallel size = {share}"
            )
        if not 0 <= dp_rank < dp_size:
            raise ConfigError(f"dp_rank {dp_rank} is not in [0, {dp_size})")
        reader = SampleReader(dataset_dir, split)
        self.samples_in_split = len(reader)
        self.digest = reader.digest
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.consumed_samples = start_samples
        self.micro_batches = global_batch_size // share
        self._multiple = pad_to_multiple
        self._equal = equal_lengths
        self._workers = num_workers
        encoder = ConversationEncoder(hf_dir, seq_length)
        self._pad_id = encoder.pad_id
        self._source = _Source(
            dataset_dir, split, hf_dir, seq_length, SampleOrder(len(reader), seed, self.digest),
            start_samples, micro_batch_size, dp_rank, dp_size, need_pixels,
        )  # fmt: skip
        if num_workers == 0:
            self._source.open(reader, encoder)

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        """Steps from the current position on; one iteration at a time.

        Raises:
            InputError: a sample cannot be used; the message names tar and sample.
            StepError: a worker process died.
        """
        first = self.consumed_samples
        source = self._source.at(first)
        stream = iter(_loader(source, self._workers))
        while True:
            step = [self._next(stream) for _ in range(self.micro_batches)]
            longest = max(batch.tokens.shape[1] for batch in step)
            padded = [
                pad(
                    batch,
                    round_up(longest if self._equal else batch.tokens.shape[1], self._multiple),
                    self._pad_id,
                )
                for batch in step
            ]
            self.consumed_samples += self.global_batch_size
            yield padded

    @staticmethod
    def _next(stream: Iterator[MicroBatch | _Failure]) -> MicroBatch:
        try:
            item = next(stream)
        except (RuntimeError, OSError, EOFError) as error:
            # What torch raises when a worker was killed; exceptions of ours come as _Failure.
            raise StepError(
                f"a loader worker process died ({error}); when it was killed for memory, lower "
                "num_workers"
            ) from error
        if isinstance(item, _Failure):
            raise item.error()
        return item

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


@dataclass(frozen=True)
class _Failure:
    """An exception on its way from a worker to the main process."""

    kind: type[StepError]
    message: str

    def error(self) -> StepError:
        return self.kind(self.message)


class _Source(Dataset["MicroBatch | _Failure"]):
    """Microbatch n of this rank, n from 0 on; sent to the workers, which open the files."""

    def __init__(
        self,
        dataset_dir: Path,
        split: str,
        hf_dir: Path,
        seq_length: int,
        order: SampleOrder,
        start: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        need_pixels: bool,
    ) -> None:
        self._where = (dataset_dir, split, hf_dir, seq_length)
        self._order = order
        self._start = start
        self._layout = (micro_batch_size, dp_rank, dp_size)
        self._need_pixels = need_pixels
        self._open: tuple[SampleReader, ConversationEncoder] | None = None

    def open(self, reader: SampleReader, encoder: ConversationEncoder) -> None:
        self._open = (reader, encoder)

    def at(self, start: int) -> _Source:
        """The same source with microbatch 0 at another position of the stream."""
        other = _Source(*self._where, self._order, start, *self._layout, self._need_pixels)
        other._open = self._open
        return other

    def __getitem__(self, number: int) -> MicroBatch | _Failure:
        try:
            return self._make(number)
        except StepError as error:
            return _Failure(type(error), str(error))
        except Exception:
            return _Failure(
                StepError, f"microbatch {number} of the loader failed:\n{traceback.format_exc()}"
            )

    def _make(self, number: int) -> MicroBatch:
        if self._open is None:
            dataset_dir, split, hf_dir, seq_length = self._where
            self._open = (
                SampleReader(dataset_dir, split),
                ConversationEncoder(hf_dir, seq_length),
            )
        reader, encoder = self._open
        size, rank, ranks = self._layout
        first = self._start + (number * ranks + rank) * size
        ids, encoded, pixels, count = [], [], [], 0
        for position in range(first, first + size):
            raw = reader.raw(self._order[position])
            try:
                sample = reader.parse(raw)
                encoded.append(encoder.encode(sample.turns))
                if self._need_pixels and sample.images:
                    pixels.append(encoder.images(sample.images))
            except SampleError as error:
                raise SampleError(f"{reader.root / raw.where}: {error}") from error
            except Exception as error:
                raise RuntimeError(f"{reader.root / raw.where}: {error}") from error
            ids.append(sample.id)
            count += len(sample.images)
        return join(ids, encoded, torch.cat(pixels) if pixels else None, count)


class _From(Sampler[int]):
    """0, 1, 2, ... without end."""

    def __iter__(self) -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1


def _same(item: Any) -> Any:
    return item


def _worker_init(_: int) -> None:
    torch.set_num_threads(1)


def _loader(source: _Source, workers: int) -> DataLoader[Any]:
    """Worker processes come from a fork server: the training process holds threads of torch and of
    the process group, and a fork of it may inherit a lock that nobody will ever release.
    """
    # Without one of its own, opening a DataLoader draws from torch's generator: a resumed training
    # would have drawn once more than an uninterrupted one.
    generator = torch.Generator()
    if workers == 0:
        return DataLoader(
            source, batch_size=None, sampler=_From(), collate_fn=_same, generator=generator
        )
    import multiprocessing

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llava_steps.data.preload"])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return DataLoader(
        source,
        batch_size=None,
        sampler=_From(),
        collate_fn=_same,
        num_workers=workers,
        prefetch_factor=_AHEAD,
        multiprocessing_context=context,
        worker_init_fn=_worker_init,
        generator=generator,
    )
