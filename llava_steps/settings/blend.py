"""Several datasets as one: a YAML file in the form of megatron-energon's MetadatasetV2.

    __module__: megatron.energon
    __class__: MetadatasetV2
    splits:
      train:
        blend_epochized:                 # or `blend`, with `weight` instead of `repetitions`
          - path: ../captions            # relative to this file
            repetitions: 1
          - path: ../dialogues
            repetitions: 2
            subflavors: {name: talk, max_turns: 3, chat_template: talk.jinja}

Read as data: nothing that it names is imported. Unsupported keys of energon's form are errors that
name the key. energon reads these files too, and ignores these `subflavors`.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from llava_steps.core.errors import ConfigError, InputError, reason
from llava_steps.settings import yaml_loader

_HEAD = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
_SUBFLAVORS = ("name", "max_turns", "chat_template", "augment")


@dataclass(frozen=True)
class Member:
    """One dataset of a blend."""

    path: Path
    """Prepared dataset directory."""
    name: str
    """For messages and metrics; unique in the blend."""
    split: str
    weight: float = 1.0
    """In a blend by weights: the proportion."""
    repetitions: int = 1
    """In a blend by epochs: how often an epoch contains each sample."""
    max_turns: int | None = None
    """Number of first rounds of question and answer that are kept of a conversation."""
    chat_template: Path | None = None
    """Jinja file used instead of the template of the HF directory."""


@dataclass(frozen=True)
class Blend:
    """Datasets and how they are mixed."""

    by: Literal["epochs", "weights"]
    members: tuple[Member, ...]

    @property
    def files(self) -> list[Path]:
        """The content of the blend besides the YAML: datasets, then templates."""
        templates = [m.chat_template for m in self.members if m.chat_template is not None]
        return [*(m.path for m in self.members), *templates]


def read_blend(path: Path, split: str) -> Blend:
    """The blend of one split in the YAML file `path`; a directory is a blend of one dataset.

    Raises:
        InputError: the file cannot be read.
        ConfigError: not a MetadatasetV2, no such split, or something that is not supported; the
            message names file and key.
    """
    if path.is_dir():
        return Blend("epochs", (Member(path, path.name, split),))
    try:
        table = yaml_loader.load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(
            f"{path} cannot be read as the YAML of a blend: {reason(error)}"
        ) from error
    try:
        return _blend(path.parent, table, split)
    except _Refused as error:
        raise ConfigError(f"{path}: {error}") from None


class _Refused(Exception):
    """A problem in the YAML, with the key."""


def _blend(base: Path, table: Any, split: str) -> Blend:
    table = _mapping(table, "the top level")
    for key, wanted in _HEAD.items():
        if table.get(key) != wanted:
            raise _Refused(f"{key} is {reprlib.repr(table.get(key))}; only {wanted} is supported")
    _only(table, (*_HEAD, "splits"), "")
    splits = _mapping(table.get("splits"), "splits")
    if split not in splits:
        raise _Refused(f"splits has no {split!r}; it has {sorted(map(str, splits))}")
    here = f"splits.{split}"
    part = _mapping(splits[split], here)
    by: Literal["epochs", "weights"] = "weights" if "blend" in part else "epochs"
    share = "weight" if by == "weights" else "repetitions"
    if "path" in part:
        items: Any = [part]
    else:
        key = "blend" if by == "weights" else "blend_epochized"
        _only(part, (key,), f"{here}.")
        items, here = part.get(key), f"{here}.{key}"
    if not isinstance(items, list) or not items:
        raise _Refused(f"{here} must be a list of datasets")
    members = [
        _member(base, item, f"{here}[{number}]", split, share) for number, item in enumerate(items)
    ]
    names = [member.name for member in members]
    if twice := {name for name in names if names.count(name) > 1}:
        raise _Refused(f"{here}: {sorted(twice)} given twice; set `subflavors: {{name: ...}}`")
    return Blend(by, tuple(members))


def _member(base: Path, item: Any, here: str, split: str, share: str) -> Member:
    item = _mapping(item, here)
    _only(item, ("path", share, "split_part", "subflavors"), f"{here}.")
    text = _value(item, "path", here, str)
    path = base / text
    if not os.path.isdir(path):
        raise _Refused(
            f"{here}.path: {path} is not a directory; blends of blends are not supported"
        )
    options = _mapping(item.get("subflavors", {}), f"{here}.subflavors")
    _only(options, _SUBFLAVORS, f"{here}.subflavors.")
    if options.get("augment", False) is not False:
        raise _Refused(
            f"{here}.subflavors.augment is {reprlib.repr(options['augment'])}; expected false, "
            "because random augmentation is not supported"
        )
    template = _value(options, "chat_template", f"{here}.subflavors", str, None)
    if template is not None and not os.path.isfile(base / template):
        raise _Refused(f"{here}.subflavors.chat_template: {base / template} is not a file")
    return Member(
        path=path,
        name=_value(options, "name", f"{here}.subflavors", str, text),
        split=_value(item, "split_part", here, str, split),
        weight=float(_value(item, "weight", here, (int, float), 1.0, _positive)),
        repetitions=_value(item, "repetitions", here, int, 1, _positive),
        max_turns=_value(options, "max_turns", f"{here}.subflavors", int, None, _positive),
        chat_template=None if template is None else base / template,
    )


_NEEDED = object()


def _value(
    table: Mapping[str, Any],
    key: str,
    here: str,
    kind: Any,
    default: Any = _NEEDED,
    check: Callable[[Any], bool] = bool,
) -> Any:
    if key not in table and default is not _NEEDED:
        return default
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, kind) or not check(value):
        wanted = {str: "text", int: "a whole number above 0"}.get(kind, "a number above 0")
        raise _Refused(f"{here}.{key} is {reprlib.repr(value)}; expected {wanted}")
    return value


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _mapping(value: Any, here: str) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise _Refused(f"{here} must be keys and values")
    return value


def _only(table: Mapping[Any, Any], allowed: tuple[str, ...], here: str) -> None:
    if unknown := [key for key in table if key not in allowed]:
        raise _Refused(f"{here}{unknown[0]} is not supported; supported here: {', '.join(allowed)}")
