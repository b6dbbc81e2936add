"""Checks before any process starts: layouts and ids that do not fit the model."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from llava_steps.core.errors import ConfigError, InputError
from llava_steps.geometry import flash4
from llava_steps.geometry.geometry import Geometry
from llava_steps.geometry.layout import pipeline_split
from llava_steps.launch import gpus, te_check
from llava_steps.settings.stage.stage import Stage


def check(stage: Stage, hf_dir: Path) -> None:
    """ConfigError, with the fix, unless the model in `hf_dir` can be trained with `stage`."""
    check_trackers(stage)
    check_interface(stage.interface)
    geometry = Geometry.load(hf_dir)
    pipeline_split(geometry, stage)
    te_check.check(stage, geometry)
    check_flash(stage, geometry)
    if stage.image_token_id is not None and stage.image_token_id != geometry.image_token_id:
        raise ConfigError(
            f"--image-token-id {stage.image_token_id}: {hf_dir} has {geometry.image_token_id} for "
            "<image>; leave the option out, the id is read from there"
        )
    if stage.pad_token_id is not None and stage.pad_token_id != (actual := pad_token(hf_dir)):
        raise ConfigError(
            f"--pad-token-id {stage.pad_token_id}: the tokenizer of {hf_dir} pads with {actual}; "
            "leave the option out, the id is read from there"
        )
    keeps_class = geometry.select_strategy == "full" and "siglip" not in geometry.vision_family
    if stage.no_add_class_token and keeps_class:
        raise ConfigError(
            f"--no-add-class-token: {hf_dir} was built with vision_feature_select_strategy full, "
            "which keeps the class token; build it with default"
        )


def check_interface(name: str) -> None:
    """ConfigError when this machine has no such interface; NCCL's patterns are left to NCCL."""
    here = [known for _, known in socket.if_nameindex()]
    # NCCL accepts the beginning of a name too.
    if not set(name) & set("^=,:") and not any(known.startswith(name) for known in here):
        raise ConfigError(
            f"--interface {name} does not exist here; there are: {', '.join(here) or 'none'}"
        )


def check_flash(stage: Stage, geometry: Geometry) -> None:
    """ConfigError when flash_attention is fa4 and a GPU here does not support it."""
    if stage.flash_attention != "fa4":
        return
    report = gpus.probe(stage.gpu_ids)
    weakest = min(report["gpus"], default=None)
    if lacking := flash4.missing(geometry.head_dim, weakest):
        why = f" ({report['error']})" if "error" in report else ""
        raise ConfigError(f"flash_attention: fa4 needs {lacking}{why}; or set it to auto or torch")


def check_trackers(stage: Stage) -> None:
    """ConfigError when a configured tracker is not installed."""
    if not stage.tensorboard:
        return
    try:
        import tensorboard as _  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--tensorboard: the package tensorboard is not installed; pip install "
            "'llava-steps[tensorboard]'"
        ) from None


def pad_token(hf_dir: Path) -> int | None:
    """Id of the padding token of the tokenizer in `hf_dir`; None when it has none."""
    from tokenizers import Tokenizer

    try:
        settings = json.loads((hf_dir / "tokenizer_config.json").read_bytes())
        tokenizer = Tokenizer.from_file(str(hf_dir / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise InputError(f"{hf_dir}: the tokenizer cannot be read: {error}") from error
    token = settings.get("pad_token")
    text = token.get("content") if isinstance(token, dict) else token
    return None if text is None else tokenizer.token_to_id(text)
