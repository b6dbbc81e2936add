"""energon's field map: where a dataset keeps its image, question and answer.

image: jpg,png             parts by their names
context: json[question]    a field of a JSON part
answers: txt,json[answer]  the first of several that exists
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava_steps.core.errors import ConfigError

_OPTION = re.compile(r"([^\[\],]+)((?:\[[^\[\]]+\])*)")
_REQUIRED = ("image", "context", "answers")


@dataclass(frozen=True)
class FieldMap:
    """Parsed field map; each field is a list of options, each a path: part, then JSON keys."""

    image: tuple[tuple[str, ...], ...]
    context: tuple[tuple[str, ...], ...]
    answers: tuple[tuple[str, ...], ...]

    @staticmethod
    def parse(table: Mapping[str, str]) -> FieldMap:
        """Raise ConfigError unless `table` maps image, context and answers to known forms."""
        if set(table) != set(_REQUIRED):
            raise ConfigError(
                f"field_map must map exactly {list(_REQUIRED)}, it maps {sorted(table)}"
            )
        parsed = {name: _options(name, table[name]) for name in _REQUIRED}
        if any(len(path) > 1 for path in parsed["image"]):
            raise ConfigError("field_map: image must be the name of a part such as jpg")
        return FieldMap(**parsed)

    @property
    def image_parts(self) -> tuple[str, ...]:
        """Names that an image part may have, such as ("jpg",)."""
        return tuple(path[0] for path in self.image)


SEED = FieldMap((("jpg",), ("jpeg",), ("png",), ("webp",)), (("json", "question"),), (("txt",),))
"""The field map of the seed's layout, which `shard_tars` writes."""


def _options(name: str, text: str) -> tuple[tuple[str, ...], ...]:
    options = []
    for option in text.split(","):
        match = _OPTION.fullmatch(option.strip())
        if match is None:
            raise ConfigError(f"field_map: {name}: cannot read {option!r}; write jpg or json[key]")
        options.append((match[1], *re.findall(r"\[([^\[\]]+)\]", match[2])))
    return tuple(options)


def look_up(parts: Mapping[str, bytes], options: tuple[tuple[str, ...], ...]) -> Any:
    """The value of the first option that `parts` has; text for a plain part.

    Raises:
        LookupError: none exists.
        ValueError: a part is not UTF-8 or not JSON.
    """
    for part, *path in options:
        if part not in parts:
            continue
        text = parts[part].decode()
        if not path and part != "json":
            return text
        value = json.loads(text)
        try:
            for key in path:
                value = value[int(key)] if isinstance(value, list) else value[key]
        except (LookupError, TypeError, ValueError):
            continue
        return value
    raise LookupError(" or ".join("".join([p, *(f"[{k}]" for k in path)]) for p, *path in options))
