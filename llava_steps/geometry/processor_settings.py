"""What a LLaVA processor needs beside its files: numbers to count image tokens, and no truncation.

transformers before 4.46 wrote fewer settings, and counted one class token for every tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_steps.core.errors import ConfigError, InputError
from llava_steps.geometry.families import VISION_FAMILIES

FILE = "processor_config.json"
PATCH, STRATEGY, ADDED = (
    "patch_size",
    "vision_feature_select_strategy",
    "num_additional_image_tokens",
)

TRUNCATION = ("max_length", "stride", "truncation", "truncation_strategy")
"""Settings of a tokenizer that make it cut texts."""


def completed(given: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, the settings of a processor, with those it lacks for the model of `config`.

    Raises:
        ConfigError: it has no patch_size, and neither has the model.
        InputError: it writes another number of tokens for an image than the model has features.
    """
    settings = dict(given)
    vision = tower(config)
    if settings.get(PATCH) is None:
        settings[PATCH] = vision.get("patch_size")
    if settings.get(STRATEGY) is None and vision:
        settings[STRATEGY] = _strategy(config)
    patch = settings[PATCH]
    if isinstance(patch, bool) or not isinstance(patch, int) or patch < 1:
        raise ConfigError(
            f"{FILE}: patch_size is {patch!r}, and vision_config in config.json gives none; set it "
            "to that of the vision tower"
        )
    expected = features(config)
    if expected is None:
        return settings
    patches = (vision["image_size"] // patch) ** 2
    dropped = settings.get(STRATEGY) == "default"
    if settings.get(ADDED) is None:
        settings[ADDED] = expected - patches + dropped
    added = settings[ADDED]
    if isinstance(added, bool) or not isinstance(added, int):
        raise InputError(f"{FILE}: {ADDED} is {added!r}; expected a whole number")
    written = patches + added - dropped
    if written != expected:
        raise InputError(
            f"{FILE}: the processor writes {written} tokens for an image, but the model of "
            f"config.json has {expected} features; correct {PATCH}, {STRATEGY} or {ADDED}"
        )
    return settings


def features(config: Mapping[str, Any]) -> int | None:
    """Features of an image, or None for a tower that is not known."""
    vision = tower(config)
    if not vision:
        return None
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    class_tokens = VISION_FAMILIES[vision["model_type"]].class_tokens
    return int(patches + class_tokens - (_strategy(config) == "default"))


def longest_text(tokenizer: Any) -> int | None:
    """Tokens after which a tokenizer, or a processor with it, cuts a text; None if it cuts none.

    Processors take the settings of the tokenizer as their own, so that a max_length suffices.
    """
    given = tokenizer.init_kwargs
    limits = [
        given.get("max_length"),
        (tokenizer.backend_tokenizer.truncation or {}).get("max_length"),
    ]
    if given.get("truncation"):
        limits.append(tokenizer.model_max_length)
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def remove_truncation(tokenizer: Any) -> None:
    """Let a tokenizer, and every processor with it, cut nothing; saved with it as well."""
    for key in TRUNCATION:
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.backend_tokenizer.no_truncation()


def tower(config: Mapping[str, Any]) -> dict[str, Any]:
    """vision_config with the defaults of its family; empty for a tower that is not known."""
    section = config.get("vision_config")
    if not isinstance(section, Mapping):
        return {}
    family = section.get("model_type", "clip_vision_model")
    if family not in VISION_FAMILIES:
        return {}
    vision = {**VISION_FAMILIES[family].defaults, **section, "model_type": family}
    for key in ("image_size", "patch_size"):
        size = vision[key]
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"config.json: {key} is {size!r}; expected one positive integer")
    return vision


def _strategy(config: Mapping[str, Any]) -> str:
    return str(config.get(STRATEGY, "default"))
