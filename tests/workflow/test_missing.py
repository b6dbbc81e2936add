"""Files of the user that do not exist are reported before the first job, with what to bring."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llava_steps.settings.hub_id import is_hub_id
from tests.workflow.project import Project

PATHS = {
    "tar_shards.source": "LLaVA JSON or JSONL beside its images",
    "energon_dataset.tar_dir": "directory of tar shards",
    "hf_model.vision_tower": "vision tower, directory or hub id",
    "hf_model.text_model": "language model, directory or hub id",
    "hf_model.chat_template": "Jinja file",
    "megatron_checkpoint.hf_dir": "HF LLaVA directory",
    "stage1.data_path": "energon dataset, or the YAML file of a blend",
    "stage1.tokenizer_load_dir": "HF directory with tokenizer",
    "stage2.megatron_load_dir": "Megatron checkpoint to start from",
    "hf_export.megatron_dir": "Megatron checkpoint directory",
    "evaluation.data": "held-out LLaVA JSON",
    "evaluation.before": "HF directory before training",
}
"""Keys that name a file or a directory, with what the message says to bring."""


def refused(project: Project, *arguments: str) -> list[str]:
    """What a dry run and a run say, below one another; nothing has run."""
    lines = []
    for call in (("-n",), ()):
        text = project.snakemake("--cores", "2", *call, *arguments, code=1)
        assert "MissingInput" not in text and "Traceback" not in text
        lines.append(text.partition("Error: ")[2])
    assert lines[0] == lines[1] and project.calls() == []
    return lines[0].splitlines()


@pytest.mark.parametrize("path", ["/no/such", "no/such/x", "$HOME/no/such", "~/no/such"])
@pytest.mark.parametrize("key", ["tar_shards.source", "stage1.data_path", "evaluation.before"])
def test_a_missing_path_is_one_line(fresh: Project, key: str, path: str) -> None:
    section, _, name = key.partition(".")
    (line,) = refused(fresh, "--config", f"{section}={{{name}: {path}}}")
    assert line.startswith(f"{key}: {path} does not exist") and PATHS[key] in line
    if path.startswith(("~", "$")):
        assert f"write {Path.home()}/no/such or another path" in line
    elif not path.startswith("/"):
        assert f"does not exist in {fresh.root}" in line


def test_every_path_is_reported_at_once(fresh: Project) -> None:
    head, *lines = refused(fresh, "--config", *[
        f"{key.partition('.')[0]}={{{key.partition('.')[2]}: ../no/{key}}}" for key in PATHS
    ])  # fmt: skip
    assert head == f"{len(PATHS)} paths of the configuration are missing:"
    for key, wanted in PATHS.items():
        (line,) = [line for line in lines if line.startswith(f"  {key}: ../no/{key} does not")]
        assert wanted in line


def test_the_template_says_what_it_needs(fresh: Project) -> None:
    lines = refused(fresh, "--configfile", "config/template.yaml")
    named = [line.split(":")[0].strip() for line in lines[1:]]
    assert named == ["datasets.captions.source", "datasets.dialogues.source", "evaluation.data"]


def test_what_a_target_does_not_need_may_be_missing(fresh: Project) -> None:
    arguments = ("--config", "evaluation={data: no/such/x}")
    assert "hf_model" in fresh.planned("hf_model", *arguments)
    assert (
        "evaluation.data: no/such/x does not exist" in refused(fresh, "evaluation", *arguments)[0]
    )


def test_a_dataset_that_is_gone_is_reported_before_the_first_job(finished: Project) -> None:
    (finished.root / "mine/set").mkdir(parents=True)
    (finished.root / "mine/set/a.tar").write_text("a")
    data = ("--config", "stage2={data_path: mine/set}")
    finished.run(*data)
    shutil.rmtree(finished.root / "mine")
    assert finished.planned(*data) == [], "what it was made into is up to date"
    finished.forget_calls()
    changed = ("--config", "stage2={data_path: mine/set}", "stage1={lr: 0.5}")
    (line,) = refused(finished, *changed)
    assert line.startswith("stage2.data_path: mine/set does not exist in ")


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("openai/clip-vit-large-patch14-336", True),
        ("gpt2", True),
        ("a/b@main", True),
        ("a/b@refs/pr/1", True),
        ("a/b/c", False),
        ("/a", False),
        ("./a", False),
        ("../a", False),
        ("~/a", False),
        ("$HOME/a", False),
        ("a/", False),
    ],
)
def test_names_on_the_hub_are_not_files(text: str, is_id: bool) -> None:
    assert is_hub_id(text, "model") == is_id


@pytest.mark.parametrize("source", ["org/data", "org/data@v1", "org/data@main/a/train.json"])
def test_a_dataset_on_the_hub_is_not_a_missing_file(fresh: Project, source: str) -> None:
    planned = fresh.planned("tar_shards", "--config", f"tar_shards={{source: {source}}}")
    assert planned == ["tar_shards"]
