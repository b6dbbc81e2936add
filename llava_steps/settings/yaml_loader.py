"""PyYAML with scalars of YAML 1.2, in which 2e-5 is a number and 190:20:30 is text.

`yes`, `no`, `on` and `off` stay true and false, and `1_000` stays a number, as in YAML 1.1.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

TEXT = "tag:yaml.org,2002:str"
_PREFIX = "tag:yaml.org,2002:"
INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F][0-9a-fA-F_]*|0b[01][01_]*)$")
"""Whole numbers. 017 is 15 in YAML 1.1 and 17 in YAML 1.2; 0o17 is text in YAML 1.1. Both are text
here, so that a setting that wants a number refuses them."""
FLOAT = re.compile(
    r"[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?$"
    r"|[-+]?[0-9]+[eE][-+]?[0-9]+$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
"""Numbers with a point or an exponent. Python reads the same as a float."""
SAME = re.compile(
    r"[-+]?[0-9]+$|0x[0-9a-fA-F]+$|[-+]?[0-9]+\.[0-9]*(?:[eE][-+][0-9]+)?$"
    r"|\.[0-9]+(?:[eE][-+][0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    r"|true$|True$|TRUE$|false$|False$|FALSE$|null$|Null$|NULL$|~$|$"
)
"""Numbers, truth values and nulls of YAML 1.1 and of YAML 1.2."""


class Loader(yaml.SafeLoader):
    """A safe loader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


def _resolve() -> None:
    """Give `Loader` its scalars. Dates and base 60 are left out, so they stay text."""
    for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items():
        for tag, pattern in kinds:
            if tag.removeprefix(_PREFIX) in ("bool", "null", "merge"):
                Loader.yaml_implicit_resolvers.setdefault(first, []).append((tag, pattern))
    Loader.add_implicit_resolver(_PREFIX + "int", INT, list("-+0123456789"))
    Loader.add_implicit_resolver(_PREFIX + "float", FLOAT, list("-+.0123456789"))


_resolve()


def is_ambiguous(written: str) -> bool:
    """Whether YAML 1.1 or YAML 1.2 takes a plain scalar for text where `Loader` does not."""
    return SAME.match(written) is None


def load(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        yaml.YAMLError: not a YAML document.
    """
    return yaml.load(text, Loader)  # noqa: S506  (a SafeLoader)
