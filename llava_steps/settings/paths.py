"""The paths that the source fields of a step's settings hold: one text, several, or by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from llava_steps.settings.fields import facts

C = TypeVar("C", bound=BaseModel)


@dataclass(frozen=True)
class Given:
    """One path of a source field."""

    key: str
    """Name of the input: the field, with `.NAME` or `.NUMBER` where the field holds several."""
    field: str
    info: FieldInfo
    text: str
    """Empty for a field without a path."""


def given(config: BaseModel) -> Iterator[Given]:
    """Each path of the source fields, in order; a field without any gives one empty text."""
    for name, info in type(config).model_fields.items():
        if facts(info).role == "source":
            for key, text in _texts(name, getattr(config, name)).items():
                yield Given(key, name, info, text)


def replaced(config: C, texts: Mapping[str, str]) -> C:
    """The settings with other paths, by the name of the input.

    A name that the settings do not hold yet is added to its field.
    """
    update: dict[str, Any] = {}
    for key, text in texts.items():
        field, _, name = key.partition(".")
        old = update.get(field, getattr(config, field))
        if isinstance(old, dict):
            update[field] = old | {name: text}
        elif isinstance(old, list):
            position = int(name or 0)
            update[field] = [*old[:position], text, *old[position + 1 :]]
        else:
            update[field] = text
    return config.model_copy(update=update)


def _texts(name: str, value: Any) -> dict[str, str]:
    if isinstance(value, dict):
        return {f"{name}.{key}": text for key, text in value.items()} or {name: ""}
    if isinstance(value, list):
        return {f"{name}.{i}" if i else name: text for i, text in enumerate(value)} or {name: ""}
    return {name: value}
