"""docs/how-to/stages.md and sections.md: each example is read, and the names shown exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llava_steps.pipeline.rules import chain, groups
from llava_steps.settings.config import Config
from llava_steps.settings.load import load

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "config/template.yaml"
STAGES = (ROOT / "docs/how-to/stages.md").read_text(encoding="utf-8")
SECTIONS = (ROOT / "docs/how-to/sections.md").read_text(encoding="utf-8")


def examples(page: str) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", page, flags=re.M | re.S)


def read(folder: Path, *texts: str, base: Path = TEMPLATE) -> Config:
    paths = [folder / f"{number}.yaml" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    return load([base, *paths])


@pytest.mark.parametrize("text", examples(STAGES))
def test_each_example_is_an_overlay_on_the_template(tmp_path: Path, text: str) -> None:
    config = read(tmp_path, text)
    assert len(chain(config)) >= 14


def of(word: str) -> str:
    """The example that has a word."""
    return next(text for text in examples(STAGES) if word in text)


def test_what_the_page_says_of_its_examples(tmp_path: Path) -> None:
    rules = chain(read(tmp_path, of("tower:")))
    assert rules["short_checkpoint"].upstream[0] == "stage1_checkpoint"
    assert "short_export" not in rules and "tower_audit" not in rules
    assert rules["hf_export"].upstream[0] == "final_checkpoint"
    rules = chain(read(tmp_path, of("evaluate_kept")))
    kept = sorted(name for name in rules if "_step" in name)
    assert kept == sorted(
        f"stage2_step{step}_{kind}"
        for step in (1000, 2000, 3000, 4000)
        for kind in ("export", "evaluation")
    )
    rules = chain(read(tmp_path, of("weight_decay")))
    kinds = [rule.declared.name for rule in rules.values()]
    assert (kinds.count("stage1_checkpoint"), kinds.count("stage2_checkpoint")) == (1, 6)
    assert len(read(tmp_path, of("train_steps: 2500")).variants) == 2


def test_names_of_rules_and_results(tmp_path: Path) -> None:
    plain = chain(read(tmp_path, of("weights: three")))
    sweep = "sweep: {stages.stage2.lr: [1e-5, 2e-5]}"
    rules = chain(read(tmp_path, of("weights: three"), sweep))
    outs = {f"results/<run>/{r.out.relative_to('results/mine')}" for r in (plain | rules).values()}
    names = {*rules, *groups(rules)}
    table = STAGES[STAGES.index("| what | rule |") : STAGES.index("Some names stand")]
    rows = [row.split("|")[2:4] for row in table.strip().splitlines()[2:]]
    for shown, result in rows:
        assert {*re.findall(r"`(\w+)`", shown)} - {"stage2_export"} <= names, shown
        assert {*re.findall(r"`(results/[^`]+)`", result)} <= outs
    for line in re.findall(r"^snakemake .*$", STAGES, flags=re.M):
        assert next(word for word in line.split()[1:] if word[0] != "-") in names, line


def test_the_two_forms_of_the_example_are_the_same(tmp_path: Path) -> None:
    rest = (
        "standalone: true\nhf_model: {vision_tower: a/b, text_model: c/d}\n"
        "evaluation: {data: held.json}\n"
    )
    (tmp_path / "rest.yaml").write_text(rest)
    base = tmp_path / "rest.yaml"
    before, after = (read(tmp_path, text, base=base) for text in examples(SECTIONS))
    for name in ("stage1", "stage2"):
        assert before.stages[name].settings == after.stages[name].settings
    old, new = chain(before), chain(after)
    assert old["tar_shards"].settings == new["train_tar_shards"].settings
    assert {name.replace("train_", "", 1) for name in new} == {*old}
