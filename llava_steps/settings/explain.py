"""What is wrong with a key of the configuration, in words that say what to write instead."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from llava_steps.settings.config import Config
from llava_steps.settings.forms import FIRST_STAGES
from llava_steps.settings.source import Key

LISTED = 12
"""Most keys that a message lists."""


def explain(problem: Any, key: Key, written: str | None) -> str:
    """What is wrong with a key, of which `written` is the scalar, and what to write instead."""
    given, kind = problem["input"], problem["type"]
    if given is None and kind not in ("missing", "model_type", "model_attributes_type"):
        return "has no value; write one after the colon, or leave the key out"
    if kind == "extra_forbidden":
        section = _section(key[:-1])
        known = sorted(_keys(section)) if section else []
        known += [*FIRST_STAGES] if section is Config else []
        if section is Config and re.fullmatch(r"stage\d+", key[-1]):
            return f"unknown key; describe it in stages, as stages: {{{key[-1]}: ...}}"
        return f"unknown key; {_hint(key, known)}"
    if kind == "missing":
        section = _section(key[:-1])
        info = section.model_fields.get(key[-1]) if section else None
        return f"is missing ({info.description})" if info and info.description else "is missing"
    if kind in ("float_type", "int_type"):
        wanted = "a number" if kind == "float_type" else "a whole number"
        number = _as_number(given)
        if isinstance(given, str) and number is not None:
            whole = kind == "int_type" and number.is_integer()
            right = str(int(number)) if whole else repr(number).replace("e-0", "e-")
            # A number in YAML 1.1 too, which needs a point before the exponent.
            if "e" in right and "." not in right:
                right = right.replace("e", ".0e")
            return f"{given!r} is text in YAML, not {wanted}; write {right}"
        if isinstance(given, float):
            advice = f"; write {given:.0f}" if given.is_integer() else ""
            return f"expected {wanted}, got {given!r}{advice}"
        return f"expected {wanted}, got {written if isinstance(given, bool) else repr(given)}"
    if kind == "int_from_float":
        return f"expected a whole number, got {given!r}"
    if kind == "bool_type":
        return f"expected true or false, got {given!r}"
    if kind == "string_type" and isinstance(given, list | dict):
        return f"expected one text, got {given!r}"
    if kind == "string_type":
        shown = given if written is None else written
        return f"expected text, got {shown}; put it in quotes: {str(shown)!r}"
    if kind == "dict_type":
        return f"expected a section with names, got {given!r}"
    if kind == "list_type":
        return f"expected a list, got {given!r}"
    if kind == "too_short" and isinstance(given, dict):
        return "is empty; describe at least one"
    if kind == "string_pattern_mismatch" and key[0] in ("datasets", "stages") and given == key[-1]:
        return (
            "a name has letters, digits, - and _, begins with a letter, and is at most 60 "
            "characters long; choose another"
        )
    if kind in ("model_type", "model_attributes_type"):
        return f"expected a section with keys, got {given!r}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return message if isinstance(given, dict) else f"{message}, got {given!r}"


def _hint(key: Key, known: Sequence[str]) -> str:
    """What a user may have meant by an unknown key, of a section with the keys `known`."""
    near = difflib.get_close_matches(key[-1], known, n=3, cutoff=0.8)
    elsewhere = [name for name, model in sections() if key[-1] in _keys(model)]
    if elsewhere and not near:
        return f"it is a key of {', '.join(elsewhere)}"
    if near := near or difflib.get_close_matches(key[-1], known, n=1):
        return f"did you mean {' or '.join(near)}?"
    if len(known) <= LISTED:
        return f"known keys: {', '.join(known)}"
    return f"config/README.md lists the {len(known)} keys of {key[-2] if key[1:] else 'a file'}"


def _keys(section: type[BaseModel]) -> list[str]:
    """The keys of a section, as a file has them."""
    return [info.alias or name for name, info in section.model_fields.items()]


def _as_number(given: object) -> float | None:
    try:
        return float(given) if isinstance(given, str) else None
    except ValueError:
        return None


def _section(key: Key) -> type[BaseModel] | None:
    """The settings class of a section; None if there is no such section."""
    section: type[BaseModel] = Config
    names = iter(key)
    for name in names:
        info = section.model_fields.get(name)
        annotation = info.annotation if info else None
        if get_origin(annotation) is dict:
            next(names, None)  # a dataset or a stage, whose name is not a field
        inner = [
            part
            for part in (annotation, *get_args(annotation))
            if isinstance(part, type) and issubclass(part, BaseModel)
        ]
        if not inner:
            return None
        section = inner[0]
    return section


def sections() -> Iterator[tuple[str, type[BaseModel]]]:
    """(name, settings class) of every section of `Config`, in order."""
    for name in Config.model_fields:
        section = _section((name,))
        if section is not None:
            yield name, section
