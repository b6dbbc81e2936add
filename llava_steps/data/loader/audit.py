"""What training will see of a dataset: shares, lengths, and every rule that a sample breaks.

Samples are read, tokenized and decoded by the classes that training uses. What comes out is then
judged here only from the ids and labels, independent of how they were made.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llava_steps.data.loader.batch import join, pad
from llava_steps.data.loader.corpus import Corpus, SampleRef
from llava_steps.data.samples.conversation import ConversationEncoder
from llava_steps.data.samples.encoded import IGNORED, Encoded
from llava_steps.data.samples.sample import PLACEHOLDER, Sample, SampleError

NAMED = 100
"""Samples that a report lists by name for each kind of trouble; all are counted."""
BINS = 10
AT_LEAST = 20
"""Samples of each dataset of a blend that are inspected, however small its share is."""


@dataclass(frozen=True)
class Piece:
    """A run of positions of an example that are all supervised, or all not."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class Example:
    """A sample to be read by a person."""

    where: str
    tokens: int
    supervised: int
    pieces: tuple[Piece, ...]
    images: tuple[bytes, ...] = ()
    """The encoded image files."""


@dataclass
class Auditor:
    """Inspects samples one by one and adds up what it finds.

    Args:
        corpus: the datasets.
        hf_dir: HF directory with tokenizer, chat template and image processor.
        seq_length: longest accepted sample in tokens.
        truncate: longer samples are cut.

    Raises:
        InputError, ConfigError: nothing can be trained with them; the message says why.
    """

    corpus: Corpus
    hf_dir: Path
    seq_length: int
    truncate: bool = False
    lengths: list[int] = field(default_factory=list)
    """Tokens of each usable sample."""
    totals: Counter[str] = field(default_factory=Counter)
    refused: list[dict[str, str]] = field(default_factory=list)
    """Samples that would stop the training, with the reason."""
    broken: list[dict[str, str]] = field(default_factory=list)
    """Samples whose labels or image tokens break a rule."""
    truncated: list[str] = field(default_factory=list)
    """Samples that max_turns of their dataset or seq_length cuts."""

    def __post_init__(self) -> None:
        self._named: set[str] = set()
        self._encoders = {
            template: ConversationEncoder(self.hf_dir, self.seq_length, template, self.truncate)
            for template in {member.chat_template for member in self.corpus.members}
        }

    def encoder(self, ref: SampleRef) -> ConversationEncoder:
        """The encoder of the sample's dataset."""
        return self._encoders[self.corpus.members[ref.dataset].chat_template]

    def inspect_sizes(self) -> None:
        """Judge the sizes of all images of the datasets, as far as these list them."""
        for reader, member in zip(self.corpus.readers, self.corpus.members, strict=True):
            images = self._encoders[member.chat_template].images
            for image in reader.long_images():
                where = str(reader.root / f"{image.tar}/{image.key}")
                try:
                    images.read.check_size(image.width, image.height)
                except SampleError as error:
                    if where not in self._named:
                        self._named.add(where)
                        self._name(self.refused, where, f"part {image.part}: {error}", "refused")

    def inspect(self, ref: SampleRef) -> Example | None:
        """Judge one sample; None if training would refuse it.

        Raises:
            InputError: its tar cannot be read.
        """
        self.totals["samples"] += 1
        raw = self.corpus.raw(ref)
        where = self.corpus.where(ref, raw)
        if where in self._named:
            return None
        encoder = self.encoder(ref)
        try:
            sample = self.corpus.parse(ref, raw)
            encoded = encoder.encode(sample.turns)
            pixels = encoder.images(sample.images[: encoded.images])
        except SampleError as error:
            self._name(self.refused, where, str(error), "refused")
            return None
        whole = self.corpus.readers[ref.dataset].parse(raw)
        if encoded.cut or len(sample.turns) < len(whole.turns):
            self.totals["truncated"] += 1
            if len(self.truncated) < NAMED:
                self.truncated.append(where)
        self._count(sample, encoded)
        for trouble in judge(encoder, sample, encoded, pixels):
            self._name(self.broken, where, trouble, "broken")
        shown = pieces(encoder, encoded)
        return Example(where, len(encoded.tokens), encoded.supervised, shown, sample.images)

    def _count(self, sample: Sample, encoded: Encoded) -> None:
        self.lengths.append(len(encoded.tokens))
        self.totals["usable"] += 1
        self.totals["tokens"] += len(encoded.tokens)
        self.totals["supervised"] += encoded.supervised
        self.totals["images"] += encoded.images
        self.totals["answers"] += encoded.answers
        self.totals["context_answers"] += encoded.context_answers

    def _name(self, samples: list[dict[str, str]], where: str, why: str, kind: str) -> None:
        self.totals[kind] += 1
        if len(samples) < NAMED:
            samples.append({"sample": where, "why": why})

    def report(self) -> dict[str, Any]:
        """Everything that was found, as JSON; shares are of tokens, lengths in tokens."""
        keys = ["samples", "usable", "refused", "broken", "truncated", "answers", "images"]
        keys += ["context_answers"] if self.totals["context_answers"] else []
        tokens = self.totals["tokens"]
        return {
            **{key: self.totals[key] for key in keys},
            "samples_in_split": len(self.corpus),
            "tokens": tokens,
            "supervised_tokens": self.totals["supervised"],
            "supervised_share": round(self.totals["supervised"] / max(tokens, 1), 6),
            "seq_length": self.seq_length,
            "lengths": lengths(self.lengths),
            "refused_samples": self.refused,
            "broken_samples": self.broken,
            "truncated_samples": self.truncated,
        }


