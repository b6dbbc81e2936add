"""The groups that make up the settings of a stage."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from llava_steps.settings.fields import StepConfig, facts
from llava_steps.settings.stage.stage import Stage

GROUPS = Stage.__bases__[::-1]


def test_fields_come_in_the_order_of_the_groups() -> None:
    names = [*StepConfig.model_fields]
    for group in GROUPS:
        names += [name for name in group.model_fields if name not in StepConfig.model_fields]
    assert list(Stage.model_fields) == names and len(names) == len(set(names))


def test_no_group_takes_the_rule_of_another() -> None:
    """pydantic knows a rule by its name: of two with one name the first would never be asked."""
    known = Stage.__pydantic_decorators__.model_validators
    rules = [name for group in (*GROUPS, Stage) for name in vars(group) if name in known]
    assert len(rules) == len(set(rules)) == len(known)


def test_a_group_checks_itself_inside_the_stage() -> None:
    with pytest.raises(ValidationError, match="is above lr"):
        Stage(lr=0.01, min_lr=0.1)
    with pytest.raises(ValidationError, match="all parts are frozen"):
        Stage(stage=1, freeze_projector=True)


def test_only_what_a_stage_starts_from_may_be_empty() -> None:
    empty = {name for name, field in Stage.model_fields.items() if facts(field).optional}
    assert empty == {"megatron_load_dir"}
