"""The metadata of an energon dataset, read as data.

energon lets `dataset.yaml` and the files beside it name Python objects, which it imports and calls.
Nothing here does that: every file below `.nv-meta` is checked first, and a dataset that names
anything outside a short list of energon's own classes, or brings Python files, is refused.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llava_steps.core.errors import ConfigError, InputError, reason

META = ".nv-meta"
SHARDS = "shards.json"
"""What `shard_tars` knows about its tars: name, samples, size, sha256."""

ALLOWED_MODULES = frozenset({"megatron.energon"})
ALLOWED_CLASSES = frozenset({"VQASample", "VQAWebdataset", "CrudeWebdataset"})
_CODE_KEYS = ("sample_loader", "part_filter")
_CODE_FILES = (".py", ".pyc", ".pyd", ".so")
MOST_NAMES = 1_000_000
"""Names that the patterns of one split may stand for; a short pattern can stand for any number."""


@dataclass(frozen=True)
class DatasetMeta:
    """What training needs to know of a prepared dataset."""

    root: Path
    shard_counts: dict[str, int]
    """Samples of each tar, in dataset order."""
    field_map: dict[str, str]
    """energon's field map; empty when dataset.yaml has none (crude datasets)."""


def read_metadata(root: Path) -> DatasetMeta:
    """Check and read `root/.nv-meta`.

    Raises:
        InputError: not a prepared dataset, unreadable metadata, or metadata that is code.
    """
    folder = root / META
    if not (folder / ".info.json").is_file():
        raise InputError(
            f"{root} is not a prepared energon dataset: {folder / '.info.json'} is missing; "
            "run `llava-steps prepare_energon` on the tars"
        )
    refuse_code(folder)
    info = _load(folder / ".info.json")
    counts = info.get("shard_counts") if isinstance(info, dict) else None
    if not isinstance(counts, dict) or not all(
        isinstance(count, int) and count > 0 for count in counts.values()
    ):
        raise InputError(f"{folder / '.info.json'}: `shard_counts` must map tars to sample counts")
    for name in counts:
        _check_name(root, name)
    return DatasetMeta(root, counts, _field_map(folder / "dataset.yaml"))


def _field_map(path: Path) -> dict[str, str]:
    table = _load(path) if path.is_file() else {}
    if not isinstance(table, dict):
        raise InputError(f"{path} must be keys and values, it is {reprlib.repr(table)}")
    fields = table.get("field_map") or {}
    if not isinstance(fields, dict) or not all(
        isinstance(x, str) for p in fields.items() for x in p
    ):
        raise InputError(f"{path}: field_map must map names to texts, it is {reprlib.repr(fields)}")
    return fields


def refuse_code(folder: Path) -> None:
    """Raise InputError when anything below a `.nv-meta` folder would make energon run code."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _CODE_FILES:
            raise InputError(
                f"{path}: dataset metadata must not contain Python code; remove the file"
            )
        if path.suffix in (".yaml", ".yml", ".json"):
            _refuse_objects(path, _load(path))


def _refuse_objects(path: Path, value: Any) -> None:
    """Look at every mapping once: an alias of YAML can make few lines a tree without end."""
    seen: set[int] = set()
    waiting = [("", value)]
    while waiting:
        where, item = waiting.pop()
        if not isinstance(item, list | dict) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, list):
            waiting.extend((f"{where}[{number}]", inner) for number, inner in enumerate(item))
            continue
        for key, inner in item.items():
            here = f"{where}.{key}" if where else str(key)
            _refuse_object(path, here, key, inner)
            waiting.append((here, inner))


def _refuse_object(path: Path, here: str, key: Any, item: Any) -> None:
    allowed = {"__module__": ALLOWED_MODULES, "__class__": ALLOWED_CLASSES}.get(key)
    if allowed is not None and (not isinstance(item, str) or item not in allowed):
        raise InputError(
            f"{path}: {here} is {reprlib.repr(item)}; only {sorted(allowed)} are allowed"
        )
    if key == "__function__" or (key in _CODE_KEYS and isinstance(item, str)):
        raise InputError(
            f"{path}: {here} names code to run; use a field_map instead (`{key}` is refused)"
        )


def _load(path: Path) -> Any:
    """YAML or JSON without object tags."""
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, OSError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error


def _check_name(root: Path, name: str) -> None:
    """A tar's name must stay inside the dataset and the tar must be there."""
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise InputError(f"{root / META / '.info.json'}: tar {name!r} is outside the dataset")
    if not (root / name).is_file():
        raise InputError(f"{root / name} is missing although {META}/.info.json lists it")


