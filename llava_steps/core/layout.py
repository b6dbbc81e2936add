"""Whether a model can be cut into tensor and pipeline parallel parts; asked before a start."""

from __future__ import annotations

from llava_steps.core.errors import ConfigError
from llava_steps.core.geometry import Geometry


def check_layout(geometry: Geometry, tp: int, pp: int) -> None:
    """ConfigError, with the fix, unless the language model can be cut into tp x pp parts."""
    divisible = {
        "vocab_size": geometry.vocab,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.kv_heads,
        "intermediate_size": geometry.ffn,
    }
    for name, size in divisible.items():
        if size % tp:
            raise ConfigError(
                f"tensor_model_parallel {tp} does not divide {name} {size}; choose a size "
                "that does"
                + (", or pad the vocabulary (hf_model.vocab_size_padding)" * (name == "vocab_size"))
            )
    if pp > geometry.layers:
        raise ConfigError(
            f"pipeline_model_parallel {pp} exceeds the model's {geometry.layers} layers"
        )
    if last_stage_layers(geometry.layers, pp) < 1:
        raise ConfigError(
            f"{geometry.layers} layers cannot be cut into {pp} pipeline stages; "
            "choose a pipeline size that divides them"
        )


def last_stage_layers(layers: int, pp: int) -> int:
    """Layers of the last stage: the earlier ones take one more each where pp does not divide, for
    the last one has the head to carry.
    """
    per_stage = -(-layers // pp)
    return layers - per_stage * (pp - 1)
