"""Memory of one training process by part, predicted from shapes and layout. No torch.

Activations are those that each kind of layer keeps for its backward pass: plain layers of the
`local` spec, or those with the kernels of model/kernels.py (compiled, or with Transformer Engine's
linears). Sizes are bytes. Temporary tensors of single kernels, the CUDA context and the buffers of
communication libraries are not included; `geometry/hardware.py` reserves a share of a GPU for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llava_steps.geometry.costs import Sum, Trained, kv_width, layer_weights, parameters, q_width
from llava_steps.geometry.geometry import Geometry
from llava_steps.geometry.layout import even_split, filled, pipeline_split

if TYPE_CHECKING:
    from llava_steps.settings.stage.stage import Stage


@dataclass(frozen=True)
class Layout:
    """Layout and compute options of a training. `cuda`: with the kernels of a GPU."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    vp: int = 1
    """Chunks of the model on each pipeline rank."""
    split: tuple[int, ...] = ()
    """Decoder layers of each of the pp x vp chunks; unless given they are shared evenly."""
    sequence_parallel: bool = False
    recompute: Literal["none", "core_attn", "full"] = "none"
    precision: Literal["fp32", "bf16"] = "bf16"
    cuda: bool = True
    kernels: bool = False
    """Layers with the kernels of model/kernels.py."""
    compiled: bool = False
    """Layers and head compiled; or only the head, with Transformer Engine's linears."""
    fp8: bool = False
    """Products of the layers in FP8."""
    engine: bool = False
    """Transformer Engine's linears, which keep the weights in FP8 too, in both orientations."""

    @classmethod
    def by(cls, geometry: Geometry, stage: Stage, cuda: bool = True) -> Layout:
        """The layout of a stage; ConfigError if the model cannot be split like that."""
        compiled = stage.compiles(cuda)
        return cls(
            stage.tensor_model_parallel,
            stage.pipeline_model_parallel,
            stage.data_parallel,
            stage.virtual_pipeline,
            pipeline_split(geometry, stage),
            stage.sequence_parallel,
            stage.recompute,
            stage.precision,
            cuda,
            compiled or stage.transformer_engine,
            compiled,
            stage.fp8,
            stage.transformer_engine,
        )


@dataclass(frozen=True)
class Row:
    """One microbatch: positions with padding, samples and the longest of them, images, labels."""

    tokens: int
    samples: int
    longest: int
    images: int
    supervised: int


