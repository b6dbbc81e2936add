"""Loads a vision tower, a language model and a tokenizer as transformers does, or says why not.

Code that comes with a model is never run, and pickled weights are read by torch's safe reader only.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from llava_steps.conversion.weight_files import PICKLE, check_weight_files, first_form
from llava_steps.core.errors import ConfigError, InputError, IntegrityError
from llava_steps.core.format import listing
from llava_steps.core.third_party import reported
from llava_steps.geometry.families import TEXT_FAMILIES
from llava_steps.geometry.hf_directory import read_config, read_object, remote_code
from llava_steps.geometry.processor_settings import longest_text, remove_truncation

IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
TOWERS = {
    # model_type -> (class of the tower in transformers, positions beside the patches)
    "clip": ("CLIPVisionModel", 1),
    "clip_vision_model": ("CLIPVisionModel", 1),
    "siglip": ("SiglipVisionModel", 0),
    "siglip_vision_model": ("SiglipVisionModel", 0),
}
"""A full clip or siglip model gives only its vision part. SigLIP2 checkpoints of fixed resolution
call themselves siglip; those of variable resolution (NaFlex, siglip2) do not fit LLaVA."""
TOWER_PARTS = ("vision_model.", "embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
"""Names of weights that belong to a tower; a full model has others, which are left out."""
TOWER_KEY, TEXT_KEY = "hf_model.vision_tower", "hf_model.text_model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
SHOWN = 3
Report = dict[str, Any]


def tower_config(path: Path) -> tuple[dict[str, Any], str, int]:
    """config.json of a tower, its class in transformers, and its positions beside the patches."""
    config = supported(path, TOWERS, TOWER_KEY)
    return config, *TOWERS[config["model_type"]]


def text_config(path: Path) -> dict[str, Any]:
    """config.json of a language model."""
    return supported(path, TEXT_FAMILIES, TEXT_KEY)


def supported(path: Path, known: Collection[str], key: str) -> dict[str, Any]:
    """config.json of a directory; ConfigError if its model_type is not supported."""
    if not (path / "config.json").is_file():
        raise InputError(
            f"{key}: {path} is not a Hugging Face model directory: config.json is missing"
        )
    try:
        config = read_config(path)
    except (InputError, ConfigError) as error:
        raise type(error)(f"{key}: {error}") from error
    family = config.get("model_type")
    if family not in known:
        raise ConfigError(
            f"{key}: {path} is of the family {family!r}; supported: {', '.join(sorted(known))}"
        )
    return config


def check_configs(tower: Path, text: Path) -> None:
    """InputError if transformers' own classes of the configurations refuse a value."""
    from transformers import AutoConfig

    for key, path in ((TOWER_KEY, tower), (TEXT_KEY, text)):
        with reported(f"{key}: {path / 'config.json'} cannot be used", "correct it"):
            AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def load_tower(path: Path, name: str) -> Any:
    """The vision tower of a directory, of the class `name` in transformers.

    Raises:
        InputError, IntegrityError: files are missing or damaged, or disagree with config.json.
    """
    import transformers

    tower, report = _loaded(getattr(transformers, name), path, TOWER_KEY)
    unknown = [key for key in report["unexpected_keys"] if key.startswith(TOWER_PARTS)]
    _refuse_unknown([key for key in unknown if not key.endswith("position_ids")], path)
    return tower


def load_text(path: Path) -> Any:
    """The language model of a directory, with its head.

    Raises:
        InputError, IntegrityError: files are missing or damaged, or disagree with config.json.
    """
    from transformers import AutoModelForCausalLM

    model, report = _loaded(AutoModelForCausalLM, path, TEXT_KEY)
    _refuse_unknown(report["unexpected_keys"], path)
    return model


def _loaded(kind: Any, path: Path, key: str) -> tuple[Any, Report]:
    check_weight_files(path)
    with reported(f"{key}: {path} cannot be loaded", **_weights_advice(path)), quiet():
        model, report = kind.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            dtype="auto",
            output_loading_info=True,
            # Reported below, with names and sizes.
            ignore_mismatched_sizes=True,
        )
    _refuse_other_sizes(report["mismatched_keys"], path)
    _refuse_missing(report["missing_keys"], path)
    return model, report


def _weights_advice(path: Path) -> dict[str, str]:
    if first_form(path).startswith(PICKLE):
        return {
            "instead": f"{PICKLE} is damaged, or holds more than tensors, which is not loaded",
            "advice": "download it again, or save the model as safetensors where you trust it",
        }
    return {"advice": "check config.json and the weight files"}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it, transformers warns of nothing: what matters is reported by the caller."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _refuse_other_sizes(wrong: Iterable[tuple[str, Any, Any]], path: Path) -> None:
    for name, stored, described in sorted(wrong):
        advice = "take the config.json that was saved with these weights"
        if name.endswith(("embed_tokens.weight", "lm_head.weight")) and stored[1] == described[1]:
            advice = f"set vocab_size to {stored[0]}, or take the right config.json"
        raise IntegrityError(
            f"{path}: config.json describes other weights: {name} is {list(stored)} in the files, "
            f"but {list(described)} by config.json; {advice}"
        )


