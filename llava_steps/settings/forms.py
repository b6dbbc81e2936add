"""The forms in which a file may describe data and stages, as one form.

A run of one dataset and two stages has them in the sections `tar_shards`, `stage1` and `stage2`.
Any number of them stand in `datasets` and `stages`. The first form is read as the second, file by
file, so that an overlay in either form changes a configuration in either form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_steps.settings.recipe import FREEZES

FIRST_STAGES = {"stage1": 1, "stage2": 2}
"""Stages that may also be sections, and their numbers."""

_REPLACES: tuple[tuple[set[str], set[str]], ...] = (
    ({"data"}, {"data_path"}),
    ({"data_path"}, {"data"}),
    ({"from"}, {"megatron_load_dir"}),
    ({"megatron_load_dir"}, {"from"}),
    ({"train"}, {*FREEZES.values()}),
)
"""Keys of a stage in a later file -> keys of earlier files that say the same in another way."""


def canonical(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of one file with its stages in `stages`."""
    made = dict(values)
    for name in FIRST_STAGES:
        if name in made:
            stages = dict(made.get("stages") or {})
            stages[name] = made.pop(name)
            made["stages"] = stages
    return made


def given_twice(values: Mapping[str, Any]) -> str:
    """A stage that one file describes in both forms; empty if there is none."""
    inner = values.get("stages")
    both = [name for name in FIRST_STAGES if name in values and name in (inner or {})]
    return both[0] if both else ""


def removed(values: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Keys of stages and datasets without anything: in their section, one that is to be removed."""
    keys: list[tuple[str, ...]] = [
        (name,) for name in FIRST_STAGES if name in values and values[name] is None
    ]
    for section in ("datasets", "stages"):
        named = values.get(section)
        if isinstance(named, Mapping):
            keys += [(section, name) for name, item in named.items() if item is None]
    return keys


def make_room(base: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Remove from `base` what `changes`, in the one form, say in another way."""
    shards = changes.get("tar_shards")
    if isinstance(shards, Mapping) and shards.get("source") and "datasets" not in changes:
        base.pop("datasets", None)
        for stage in _stages(base).values():
            stage.pop("data", None)
    if changes.get("datasets") and isinstance(base.get("tar_shards"), dict):
        base["tar_shards"].pop("source", None)
    for name, section in _stages(changes).items():
        before = _stages(base).get(name)
        if before is None:
            continue
        for given, replaced in _REPLACES:
            if given & {*section}:
                for key in replaced - {*section}:
                    before.pop(key, None)
        if "train" in before and {*FREEZES.values()} & {*section} and "train" not in section:
            _freeze(before)


def _freeze(stage: dict[str, Any]) -> None:
    """Say by the freeze_ keys what `train` says."""
    named = stage.pop("train")
    parts = [*FREEZES] if named == "all" else [named] if isinstance(named, str) else named
    if isinstance(parts, list):
        stage |= {key: part not in parts for part, key in FREEZES.items()}


def without_removed(values: dict[str, Any], demo: str) -> None:
    """Drop datasets and stages that a file removes by `NAME: null`, and what left with the demo.

    Without `demo_assets`, datasets of the demo go that no stage names; `demo` is the prefix of
    their paths.
    """
    for section in ("datasets", "stages"):
        named = values.get(section)
        if isinstance(named, dict):
            values[section] = {name: item for name, item in named.items() if item is not None}
    if values.get("demo_assets") is not None or not isinstance(values.get("datasets"), dict):
        return
    used = {name for stage in _stages(values).values() for name in _names(stage.get("data"))}
    values["datasets"] = {
        name: item
        for name, item in values["datasets"].items()
        if name in used or not _is_of_demo(item, demo)
    }


def _is_of_demo(dataset: Any, demo: str) -> bool:
    source = dataset.get("source") if isinstance(dataset, dict) else None
    sources = source if isinstance(source, list) else [source]
    return any(isinstance(text, str) and text.startswith(demo) for text in sources)


def _names(data: Any) -> list[str]:
    if isinstance(data, str):
        return [data]
    return [*data] if isinstance(data, list | dict) else []


def _stages(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages that are sections; anything else is reported when it is validated."""
    stages = values.get("stages")
    if not isinstance(stages, Mapping):
        return {}
    return {name: stage for name, stage in stages.items() if isinstance(stage, dict)}
