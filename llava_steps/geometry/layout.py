"""Whether and how a model can be split into tensor and pipeline parallel parts.

The pipeline is split into pp x vp chunks of whole decoder layers, in the order of the model: chunk
c is held by pipeline rank c % pp. The first chunk has the vision tower and the embeddings beside
its layers, the last one the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from llava_steps.core.errors import ConfigError
from llava_steps.geometry.costs import Trained, Work, flops
from llava_steps.geometry.geometry import Geometry
from llava_steps.settings.stage.stage import Stage

Split = Sequence[int] | Literal["even"]


def check_layout(geometry: Geometry, tp: int, pp: int, vp: int = 1, split: Split = "even") -> None:
    """ConfigError, with the fix, unless the language model can be split into these parts."""
    divisible = {
        "vocab_size": geometry.vocab,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.kv_heads,
        "intermediate_size": geometry.ffn,
    }
    for name, size in divisible.items():
        if size % tp:
            advice = "choose a size that does"
            if name == "vocab_size":
                advice = (
                    f"set hf_model.tp to {tp}, which pads the vocabulary for it (with "
                    f"hf_model.vocab_size_padding above 0), or {advice}"
                )
            raise ConfigError(f"tensor_model_parallel {tp} does not divide {name} {size}; {advice}")
    if pp > geometry.layers:
        raise ConfigError(
            f"pipeline_model_parallel {pp} exceeds the model's {geometry.layers} layers"
        )
    if pp * vp > geometry.layers:
        raise ConfigError(
            f"pipeline_model_parallel {pp} x virtual_pipeline {vp} = {pp * vp} chunks, and the "
            f"model has {geometry.layers} layers; set virtual_pipeline to at most "
            f"{geometry.layers // pp}"
        )
    if split != "even" and (len(split) != pp * vp or sum(split) != geometry.layers):
        raise ConfigError(
            f"pipeline_split {','.join(map(str, split))} gives {sum(split)} layers to {len(split)} "
            f"chunks; the model has {geometry.layers} layers for pipeline_model_parallel x "
            f"virtual_pipeline = {pp * vp} chunks; auto finds a split"
        )


FP8_MULTIPLES = {"tensorwise": 16, "blockwise": 128}
"""Recipe -> the sizes of a matrix must be multiples of this for Transformer Engine."""


def check_fp8(geometry: Geometry, tp: int, recipe: str) -> None:
    """ConfigError, with the fix, unless the linears of a decoder layer support FP8."""
    multiple = FP8_MULTIPLES[recipe]
    parts = {
        "hidden_size": geometry.hidden,
        "intermediate_size / tensor_model_parallel": geometry.ffn // tp,
        "heads x head_dim / tensor_model_parallel": geometry.heads * geometry.head_dim // tp,
        "(heads + 2 x key-value heads) x head_dim / tensor_model_parallel": (
            (geometry.heads + 2 * geometry.kv_heads) * geometry.head_dim // tp
        ),
    }
    smaller = ["fp8_recipe tensorwise"] * (recipe != "tensorwise")
    smaller += ["a smaller tensor_model_parallel"] * (tp > 1)
    for name, size in parts.items():
        if size % multiple:
            raise ConfigError(
                f"fp8 with fp8_recipe {recipe} needs multiples of {multiple}, and {name} is "
                f"{size}; use {' or '.join([*smaller, 'no fp8'])}"
            )


LABELS = 128
"""Compiled heads compute a multiple of this."""


def filled(labels: int) -> int:
    """Positions that a compiled head computes for a row with so many labels; never 0."""
    return max(-(-labels // LABELS), 1) * LABELS


def even_split(layers: int, chunks: int) -> tuple[int, ...]:
    """Layers of each chunk; if they cannot be equal the later ones take one less, because the last
    one also has the head.
    """
    return tuple((layers + chunks - 1 - number) // chunks for number in range(chunks))


def pipeline_split(geometry: Geometry, stage: Stage) -> tuple[int, ...]:
    """Layers of each chunk as configured in `stage`.

    `auto` minimises the largest number of operations of a chunk.
    ConfigError, with the fix, if the model cannot be split like that.
    """
    pp, vp = stage.pipeline_model_parallel, stage.virtual_pipeline
    chosen: tuple[int, ...] | None = None
    if stage.pipeline_split not in ("auto", "even"):
        chosen = tuple(int(part) for part in stage.pipeline_split.split(","))
    check_layout(geometry, stage.tensor_model_parallel, pp, vp, chosen or "even")
    if chosen:
        return chosen
    if stage.pipeline_split == "even" or pp == 1:
        return even_split(geometry.layers, pp * vp)
    layer, first, last = costs(geometry, stage)
    extra = [0.0] * (pp * vp)
    extra[0] += first
    extra[-1] += last
    split = [1] * (pp * vp)
    # All layers cost the same, so adding each to the cheapest chunk is optimal.
    for _ in range(geometry.layers - pp * vp):
        loads = [extra[chunk] + (count + 1) * layer for chunk, count in enumerate(split)]
        split[loads.index(min(loads))] += 1
    return tuple(split)


def costs(geometry: Geometry, stage: Stage) -> tuple[float, float, float]:
    """Operations of one row: (a decoder layer, tower and projector, head), for comparison.

    Assumes a row of half image tokens and half text, half of which is supervised.
    """
    tokens = (stage.pack_length if stage.packing else 0) or stage.seq_length
    images = -(-tokens // (2 * geometry.tokens_per_image))
    work = Work(tokens, tokens // 4, images, tokens * stage.seq_length)
    trained = Trained.by(stage)
    parts = flops(geometry, trained, work, "supervised")
    layers = parts.layers + parts.attention
    if stage.recompute == "full":
        forward = flops(geometry, Trained(False, False, False), work, "supervised")
        layers += forward.layers + forward.attention
    return layers / geometry.layers, parts.vision + parts.projector, parts.head
