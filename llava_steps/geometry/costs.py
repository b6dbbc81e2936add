"""The costs of a model and a training step: parameters and floating-point operations. No torch.

Everything follows from the `Geometry`, the trained parts, and counts of tokens and images. The
metrics of training, the plan and the benchmarks all use this module. Operations are those of matrix
products, one multiplication and one addition each; norms, activations, softmax and look-ups are
left out, as in Kaplan et al. 2020 (arXiv:2001.08361, table 1) and Chowdhery et al. 2022
(arXiv:2204.02311, appendix B). Recomputing activations does not count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

from llava_steps.geometry.families import VISION_FAMILIES
from llava_steps.geometry.geometry import Geometry

if TYPE_CHECKING:
    from llava_steps.settings.stage.stage import Stage


class Sum:
    """A dataclass of numbers that has a total and can be added up."""

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Part -> number, in the order of the fields."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class Trained:
    """Which parts of the model are trained.

    `adapters`: the language model has LoRA adapters, which are trained; their own parameters and
    operations, a per cent or so of the model's, are left out.
    """

    vision: bool = False
    projector: bool = True
    language_model: bool = True
    adapters: bool = False

    @classmethod
    def by(cls, stage: Stage) -> Trained:
        """The trained parts of a stage."""
        return cls(
            not stage.freeze_vision,
            not stage.freeze_projector,
            not stage.freeze_lm and not stage.lora_rank,
            bool(stage.lora_rank),
        )


@dataclass(frozen=True)
class Parameters(Sum):
    """Numbers of parameters. `vision_read` is the part of the tower that training runs, embeddings
    included; `vision_rest` the part after the hidden state that is read.
    """

    vision_read: int
    vision_rest: int
    projector: int
    embedding: int
    layers: int
    final_norm: int
    head: int


def parameters(geometry: Geometry) -> Parameters:
    """The parameters of a model; a tied head counts as 0."""
    g = geometry
    tower = _tower(g)
    layer = layer_weights(g) + 2 * g.hidden
    layer += g.qkv_bias * (q_width(g) + 2 * kv_width(g)) + g.output_bias * g.hidden
    layer += g.mlp_bias * (2 * g.ffn + g.hidden) + g.qk_norm * 2 * g.head_dim
    return Parameters(
        vision_read=tower.embeddings + g.feature_depth * tower.layer,
        vision_rest=(g.vision_layers - g.feature_depth) * tower.layer + tower.after,
        projector=_projector_weights(g) + g.projector_bias * 2 * g.hidden,
        embedding=g.vocab * g.hidden,
        layers=g.layers * layer,
        final_norm=g.hidden,
        head=0 if g.tied else g.vocab * g.hidden,
    )


def trained_parameters(geometry: Geometry, trained: Trained) -> Parameters:
    """The parameters that training updates, by part."""
    p = parameters(geometry)
    lm = trained.language_model
    return Parameters(
        vision_read=trained.vision * p.vision_read,
        vision_rest=0,
        projector=trained.projector * p.projector,
        embedding=lm * p.embedding,
        layers=lm * p.layers,
        final_norm=lm * p.final_norm,
        head=lm * p.head,
    )


@dataclass(frozen=True)
class Work:
    """Counts of the model's input, without padding; they add up over batches and ranks.

    tokens: positions of samples, image tokens included. supervised: those with a label. images:
    pictures. squares: sum over the samples of length in tokens, squared.
    """

    tokens: int = 0
    supervised: int = 0
    images: int = 0
    squares: int = 0

    @classmethod
    def of(cls, lengths: Iterable[int], supervised: int, images: int) -> Work:
        """The work of samples of these lengths in tokens."""
        known = [int(length) for length in lengths]
        return cls(sum(known), supervised, images, sum(n * n for n in known))

    def __add__(self, other: Work) -> Work:
        return Work(
            self.tokens + other.tokens,
            self.supervised + other.supervised,
            self.images + other.images,
            self.squares + other.squares,
        )


@dataclass(frozen=True)
class Flops(Sum):
    """Floating-point operations, forward and backward together, by part of the model.

    `layers` are the products with the weights of the decoder layers; `attention` grows with the
    square of the length.
    """

    vision: int
    projector: int
    layers: int
    attention: int
    head: int


def flops(
    geometry: Geometry, trained: Trained, work: Work, head: Literal["supervised", "tokens"]
) -> Flops:
    """The model's operations for `work`, forward and backward.

    Per weight of a matrix and position: 2 forward, 2 more if gradients pass on to earlier parts, 2
    more if the weight itself is trained; hence 6 in a trained language model, 4 in a frozen one
    after a trained part, 2 in a frozen tower. Attention covers half of the square of a sample
    (causal; as FlashAttention counts, arXiv:2307.08691, section 4.1), all of it in the tower; its
    backward pass is twice the forward one. Vision layers after the hidden state that is read never
    run.

    Args:
        geometry: the model.
        trained: its trained parts.
        work: counts of what is computed, over the global batch or one rank's share of it.
        head: positions to count for the output layer: those with a label, as training computes
            them, or all tokens, as most published figures do.
    """
    g, lm = geometry, trained.language_model
    before = trained.vision or trained.projector
    vision, first, tower_attention = _vision(g, work.images)
    positions = work.images * g.tokens_per_image
    heads = work.supervised if head == "supervised" else work.tokens
    # Embeddings are trained with the language model, so its first layer passes gradients on.
    passes = lm or before or trained.adapters
    through = 2 + 2 * passes + 2 * lm
    return Flops(
        vision=vision * (2 + 4 * trained.vision)
        # The gradient of the pixels is not needed.
        + first * (2 + 2 * trained.vision)
        + tower_attention * (3 if trained.vision else 1),
        projector=positions
        * (
            g.vision_hidden * g.hidden * (2 + 2 * trained.vision + 2 * trained.projector)
            + g.hidden**2 * (2 + 2 * before + 2 * trained.projector)
        ),
        layers=work.tokens * g.layers * layer_weights(g) * through,
        # Two products, 2 operations each, over half the square.
        attention=g.layers * 2 * q_width(g) * work.squares * (3 if passes else 1),
        head=heads * g.vocab * g.hidden * through,
    )


@dataclass(frozen=True)
class _Tower:
    """Parameters of a tower: before the layers, of each, after them; width of a layer's MLP."""

    embeddings: int
    layer: int
    after: int
    ffn: int
    channels: int


