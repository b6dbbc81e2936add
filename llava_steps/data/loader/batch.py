"""Microbatches: encoded samples back to back in one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from llava_steps.data.samples.encoded import IGNORED, Encoded


@dataclass(frozen=True)
class MicroBatch:
    """Samples that go through the model together, concatenated in one row of T positions."""

    tokens: torch.Tensor
    """int64 [1, T], image tokens expanded; padding at the end."""
    labels: torch.Tensor
    """int64 [1, T], shifted: the id that position t predicts; -100 where nothing is supervised."""
    position_ids: torch.Tensor
    """int64 [1, T], from 0 in every segment."""
    cu_seqlens: torch.Tensor
    """int32 [segments + 1]: segment borders, 0 first, T last; padding is a separate segment."""
    max_seqlen: int
    """Longest segment, padding included."""
    pixel_values: torch.Tensor | None
    """float32 [n, 3, H, W], this rank's part of the row's images (`image_share`, possibly of
    no image) in the order of the image tokens; None for a row without images, or when the spec says
    that this rank needs no pixels."""
    num_images: int
    """Images of the row, whichever rank decoded them."""
    sample_ids: list[str]
    """Ids from the data, which may not be unique."""
    keys: list[str]
    """Tar and key of each sample in its dataset."""
    slots: list[int]
    """Slots of the samples in their global batch, from 0 on."""
    datasets: list[str]
    """Name of the dataset of each sample."""
    num_supervised: int
    """Positions with a label."""
    num_tokens: int
    """Positions of samples, that is T without padding."""


def sample_names(batch: MicroBatch) -> list[str]:
    """What to call the samples in messages: id, dataset, tar and key."""
    rows = zip(batch.sample_ids, batch.datasets, batch.keys, strict=True)
    return [f"{id_} ({dataset}/{key})" for id_, dataset, key in rows]


def image_share(images: int, part: int, parts: int) -> range:
    """Numbers of the images of a row that part `part` of `parts` decodes.

    Equal shares, rounded up: the last parts may have fewer or none.
    """
    share = -(-images // parts)
    return range(min(part * share, images), min((part + 1) * share, images))


def join(
    ids: Sequence[str],
    keys: Sequence[str],
    slots: Sequence[int],
    datasets: Sequence[str],
    encoded: Sequence[Encoded],
    pixels: torch.Tensor | None,
    num_images: int,
) -> MicroBatch:
    """Put samples back to back, without padding."""
    lengths = [len(item.tokens) for item in encoded]
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return MicroBatch(
        tokens=torch.cat([item.tokens for item in encoded])[None],
        labels=torch.cat([item.shifted_labels for item in encoded])[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seqlens=borders,
        max_seqlen=max(lengths),
        pixel_values=pixels,
        num_images=num_images,
        sample_ids=list(ids),
        keys=list(keys),
        slots=list(slots),
        datasets=list(datasets),
        num_supervised=sum(item.supervised for item in encoded),
        num_tokens=sum(lengths),
    )


def pad(batch: MicroBatch, length: int, pad_id: int) -> MicroBatch:
    """`batch` filled up to `length` positions with one unsupervised segment."""
    missing = length - batch.tokens.shape[1]
    if missing < 0:
        raise ValueError(f"a row of {batch.tokens.shape[1]} positions is longer than {length}")
    if missing == 0:
        return batch
    return replace(
        batch,
        tokens=torch.cat([batch.tokens, torch.full((1, missing), pad_id)], dim=1),
        labels=torch.cat([batch.labels, torch.full((1, missing), IGNORED)], dim=1),
        position_ids=torch.cat([batch.position_ids, torch.arange(missing)[None]], dim=1),
        cu_seqlens=torch.cat([batch.cu_seqlens, torch.tensor([length], dtype=torch.int32)]),
        max_seqlen=max(batch.max_seqlen, missing),
    )


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `length`."""
    return -(-length // multiple) * multiple
