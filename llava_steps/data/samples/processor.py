"""The processor saved in a LLaVA directory, with what older versions of transformers left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_steps.core.errors import ConfigError, InputError
from llava_steps.core.third_party import brief
from llava_steps.geometry import processor_settings
from llava_steps.geometry.hf_directory import CONFIG, read_config, read_object, remote_code

CODE = {
    processor_settings.FILE: "AutoProcessor",
    "tokenizer_config.json": "AutoTokenizer",
    "preprocessor_config.json": "AutoImageProcessor",
}
"""Where a directory may ask for separate code, and for what."""


def load_processor(hf_dir: Path) -> Any:
    """The processor saved in an HF directory, with Pillow image processing, from disk only.

    It writes one image token for each feature of the model: what its settings leave out is filled
    in from config.json. It cuts nothing.

    Raises:
        InputError: the directory holds no loadable processor, or one of another model.
        ConfigError: it cannot be used; the message says why.
    """
    from transformers import AutoProcessor

    described = (hf_dir / CONFIG).is_file()
    config = read_config(hf_dir) if described else {}
    try:
        processor = AutoProcessor.from_pretrained(
            hf_dir, backend="pil", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        if not described:
            # transformers would tell of hub ids, or of the model types that it knows.
            raise InputError(
                f"{hf_dir}: no processor can be loaded from it, config.json is missing; give the "
                "directory of a Hugging Face LLaVA model, as build_hf makes it"
            ) from error
        cause = f"{type(error).__name__}: {brief(error)}"
        if any(remote_code(hf_dir / name, key) for name, key in CODE.items()):
            cause = "it needs separate code (auto_map), which is not run"
        raise InputError(
            f"{hf_dir}: no processor can be loaded from it ({cause}); give a directory with "
            "tokenizer and image processor of transformers"
        ) from error
    if not hasattr(processor, "replace_image_token"):
        raise InputError(
            f"{hf_dir}: its processor is a {type(processor).__name__}, not that of a LLaVA; add "
            f"{processor_settings.FILE} and preprocessor_config.json"
        )
    _complete(processor, hf_dir, config)
    _check_image_token(processor, hf_dir, config)
    _remove_truncation(processor.tokenizer, hf_dir, processor_settings.features(config) or 1)
    return processor


def _complete(processor: Any, hf_dir: Path, config: Mapping[str, Any]) -> None:
    """Fill in what `processor` needs to count image tokens, and compare with the model."""
    path = hf_dir / processor_settings.FILE
    given = read_object(path) if path.is_file() else {}
    try:
        settings = processor_settings.completed(given, config)
    except (InputError, ConfigError) as error:
        raise type(error)(f"{hf_dir}: {error}") from error
    for name in (processor_settings.PATCH, processor_settings.STRATEGY, processor_settings.ADDED):
        if name in settings:
            setattr(processor, name, settings[name])


def _check_image_token(processor: Any, hf_dir: Path, config: Mapping[str, Any]) -> None:
    wanted = config.get("image_token_index", config.get("image_token_id"))
    tokenizer = processor.tokenizer
    number = tokenizer.get_vocab().get(processor.image_token)
    if number is None or (wanted is not None and number != wanted):
        held = "does not have it" if number is None else f"has it as {number}"
        raise InputError(
            f"{hf_dir}: the image token {processor.image_token!r} is {wanted} in {CONFIG}, but the "
            f"tokenizer {held}; take the tokenizer that belongs to the model"
        )


def _remove_truncation(tokenizer: Any, hf_dir: Path, features: int) -> None:
    if not tokenizer.is_fast:
        return
    longest = processor_settings.longest_text(tokenizer)
    if longest is not None and longest < features:
        raise ConfigError(
            f"{hf_dir}: the tokenizer cuts texts after {longest} tokens, but an image has "
            f"{features}; set truncation to null in tokenizer.json, and remove max_length from "
            "tokenizer_config.json"
        )
    processor_settings.remove_truncation(tokenizer)
