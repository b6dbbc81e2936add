"""Named datasets and stages: what the configuration of a run says besides the settings of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    WithJsonSchema,
    create_model,
    model_validator,
)
from pydantic.fields import FieldInfo

from llava_steps.settings.dataset import EnergonDataset, TarShards
from llava_steps.settings.problem import KeyProblem
from llava_steps.settings.stage.stage import Stage

NAME = r"^[A-Za-z][A-Za-z0-9_-]{0,59}$"
"""Names of datasets and stages; rules and directories are named after them."""

Part = Literal["vision_tower", "projector", "language_model"]
FREEZES: dict[str, str] = {
    "vision_tower": "freeze_vision",
    "projector": "freeze_projector",
    "language_model": "freeze_lm",
}


class Share(BaseModel):
    """A dataset in the data of a stage."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    weight: float | None = Field(None, gt=0, allow_inf_nan=False, description="its proportion")
    repetitions: PositiveInt | None = Field(
        None, description="how often an epoch contains each of its samples"
    )
    max_turns: PositiveInt | None = Field(
        None, description="first rounds of question and answer that are kept of a conversation"
    )
    chat_template: str = Field(
        "", description="Jinja file used instead of the template of the HF directory"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.weight is not None and self.repetitions is not None:
            raise ValueError("give weight or repetitions, not both")
        return self

    @property
    def options(self) -> bool:
        """Whether more is said than that the dataset is read."""
        return bool((self.repetitions or 1) > 1 or self.max_turns or self.chat_template)


def _shares(given: Any) -> Any:
    """Each form in which a stage names its data, as shares by name."""
    if isinstance(given, str):
        return {given: {}} if given else {}
    if isinstance(given, list) and all(isinstance(name, str) for name in given):
        if len(set(given)) < len(given):
            raise ValueError("names a dataset twice; give it repetitions instead")
        return {name: {} for name in given}
    if isinstance(given, Mapping):
        return {name: _share(name, share) for name, share in given.items()}
    raise ValueError("expected the name of a dataset, a list of names, or NAME: WEIGHT")


def _share(name: str, given: Any) -> Any:
    if isinstance(given, Mapping | Share):
        return given
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    if not (is_number and math.isfinite(given) and given > 0):
        raise KeyProblem(
            (name,), f"expected a weight, a number above 0, or {{repetitions: N}}, got {given!r}"
        )
    return {"weight": float(given)}


Shares = Annotated[
    dict[str, Share],
    BeforeValidator(_shares),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {
                    "type": "object",
                    "additionalProperties": {"anyOf": [{"type": "number"}, {"type": "object"}]},
                },
            ]
        }
    ),
]


def _parts(given: Any) -> Any:
    """Each form of `train`, as a list of parts."""
    if given is None or given == "all":
        return given and [*get_args(Part)]
    named = [given] if isinstance(given, str) else given
    if not isinstance(named, list):
        raise ValueError(f"expected all, a part or a list of parts, got {given!r}")
    if wrong := [part for part in named if part not in get_args(Part)]:
        parts = ", ".join(get_args(Part))
        raise ValueError(f"{wrong[0]!r} is not a part; parts are {parts}, or all of them: all")
    if not named:
        raise ValueError("trains nothing; name a part, or leave the stage out")
    return named


Parts = Annotated[
    list[Part],
    BeforeValidator(_parts),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["all", *get_args(Part)]},
                {"type": "array", "items": {"enum": [*get_args(Part)]}},
            ]
        }
    ),
]


def stage_title(name: str) -> str:
    """A stage in the middle of a sentence: `stage 1` for stage1, `stage NAME` for others."""
    number = name.removeprefix("stage")
    return f"stage {number if number.isdigit() else name}"


