"""The forms in which a file may describe data and stages, as one form.

A run of one dataset and two stages has them in the sections `tar_shards`, `stage1` and `stage2`.
Any number of them are in `datasets` and `stages`. The first form is read as the second, file by
file, so that an overlay in either form changes a configuration in either form.

`stages.all` has keys of every stage. In a file, the keys of a stage override it; in a later file it
overrides those of earlier files.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from llava_steps.settings.recipe import FREEZES, OF_RAW

FIRST_STAGES = {"stage1": 1, "stage2": 2}
"""Stages that may also be sections, and their numbers."""

EVERY = "all"
"""What has, in `stages`, the keys of every stage."""

OF_ONE = {"tar_shards": "source", "energon_dataset": "tar_dir"}
"""Section -> its key that names the data of a run with one dataset."""

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


def every(values: Mapping[str, Any]) -> Any:
    """What one file has for every stage."""
    stages = values.get("stages")
    return stages.get(EVERY, {}) if isinstance(stages, Mapping) else {}


def given_twice(values: Mapping[str, Any]) -> str:
    """A stage that one file describes in both forms, or an empty text."""
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
            keys += [(section, n) for n, item in named.items() if item is None and n != EVERY]
    return keys


def make_room(base: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Remove from `base` what `changes`, in the one form, say in another way."""
    data = [_section(changes, name).get(key) for name, key in OF_ONE.items()]
    if any(data) and "datasets" not in changes:
        base.pop("datasets", None)
        for stage in _stages(base).values():
            stage.pop("data", None)
    if changes.get("datasets"):
        for name, key in OF_ONE.items():
            _section(base, name).pop(key, None)
    for name, section in _named(changes, "datasets").items():
        if (dataset := _named(base, "datasets").get(name)) is not None:
            _make_room_in_dataset(dataset, section)
    for name, section in _stages(changes).items():
        if (before := _stages(base).get(name)) is not None:
            _make_room_in_stage(before, section)


def _make_room_in_dataset(before: dict[str, Any], section: Mapping[str, Any]) -> None:
    """Remove from a dataset what does not apply to the data that `section` names."""
    if section.get("path"):
        before.clear()
    elif section.get("tar_dir"):
        for key in ("path", *OF_RAW):
            before.pop(key, None)
    elif section.get("source"):
        for key in ("path", "tar_dir"):
            before.pop(key, None)


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section; anything else is reported when it is validated."""
    section = values.get(name)
    return section if isinstance(section, dict) else {}


def _make_room_in_stage(before: dict[str, Any], section: Mapping[str, Any]) -> None:
    """Remove from a stage what `section`, which will be merged into it, says in another way."""
    for given, replaced in _REPLACES:
        if given & {*section}:
            for key in replaced - {*section}:
                before.pop(key, None)
    if "train" in before and {*FREEZES.values()} & {*section} and "train" not in section:
        _freeze(before)


def spread(base: Mapping[str, Any], changes: dict[str, Any]) -> None:
    """Give the stages of `changes` the keys of `stages.all`, and those of `base` that it changes.

    A stage that is new in `changes` also gets the keys that `base` has for every stage.
    """
    before, own = _stages(base), _stages(changes)
    given = own.get(EVERY, {})
    stages = {} if changes.get("stages") is None else changes["stages"]
    if not isinstance(stages, Mapping):
        return
    stages = dict(stages)
    for name in {**before, **own}:
        if name == EVERY or not isinstance(stages.get(name, {}), Mapping):
            continue
        made = copy.deepcopy({} if name in before else before.get(EVERY, {}))
        for section in (given, own.get(name, {})):
            _make_room_in_stage(made, section)
            merge(made, copy.deepcopy(section))
        if made:
            stages[name] = made
    if stages:
        changes["stages"] = stages


def _freeze(stage: dict[str, Any]) -> None:
    """Say by the freeze_ keys what `train` says."""
    named = stage.pop("train")
    parts = [*FREEZES] if named == "all" else [named] if isinstance(named, str) else named
    if isinstance(parts, list):
        stage |= {key: part not in parts for part, key in FREEZES.items()}


def merge(base: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Merge section by section; anything that is not a section on both sides is replaced."""
    for name, item in changes.items():
        old = base.get(name)
        if isinstance(old, dict) and isinstance(item, Mapping):
            merge(old, item)
        elif isinstance(item, Mapping):
            base[name] = {}
            merge(base[name], item)
        else:
            base[name] = item


def without_removed(values: dict[str, Any], demo: str) -> None:
    """Drop datasets and stages that a file removes by `NAME: null`, and what left with the demo.

    `stages.all` goes too, because every stage has its keys. Without `demo_assets`, datasets of the
    demo go that no stage names; `demo` is the prefix of their paths.
    """
    for section in ("datasets", "stages"):
        named = values.get(section)
        if isinstance(named, dict):
            values[section] = {name: item for name, item in named.items() if item is not None}
    if EVERY in _stages(values):
        del values["stages"][EVERY]
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
    return [name for name in data if isinstance(name, str)] if isinstance(data, list | dict) else []


def _stages(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages that are sections; anything else is reported when it is validated."""
    return _named(values, "stages")


def _named(values: Mapping[str, Any], section: str) -> dict[str, dict[str, Any]]:
    """The datasets or stages that are sections."""
    named = values.get(section)
    if not isinstance(named, Mapping):
        return {}
    return {name: item for name, item in named.items() if isinstance(item, dict)}
