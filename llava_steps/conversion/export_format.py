"""An export as transformers 4 reads it: names of weights, and the files beside them.

transformers 5 reads what 4 wrote, but not the other way round. What differs:

* weights: the tower's names begin with `vision_tower.vision_model.`
* config.json: `torch_dtype`, and `rope_theta` with `rope_scaling` instead of `rope_parameters`
* the image processor has its own file, preprocessor_config.json
* the chat template is also in chat_template.json, the only file that 4.45 reads
* tokenizer_config.json: another class name, `additional_special_tokens`, `model_input_names`
* 4.45 counts a class token for every tower, so the processor's numbers are set to compensate
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_steps.conversion.hf_names import canonical
from llava_steps.conversion.tensors import TensorDirectory, renamed
from llava_steps.core import filesystem
from llava_steps.core.errors import ConfigError, InputError, IntegrityError
from llava_steps.geometry import processor_settings
from llava_steps.geometry.geometry import Geometry
from llava_steps.geometry.hf_directory import read_object

TOWER, OLDER_TOWER = "vision_tower.", "vision_tower.vision_model."
VERSION = "4.45.0"


def older_name(name: str) -> str:
    """The name that transformers 4.45 to 4.57 saves for an HF weight of any version."""
    own = canonical(name)
    return OLDER_TOWER + own.removeprefix(TOWER) if own.startswith(TOWER) else own


def older_layout(template: TensorDirectory) -> TensorDirectory:
    """`template` with the names of transformers 4: a layout for writing only."""
    return renamed(template, older_name)


def complete_processor(directory: Path) -> None:
    """Give the processor in `directory` the settings that plain transformers needs.

    A whole one keeps its bytes, and a directory without a processor gets none.

    Raises:
        ConfigError, InputError: they cannot be known, or contradict the model.
    """
    path = directory / processor_settings.FILE
    if not (path.is_file() or (directory / "preprocessor_config.json").is_file()):
        return
    given = read_object(path) if path.is_file() else {"processor_class": "LlavaProcessor"}
    config = read_object(directory / "config.json")
    try:
        settings = processor_settings.completed(given, config)
    except (InputError, ConfigError) as error:
        raise type(error)(f"{directory}: {error}") from error
    if settings != given:
        filesystem.write_json(path, settings)


def rewrite_companions(directory: Path, geometry: Geometry) -> None:
    """Turn the files beside the weights in `directory` into those of transformers 4.

    Raises:
        ConfigError: transformers 4.45 could not count this model's image tokens.
        IntegrityError: the new config.json describes another model.
    """
    path = directory / "config.json"
    filesystem.write_json(path, older_config(read_object(path)))
    if Geometry.load(directory).tokens_per_image != geometry.tokens_per_image:
        raise IntegrityError(
            f"{path}: the new format describes another model; keep --export-format transformers-5"
        )
    _older_processor(directory, geometry)
    _older_tokenizer(directory)


def older_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json, or a section of it, with the keys of transformers 4."""
    older = {k: older_config(v) if k.endswith("_config") else v for k, v in config.items()}
    if "dtype" in older:
        older["torch_dtype"] = older.pop("dtype")
    if rope := older.pop("rope_parameters", None):
        rope = dict(rope)
        older["rope_theta"] = rope.pop("rope_theta")
        older["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    if "transformers_version" in older:
        older["transformers_version"] = VERSION
    return older


def _older_processor(directory: Path, geometry: Geometry) -> None:
    path = directory / "processor_config.json"
    processor = read_object(path)
    images = processor.pop("image_processor", None)
    if images is not None:
        older = {**images, "processor_class": "LlavaProcessor"}
        filesystem.write_json(directory / "preprocessor_config.json", older)
    patches = (geometry.image_size // geometry.patch_size) ** 2
    strategies = {patches: "default", patches + 1: "full"}
    if geometry.tokens_per_image not in strategies:
        raise ConfigError(
            f"transformers 4.45 cannot count {geometry.tokens_per_image} image tokens for "
            f"{patches} patches: use --export-format transformers-5"
        )
    processor["vision_feature_select_strategy"] = strategies[geometry.tokens_per_image]
    processor["num_additional_image_tokens"] = 1
    filesystem.write_json(path, processor)
    template = directory / "chat_template.jinja"
    # Without it an older version wrote the template, where 4.45 finds it.
    if template.is_file():
        text = template.read_text(encoding="utf-8")
        filesystem.write_json(directory / "chat_template.json", {"chat_template": text})


def _older_tokenizer(directory: Path) -> None:
    path = directory / "tokenizer_config.json"
    tokenizer = read_object(path)
    for key in ("backend", "is_local", "local_files_only"):
        tokenizer.pop(key, None)
    # Their fast tokenizers also return token_type_ids by default; LLaVA does not take them.
    tokenizer.setdefault("model_input_names", ["input_ids", "attention_mask"])
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    special = tokenizer.pop("extra_special_tokens", [])
    names = special if isinstance(special, list) else list(special.values())
    tokenizer["additional_special_tokens"] = names
    filesystem.write_json(path, tokenizer)