class StageSection(Stage):
    """A training stage of the recipe: where it starts, what it reads and trains, its settings."""

    data: Shares = Field(
        {},
        description="dataset of `datasets`, list of them, or NAME: WEIGHT; `{repetitions: N}` "
        "instead of a weight repeats samples in an epoch; with one dataset in all, that",
    )
    start: str = Field(
        "",
        alias="from",
        description="stage that it starts from, or `megatron_checkpoint`: the model before "
        "training; empty: the stage before it in the file",
    )
    train: Parts | None = Field(
        None,
        description="parts that learn: `vision_tower`, `projector`, `language_model`, a list of "
        "them, or `all`; the others are frozen",
    )
    audit: bool = Field(True, description="check the data before the stage is trained")
    export: bool = Field(
        True,
        description="export and evaluate its result; that of the last stage is always exported",
    )
    evaluate_kept: bool = Field(
        False,
        description="export and evaluate the checkpoints that keep_every keeps, for a curve of "
        "scores",
    )

    @model_validator(mode="before")
    @classmethod
    def _frozen_by_train(cls, given: Any) -> Any:
        """Set the freeze_ keys of what `train` leaves out, and the number that this implies."""
        if not isinstance(given, dict):
            return given
        made = dict(given)
        try:
            named = _parts(made.get("train"))
        except ValueError as error:
            raise KeyProblem(("train",), str(error)) from None
        if named is not None:
            for part, key in FREEZES.items():
                frozen = part not in named
                if made.setdefault(key, frozen) not in (frozen, None):
                    raise KeyProblem(
                        ("train",),
                        f"{', '.join(named)} and {key} {str(given[key]).lower()} contradict each "
                        "other; leave one of them out",
                    )
                made[key] = frozen
        if "stage" not in made:
            if made.get("freeze_lm") is None:
                raise ValueError(
                    "does not say what it trains; give train: projector, train: [projector, "
                    "language_model] or train: all"
                )
            made["stage"] = 1 if made["freeze_lm"] else 2
        return made

    @model_validator(mode="after")
    def _data_is_given_once(self) -> Self:
        if self.data and self.data_path:
            raise KeyProblem(
                ("data",), "names datasets of this file, data_path names a path: give only one"
            )
        kinds = {share.weight is not None for share in self.data.values()}
        if len(kinds) > 1:
            first = next(name for name, share in self.data.items() if share.weight is None)
            raise KeyProblem(
                ("data",),
                f"some datasets have a weight and {first} has none; give each a weight, or only "
                "repetitions",
            )
        return self

    @model_validator(mode="after")
    def _checkpoints_are_kept(self) -> Self:
        if self.evaluate_kept and not self.kept_steps:
            raise KeyProblem(
                ("evaluate_kept",),
                "needs checkpoints that are kept: set keep_every to a multiple of save_interval "
                f"{self.save_interval} below train_steps {self.train_steps}",
            )
        return self

    @property
    def kept_steps(self) -> list[int]:
        """Steps whose checkpoints keep_every keeps, but for the last step."""
        if not (self.keep_every and self.save):
            return []
        between = math.lcm(self.keep_every, self.save_interval)
        return [*range(between, self.train_steps, between)]

    @property
    def settings(self) -> Stage:
        """The settings of its training."""
        return Stage.model_validate({name: getattr(self, name) for name in Stage.model_fields})


_OF_SHARES = {"part", "parts", "remove_parts"}
_FIELDS = {
    name: info
    for model in (EnergonDataset, TarShards)
    for name, info in model.model_fields.items()
    if name not in _OF_SHARES
}


OF_RAW = {*TarShards.model_fields} - {*EnergonDataset.model_fields}
"""Keys of a dataset that apply to raw data only."""


class _Dataset(BaseModel):
    """A named dataset: raw data through tar shards and energon preparation, or a prepared one.

    With `tar_dir` in place of `source` it is made from tars that exist.

    Keys that are left out are those of the sections `tar_shards` and `energon_dataset`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    path: str = Field(
        "", description="energon dataset that is prepared already, used where it is; no other key"
    )

    @model_validator(mode="after")
    def _in_one_way(self) -> Self:
        others = sorted(self.model_fields_set - {"path"})
        if self.path and others:
            raise KeyProblem(
                ("path",),
                f"names a prepared dataset, to which {others[0]} does not apply; leave one out",
            )
        others = sorted(self.model_fields_set & OF_RAW)
        if getattr(self, "tar_dir", "") and others:
            raise KeyProblem(
                ("tar_dir",),
                f"names tars that exist, to which {others[0]} does not apply; leave one out",
            )
        if not (self.path or getattr(self, "tar_dir", "") or getattr(self, "source", "")):
            raise ValueError(
                "give source, the raw data, or path, a prepared energon dataset, or tar_dir, tars "
                "that exist"
            )
        return self

    def tar_shards(self, defaults: TarShards) -> TarShards:
        """The settings of its sharding."""
        return TarShards.model_validate(defaults.model_dump() | self._of(TarShards))

    def energon_dataset(self, defaults: EnergonDataset) -> EnergonDataset:
        """The settings of its preparation."""
        return EnergonDataset.model_validate(defaults.model_dump() | self._of(EnergonDataset))

    def _of(self, model: type[BaseModel]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.model_fields_set & {*model.model_fields}}


def _optional(info: FieldInfo) -> FieldInfo:
    made = copy(info)
    if made.is_required():
        made.default = ""
    return made


if TYPE_CHECKING:
    Dataset = _Dataset
else:
    Dataset = create_model(
        "Dataset",
        __base__=_Dataset,
        __module__=__name__,
        __doc__=_Dataset.__doc__,
        **{name: (info.annotation, _optional(info)) for name, info in _FIELDS.items()},
    )
