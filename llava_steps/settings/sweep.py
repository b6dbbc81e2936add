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
from llava_steps.settings.forms import EVERY, FIRST_STAGES

LIMIT = 1000
"""Variants of one run."""
FIXED = ("run", "results", "store", "image", "cluster", "sweep")
"""Keys that belong to the run, not to a variant of it."""
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
        keys = [full(str(key)) for key in sweep]
        made = [
            dict(zip(keys, chosen, strict=True)) for chosen in itertools.product(*sweep.values())
        ]
    elif isinstance(sweep, list) and all(isinstance(item, Mapping) and item for item in sweep):
        made = [{full(str(key)): value for key, value in item.items()} for item in sweep]
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


def full(key: str) -> str:
    """A dotted key, with `stages.` before stage1 and stage2."""
    return f"stages.{key}" if key.split(".")[0] in FIRST_STAGES else key


def assign(values: dict[str, Any], assignments: Assignments) -> None:
    """Set keys of nested sections; sections that are missing are added.

    A key of `stages.all` is set in every stage.
    """
    for key, value in assignments.items():
        *sections, last = key.split(".")
        if sections[:2] == ["stages", EVERY]:
            inner = key.split(".", 2)[2]
            assign(values, {f"stages.{name}.{inner}": value for name in values["stages"]})
            continue
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
