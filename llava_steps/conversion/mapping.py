"""The table between Hugging Face names and the Megatron checkpoint, used in both directions.

A row names one Megatron tensor and the HF tensors it is made of. `{i}` in HF names is the layer
number: Megatron stores such tensors stacked, [layers, ...]. Only the rows of the vision
tower use a wildcard, because the tower is the HF module itself.

Shapes are part of the table, in the symbols of `_sizes`, so that a tensor of the wrong shape is
refused by name before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llava_steps.core.errors import IntegrityError
from llava_steps.geometry.geometry import Geometry

LAYER = "{i}"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One Megatron tensor; absent unless the Geometry flag named by `when` (or "untied") holds.

    `cut` is the dimension that tensor parallel ranks split, and `last` says that it is on the last
    pipeline rank, not on the first one. Both only decide which file of a converted checkpoint
    holds it.
    """

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[str, ...]
    transform: str = "identity"
    when: str = ""
    cut: Literal["", "rows", "columns"] = ""
    last: bool = False


_L = "language_model.model.layers.{i}."
_M = "language_model.decoder.layers."
_QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")

ROWS: tuple[Row, ...] = (
    Row(
        "language_model.embedding.word_embeddings.weight",
        ("language_model.model.embed_tokens.weight",),
        ("vocab hidden",),
        cut="rows",
    ),
    Row(_M + "input_layernorm.weight", (_L + "input_layernorm.weight",), ("hidden",)),
    Row(
        _M + "self_attention.linear_qkv.weight",
        tuple(f"{_L}self_attn.{part}.weight" for part in _QKV),
        ("q hidden", "kv hidden", "kv hidden"),
        "qkv",
        cut="rows",
    ),
    Row(
        _M + "self_attention.linear_qkv.bias",
        tuple(f"{_L}self_attn.{part}.bias" for part in _QKV),
        ("q", "kv", "kv"),
        "qkv",
        when="qkv_bias",
        cut="rows",
    ),
    Row(
        _M + "self_attention.q_layernorm.weight",
        (_L + "self_attn.q_norm.weight",),
        ("head",),
        when="qk_norm",
    ),
    Row(
        _M + "self_attention.k_layernorm.weight",
        (_L + "self_attn.k_norm.weight",),
        ("head",),
        when="qk_norm",
    ),
    Row(
        _M + "self_attention.linear_proj.weight",
        (_L + "self_attn.o_proj.weight",),
        ("hidden q",),
        cut="columns",
    ),
    Row(
        _M + "self_attention.linear_proj.bias",
        (_L + "self_attn.o_proj.bias",),
        ("hidden",),
        when="output_bias",
    ),
    Row(_M + "pre_mlp_layernorm.weight", (_L + "post_attention_layernorm.weight",), ("hidden",)),
    Row(
        _M + "mlp.linear_fc1.weight",
        tuple(f"{_L}mlp.{part}.weight" for part in _GATE_UP),
        ("ffn hidden", "ffn hidden"),
        "gate_up",
        cut="rows",
    ),
    Row(
        _M + "mlp.linear_fc1.bias",
        tuple(f"{_L}mlp.{part}.bias" for part in _GATE_UP),
        ("ffn", "ffn"),
        "gate_up",
        when="mlp_bias",
        cut="rows",
    ),
    Row(
        _M + "mlp.linear_fc2.weight",
        (_L + "mlp.down_proj.weight",),
        ("hidden ffn",),
        cut="columns",
    ),
    Row(_M + "mlp.linear_fc2.bias", (_L + "mlp.down_proj.bias",), ("hidden",), when="mlp_bias"),
    Row(
        "language_model.decoder.final_layernorm.weight",
        ("language_model.model.norm.weight",),
        ("hidden",),
        last=True,
    ),
    Row(
        "language_model.output_layer.weight",
        ("language_model.lm_head.weight",),
        ("vocab hidden",),
        when="untied",
        cut="rows",
        last=True,
    ),
    Row(
        "mm_projector.linear_1.weight",
        ("multi_modal_projector.linear_1.weight",),
        ("hidden vision",),
    ),
    Row(
        "mm_projector.linear_1.bias",
        ("multi_modal_projector.linear_1.bias",),
        ("hidden",),
        when="projector_bias",
    ),
    Row(
        "mm_projector.linear_2.weight",
        ("multi_modal_projector.linear_2.weight",),
        ("hidden hidden",),
    ),
    Row(
        "mm_projector.linear_2.bias",
        ("multi_modal_projector.linear_2.bias",),
        ("hidden",),
        when="projector_bias",
    ),
    Row("vision_tower.*", ("vision_tower.*",), ("*",)),
)