def choose(corpus: Corpus, count: int, seed: int) -> list[SampleRef]:
    """`count` samples of the corpus, spread over its datasets by their sizes; 0 is all of them."""
    chosen: list[SampleRef] = []
    total = len(corpus)
    for dataset, size in enumerate(corpus.sizes):
        share = size if count in (0, total) else max(round(count * size / total), AT_LEAST)
        if len(corpus.sizes) == 1 and count:
            share = count
        numbers = random.Random(f"{seed} {dataset}").sample(range(size), min(share, size))
        chosen += [SampleRef(dataset, number) for number in sorted(numbers)]
    return chosen


def judge(
    encoder: ConversationEncoder, sample: Sample, encoded: Encoded, pixels: torch.Tensor
) -> list[str]:
    """What is wrong with a sample as training gets it; nothing, if it is right.

    Args:
        encoder: gives the ids of image token, padding and end tokens.
        sample: the conversation and its images.
        encoded: its tokens and labels.
        pixels: float32 [images, 3, height, width].
    """
    problems = []
    row = pad(
        join([sample.id], [""], [0], [""], [encoded], None, len(sample.images)),
        len(encoded.tokens) + 1,
        encoder.pad_id,
    )
    tokens, labels = row.tokens[0].numpy(), row.labels[0].numpy()
    supervised = labels != IGNORED
    length = len(encoded.tokens)
    if supervised[length - 1 :].any():
        problems.append("padding is supervised")
    targets = np.append(tokens[1:], IGNORED)
    if (labels[supervised] != targets[supervised]).any():
        problems.append("a label is not the next token")
    if (labels == encoder.image_token_id).any():
        problems.append("an image token is supervised")
    if encoder.pad_id not in encoder.end_ids and (labels == encoder.pad_id).any():
        problems.append("a padding token is supervised")
    spans = runs(supervised)
    answers, wanted = len(sample.turns) // 2 - encoded.context_answers, len(sample.images)
    if encoded.cut:  # whole rounds with their images, or part of the first one
        answers = min(max(len(spans), 1), answers)
        rounds = sample.turns[: 2 * answers + len(sample.turns) % 2]  # a system turn goes before
        wanted = sum(turn.content.count(PLACEHOLDER) for turn in rounds)
        wanted = wanted if not encoded.context_answers else encoded.images
    if len(spans) != answers:
        problems.append(f"{len(spans)} supervised spans for {answers} answers")
    ended = sum(int(labels[stop - 1]) in encoder.end_ids for _, stop in spans)
    closed = answers - encoded.open_answers
    if ended != closed and not (encoded.cut and answers == 1 and length == encoder.seq_length):
        problems.append(f"{ended} of {closed} answers are supervised up to an end token")
    if length > encoder.seq_length:
        problems.append(f"{length} tokens are more than seq_length {encoder.seq_length}")
    images = int((tokens == encoder.image_token_id).sum())
    if images != encoder.tokens_per_image * wanted:
        problems.append(f"{images} image tokens for {wanted} images of {encoder.tokens_per_image}")
    if len(pixels) != wanted or not bool(torch.isfinite(pixels).all()):
        problems.append("pixel values are missing or not finite")
    return problems


def runs(mask: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """[start, end) of each run of True in a bool vector."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def pieces(encoder: ConversationEncoder, encoded: Encoded) -> tuple[Piece, ...]:
    """The sample's text, split where supervision begins and ends; runs of image tokens are short.

    A token is supervised when the position before it has it as label.
    """
    tokens = encoded.tokens.numpy()
    supervised = np.concatenate(([False], encoded.shifted_labels.numpy()[:-1] != IGNORED))
    borders = [0, *(np.flatnonzero(np.diff(supervised)) + 1).tolist(), len(tokens)]
    return tuple(
        Piece(_text(encoder, tokens[start:stop]), bool(supervised[start]))
        for start, stop in pairwise(borders)
        if stop > start
    )


def _text(encoder: ConversationEncoder, tokens: npt.NDArray[np.int64]) -> str:
    """Decoded tokens; n image tokens in a row are written as `<image> x n`."""
    text, done = "", 0
    for start, stop in runs(tokens == encoder.image_token_id):
        text += encoder.decode(tokens[done:start]) + encoder.decode(tokens[start : start + 1])
        text += f" x {stop - start} "
        done = stop
    return text + encoder.decode(tokens[done:])


def lengths(tokens: Sequence[int]) -> dict[str, Any]:
    """Smallest, middle and largest length and a histogram: rows [from, to), number of samples."""
    if not tokens:
        return {"histogram": []}
    values = np.asarray(tokens)
    edges = np.unique(np.linspace(values.min(), values.max() + 1, BINS + 1).round().astype(int))
    counts, _ = np.histogram(values, edges)
    # The last bin of numpy is closed on the right; nothing lies at its end, which is max + 1.
    rows = [
        {"from": int(a), "to": int(b), "samples": int(n)}
        for (a, b), n in zip(pairwise(edges), counts, strict=True)
    ]
    middle = {f"p{p}": int(np.percentile(values, p)) for p in (50, 90, 99)}
    return {"min": int(values.min()), **middle, "max": int(values.max()), "histogram": rows}