def _refuse_missing(missing: Collection[str], path: Path) -> None:
    """transformers would fill them with random numbers."""
    if missing:
        advice = "download them again, or take the config.json that was saved with them"
        if set(missing) == {"lm_head.weight"}:
            advice = (
                "if the embedding is also the head, set tie_word_embeddings to true in config.json"
            )
        raise IntegrityError(
            f"{path}: weights are missing from the files: {_some(missing)}; {advice}"
        )


def _refuse_unknown(unknown: Collection[str], path: Path) -> None:
    if unknown:
        raise IntegrityError(
            f"{path}: these weights are not part of the model that config.json describes: "
            f"{_some(unknown)}; take the config.json that was saved with them"
        )


def _some(names: Collection[str]) -> str:
    return listing(sorted(names), SHOWN)


def load_tokenizer(
    path: Path, template: Path | None = None, tokens_per_image: int = 1
) -> tuple[Any, tuple[str, ...]]:
    """The tokenizer with `<image>` and a padding token, and the tokens that were added to it.

    It cuts nothing: a truncation that its file asks for is removed if an image fits in.

    Raises:
        InputError: it cannot be loaded.
        ConfigError: it cannot be used; the message says why.
    """
    tokenizer = _tokenizer(path)
    _remove_truncation(tokenizer, path, tokens_per_image)
    if template is not None:
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"hf_model.chat_template: {template}: {error}") from error
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{TEXT_KEY}: the tokenizer of {path} has no chat template; write one into "
            "chat_template.jinja beside tokenizer.json or give hf_model.chat_template"
        )
    before = tokenizer.get_vocab()
    if IMAGE_TOKEN not in before:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False
        )
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.image_token = IMAGE_TOKEN
    added = set(tokenizer.get_vocab()) - set(before)
    return tokenizer, tuple(sorted(added, key=tokenizer.convert_tokens_to_ids))


def _tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    with reported(f"{TEXT_KEY}: {path} has no usable tokenizer", **_tokenizer_advice(path)):
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    if not tokenizer.is_fast:
        raise ConfigError(f"{TEXT_KEY}: {path} has no fast tokenizer (tokenizer.json)")
    ids = list(tokenizer.get_vocab().values())
    if len(set(ids)) < len(ids):
        raise ConfigError(f"{TEXT_KEY}: two tokens of the tokenizer of {path} have the same id")
    return tokenizer


def _tokenizer_advice(path: Path) -> dict[str, str]:
    held = [name for name in TOKENIZER_FILES if (path / name).is_file()]
    advice = "give a directory with a whole tokenizer.json"
    if remote_code(path / "tokenizer_config.json", "AutoTokenizer"):
        return {
            "instead": "it needs separate code (auto_map), which is not run",
            "advice": "convert it to a tokenizer of transformers, which saves a tokenizer.json",
        }
    if not held:
        return {"instead": f"it holds none of {', '.join(TOKENIZER_FILES)}", "advice": advice}
    if held == ["tokenizer.model"]:
        if importlib.util.find_spec("sentencepiece") is None:
            return {
                "instead": "tokenizer.model is read by sentencepiece, which is not installed",
                "advice": "pip install sentencepiece",
            }
        return {
            "instead": "tokenizer.model is damaged, or of a kind that is not supported",
            "advice": advice,
        }
    return {"advice": advice}


def _remove_truncation(tokenizer: Any, path: Path, tokens_per_image: int) -> None:
    longest = longest_text(tokenizer)
    if longest is not None and longest < tokens_per_image:
        raise ConfigError(
            f"{TEXT_KEY}: the tokenizer of {path} cuts texts after {longest} tokens, but an image "
            f"has {tokens_per_image}; set truncation to null in tokenizer.json, and remove "
            "max_length from tokenizer_config.json"
        )
    remove_truncation(tokenizer)


def load_image_processor(path: Path) -> Any:
    """The image processor of a tower's directory, with Pillow.

    Raises:
        InputError: it cannot be loaded.
    """
    from transformers import AutoImageProcessor

    with reported(f"{TOWER_KEY}: {path} has no usable image processor", **_image_advice(path)):
        return AutoImageProcessor.from_pretrained(
            path, backend="pil", local_files_only=True, trust_remote_code=False
        )


def _image_advice(path: Path) -> dict[str, str]:
    own = path / "preprocessor_config.json"
    advice = f"give a directory with the {own.name} of the tower"
    if remote_code(own, "AutoImageProcessor"):
        return {
            "instead": f"{own.name} needs separate code (auto_map), which is not run",
            "advice": f"write the settings of transformers' own image processor into {own.name}",
        }
    if not (own.is_file() or (path / "processor_config.json").is_file()):
        return {"instead": f"{own.name} is missing", "advice": advice}
    if own.is_file() and not {"image_processor_type", "feature_extractor_type"} & set(
        read_object(own)
    ):
        return {"instead": f"{own.name} has no image_processor_type", "advice": advice}
    return {"advice": advice}