@dataclass(frozen=True)
class Entry:
    """One tensor to move: a row at one layer. `shape` is the Megatron one, without the layers."""

    row: Row
    megatron: str
    layer: int | None
    hf: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    shape: Shape

    @property
    def transform(self) -> str:
        """The transform of the row."""
        return self.row.transform


def _sizes(g: Geometry) -> dict[str, int]:
    return {
        "hidden": g.hidden,
        "vocab": g.vocab,
        "ffn": g.ffn,
        "head": g.head_dim,
        "q": g.heads * g.head_dim,
        "kv": g.kv_heads * g.head_dim,
        "vision": g.vision_hidden,
    }


def entries(
    geometry: Geometry, tower: Mapping[str, Shape], rows: tuple[Row, ...] = ROWS
) -> list[Entry]:
    """Every tensor of the model, in the order of the table; `tower` from tower_shapes."""
    sizes = _sizes(geometry)
    entries: list[Entry] = []
    for row in rows:
        if row.when and not _holds(geometry, row.when):
            continue
        if row.megatron.endswith("*"):
            prefix, hf_prefix = row.megatron[:-1], row.hf[0][:-1]
            for name, shape in tower.items():
                entries.append(
                    Entry(
                        row,
                        prefix + name,
                        None,
                        (hf_prefix + name,),
                        (shape,),
                        shape,
                    )
                )
            continue
        shapes = tuple(tuple(sizes[symbol] for symbol in text.split()) for text in row.shapes)
        # Every transform stacks its parts along the rows.
        fused = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        layers = range(geometry.layers) if LAYER in row.hf[0] else [None]
        for layer in layers:
            names = tuple(name.replace(LAYER, str(layer)) for name in row.hf)
            entries.append(Entry(row, row.megatron, layer, names, shapes, fused))
    return entries


def _holds(geometry: Geometry, flag: str) -> bool:
    return not geometry.tied if flag == "untied" else bool(getattr(geometry, flag))


def stored_shapes(items: list[Entry]) -> dict[str, Shape]:
    """Megatron tensor name -> its whole shape in the checkpoint, stacked layers included."""
    shapes: dict[str, Shape] = {}
    layers: dict[str, int] = {}
    for entry in items:
        if entry.layer is None:
            shapes[entry.megatron] = entry.shape
        else:
            layers[entry.megatron] = layers.get(entry.megatron, 0) + 1
            shapes[entry.megatron] = (layers[entry.megatron], *entry.shape)
    return shapes


def check_hf(items: list[Entry], present: Mapping[str, Shape], where: str) -> None:
    """IntegrityError unless `present` (canonical name -> shape) is exactly what `items` read."""
    expected = {
        name: shape
        for entry in items
        for name, shape in zip(entry.hf, entry.hf_shapes, strict=True)
    }
    check_shapes(expected, present, where, "the mapping table (llava_steps/conversion/mapping.py)")


def check_shapes(
    expected: Mapping[str, Shape], present: Mapping[str, Shape], where: str, by: str
) -> None:
    """IntegrityError naming the first missing, unknown or mis-shaped tensor of `where`."""
    missing = sorted(expected.keys() - present.keys())
    if missing:
        raise IntegrityError(
            f"{where}: {missing[0]!r} is missing ({len(missing)} in all), which {by} requires for "
            "this config.json"
        )
    unknown = sorted(present.keys() - expected.keys())
    if unknown:
        raise IntegrityError(
            f"{where}: {unknown[0]!r} is unknown ({len(unknown)} in all) to {by} for this "
            "config.json; every tensor must be mapped"
        )
    for name, shape in expected.items():
        if tuple(present[name]) != shape:
            raise IntegrityError(
                f"{where}: {name!r} has shape {list(present[name])}, config.json implies "
                f"{list(shape)}"
            )
