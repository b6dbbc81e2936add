"""The structure of a LLaVA model, read only from its config.json. No torch.

`Geometry.from_hf` is the only reader of Hugging Face configurations: the parallel model, the
mapping table, the encoder and the planner all use the `Geometry`. Unsupported values are errors
that list the supported ones; nothing structural is guessed or silently ignored.

The families are rows of tables in families.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from llava_steps.core.errors import InputError
from llava_steps.geometry.families import TEXT_FAMILIES, VISION_FAMILIES, refuse_window
from llava_steps.geometry.hf_directory import quantized, read_object

T = TypeVar("T")

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
SELECT_STRATEGIES = ("default", "full")


def padded(rows: int, multiple: int) -> int:
    """`rows` of an embedding, or the next multiple of `multiple` if that is not 0."""
    return -(-rows // multiple) * multiple if multiple else rows


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: `parameters` is transformers' rope_parameters, theta and type included."""

    kind: str
    theta: float
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Geometry:
    """A LLaVA model's structure. Sizes are counts of elements; tokens_per_image is per image."""

    family: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_eps: float
    rope: Rope
    max_positions: int
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    vocab: int
    hidden_act: str
    dtype: str

    vision_family: str
    vision_config: Mapping[str, Any] = field(repr=False)
    vision_hidden: int
    vision_layers: int
    image_size: int
    patch_size: int
    feature_layer: int
    select_strategy: str
    tokens_per_image: int

    projector_act: str
    projector_bias: bool

    image_token_id: int
    pad_token_id: int | None

    @property
    def feature_depth(self) -> int:
        """Vision layers run before the features are read; 0 reads the embeddings."""
        return self.feature_layer % (self.vision_layers + 1)

    @classmethod
    def load(cls, directory: str | Path) -> Geometry:
        """The geometry of `<directory>/config.json`; InputError if it cannot be used."""
        path = Path(directory) / "config.json"
        config = read_object(path)
        try:
            return cls.from_hf(config)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Geometry:
        """The geometry of a LLaVA model's config.json; InputError when it is not supported."""
        if config.get("model_type") != "llava":
            raise InputError(
                f"model_type {config.get('model_type')!r} is not supported; supported: 'llava'"
            )
        if message := quantized(config):
            raise InputError(message)
        text = _section(config, "text_config", "llama")
        vision = _section(config, "vision_config", "clip_vision_model")
        family = text["model_type"]
        row = _known(TEXT_FAMILIES, family, "text_config.model_type")
        filled = {**row.defaults, **text}
        for key in row.must_be_off:
            if filled.get(key):
                raise InputError(f"text_config.{key}={filled[key]!r} is not supported; unset it")
        refuse_window(family, row, filled)
        if filled["hidden_act"] != "silu":
            raise InputError(
                f"text_config.hidden_act {filled['hidden_act']!r} is not supported; "
                "supported: 'silu'"
            )
        heads = _count(filled, "num_attention_heads")
        hidden = _count(filled, "hidden_size")
        kv_heads = _count(filled, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise InputError(
                f"text_config: {heads} attention heads are not a multiple of {kv_heads} kv heads"
            )
        if filled.get("head_dim") is None and hidden % heads:
            raise InputError(
                f"text_config: hidden_size {hidden} is not a multiple of {heads} attention heads, "
                "and head_dim is missing"
            )
        image_token = config.get("image_token_index", config.get("image_token_id"))
        if not isinstance(image_token, int):
            raise InputError("image_token_index is missing; add the id of <image> to config.json")
        return cls(
            family=family,
            layers=_count(filled, "num_hidden_layers"),
            hidden=hidden,
            ffn=_count(filled, "intermediate_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=_count(filled, "head_dim", hidden // heads),
            rms_eps=_number(filled, "rms_norm_eps"),
            rope=_rope(filled),
            max_positions=_count(filled, "max_position_embeddings"),
            qkv_bias=_flag(filled, row.qkv_bias),
            output_bias=_flag(filled, row.output_bias),
            mlp_bias=_flag(filled, row.mlp_bias),
            qk_norm=row.qk_norm,
            tied=bool(config.get("tie_word_embeddings")) or bool(filled["tie_word_embeddings"]),
            vocab=_count(filled, "vocab_size"),
            hidden_act=filled["hidden_act"],
            dtype=str(_first(config, text, keys=("dtype", "torch_dtype"), default="float32")),
            **_vision(config, vision),
            projector_act=str(config.get("projector_hidden_act", "gelu")),
            projector_bias=bool(config.get("multimodal_projector_bias", True)),
            image_token_id=image_token,
            pad_token_id=_first(config, text, keys=("pad_token_id",), default=None),
        )


def _vision(config: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    """The vision fields of a Geometry."""
    family = vision["model_type"]
    row = _known(VISION_FAMILIES, family, "vision_config.model_type")
    filled = {**row.defaults, **vision}
    image, patch = _count(filled, "image_size"), _count(filled, "patch_size")
    layers = _count(filled, "num_hidden_layers")
    layer = config.get("vision_feature_layer", -2)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise InputError(
            f"vision_feature_layer {layer!r} is not supported; supported: one layer, an integer"
        )
    if not -(layers + 1) <= layer <= layers:
        raise InputError(f"vision_feature_layer {layer} is outside a tower of {layers} layers")
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy not in SELECT_STRATEGIES:
        raise InputError(
            f"vision_feature_select_strategy {strategy!r} is not supported; supported: "
            + ", ".join(SELECT_STRATEGIES)
        )
    positions = (image // patch) ** 2 + row.class_tokens
    return {
        "vision_family": family,
        "vision_config": dict(vision),
        "vision_hidden": _count(filled, "hidden_size"),
        "vision_layers": layers,
        "image_size": image,
        "patch_size": patch,
        "feature_layer": layer,
        "select_strategy": strategy,
        # HF drops the first position for "default", whether or not the tower has a class token.
        "tokens_per_image": positions - (strategy == "default"),
    }


def _rope(text: Mapping[str, Any]) -> Rope:
    """transformers 5 has rope_parameters; older versions have rope_theta and rope_scaling."""
    given = text.get("rope_parameters")
    name = "rope_scaling" if given is None else "rope_parameters"
    section = text.get(name) or {}
    if not isinstance(section, Mapping):
        raise InputError(f"{name} is {section!r}; expected a section with rope_type")
    parameters = dict(section)
    if given is None and "type" in parameters:
        parameters.setdefault("rope_type", parameters.pop("type"))
    kind = parameters.setdefault("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise InputError(f"rope_type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    # A theta beside the parameters applies only if the parameters have none (older layout).
    parameters.setdefault("rope_theta", text.get("rope_theta", 10000.0))
    partial = parameters.get("partial_rotary_factor", text.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise InputError(f"partial_rotary_factor {partial} is not supported; supported: 1.0")
    return Rope(kind, _number(parameters, "rope_theta"), parameters)


def _section(config: Mapping[str, Any], name: str, default_type: str) -> dict[str, Any]:
    section = config.get(name)
    if not isinstance(section, Mapping):
        raise InputError(f"{name} is missing from config.json")
    return {"model_type": default_type, **section}


def _known(table: Mapping[str, T], name: Any, key: str) -> T:
    if name not in table:
        raise InputError(f"{key} {name!r} is not supported; supported: {', '.join(table)}")
    return table[name]


def _count(section: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = section.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise InputError(f"{key} is {value!r}; expected one positive integer")
    return value


def _number(section: Mapping[str, Any], key: str) -> float:
    value = section.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{key} is {value!r}; expected a number")
    return float(value)


def _flag(section: Mapping[str, Any], source: bool | str) -> bool:
    return source if isinstance(source, bool) else bool(section[source])


def _first(*sections: Mapping[str, Any], keys: tuple[str, ...], default: Any) -> Any:
    for section in sections:
        for key in keys:
            if section.get(key) is not None:
                return section[key]
    return default
