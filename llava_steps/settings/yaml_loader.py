"""PyYAML with floats of YAML 1.2, in which 2e-5 is a number."""

from __future__ import annotations

import re
from typing import Any

import yaml

FLOAT = "tag:yaml.org,2002:float"
EXPONENT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+$")
"""Numbers with an exponent in the core schema of YAML 1.2; YAML 1.1 also requires a point and a
sign of the exponent. Python reads the same as a float."""


class Loader(yaml.SafeLoader):
    """A safe loader with the floats of YAML 1.2."""


Loader.add_implicit_resolver(FLOAT, EXPONENT, list("-+.0123456789"))


def load(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        yaml.YAMLError: not a YAML document.
    """
    return yaml.load(text, Loader)  # noqa: S506  (a SafeLoader)