def _tower(g: Geometry) -> _Tower:
    row = VISION_FAMILIES[g.vision_family]
    config = {**row.defaults, **g.vision_config}
    ffn, channels, hidden = config["intermediate_size"], config["num_channels"], g.vision_hidden
    mlp = 2 * hidden * ffn + ffn + hidden
    layer = 4 * (hidden**2 + hidden) + mlp + 4 * hidden
    patches = (g.image_size // g.patch_size) ** 2
    embeddings = hidden * (channels * g.patch_size**2 + patches + row.class_tokens)
    after = 2 * hidden
    if g.vision_family == "clip_vision_model":
        embeddings += hidden + 2 * hidden  # the class token, and the norm before the layers
    else:
        embeddings += hidden  # SigLIP's patches have a bias
        if config["vision_use_head"]:  # attention pooling: a probe, attention, a norm and an MLP
            after += hidden + 4 * (hidden**2 + hidden) + 2 * hidden + mlp
    return _Tower(embeddings, layer, after, ffn, channels)


def _vision(g: Geometry, images: int) -> tuple[int, int, int]:
    """Weights times positions of the layers and of the patch embedding, and forward operations of
    attention, over all images.
    """
    tower = _tower(g)
    patches = (g.image_size // g.patch_size) ** 2
    positions = patches + VISION_FAMILIES[g.vision_family].class_tokens
    weights = 4 * g.vision_hidden**2 + 2 * g.vision_hidden * tower.ffn
    return (
        images * positions * g.feature_depth * weights,
        images * patches * tower.channels * g.patch_size**2 * g.vision_hidden,
        images * g.feature_depth * 4 * positions**2 * g.vision_hidden,
    )


def q_width(g: Geometry) -> int:
    """Width of all queries of a layer."""
    return g.heads * g.head_dim


def kv_width(g: Geometry) -> int:
    """Width of all keys, or all values, of a layer."""
    return g.kv_heads * g.head_dim


def layer_weights(g: Geometry) -> int:
    """Elements of the matrices of one decoder layer."""
    return g.hidden * (2 * q_width(g) + 2 * kv_width(g) + 3 * g.ffn)


def _projector_weights(g: Geometry) -> int:
    return g.hidden * (g.vision_hidden + g.hidden)
