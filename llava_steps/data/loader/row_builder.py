"""What loader workers make: lengths of samples, and rows of samples with their pixels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from llava_steps.core.errors import StepError
from llava_steps.data.energon.reader import RawSample
from llava_steps.data.loader.batch import MicroBatch, image_share, join
from llava_steps.data.loader.corpus import Corpus, SampleRef
from llava_steps.data.loader.lengths import Lengths
from llava_steps.data.loader.spec import LoaderSpec
from llava_steps.data.samples.conversation import ConversationEncoder
from llava_steps.data.samples.encoded import Encoded
from llava_steps.data.samples.sample import Sample, SampleError


class RowBuilder:
    """Reads, tokenizes and decodes; sent to the workers, each of which opens the files itself.

    Args:
        corpus: the samples.
        spec: how they are read.
        lengths: table of known lengths, by `corpus.number`; only packing needs it.
    """

    def __init__(self, corpus: Corpus, spec: LoaderSpec, lengths: Lengths | None = None) -> None:
        self.corpus = corpus
        self._spec = spec
        self._lengths = lengths
        self._encoders: dict[Path | None, ConversationEncoder] = {}
        self.watch: Callable[[int], None] = _unwatched
        """Called with the position of each sample before it is touched."""

    def encoder(self, dataset: int = 0) -> ConversationEncoder:
        """The encoder with the chat template of a dataset.

        Raises:
            InputError, ConfigError: nothing can be trained with it; the message says why.
        """
        template = self.corpus.members[dataset].chat_template
        if template not in self._encoders:
            spec = self._spec
            self._encoders[template] = ConversationEncoder(
                spec.hf_dir, spec.seq_length, template, spec.truncate
            )
        return self._encoders[template]

    def check(self) -> None:
        """Make all encoders now, in the process that can tell the user."""
        for dataset in range(len(self.corpus.members)):
            self.encoder(dataset)

    def without_encoders(self) -> RowBuilder:
        """A copy that can be sent to another process, where its encoders are made anew."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__ | {"_encoders": {}, "watch": _unwatched})
        return copy

    def lengths(self, positions: Sequence[int]) -> list[int]:
        """Tokens of the samples at these positions; images are not read.

        Raises:
            SampleError: a sample cannot be used; the message names tar and key.
        """
        assert self._lengths is not None
        lengths = []
        for position in positions:
            self.watch(position)
            ref = self.corpus[position]
            number = self.corpus.number(ref)
            length = self._lengths[number]
            if not length:
                length = self._length(ref)
                self._lengths[number] = length
            lengths.append(length)
        return lengths

    def _length(self, ref: SampleRef) -> int:
        raw = self.corpus.raw(ref, images=False)
        with _naming(self.corpus.where(ref, raw)):
            return self.encoder(ref.dataset).length(self.corpus.parse(ref, raw).turns)

    def row(self, first: int, slots: Sequence[int], tokens: int | None) -> MicroBatch:
        """The row of the samples at `slots` of the global batch that begins at position `first`.

        `tokens` is what the plan says of its length, if there is a plan.

        Raises:
            SampleError: a sample cannot be used; the message names tar and key.
            StepError: the row is longer or shorter than planned.
        """
        ids, keys, datasets, encoded = [], [], [], []
        images: list[tuple[int, bytes, str]] = []
        total = 0
        for slot in slots:
            self.watch(first + slot)
            ref = self.corpus[first + slot]
            raw = self.corpus.raw(ref)
            where = self.corpus.where(ref, raw)
            with _naming(where):
                sample, item = self._encode(ref, raw)
            ids.append(sample.id)
            keys.append(raw.where)
            datasets.append(self.corpus.members[ref.dataset].name)
            encoded.append(item)
            for number, data in enumerate(sample.images[: item.images]):
                images.append((first + slot, data, f"{where}: image {number}"))
            total += len(item.tokens)
        if tokens is not None and total != tokens:
            raise StepError(
                f"samples {ids} have {total} tokens where {tokens} were planned; did the dataset "
                "or the tokenizer change while the training runs?"
            )
        pixels = self._pixels(images) if self._spec.need_pixels else None
        return join(ids, keys, slots, datasets, encoded, pixels, len(images))

    def _encode(self, ref: SampleRef, raw: RawSample) -> tuple[Sample, Encoded]:
        sample = self.corpus.parse(ref, raw)
        return sample, self.encoder(ref.dataset).encode(sample.turns)

    def _pixels(self, images: Sequence[tuple[int, bytes, str]]) -> torch.Tensor | None:
        """float32 [n, 3, H, W] of this rank's part of a row's images; None for a row of text."""
        if not images:
            return None
        transform = self.encoder().images
        part = image_share(len(images), self._spec.image_part, self._spec.image_parts)
        pixels = transform.empty(len(part))
        for target, number in enumerate(part):
            position, data, where = images[number]
            self.watch(position)
            with _naming(where):
                transform.fill(pixels[target], data)
        return torch.from_numpy(pixels)


def _unwatched(position: int) -> None:
    return None


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Have an error name the sample that caused it."""
    try:
        yield
    except SampleError as error:
        raise SampleError(f"{where}: {error}") from error
    except Exception as error:
        raise RuntimeError(f"{where}: {error}") from error