def split_shards(meta: DatasetMeta, split: str) -> list[str]:
    """Names of the tars of one split, in order.

    Raises:
        ConfigError: there is no such split.
        InputError: the split is empty, names unknown tars or one of them twice, or excludes single
            samples.
    """
    path = meta.root / META / "split.yaml"
    table = _load(path)
    parts = table.get("split_parts") if isinstance(table, dict) else None
    if not isinstance(parts, dict):
        raise InputError(f"{path}: `split_parts` is missing")
    if split not in parts:
        raise ConfigError(f"{path} has no split {split!r}; there are {sorted(map(str, parts))}")
    excluded = set(_expanded(path, "exclude", table.get("exclude")))
    if any(name.partition(".tar")[2] for name in excluded):
        raise InputError(f"{path}: excluding single samples is not supported, only whole tars")
    named = _expanded(path, f"split_parts.{split}", parts[split])
    names = [name for name in named if name not in excluded]
    if unknown := [name for name in names if name not in meta.shard_counts]:
        raise InputError(f"{path}: split {split!r} names unknown tars: {unknown[:5]}")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(
            f"{path}: split {split!r} names a tar more than once: {twice[:5]}; to see samples more "
            "often give the dataset more epochs or a greater weight in a blend"
        )
    if not names:
        raise InputError(f"{path}: split {split!r} is empty; change the split ratio")
    return names


def _expanded(path: Path, key: str, patterns: Any) -> Iterator[str]:
    """The names that a list of brace patterns stands for; InputError before there are too many."""
    from braceexpand import braceexpand

    if not isinstance(patterns, list | None) or not all(isinstance(p, str) for p in patterns or []):
        raise InputError(f"{path}: {key} must be a list of names, it is {reprlib.repr(patterns)}")
    if sum(map(count_names, patterns or [])) > MOST_NAMES:
        raise InputError(f"{path}: {key} stands for more than {MOST_NAMES} names")
    for pattern in patterns or []:
        try:
            yield from braceexpand(pattern)
        except (ValueError, RecursionError) as error:  # braces that do not close
            raise InputError(f"{path}: {key}: {reprlib.repr(pattern)}: {error}") from error


_RANGE = re.compile(r"{(-?\d{1,99}|[A-Za-z])\.\.(-?\d{1,99}|[A-Za-z])(?:\.\.-?\d+)?}")


def count_names(pattern: str) -> int:
    """How many names a brace pattern stands for (a range with a step: without the step)."""
    levels = [(0, 0, 1)]  # of each open brace: where, names before the last comma, names since it
    index = 0
    while index < len(pattern):
        start, before, since = levels[-1]
        if pattern[index] == "\\":
            index += 1
        elif pattern[index] == "{":
            levels.append((index, 0, 1))
        elif pattern[index] == "," and len(levels) > 1:
            levels[-1] = (start, before + since, 1)
        elif pattern[index] == "}" and len(levels) > 1:
            names = before + since
            if ends := _RANGE.fullmatch(pattern, start, index + 1):
                first, last = (int(e) if e[-1].isdigit() else ord(e) for e in ends.groups())
                names = abs(first - last) + 1
            levels.pop()
            start, before, since = levels[-1]
            levels[-1] = (start, before, since * names)
        index += 1
    return levels[-1][1] + levels[-1][2]
