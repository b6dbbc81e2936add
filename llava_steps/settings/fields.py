"""Roles and declarations of settings, and the base of all settings classes.

The YAML of a run, the flags of every step, the JSON schema in workflow/schemas and the table in
config/README.md all come from the settings classes. Values are checked strictly: an unknown key, a
wrong type or a number written as a string is a `ConfigError` with the path of the key.

Each field declares its role:

* `value(...)`   an ordinary setting, part of the step's fingerprint
* `source(...)`  a path to an artefact or to a file of the user; its *content* is in the fingerprint
* `quiet(...)`   logging, labels and resources: changing it never recomputes a step

Other facts about a field are declared beside it too; `Facts` lists them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic import NonNegativeInt as Count
from pydantic.fields import FieldInfo

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Port = Annotated[int, Field(ge=0, le=65535)]

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Facts:
    """What a field declares besides its type, its default and its help."""

    role: str = "value"
    flag: str = ""
    """Long flag; empty: the name of the field, with dashes."""
    short: str = ""
    """Short flag of the scripts that this project replaces."""
    bare: int | None = None
    """Value of a flag that is given without one."""
    counts_gpus: bool = False
    """Whether the flag also takes -1, for all GPUs of the machine."""
    optional: bool = False
    """Whether a source may stay empty when the step runs."""
    is_data: bool = False
    """Whether a source always names a file of the user; others may name a result or a hub id."""
    hub: str = ""
    """What a source may name on the hub: `model`, `dataset`, or nothing."""
    is_blend: bool = False
    """Whether a source may be the YAML file of a blend: what it names counts as content too."""
    of_stage: bool = False
    """Whether a run takes the setting over from the stage that the step belongs to."""
    selects_share: bool = False
    """Whether the step makes only a share of a value when this setting is given. Once the whole
    value is sealed, a share that was not begun is not computed: the whole is shown instead."""
    of_whole: bool = False
    """Whether the setting applies to the whole value and decides nothing about a share of it."""


def value(
    default: Any = ...,
    help: str = "",
    flag: str = "",
    *,
    short: str = "",
    bare: int | None = None,
    counts_gpus: bool = False,
    of_stage: bool = False,
    selects_share: bool = False,
    of_whole: bool = False,
    **bounds: Any,
) -> Any:
    """A setting that is part of the fingerprint."""
    declared = Facts(
        "value",
        flag,
        short,
        bare,
        counts_gpus=counts_gpus,
        of_stage=of_stage,
        selects_share=selects_share,
        of_whole=of_whole,
    )
    return _field(default, help, declared, bounds)


def source(
    default: Any = ...,
    help: str = "",
    flag: str = "",
    *,
    optional: bool = False,
    is_data: bool = False,
    hub: Literal["", "model", "dataset"] = "",
    is_blend: bool = False,
    of_stage: bool = False,
) -> Any:
    """A path whose content is part of the fingerprint. The workflow fills in upstream artefacts."""
    declared = Facts(
        "source",
        flag,
        optional=optional,
        is_data=is_data,
        hub=hub,
        is_blend=is_blend,
        of_stage=of_stage,
    )
    return _field(default, help, declared, {})


def quiet(
    default: Any = ..., help: str = "", flag: str = "", *, short: str = "", **bounds: Any
) -> Any:
    """A logging, label or resource setting: never part of the fingerprint."""
    return _field(default, help, Facts("quiet", flag, short), bounds)


def _field(default: Any, help: str, declared: Facts, bounds: Mapping[str, Any]) -> Any:
    unsaid = asdict(Facts(role=""))
    given = {name: fact for name, fact in asdict(declared).items() if fact != unsaid[name]}
    return Field(default, description=help, json_schema_extra=given, **bounds)


def facts(field: FieldInfo) -> Facts:
    """What a field declares; one without a declaration is a value."""
    extra = field.json_schema_extra
    return Facts(**extra) if isinstance(extra, dict) else Facts()  # type: ignore[arg-type]


def flag_name(name: str, field: FieldInfo) -> str:
    """Long flag of a field: the declared one, or the field's name with dashes."""
    return facts(field).flag or "--" + name.replace("_", "-")


def whole_of(config: M) -> M | None:
    """The settings of the whole value that `config` makes a share of; None if it makes no share."""
    for name, field in type(config).model_fields.items():
        if facts(field).selects_share and getattr(config, name):
            return config.model_copy(update={name: field.get_default()})
    return None


def values(config: BaseModel) -> dict[str, Any]:
    """The settings that are part of the fingerprint by value."""
    is_share = whole_of(config) is not None
    declared = {name: facts(field) for name, field in type(config).model_fields.items()}
    return {
        name: getattr(config, name)
        for name, about in declared.items()
        if about.role == "value" and not (is_share and about.of_whole)
    }


class StepConfig(BaseModel):
    """Base of all step settings: frozen, strict, no unknown keys.

    Validators are built when the first settings are checked: `--help` does not need them.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True
    )

    seed: Count = value(1234, "seed of everything random in this step")
