"""The model of a run before it is built: from configuration files, without weights or network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_steps.core.errors import InputError
from llava_steps.geometry.geometry import Geometry, padded
from llava_steps.geometry.hf_directory import llava_config, read_object
from llava_steps.settings.config import Config
from llava_steps.settings.demo_assets import DemoAssets
from llava_steps.settings.hub_id import parse_model
from llava_steps.settings.load import DEMO
from llava_steps.store import store
from llava_steps.store.hub import Hub

SHAPES = Path("config/recipes/models")
"""Configurations of published models, beside the recipes that name them."""


@dataclass(frozen=True)
class Model:
    """A geometry, where it comes from, and whether its vocabulary is certain."""

    geometry: Geometry
    source: str
    sure: bool


def model_of(config: Config, done: bool = False, shapes: Path = SHAPES) -> Model:
    """The model that a run trains.

    `done`: whether the run's hf_model matches the configuration. If not, it is used only where it
    was built from the same parts and those no longer exist.

    Raises:
        InputError: a configuration is missing or cannot be used; the message lists where it can be.
    """
    given = config.stages[config.last_stage].tokenizer_load_dir
    built = Path(given or Path(config.results, config.run, "hf_model"))
    exists = (built / "config.json").is_file()
    if given or (exists and done):
        return Model(Geometry.load(built), str(built), True)
    try:
        return _unbuilt(config, shapes)
    except InputError:
        if not (exists and _same_parts(built, config)):
            raise
        return Model(Geometry.load(built), f"{built}, which will be rebuilt", False)


def _same_parts(built: Path, config: Config) -> bool:
    inputs = (store.read_manifest(built) or {}).get("inputs", {})
    return all(
        inputs.get(key, {}).get("path") == getattr(config.hf_model, key)
        for key in ("vision_tower", "text_model")
    )


def _unbuilt(config: Config, shapes: Path) -> Model:
    """The model that will be built from its parts."""
    hf, root = config.hf_model, Path(config.store)
    vision, from_vision, _ = _part(
        hf.vision_tower, config.demo_assets, shapes, root, "vision_tower"
    )
    text, from_text, tokens = _part(hf.text_model, config.demo_assets, shapes, root, "text_model")
    vocab = text.get("vocab_size", 32000)
    if not isinstance(vocab, int):
        raise InputError(f"{from_text}: vocab_size is {vocab!r}; expected a whole number")
    # Building adds <image>; only the tokenizer knows whether that needs a new row.
    rows = max(vocab, tokens or vocab + 1)
    rows = padded(rows, hf.vocab_size_padding * hf.tp)
    try:
        geometry = Geometry.from_hf(llava_config(vision, text, rows, hf))
    except InputError as error:
        raise InputError(f"{from_vision}, {from_text}: {error}") from error
    return Model(geometry, f"{from_vision}, {from_text}", tokens is not None)


def _part(
    text: str, demo: DemoAssets | None, shapes: Path, root: Path, key: str
) -> tuple[Mapping[str, Any], str, int | None]:
    """config.json of a part of the model, its source, and the number of tokens if known."""
    if text.startswith(DEMO) and demo is not None:
        config, tokens = _demo(demo, key)
        return config, text, tokens
    local = Path(text) / "config.json"
    if local.is_file():
        return read_object(local), text, _tokens(Path(text))
    shipped = shapes / (text.partition("@")[0].replace("/", "--") + ".json")
    if shipped.is_file():
        known = read_object(shipped)
        tokens = known.pop("tokens_with_image", None)
        known.pop("from", None)
        return known, text, tokens
    if cached := _hub(text, root):
        return read_object(cached), text, _tokens(cached.parent)
    raise InputError(
        f"hf_model.{key}: {text} is not a directory here, and its config.json is neither in the "
        f"Hugging Face cache nor in {shapes}; download the model, or "
        f"save its config.json as {shipped}"
    )


def _hub(text: str, root: Path) -> Path | None:
    """config.json of a hub id that was downloaded before, at the commit that a run takes."""
    from huggingface_hub import try_to_load_from_cache

    named = parse_model(text)
    if named is None:
        return None
    commit = Hub(root, fetch=False).recorded(text, named, "model") or named.revision
    cached = try_to_load_from_cache(named.name, "config.json", revision=commit or None)
    return Path(cached) if isinstance(cached, str) else None


def _tokens(directory: Path) -> int | None:
    """Tokens of a directory's tokenizer and those that building adds; None without a tokenizer."""
    path, settings = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise InputError(f"{path} cannot be read: {error}") from error
    known = tokenizer.get_vocab(with_added_tokens=True)
    pads = bool(settings.is_file() and read_object(settings).get("pad_token"))
    ids = 1 + max(known.values(), default=-1)
    return max(ids, len(known) + ("<image>" not in known) + (not pads and "<pad>" not in known))


def _demo(demo: DemoAssets, key: str) -> tuple[Mapping[str, Any], int | None]:
    """What `demo_assets` will write, as demo/vision.py and demo/text.py build it."""
    if key == "vision_tower":
        return {
            "model_type": "clip_vision_model",
            "image_size": demo.image_size,
            "patch_size": demo.patch_size,
            "hidden_size": demo.vision_hidden_size,
            "intermediate_size": 4 * demo.vision_hidden_size,
            "num_hidden_layers": demo.vision_layers,
        }, None
    # The tokenizer learns as many tokens as it may; building adds <image>.
    return {
        "model_type": "llama",
        "vocab_size": demo.vocab_size,
        "hidden_size": demo.text_hidden_size,
        "intermediate_size": 3 * demo.text_hidden_size,
        "num_hidden_layers": demo.text_layers,
        "num_attention_heads": demo.text_heads,
        "num_key_value_heads": demo.text_kv_heads,
        "max_position_embeddings": 512,
    }, demo.vocab_size + 1
