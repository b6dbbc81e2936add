"""The metadata of an energon dataset, read as data.

energon lets `dataset.yaml` and the files beside it name Python objects, which it imports and calls.
Nothing here does that: every file below `.nv-meta` is looked at first, and a dataset that names
anything outside a short list of energon's own classes, or brings Python files, is refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llava_steps.core.errors import ConfigError, InputError

META = ".nv-meta"
SHARDS = "shards.json"
"""What `shard_tars` knows about its tars: name, samples, size, sha256."""

ALLOWED_MODULES = frozenset({"megatron.energon"})
ALLOWED_CLASSES = frozenset({"VQASample", "VQAWebdataset", "CrudeWebdataset"})
_CODE_KEYS = ("sample_loader", "part_filter")


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
            "run `python -m llava_steps.prepare_energon` on the tars"
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
    fields = {}
    if (folder / "dataset.yaml").is_file():
        fields = _load(folder / "dataset.yaml").get("field_map", {})
    return DatasetMeta(root, counts, fields)


def refuse_code(folder: Path) -> None:
    """Raise InputError when anything below a `.nv-meta` folder would make energon run code."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".pyc", ".so"):
            raise InputError(
                f"{path}: dataset metadata must not bring Python code; remove the file"
            )
        if path.suffix in (".yaml", ".yml", ".json"):
            _refuse_objects(path, _load(path), "")


def _refuse_objects(path: Path, value: Any, where: str) -> None:
    if isinstance(value, list):
        for number, item in enumerate(value):
            _refuse_objects(path, item, f"{where}[{number}]")
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        here = f"{where}.{key}" if where else str(key)
        allowed = {"__module__": ALLOWED_MODULES, "__class__": ALLOWED_CLASSES}.get(key)
        if allowed is not None and item not in allowed:
            raise InputError(f"{path}: {here} is {item!r}; only {sorted(allowed)} are allowed")
        if key == "__function__" or (key in _CODE_KEYS and isinstance(item, str)):
            raise InputError(
                f"{path}: {here} names code to run; use a field_map instead (`{key}` is refused)"
            )
        _refuse_objects(path, item, here)


def _load(path: Path) -> Any:
    """YAML or JSON without object tags."""
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, OSError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


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
        InputError: the split is empty, names unknown tars, or excludes single samples.
    """
    from braceexpand import braceexpand

    path = meta.root / META / "split.yaml"
    table = _load(path)
    parts = table.get("split_parts") if isinstance(table, dict) else None
    if not isinstance(parts, dict):
        raise InputError(f"{path}: `split_parts` is missing")
    if split not in parts:
        raise ConfigError(f"{path} has no split {split!r}; there are {sorted(parts)}")
    excluded = {name for item in table.get("exclude") or [] for name in braceexpand(item)}
    if any(name.partition(".tar")[2] for name in excluded):
        raise InputError(f"{path}: excluding single samples is not supported, only whole tars")
    names = [n for item in parts[split] or [] for n in braceexpand(item) if n not in excluded]
    if unknown := [name for name in names if name not in meta.shard_counts]:
        raise InputError(f"{path}: split {split!r} names unknown tars: {unknown[:5]}")
    if not names:
        raise InputError(f"{path}: split {split!r} is empty; change the split ratio")
    return names
