"""The variants of a run: what its `sweep` changes, and a configuration for each.

sweep:                                  # every combination
  stages.stage2.lr: [1e-5, 2e-5]
  stages.stage2.train_steps: [500, 1000]

sweep:                                  # the combinations that are listed
  - {stages.stage2.lr: 1e-5, stages.stage2.train_steps: 1000}
  - {stages.stage2.lr: 2e-5, stages.stage2.train_steps: 500}
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llava_steps.core import filesystem
from llava_steps.settings.forms import EVERY, FIRST_STAGES, make_room

LIMIT = 1000
"""Variants of one run."""
FIXED = ("run", "results", "store", "image", "cluster", "sweep")
"""Keys that belong to the run, not to a variant of it."""
EXAMPLE = "stages.stage2.lr"
LONGEST = 80
"""Characters of a label; longer ones end in a digest."""

Assignments = dict[str, Any]
"""Dotted key of the configuration -> value."""


class SweepError(ValueError):
    """What is wrong with the section `sweep`."""


def combinations(sweep: Any) -> list[Assignments]:
    """The assignments of each variant, in order.

    Raises:
        SweepError: not a grid or a list, an empty one, or one with two equal variants.
    """
    if isinstance(sweep, Mapping):
        for key, choices in sweep.items():
            if not isinstance(choices, list) or not choices:
                raise SweepError(f"{key}: expected a list of values, got {choices!r}")
        keys = _full_keys(sweep)
        made = [
            dict(zip(keys, chosen, strict=True)) for chosen in itertools.product(*sweep.values())
        ]
    elif isinstance(sweep, list) and all(isinstance(item, Mapping) and item for item in sweep):
        made = [dict(zip(_full_keys(item), item.values(), strict=True)) for item in sweep]
    else:
        raise SweepError("expected KEY: [VALUE, ...], or a list of {KEY: VALUE}")
    if not made:
        raise SweepError("names no variant; leave the section out")
    if len(made) > LIMIT:
        raise SweepError(f"makes {len(made)} variants; at most {LIMIT} are one run")
    seen: set[str] = set()
    for assignments in made:
        for key in assignments:
            if key.split(".")[0] in FIXED:
                raise SweepError(f"{key} belongs to the whole run; it cannot differ in variants")
        text = json.dumps(assignments, sort_keys=True, default=str)
        if text in seen:
            raise SweepError(f"makes the variant {label(assignments)} twice")
        seen.add(text)
    return made


def refuse_unknown(keys: Iterable[str], names: Mapping[str, Iterable[str]]) -> None:
    """SweepError for a key of a stage or dataset that is not one, or of a whole one.

    `names` are those of the configuration, by section.
    """
    for key in keys:
        section, *inner = key.split(".")
        if not all((section, *inner)):
            raise SweepError(f"{key!r} is not a key; write one with dots, such as {EXAMPLE}")
        if section not in names:
            continue
        known = [*names[section]]
        if len(inner) < 2:
            raise SweepError(f"{key} is a section; vary keys in it, such as {EXAMPLE}")
        if inner[0] not in known and (section, inner[0]) != ("stages", EVERY):
            what = section.removesuffix("s")
            raise SweepError(
                f"{key}: {inner[0]!r} is not a {what}; {section} are {', '.join(known)}"
            )


def full(key: str) -> str:
    """A dotted key, with `stages.` before stage1 and stage2."""
    return f"stages.{key}" if key.split(".")[0] in FIRST_STAGES else key


def _full_keys(given: Mapping[str, Any]) -> list[str]:
    keys = [full(str(key)) for key in given]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise SweepError(f"{twice[0]}: given twice")
    return keys


def assign(values: dict[str, Any], assignments: Assignments) -> None:
    """Set keys of nested sections, as a later file would; a key of `stages.all` in every stage.

    A key of one stage overrides that of all, in whichever order they are written.
    """
    spread: Assignments = {}
    of_all = f"stages.{EVERY}."
    for key, value in sorted(assignments.items(), key=lambda item: not item[0].startswith(of_all)):
        section, _, inner = key.partition(f".{EVERY}.")
        keys = [f"stages.{name}.{inner}" for name in values["stages"]]
        spread |= dict.fromkeys(keys if inner and section == "stages" else [key], value)
    changes: dict[str, Any] = {}
    _set(changes, spread)
    make_room(values, changes)
    _set(values, spread)


def _set(values: dict[str, Any], assignments: Assignments) -> None:
    """Set keys of nested sections; sections that are missing are added."""
    for key, value in assignments.items():
        *sections, last = key.split(".")
        inside = values
        for name in sections:
            if not isinstance(inside.get(name), dict):
                inside[name] = {}
            inside = inside[name]
        inside[last] = value


def varied(variants: Iterable[Assignments]) -> list[str]:
    """Keys whose values differ between variants, in the order of the file."""
    listed = [*variants]
    keys = dict.fromkeys(key for assignments in listed for key in assignments)
    return [key for key in keys if len({written(each.get(key)) for each in listed}) > 1]


def common(variants: Sequence[Assignments], keys: Iterable[str]) -> Assignments:
    """Those of `keys` that have the same value in all of these variants, with it."""
    first = variants[0]
    return {
        key: first[key]
        for key in keys
        if key in first and len({written(each.get(key)) for each in variants}) == 1
    }


def label(assignments: Assignments, among: Iterable[str] = ()) -> str:
    """A name of directories for what some keys are set to, such as `lr_2e-5`.

    A key is shortened to its last part where that is clear among all swept keys.
    """
    keys = {*among} | {*assignments}
    parts = []
    for key, value in assignments.items():
        last = key.rpartition(".")[2]
        is_clear = sum(other.rpartition(".")[2] == last for other in keys) == 1
        name = last if is_clear else key.removeprefix("stages.")
        parts.append(f"{name}_{written(value)}")
    text = ",".join(parts)
    safe = re.sub(r"[^A-Za-z0-9._,+-]", "_", text)
    if safe == text and len(safe) <= LONGEST:
        return safe
    return f"{safe[: LONGEST - 9]}-{filesystem.sha256_json(text)[:8]}"


def labels(variants: Sequence[Assignments]) -> list[str]:
    """A distinct name of each variant."""
    keys = varied(variants)
    made = [label({k: v for k, v in each.items() if k in keys}, keys) for each in variants]
    return [
        name if name and made.count(name) == 1 else f"variant_{number}"
        for number, name in enumerate(made, 1)
    ]


def written(value: Any) -> str:
    """A value as a label has it: 2e-5, text without quotes, JSON of anything else."""
    if isinstance(value, float):
        return re.sub(r"e([+-])0+", r"e\1", repr(value)).replace("e+", "e")
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
