"""PyYAML with floats of YAML 1.2, in which 2e-5 is a number."""

from __future__ import annotations

import re
from typing import Any

import yaml

FLOAT = "tag:yaml.org,2002:float"
TEXT = "tag:yaml.org,2002:str"
EXPONENT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+$")
"""Numbers with an exponent in the core schema of YAML 1.2; YAML 1.1 also requires a point and a
sign of the exponent. Python reads the same as a float."""


class WrittenFloat(float):
    """A number that YAML 1.1 takes for text; `written` is that text."""

    written: str


class Loader(yaml.SafeLoader):
    """A safe loader with the floats of YAML 1.2."""

    def construct_float(self, node: yaml.ScalarNode) -> float:
        number = self.construct_yaml_float(node)
        if not is_text_in_yaml_1_1(node):
            return number
        kept = WrittenFloat(number)
        kept.written = str(node.value)
        return kept


def is_text_in_yaml_1_1(node: yaml.ScalarNode) -> bool:
    """Whether PyYAML's own loader takes a plain scalar for text."""
    resolver: Any = yaml.resolver.Resolver()
    resolved = resolver.resolve(yaml.ScalarNode, node.value, (True, False))
    return bool(resolved == TEXT)


Loader.add_implicit_resolver(FLOAT, EXPONENT, list("-+.0123456789"))
Loader.add_constructor(FLOAT, Loader.construct_float)


def load(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        yaml.YAMLError: not a YAML document.
    """
    return yaml.load(text, Loader)  # noqa: S506  (a SafeLoader)
