"""Files in the old form (sections) and the new one (datasets, stages), over each other."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_steps.core.errors import ConfigError
from llava_steps.settings.config import Config
from llava_steps.settings.load import load

REST = {
    "standalone": True,
    "hf_model": {"vision_tower": "a/b", "text_model": "c/d"},
    "evaluation": {"data": "held.json"},
}
STAGE1 = {"train_steps": 10, "lr": 0.1}
STAGE2 = {"train_steps": 20, "lr": 0.2}
OLD: dict[str, Any] = {
    **REST,
    "tar_shards": {"source": "old.json"},
    "stage1": {**STAGE1, "freeze_lm": True},
    "stage2": STAGE2,
}
NEW: dict[str, Any] = {
    **REST,
    "datasets": {"one": {"source": "one.json"}, "two": {"source": "two.json"}},
    "stages": {
        "stage1": {**STAGE1, "data": "one", "train": "projector"},
        "stage2": {**STAGE2, "data": "two", "train": ["projector", "language_model"]},
    },
}


@pytest.fixture
def merged(tmp_path: Path):
    def merged(*files: dict[str, Any]) -> Config:
        paths = []
        for number, values in enumerate(files):
            path = tmp_path / f"{number}.yaml"
            path.write_text(yaml.safe_dump(values, sort_keys=False))
            paths.append(path)
        return load(paths)

    return merged


def rates(config: Config) -> dict[str, float]:
    return {name: stage.lr for name, stage in config.stages.items()}


@pytest.mark.parametrize("base", [OLD, NEW], ids=["old", "new"])
@pytest.mark.parametrize(
    "overlays",
    [*itertools.product([{"stage2": {"lr": 0.5}}, {"stages": {"stage2": {"lr": 0.5}}}], repeat=2)],
    ids=["old-old", "old-new", "new-old", "new-new"],
)
def test_an_overlay_of_either_form_changes_a_file_of_either_form(
    merged, base: dict[str, Any], overlays: tuple[dict[str, Any], ...]
) -> None:
    first, second = overlays
    last = {key: yaml.safe_load(str(value).replace("0.5", "0.7")) for key, value in second.items()}
    config = merged(base, first, last)
    assert rates(config) == {"stage1": 0.1, "stage2": 0.7}
    assert config.stages["stage2"].train_steps == 20
    assert (config.stages["stage1"].stage, config.stages["stage2"].stage) == (1, 2)
    assert config.data_of("stage1").keys() == merged(base).data_of("stage1").keys()


def test_the_two_forms_say_the_same(merged) -> None:
    new = {
        **REST,
        "tar_shards": {"source": "old.json"},
        "stages": {"stage1": {**STAGE1, "train": "projector"}, "stage2": {**STAGE2}},
    }
    old, new_one = merged(OLD), merged(new)
    for name in old.stages:
        assert old.stages[name].settings == new_one.stages[name].settings


@pytest.mark.parametrize("second", [{}, {"stage2": {"lr": 0.7}}, {"stages": {"stage2": {}}}])
def test_a_source_in_the_old_form_replaces_named_datasets(merged, second: dict[str, Any]) -> None:
    config = merged(NEW, {"tar_shards": {"source": "mine.json"}}, second)
    assert config.dataset_names == [""] and config.dataset("").source == "mine.json"
    assert [*config.data_of("stage2")] == [""]
    config = merged(NEW, {"energon_dataset": {"tar_dir": "tars"}}, second)
    assert config.dataset_names == [""] and config.dataset("").tar_dir == "tars"


def test_named_datasets_replace_a_source_in_the_old_form(merged) -> None:
    config = merged(OLD, {"datasets": {"mine": {"source": "mine.json"}}})
    assert config.dataset_names == ["mine"] and config.tar_shards.source == ""
    assert [*config.data_of("stage1")] == ["mine"]


def test_data_of_a_later_file_replaces_what_says_it_in_another_way(merged) -> None:
    path = {"stage1": {"data_path": "prepared"}}
    config = merged(NEW, path)
    assert (config.stages["stage1"].data, config.stages["stage1"].data_path) == ({}, "prepared")
    back = merged(NEW, path, {"stages": {"stage1": {"data": "two"}}})
    assert [*back.data_of("stage1")] == ["two"] and back.stages["stage1"].data_path == ""


def test_a_start_of_a_later_file_replaces_what_says_it_in_another_way(merged) -> None:
    load_dir = {"stage2": {"megatron_load_dir": "before"}}
    start = {"stages": {"stage2": {"from": "megatron_checkpoint"}}}
    assert merged(NEW, start, load_dir).stages["stage2"].start == ""
    config = merged(OLD, load_dir, start)
    assert config.start_of("stage2") == "" and config.stages["stage2"].megatron_load_dir == ""


def test_trained_parts_of_a_later_file_replace_those_before(merged) -> None:
    def frozen(*files: dict[str, Any]) -> tuple[bool, bool, bool | None]:
        stage = merged(*files).stages["stage2"]
        return stage.freeze_vision, stage.freeze_projector, stage.freeze_lm

    everything = {"stages": {"stage2": {"train": "all"}}}
    keys = {"stage2": {"freeze_lm": True}}
    assert frozen(NEW) == frozen(OLD) == (True, False, False)
    assert frozen(OLD, everything) == (False, False, False)
    assert frozen(NEW, everything, keys) == (False, False, True), "one key changes one part"
    assert frozen(NEW, keys, everything) == (False, False, False)
    assert frozen(OLD, keys, everything, keys) == (False, False, True)


def test_keys_of_every_stage(merged) -> None:
    more = {"train_steps": 30, "train": "all", "data": "one"}
    shared = {**NEW, "stages": {"all": {"lr": 0.9, "save_interval": 7}, **NEW["stages"]}}
    config = merged(shared)
    assert rates(config) == {"stage1": 0.1, "stage2": 0.2}, "a stage overrides them in its file"
    assert {stage.save_interval for stage in config.stages.values()} == {7}
    config = merged(NEW, {"stages": {"all": {"lr": 0.5}, "stage1": {"lr": 0.3}}})
    assert rates(config) == {"stage1": 0.3, "stage2": 0.5}, "they override earlier files"
    config = merged(shared, {"stages": {"extra": more}}, {"stages": {"all": {"save_interval": 8}}})
    assert rates(config) == {"stage1": 0.1, "stage2": 0.2, "extra": 0.9}
    assert {stage.save_interval for stage in config.stages.values()} == {8}
    assert [*config.stages] == ["stage1", "stage2", "extra"]
    config = merged(OLD, {"stages": {"all": {"lr": 0.5}}}, {"stage1": {"lr": 0.6}})
    assert rates(config) == {"stage1": 0.6, "stage2": 0.5}
    config = merged(shared, {"stages": {"stage2": None}}, {"stages": {"all": {"lr": 0.5}}})
    assert rates(config) == {"stage1": 0.5}, "a stage that was removed stays away"


def test_keys_of_every_stage_that_say_the_same_in_another_way(merged) -> None:
    config = merged(NEW, {"stages": {"all": {"train": "all", "data": "two"}}})
    assert not any(stage.freeze_vision or stage.freeze_lm for stage in config.stages.values())
    config = merged(NEW, {"stages": {"all": {"data_path": "prepared"}, "stage2": {"data": "one"}}})
    assert [*config.data_of("stage2")] == ["one"] and config.stages["stage1"].data == {}
    config = merged(NEW, {"stages": {"all": {"train": "all"}, "stage2": {"freeze_lm": True}}})
    assert (config.stages["stage1"].freeze_lm, config.stages["stage2"].freeze_lm) == (False, True)


def test_problems_of_every_stage_name_its_line(merged, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        merged(NEW, {"stages": {"all": {"gpus": 1, "lr": "fast"}, "stage1": {"lr": "slow"}}})
    assert str(caught.value).splitlines()[1:] == [
        f"  {tmp_path}/1.yaml:6: stages.stage1.lr: expected a number, got 'slow'",
        f"  {tmp_path}/1.yaml:4: stages.all.lr: expected a number, got 'fast'",
    ]
    for wrong in (3, None, ["a"]):
        with pytest.raises(ConfigError, match=r"stages\.all: expected keys of every stage, got"):
            merged(NEW, {"stages": {"all": wrong}})


@pytest.mark.parametrize("base", [OLD, NEW], ids=["old", "new"])
def test_removed_stages_and_datasets(merged, base: dict[str, Any]) -> None:
    config = merged(base, {"stages": {"stage1": None}})
    assert [*config.stages] == ["stage2"] and config.start_of("stage2") == ""
    with pytest.raises(ConfigError, match="stage1: expected a section with keys, got nothing"):
        merged(base, {"stage1": None})
    with pytest.raises(ConfigError, match=r"stages\.other: expected a section with keys"):
        merged(base, {"stages": {"other": None}})


def test_a_stage_is_described_once_in_a_file(merged) -> None:
    with pytest.raises(ConfigError, match="stage1: is in stages too; describe it once"):
        merged(NEW, {"stage1": {"lr": 0.5}, "stages": {"stage1": {"lr": 0.5}}})
    merged(NEW, {"stage1": {"lr": 0.5}, "stages": {"stage2": {"lr": 0.5}}})
