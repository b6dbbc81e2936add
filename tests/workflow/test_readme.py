"""The Snakemake commands, the overlay and the template that the pages show do what they say."""

from __future__ import annotations

import re
import shlex

from llava_steps.pipeline.rules import chain
from llava_steps.settings.load import load
from llava_steps.settings.steps import STEPS
from tests.workflow.project import ROOT, Project

OF_DATASET = ("tar_shards", "energon_dataset")
README = (ROOT / "README.md").read_text(encoding="utf-8")
STAGES = (ROOT / "docs/how-to/stages.md").read_text(encoding="utf-8")
RUN = (ROOT / "docs/how-to/run.md").read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """Lines of fenced blocks that are commands, without their comments."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)
    blocks = [block for language, block in fenced if not language]
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.split(" ")[0] in ("snakemake", "python", "make")]


def test_dry_runs_of_the_readme_plan(fresh: Project) -> None:
    """Every snakemake line; those that would run something with `-n`."""
    fresh.overlay("stage2:\n  lr: 5.0e-4\n", "mine.yaml")
    lines = [line for line in commands(README + RUN) if line.startswith("snakemake")]
    assert len(lines) >= 8
    for line in dict.fromkeys(lines):
        arguments = shlex.split(line)[1:]
        text = fresh.snakemake(*arguments, *(() if "-n" in arguments else ("-n",)))
        assert "rule stage2_checkpoint:" in text, line


def test_dry_runs_of_datasets_and_stages_plan(fresh: Project) -> None:
    fresh.overlay((ROOT / "config/template.yaml").read_text(encoding="utf-8"), "mine.yaml")
    for path in ("captions", "dialogues", "heldout"):
        (fresh.root / "data").mkdir(exist_ok=True)
        (fresh.root / f"data/{path}.json").write_text("[]")
    lines = [line for line in commands(STAGES) if line.startswith("snakemake")]
    assert len(lines) == 4
    for line in lines:
        text = fresh.snakemake(*shlex.split(line)[1:])
        assert "rule captions_tar_shards:" in text or "rule hf_model:" in text, line


def test_the_overlay_of_the_readme_changes_what_it_says(finished: Project) -> None:
    (overlay,) = re.findall(r"^```yaml\n(# mine.yaml\n.*?)^```", RUN, flags=re.M | re.S)
    fresh = finished.overlay(overlay, "mine.yaml")
    assert finished.planned("--configfile", fresh) == [
        "evaluation",
        "hf_export",
        "report",
        "stage2_checkpoint",
    ]


def test_the_template_is_a_whole_configuration(fresh: Project) -> None:
    shipped, template = ROOT / "config/config.yaml", ROOT / "config/template.yaml"
    config = load([shipped, template])
    assert config == load([template]) and config.demo_assets is None
    of_datasets = [f"{name}_{kind}" for name in ("captions", "dialogues") for kind in OF_DATASET]
    of_stages = [f"stage{n}_{kind}" for n in (1, 2) for kind in ("audit", "checkpoint")]
    of_run = [name for name, step in STEPS.items() if not (step.optional or step.each)]
    rules = sorted([*of_datasets, *of_stages, "stage1_export", *of_run])
    assert sorted(chain(config)) == rules
    for path in (*(each.source for each in config.datasets.values()), config.evaluation.data):
        (fresh.root / path).parent.mkdir(exist_ok=True)
        (fresh.root / path).write_text("[]")
    planned = fresh.planned("--configfile", "config/template.yaml")
    assert planned == rules
