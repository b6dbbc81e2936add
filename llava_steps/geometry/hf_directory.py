"""What a Hugging Face directory says about itself, read before a library loads anything from it.

Libraries answer a damaged or quantized directory with a traceback or with advice that leads
nowhere, and some continue without the file. So each file is read here first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_steps.core.errors import ConfigError, InputError, reason

if TYPE_CHECKING:
    from llava_steps.settings.conversion import HfModel

CONFIG = "config.json"
OBJECTS = (
    CONFIG,
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files that hold one JSON object each."""
QUANTIZATION = ("quantization_config", "compression_config")
"""Keys of config.json that describe quantized weights."""

PARTS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""model_type of a full model -> that of its tower."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; InputError if it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; give a Hugging Face model directory") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read as JSON: {reason(error)}; copy it again"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold a JSON object; copy it again")
    return content


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a directory, whose other JSON files can be read as well.

    Raises:
        InputError: one of them is damaged, or config.json is missing.
        ConfigError: the weights are quantized.
    """
    for name in OBJECTS[1:]:
        if (directory / name).exists():
            read_object(directory / name)
    config = read_object(directory / CONFIG)
    if message := quantized(config):
        raise ConfigError(f"{directory}: {message}")
    return config


def quantized(config: Mapping[str, Any]) -> str:
    """What to say if config.json, or a section of it, describes quantized weights; else empty."""
    for name, section in _sections(config):
        for key in QUANTIZATION:
            if section.get(key) is not None:
                return (
                    f"the weights are quantized ({name}{key}{_method(section[key])}), and only "
                    "plain weights can be trained; give the model that it was made from, in bf16, "
                    "fp16 or fp32"
                )
    return ""


def remote_code(path: Path, key: str) -> bool:
    """Whether a JSON file asks for separate code for `key`, such as AutoTokenizer."""
    if not path.is_file():
        return False
    named = read_object(path).get("auto_map")
    return bool(named) if not isinstance(named, dict) else key in named


def llava_config(
    vision: Mapping[str, Any], text: Mapping[str, Any], rows: int, cfg: HfModel
) -> dict[str, Any]:
    """config.json of the LLaVA that a tower and a language model will form.

    `vision` and `text` are their config.json, `rows` the vocabulary; the last row is `<image>`.

    Raises:
        InputError: a full model's section of the tower is not one.
    """
    if vision.get("model_type") in PARTS:
        inner: dict[str, Any] = {"model_type": PARTS[vision["model_type"]]}
        # transformers 4.25 and older wrote the second name.
        for key in ("vision_config", "vision_config_dict"):
            section = vision.get(key)
            section = {} if section is None else section
            if not isinstance(section, dict):
                raise InputError(f"{key} is not a section; expected keys and values")
            inner |= section
        vision = inner | {"model_type": PARTS.get(inner["model_type"], inner["model_type"])}
    return {
        "model_type": "llava",
        "text_config": {**text, "vocab_size": rows},
        "vision_config": vision,
        "vision_feature_layer": cfg.vision_feature_layer,
        "vision_feature_select_strategy": cfg.vision_feature_select_strategy,
        "projector_hidden_act": cfg.projector_hidden_act,
        "image_token_index": rows - 1 if isinstance(rows, int) else 0,
    }


def _sections(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield "", config
    for key, value in config.items():
        if key.endswith("_config") and key not in QUANTIZATION and isinstance(value, Mapping):
            yield f"{key}.", value


def _method(described: Any) -> str:
    method = described.get("quant_method") if isinstance(described, Mapping) else None
    return f": {method}" if method else ""
