"""The variants of a sweep: combinations, labels, what they share, and collisions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava_steps.core.errors import ConfigError
from llava_steps.pipeline.rules import chain, groups
from llava_steps.settings import sweep
from llava_steps.settings.load import load

BASE = """\
standalone: true
run: mine
hf_model: {vision_tower: a/b, text_model: c/d}
evaluation: {data: held.json}
datasets:
  one: {source: one.json}
  two: {source: two.json}
stages:
  stage1: {data: one, train: projector, train_steps: 100}
  stage2: {data: two, train: all, train_steps: 100}
"""


def test_a_grid_is_every_combination_in_the_order_of_the_file() -> None:
    made = sweep.combinations({"stage2.lr": [1e-5, 2e-5], "hf_model.tp": [1, 2]})
    assert made == [
        {"stages.stage2.lr": lr, "hf_model.tp": tp} for lr in (1e-5, 2e-5) for tp in (1, 2)
    ]


def test_a_list_is_its_combinations() -> None:
    listed = [{"stage2.lr": 1e-5}, {"stages.stage2.lr": 2e-5, "hf_model.tp": 2}]
    assert sweep.combinations(listed) == [
        {"stages.stage2.lr": 1e-5}, {"stages.stage2.lr": 2e-5, "hf_model.tp": 2},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "at most"),
        ([], "names no variant"),
        ({"a.b": []}, "expected a list of values"),
        ({"a.b": 3}, "expected a list of values"),
        ([{}], "expected KEY"),
        ({"a.b": [*range(1001)]}, "makes 1001 variants; at most 1000"),
        ({"a.b": [1, 1]}, "makes the variant b_1 twice"),
        ([{"a.b": 1, "c.d": 2}, {"c.d": 2, "a.b": 1}], "makes the variant"),
        ({"stage2.lr": [1], "stages.stage2.lr": [2]}, "stages.stage2.lr: given twice"),
        ([{"stage2.lr": 1, "stages.stage2.lr": 2}], "stages.stage2.lr: given twice"),
        *(({key: ["a"]}, "belongs to the whole run") for key in sweep.FIXED),
        ({"cluster.gres": ["a"]}, "belongs to the whole run"),
    ],
)
def test_what_is_not_a_sweep(given: Any, message: str) -> None:
    if given == {}:
        assert sweep.combinations(given) == [{}]
        return
    with pytest.raises(sweep.SweepError, match=message.replace(".", r"\.")):
        sweep.combinations(given)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["stages.stage3.lr"], "'stage3' is not a stage; stages are stage1"),
        (["datasets.two.source"], "'two' is not a dataset; datasets are one"),
        (["stages.stage1"], "is a section"),
        (["stages"], "is a section"),
        (["stages..lr"], "is not a key"),
        ([""], "is not a key"),
    ],
)
def test_keys_of_stages_and_datasets_that_are_missing(keys: list[str], message: str) -> None:
    names = {"stages": ["stage1"], "datasets": ["one"]}
    with pytest.raises(sweep.SweepError, match=message):
        sweep.refuse_unknown(keys, names)
    known = ["stages.stage1.lr", "stages.all.lr", "datasets.one.source", "hf_model.tp", "zzz"]
    sweep.refuse_unknown(known, names)


@pytest.mark.parametrize(
    ("assignments", "label"),
    [
        ({"stages.stage2.lr": 2e-05}, "lr_2e-5"),
        ({"stages.stage2.lr": 1e16}, "lr_1e16"),
        ({"stages.stage2.packing": True}, "packing_true"),
        ({"hf_model.text_model": "a/b"}, "text_model_a_b-"),
        ({"stages.stage2.train": ["projector", "language_model"]}, "train_"),
        ({"stages.a.lr": 1, "stages.b.lr": 2}, "a.lr_1,b.lr_2"),
        ({"stages.a.lr": 1, "datasets.b.workers": 2}, "lr_1,workers_2"),
    ],
)
def test_labels(assignments: dict[str, Any], label: str) -> None:
    made = sweep.label(assignments)
    assert made.startswith(label) and (label.endswith(("-", "_")) or made == label)
    assert len(made) <= sweep.LONGEST and "/" not in made and " " not in made


def test_long_labels_and_those_with_other_signs_stay_distinct() -> None:
    texts = [f"{'a' * 200}/{end}" for end in "bc"] + ["x/y", "x_y", "x y", "日本", "日本語"]
    made = sweep.labels([{"hf_model.text_model": text} for text in texts])
    assert len({*made}) == len(texts)


def test_labels_name_only_what_varies() -> None:
    variants = [{"a.lr": lr, "a.steps": 5} for lr in (1, 2)]
    assert sweep.varied(variants) == ["a.lr"]
    assert sweep.labels(variants) == ["lr_1", "lr_2"]
    assert sweep.labels([{"a.lr": 1}, {}]) == ["lr_1", "variant_2"], "one has the value of the file"
    assert sweep.varied([{"a.b": 1}, {"a.b": "1"}]) == []
    assert sweep.labels([{"a.b": 1}, {"a.b": "1"}]) == ["variant_1", "variant_2"]


def test_common_is_what_all_have_alike() -> None:
    variants = [{"a.lr": 1, "a.b": 2, "a.c": 4}, {"a.lr": 1, "a.b": 3}]
    assert sweep.common(variants, ["a.lr", "a.b", "a.c"]) == {"a.lr": 1}


def test_a_key_of_every_stage_and_one_that_says_it_in_another_way() -> None:
    values: dict[str, Any] = {
        "stages": {"a": {"lr": 1, "train": "all"}, "b": {"data": "one"}},
    }
    sweep.assign(
        values, {"stages.all.lr": 2, "stages.a.freeze_lm": True, "stages.b.data_path": "x"}
    )
    assert values["stages"] == {
        "a": {"lr": 2, "freeze_vision": False, "freeze_projector": False, "freeze_lm": True},
        "b": {"lr": 2, "data_path": "x"},
    }


def swept(folder: Path, text: str) -> list[str]:
    """Directories of the rules of a run, below that of the run."""
    (folder / "base.yaml").write_text(BASE)
    (folder / "sweep.yaml").write_text(text)
    config = load([folder / "base.yaml", folder / "sweep.yaml"])
    return sorted(str(rule.out.relative_to("results/mine")) for rule in chain(config).values())


def test_variants_share_what_is_equal(tmp_path: Path) -> None:
    made = swept(tmp_path, "sweep: {stages.stage2.lr: [1e-5, 2e-5, 5e-5]}")
    differ = {name for name in made if "/" in name}
    own = ["stage2_checkpoint", "hf_export", "evaluation", "report"]
    assert differ == {f"lr_{lr}/{name}" for lr in ("1e-5", "2e-5", "5e-5") for name in own}
    assert {*made} - differ == {
        "one_tar_shards", "one_energon_dataset", "two_tar_shards", "two_energon_dataset",
        "hf_model", "megatron_checkpoint", "stage1_audit", "stage2_audit", "stage1_checkpoint",
        "stage1_export", "comparison",
    }  # fmt: skip


def test_a_rule_is_named_after_the_settings_that_it_depends_on(tmp_path: Path) -> None:
    made = swept(tmp_path, "sweep: {stages.stage1.lr: [1, 2], stages.stage2.lr: [3, 4]}")
    first = [name for name in made if name.endswith("/stage1_checkpoint")]
    assert first == ["stage1.lr_1/stage1_checkpoint", "stage1.lr_2/stage1_checkpoint"]
    assert sum(name.endswith("/stage2_checkpoint") for name in made) == 4


def test_names_of_a_sweep_stand_for_the_rules_of_all_variants(tmp_path: Path) -> None:
    swept(tmp_path, "sweep: {stages.stage2.lr: [1, 2]}")
    rules = chain(load([tmp_path / "base.yaml", tmp_path / "sweep.yaml"]))
    named = groups(rules)
    assert named["stage2_checkpoint"] == ["stage2_checkpoint_lr_1", "stage2_checkpoint_lr_2"]
    assert named["tar_shards"] == ["one_tar_shards", "two_tar_shards"]
    assert {*named}.isdisjoint(rules)


def test_variants_that_are_equal_share_everything(tmp_path: Path) -> None:
    made = swept(tmp_path, "sweep: [{stages.stage2.lr: 1}, {stages.stage2.lr: 1.0}]")
    assert [name for name in made if "/" in name] == []


def test_two_steps_of_one_name_are_refused(tmp_path: Path) -> None:
    """A stage whose rule is called as that of a variant of another."""
    stage = "stage2_checkpoint_lr_1"
    text = f"stages: {{{stage}: {{data: one, train: all}}}}\nsweep: {{stages.stage2.lr: [1, 2]}}"
    try:
        made = swept(tmp_path, text)
    except ConfigError as error:
        assert "two steps would be called" in str(error)
    else:
        assert len({*made}) == len(made)


def test_a_key_of_one_stage_overrides_that_of_all_in_either_order() -> None:
    one, every = {"stages.stage2.lr": 4e-5}, {"stages.all.lr": 1e-5}
    for assignments in (one | every, every | one):
        values: dict[str, Any] = {"stages": {"stage1": {"lr": 1.0}, "stage2": {"lr": 2.0}}}
        sweep.assign(values, assignments)
        assert values == {"stages": {"stage1": {"lr": 1e-5}, "stage2": {"lr": 4e-5}}}