@dataclass(frozen=True)
class Memory(Sum):
    """Bytes of one process. `logits` are the activations of the head and the loss."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int


def memory(
    geometry: Geometry, trained: Trained, layout: Layout, row: Row, microbatches: int = 1
) -> Memory:
    """Of the process that needs most: the maximum over the pipeline stages."""
    each = (
        of_stage(geometry, trained, layout, row, microbatches, number)
        for number in range(layout.pp)
    )
    return max(each, key=lambda memory: memory.total)


def of_stage(
    g: Geometry, trained: Trained, layout: Layout, row: Row, microbatches: int, number: int
) -> Memory:
    """Of a process of pipeline stage `number`, in one step of `microbatches` rows like `row`.

    One forward one backward: stage k of p holds up to p - k microbatches; interleaved, with v
    chunks each, 2 (p - k - 1) + (v - 1) p + 1 chunks of one (Narayanan et al. 2021,
    arXiv:2104.04473, section 2.2, and Megatron's schedule).
    """
    first, last = number == 0, number == layout.pp - 1
    weights, learned = _weights(g, trained, layout, number)
    size = _bytes(layout)
    chunks = layout.pp - number
    if layout.vp > 1:
        chunks = 2 * (chunks - 1) + (layout.vp - 1) * layout.pp + 1
    flying = min(chunks, microbatches * layout.vp)
    activations, once = _layers(g, trained, layout, row, number)
    kept = -(-flying * activations // layout.vp)
    norm, logits = _head(g, trained, layout, row) if last else (0, 0)
    if first:
        kept += -(-flying // layout.vp) * _front(g, trained, layout, row)
    # A layer is recomputed after the head has freed its activations: never both at a time.
    kept += norm + max(0, once - norm - logits)
    # The distributed optimizer: fp32 masters (in fp32 the weights themselves) and two moments.
    states = 12 if layout.precision == "bf16" else 8
    return Memory(
        weights=weights * size + (layout.fp8 and layout.engine) * 2 * _products(g, layout, number),
        gradients=learned * 4,
        optimizer=-(-learned * states // layout.dp),
        activations=kept,
        logits=logits,
    )


def _bytes(layout: Layout) -> int:
    return 2 if layout.precision == "bf16" else 4


def stage_layers(g: Geometry, layout: Layout, number: int) -> int:
    """Decoder layers of pipeline stage `number`, in all its chunks."""
    split = layout.split or even_split(g.layers, layout.pp * layout.vp)
    return sum(split[number :: layout.pp])


def _weights(g: Geometry, trained: Trained, layout: Layout, number: int) -> tuple[int, int]:
    """Parameters of a process of stage `number`, and those that it trains."""
    first, last = number == 0, number == layout.pp - 1
    p, tp, lm = parameters(g), layout.tp, trained.language_model
    whole = 2 * g.hidden + (g.output_bias + g.mlp_bias) * g.hidden + g.qk_norm * 2 * g.head_dim
    layer = p.layers // g.layers
    language = stage_layers(g, layout, number) * (whole + (layer - whole) // tp)
    if first:
        language += p.embedding // tp
    if last:
        language += p.final_norm + p.head // tp
        if g.tied and not first:
            language += p.embedding // tp  # a copy, kept equal
    weights, learned = language, lm * language
    if first:
        weights += p.vision_read + p.vision_rest + p.projector
        learned += trained.vision * p.vision_read + trained.projector * p.projector
    return weights, learned


def _products(g: Geometry, layout: Layout, number: int) -> int:
    """Weights of a stage's layers of which Transformer Engine keeps FP8 copies."""
    return stage_layers(g, layout, number) * layer_weights(g) // layout.tp


def _layers(
    g: Geometry, trained: Trained, layout: Layout, row: Row, number: int
) -> tuple[int, int]:
    """Bytes that a stage's layers keep for one microbatch, and those of one layer at a time."""
    b, tp = _bytes(layout), layout.tp
    q, kv = q_width(g) // tp, kv_width(g) // tp
    ffn, heads = g.ffn // tp, g.heads // tp
    wide = row.tokens // (tp if layout.sequence_parallel else 1)
    dense = row.tokens if layout.cuda else row.samples * row.longest
    lm = trained.language_model
    if not (lm or trained.adapters or trained.projector or trained.vision):
        return 0, 0
    layers = stage_layers(g, layout, number)
    if layout.kernels:
        return _over_kernels(g, layout, row, lm, layers, number == layout.pp - 1)
    # The output of a norm is kept by the product after it.
    norm = _norm(g, trained, layout, row) + lm * wide * g.hidden * b
    if layout.cuda or row.samples > 1:
        attention = dense * ((2 * q + 2 * kv) * b + heads * 4)
        if not layout.cuda:
            attention += lm * row.tokens * q * b  # the output again, back in its row
    else:
        # Values are a view of the fused projection, which therefore stays as a whole.
        attention = dense * ((3 * q + 3 * kv) * b + heads * 4)
    # The fused gate and up, the activated gate, up, and their product.
    mlp = row.tokens * ffn * b * (4 + lm)
    whole = 2 * norm + attention + mlp
    tables = row.tokens * 2 * g.head_dim * b
    if not layout.cuda and row.samples > 1:
        tables += 8 * (dense + row.tokens)
    if layout.recompute == "full":
        given = wide * g.hidden * b
        return layers * given + tables, whole - given
    if layout.recompute == "core_attn":
        lean = row.tokens * (2 * q + 2 * kv) * b
        return layers * (2 * norm + lean + mlp) + tables, attention
    return layers * whole + tables, 0


def _over_kernels(
    g: Geometry, layout: Layout, row: Row, lm: bool, layers: int, last: bool
) -> tuple[int, int]:
    """Like `_layers`; the last layer of a compiled model keeps only positions with labels."""
    b, tp = _bytes(layout), layout.tp
    # Bytes of its input that a product keeps.
    kept = lm * (1 if layout.fp8 else b)
    q, kv, ffn = q_width(g) // tp, kv_width(g) // tp, g.ffn // tp
    scattered = tp if layout.sequence_parallel else 1
    wide = row.tokens // scattered
    # A norm's input and one number a position; its output is kept by the product after it.
    norm = g.hidden * (b + kept) + 4
    # The fused projection, rotated queries and keys, the result and its normalisation.
    attention = row.tokens * ((3 * q + 3 * kv) * b + g.heads // tp * 4)
    attention += layout.fp8 * row.tokens * q * kept
    mlp = ffn * (2 * b + kept)  # gate and up, and their product
    whole = wide * 2 * norm + attention + row.tokens * mlp
    tables = row.tokens * 2 * g.head_dim * b
    if layout.recompute == "full":
        given = wide * g.hidden * b
        return layers * given + tables, whole - given
    total = layers * whole + tables
    if last and layout.compiled:
        total -= (row.tokens - filled(row.supervised)) * (norm + mlp)
        total += filled(row.supervised) * q * kept
    return total, 0


def _front(g: Geometry, trained: Trained, layout: Layout, row: Row) -> int:
    """Bytes that embedding, tower and projector keep for one microbatch."""
    b, positions = _bytes(layout), row.images * g.tokens_per_image
    kept = trained.language_model * row.tokens * 8
    if trained.vision or trained.projector:
        # linear_1's input, the activation's, linear_2's, and the features with their positions.
        kept += positions * (
            trained.projector * (g.vision_hidden + g.hidden) * b + 2 * g.hidden * b + 8
        )
    elif trained.language_model:
        kept += positions * (g.hidden * b + 8)
    if trained.vision:
        patches = (g.image_size // g.patch_size) ** 2 + 1
        ffn = g.vision_config.get("intermediate_size", 3072)
        layer = (10 * g.vision_hidden + 4 * ffn) * b
        kept += row.images * patches * g.feature_depth * layer
    return kept


def _head(g: Geometry, trained: Trained, layout: Layout, row: Row) -> tuple[int, int]:
    """Bytes kept by the final norm, and by the head and the loss, for one microbatch."""
    b, lm = _bytes(layout), trained.language_model
    rows = row.supervised
    selected = lm * g.hidden * b + 8 + 1 + 8
    if layout.compiled:
        # The logits once, and on a GPU their gradient briefly; the final norm sees no more.
        size, rows = b * (2 if layout.cuda else 1), filled(rows)
        return rows * (g.hidden * b + 4), rows * (g.vocab * size + selected)
    # Softmax in fp32; on a GPU in bf16 the logits exist beside it briefly.
    passing = 2 if layout.cuda and layout.precision == "bf16" else 0
    head = rows * (g.vocab // layout.tp * (4 + passing) + selected)
    return _norm(g, trained, layout, row), head


def _norm(g: Geometry, trained: Trained, layout: Layout, row: Row) -> int:
    """Bytes that a norm keeps: its input and one number a position; on a CPU, which computes it
    step by step in fp32, for the gradient of its weight the quotient too.
    """
    wide = row.tokens // (layout.tp if layout.sequence_parallel else 1)
    if layout.cuda:
        return wide * (g.hidden * _bytes(layout) + 4)
    return wide * (g.hidden * 4 * (1 + trained.language_model) + 4)
