"""Roles and declarations of settings, and the base of all settings classes.

The YAML of a run, the flags of every step, the JSON schema in workflow/schemas and the table in
config/README.md all come from the settings classes. Values are checked strictly: an unknown key, a
wrong type or a number written as a string is a `ConfigError` with the path of the key.

Each field declares its role:

* `value(...)`   an ordinary setting, part of the step's fingerprint
* `source(...)`  a path to an artefact or to a file of the user; its *content* is in the fingerprint
* `quiet(...)`   logging, labels and resources: changing it never recomputes a step
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic import NonNegativeInt as Count
from pydantic.fields import FieldInfo

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Port = Annotated[int, Field(ge=0, le=65535)]


def value(
    default: Any = ...,
    help: str = "",
    flag: str | None = None,
    bare: int | None = None,
    **bounds: Any,
) -> Any:
    """A setting that is part of the fingerprint.

    `flag` names it on the command line; `bare` is its value when the flag is given without one.
    """
    return Field(default, description=help, json_schema_extra=_facts("value", flag, bare), **bounds)


def source(
    default: Any = ..., help: str = "", flag: str | None = None, optional: bool = False
) -> Any:
    """A path whose content is part of the fingerprint. The workflow fills in upstream artefacts.

    An `optional` one may stay empty when the step runs.
    """
    facts = _facts("source", flag, optional=optional or None)
    return Field(default, description=help, json_schema_extra=facts)


def quiet(default: Any = ..., help: str = "", flag: str | None = None, **bounds: Any) -> Any:
    """A logging, label or resource setting: never part of the fingerprint."""
    return Field(default, description=help, json_schema_extra=_facts("quiet", flag), **bounds)


def may_be_empty(field: FieldInfo) -> bool:
    """Whether a source field may stay empty when the step runs."""
    facts = field.json_schema_extra
    return isinstance(facts, dict) and facts.get("optional") is True


def _facts(
    role: str, flag: str | None, bare: int | None = None, optional: bool | None = None
) -> dict[str, Any]:
    """The declarations of a field that were given."""
    facts = {"role": role, "flag": flag, "bare": bare, "optional": optional}
    return {name: fact for name, fact in facts.items() if fact is not None}


class StepConfig(BaseModel):
    """Base of all step settings: frozen, strict, no unknown keys.

    Validators are built when the first settings are checked: `--help` does not need them.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True
    )

    seed: Count = value(1234, "seed of everything random in this step")
