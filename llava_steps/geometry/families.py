"""The supported text and vision architectures, one row each. No torch.

A text family's row gives the config.json keys of its biases, what it adds to a Llama block,
settings that it must not use, and the defaults of transformers for keys that an older config.json
leaves out (a test compares them with the installed transformers).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llava_steps.core.errors import InputError


@dataclass(frozen=True)
class TextFamily:
    """The properties of one text architecture. Bias fields: a constant, or the config key to read.

    `window`: when `sliding_window` applies: never, always, or by `use_sliding_window` and the
    layer's type.
    """

    qkv_bias: bool | str
    output_bias: bool | str
    mlp_bias: bool | str
    defaults: Mapping[str, Any]
    qk_norm: bool = False
    must_be_off: tuple[str, ...] = ()
    window: Literal["never", "always", "by layer"] = "never"


LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_BASE = {k: v for k, v in LLAMA_DEFAULTS.items() if not k.endswith("_bias")}
MISTRAL_DEFAULTS: dict[str, Any] = {
    **_BASE,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}
QWEN2_DEFAULTS: dict[str, Any] = {
    **_BASE,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
QWEN3_DEFAULTS: dict[str, Any] = {**QWEN2_DEFAULTS, "head_dim": 128, "attention_bias": False}

TEXT_FAMILIES: dict[str, TextFamily] = {
    "llama": TextFamily(
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias="mlp_bias",
        defaults=LLAMA_DEFAULTS,
        must_be_off=("sliding_window",),
    ),
    "mistral": TextFamily(
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        defaults=MISTRAL_DEFAULTS,
        window="always",
    ),
    "qwen2": TextFamily(
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
        defaults=QWEN2_DEFAULTS,
        window="by layer",
    ),
    "qwen3": TextFamily(
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        mlp_bias=False,
        defaults=QWEN3_DEFAULTS,
        qk_norm=True,
        window="by layer",
    ),
}


@dataclass(frozen=True)
class VisionFamily:
    """A vision tower: positions beside the patches, and transformers' defaults."""

    class_tokens: int
    defaults: Mapping[str, Any]


_VISION_BASE: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_channels": 3,
    "image_size": 224,
}
VISION_FAMILIES: dict[str, VisionFamily] = {
    "clip_vision_model": VisionFamily(1, {**_VISION_BASE, "patch_size": 32}),
    # SigLIP and the SigLIP2 checkpoints of fixed resolution; those of variable resolution (NaFlex,
    # siglip2_vision_model) take other inputs than pixels and do not fit a LLaVA model.
    "siglip_vision_model": VisionFamily(
        0, {**_VISION_BASE, "patch_size": 16, "vision_use_head": True}
    ),
}


def refuse_window(family: str, row: TextFamily, text: Mapping[str, Any]) -> None:
    """InputError if `text` (defaults filled in) has a sliding window that a sequence can outgrow.

    A window of max_position_embeddings or more has no effect.
    """
    if row.window == "never":
        return
    window, longest = text.get("sliding_window"), text["max_position_embeddings"]
    if row.window == "by layer":
        types = text.get("layer_types")
        if types is None:
            layers = range(text["num_hidden_layers"])
            inside = any(i >= text["max_window_layers"] for i in layers)
        else:
            inside = "sliding_attention" in types
        if not (text["use_sliding_window"] and inside):
            return
    if window is not None and window < longest:
        raise InputError(
            f"text_config.sliding_window={window} of {family!r} is not supported below "
            f"max_position_embeddings={longest}; set sliding_window to null, or "
            f"max_position_embeddings to {window} if no sequence is to be longer"
        )
