"""Losses of single samples, packed and one by one. Run through tests.helpers.dist_helpers.spawn."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

from llava_steps.data.samples.encoded import IGNORED
from llava_steps.geometry.geometry import Geometry
from llava_steps.model.llava import build_llava
from llava_steps.model.options import ModelOptions
from llava_steps.model.weights import load_weights
from llava_steps.store.commit import latest_commit
from tests.helpers.data_fixtures import train_loader
from tests.helpers.dist_helpers import model_parallel

STEPS, BATCH, LENGTH = 5, 40, 256


def losses(
    rank: int, hf: Path, dataset: Path, checkpoint: Path
) -> list[tuple[list[tuple[int, str, float]], int, int]]:
    """For unpacked and packed: (place in the stream, id, mean loss) by sample; rows; tokens."""
    found = []
    with model_parallel(1, 1):
        model = build_llava(Geometry.load(hf), ModelOptions(precision="fp32"))
        load_weights(model, latest_commit(checkpoint) / "weights")
        model.eval()
        for packing in (False, True):
            loader = train_loader(
                dataset, hf, seq_length=LENGTH, global_batch_size=BATCH, seed=11, packing=packing
            )
            samples, rows, tokens = [], 0, 0
            for step, batch in enumerate(itertools.islice(loader, STEPS)):
                for row in batch:
                    with torch.no_grad():
                        out = model(
                            row.tokens, row.position_ids, row.cu_seqlens, row.max_seqlen,
                            row.pixel_values, row.labels,
                        )  # fmt: skip
                    borders = row.cu_seqlens.tolist()[: len(row.sample_ids) + 1]
                    counts = [
                        int((row.labels[0, a:b] != IGNORED).sum())
                        for a, b in itertools.pairwise(borders)
                    ]
                    means = [float(part.double().mean()) for part in out.split(counts)]
                    for place, name, mean in zip(row.slots, row.sample_ids, means, strict=True):
                        samples.append((step * BATCH + place, name, mean))
                    rows += 1
                    tokens += row.num_tokens
            found.append((sorted(samples), rows, tokens))
    return found
