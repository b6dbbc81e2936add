"""Any datasets, stages and sweeps: which jobs there are, and which run again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.benchmarks import recipes
from tests.workflow.project import Project, make_project

THREE = """
standalone: true
run: three
datasets:
  pretrain: {source: raw/pretrain.json}
  instruct: {source: raw/instruct.json, samples_per_shard: 7}
  docs: {path: docs}
hf_model: {vision_tower: tower, text_model: text}
stages:
  stage1: {data: pretrain, train: [projector], lr: 1e-3}
  stage2: {data: {instruct: 3, docs: 1}, train: [projector, language_model], lr: 2e-5}
  stage3: {from: stage1, data: docs, train: all, vision_lr: 2e-6}
sweep:
  stages.stage2.lr: [1e-5, 2e-5, 5e-5]
evaluation: {data: heldout.json}
"""

BY_HAND = Counter(
    {
        "tar_shards": 2,  # docs is prepared already
        "energon_dataset": 2,
        "hf_model": 1,
        "megatron_checkpoint": 1,
        "blend": 1,  # of stage 2
        "stage1_audit": 1,
        "stage2_audit": 2,  # of stages 2 and 3, which train the language model
        "stage1_checkpoint": 1,
        "stage2_checkpoint": 4,  # stage 2 three times, stage 3
        "hf_export": 5,  # stage 1, stage 2 three times, stage 3
        "evaluation": 3,
        "report": 3,
        "comparison": 1,
    }
)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished run of three datasets, three stages with a branch, and three variants."""
    project = make_project(tmp_path_factory.mktemp("three") / "project")
    root = project.root
    for name in ("raw/pretrain.json", "raw/instruct.json", "docs/data", "heldout.json"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(name)
    for name in ("tower", "text"):
        (root / name).mkdir()
        (root / name / "config.json").write_text("{}")
    project.overlay(THREE, "three.yaml")
    project.snakemake("--cores", "4", "--configfile", "three.yaml")
    return project


def _computed(project: Project) -> Counter[str]:
    return Counter(str(call["step"]) for call in project.calls())


def test_shared_steps_run_once(three: Project) -> None:
    assert _computed(three) == BY_HAND
    results = three.root / "results/three"
    labels = ["lr_1e-5", "lr_2e-5", "lr_5e-5"]
    for label in labels:
        assert (results / label / "stage2_checkpoint/manifest.json").exists()
        assert (results / label / "report.html").exists()
    assert (results / "comparison.html").exists() and not (results / "report.html").exists()
    rates = [call["lr"] for call in three.calls() if call["step"] == "stage2_checkpoint"]
    assert sorted(rates) == [1e-5, 2e-5, 5e-5, 1e-3]
    assert three.planned("--configfile", "three.yaml") == []


def test_names_stand_for_every_dataset_and_variant(three: Project) -> None:
    for name, rules in (
        ("tar_shards", ["instruct_tar_shards", "pretrain_tar_shards"]),
        (
            "stage2_checkpoint",
            [f"stage2_checkpoint_lr_{rate}" for rate in ("1e_5", "2e_5", "5e_5")],
        ),
    ):
        given = ("--configfile", "three.yaml", "--forcerun", name)
        assert three.planned(name, *given) == sorted([name, *rules])


def test_an_edit_of_a_dataset_runs_what_it_feeds(three: Project) -> None:
    three.forget_calls()
    (three.root / "raw/instruct.json").write_text("other")
    three.snakemake("--cores", "4", "--configfile", "three.yaml")
    assert _computed(three) == Counter(
        {
            "tar_shards": 1,
            "energon_dataset": 1,
            "blend": 1,
            "stage2_audit": 1,
            "stage2_checkpoint": 3,
            "hf_export": 3,
            "evaluation": 3,
            "report": 3,
            "comparison": 1,
        }
    )


@pytest.mark.parametrize("seed", [4, 7])
def test_a_random_recipe_runs_what_it_must(seed: int, tmp_path: Path) -> None:
    """`make recipes` runs twenty of them."""
    assert recipes.wrong(seed, tmp_path / "project") == ""


KEPT = """
stages:
  stage2: {train_steps: 9, warmup_steps: 0, save_interval: 2, keep_every: 4, evaluate_kept: true}
"""


def test_checkpoints_that_were_not_kept_are_reported_before_a_job(
    three: Project, tmp_path: Path
) -> None:
    """Kept checkpoints do not change a value: they are made by a training that is forced."""
    plain = three.overlay(KEPT.replace(", evaluate_kept: true", ", name: x"), "plain.yaml")
    kept = three.overlay(KEPT, "kept.yaml")
    files = ("--configfile", "three.yaml")
    three.snakemake("--cores", "4", *files, plain)
    text = three.snakemake("--cores", "1", "-n", *files, kept, code=1)
    assert (
        "stages.stage2.evaluate_kept: results/three/lr_1e-5/stage2_checkpoint was trained" in text
    )
    assert "--forcerun stage2_checkpoint_lr_1e_5" in text
    rules = three.planned(*files, kept, "--forcerun", "stage2_checkpoint")
    assert {"stage2_step4_export_lr_1e_5", "stage2_step8_evaluation_lr_5e_5"} <= {*rules}
