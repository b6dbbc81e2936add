"""The report of runs with any datasets and stages: names, order, branches, scores by step."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from llava_steps.core.errors import InputError
from llava_steps.reporting import charts, html, kinds
from llava_steps.store.store import Input
from tests.helpers.chain import run_step
from tests.helpers.page import Page
from tests.helpers.recipe_fixtures import SAMPLES, flags, make_recipe
from tests.helpers.sealed import losses, seal


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("recipe")
    results = make_recipe(root)
    run_step("report", *flags(results), "--save-dir=out", cwd=root)
    return root, results


@pytest.fixture(scope="module")
def page(made: tuple[Path, dict[str, Path]]) -> Page:
    return Page((made[0] / "out/report.html").read_text(encoding="utf-8"))


def test_every_dataset_is_shown(page: Page) -> None:
    for name, count in SAMPLES.items():
        for text in (f"bad in {name}", f"{count + 7:,}", f"{count:,}", f"{count - 10:,}"):
            assert text in page.text, text
    assert "3,030 samples of 3 datasets" in page.text
    assert "tar shardss" not in page.text
    assert "pretrain: 1,000 samples" in page.text and "energon datasets" in page.text


def test_stages_are_in_the_order_of_their_training(page: Page) -> None:
    titles = [text for text in page.headings if text.partition(":")[0] in
              ("Stage 1", "Stage 3", "Stage sft", "Stage 2") and ":" in text]  # fmt: skip
    assert [title.partition(":")[0] for title in titles][-1] == "Stage 2"
    assert titles[0].startswith("Stage 1:") and len(titles) == 4
    for start in ("the untrained model", "stage 1", "stage sft"):
        assert f"starts from {start}" in page.spaced, start
    assert "data docs (weight 1), instruct (weight 3)" in page.spaced
    assert "data pretrain" in page.spaced
    # Colours follow the order of the stages.
    tones = [str(a["class"]).split()[-1] for t, a in page.tags if t == "polyline"]
    changes = [tone for tone, after in pairwise([*tones, ""]) if tone != after]
    assert changes[-4:] == ["tone-1", "tone-2", "tone-3", "tone-4"]


def test_models_are_in_the_order_of_the_stages(page: Page) -> None:
    heads = [text for tag, text in page.cells if tag == "th"]
    first = heads.index("before")
    shown = heads[first : first + 5]
    assert shown[:2] == ["before", "stage 1"] and shown[-1] == "stage 2"
    assert sorted(shown[2:4]) == ["stage 3", "stage sft"]
    # 50 % four times and 0 % four times are no best value; the best of `all` is one.
    best = page.of_class("best")
    assert len(best) == 1


def test_certificates_and_audits_of_all(page: Page) -> None:
    rows = [text for tag, text in page.cells if tag == "th"]
    for name in (
        "stage 1 export",
        "sft export",
        "stage 3 export",
        "HF export",
        "sft step20 export",
    ):
        assert name in rows, name
    # Costs and provenance are in the order of the pipeline.
    assert rows.index("docs energon dataset") < rows.index("HF model") < rows.index("stage 1 audit")
    for stage in ("stage 1", "stage 3", "stage sft", "stage 2"):
        assert f"Sample lengths, {stage}" in page.spaced, stage


def test_answers_that_were_cut_say_so(page: Page) -> None:
    assert page.text.count("cut at max_new_tokens") == 5


def test_scores_by_step(page: Page) -> None:
    start = page.headings.index("Scores by step")
    assert page.headings[start + 1] == "Stage sft"
    cells = [text for _, text in page.cells]
    row = cells.index("20")
    assert cells[row : row + 3] == ["20", "20.0\u202f%", "20.0\u202f%"]
    end = cells.index("60end")
    assert cells[end : end + 4] == ["60end", "50.0\u202f%", "50.0\u202f%", "0.0\u202f%"]


def test_a_single_stage_has_no_faint_second(
    tmp_path: Path, made: tuple[Path, dict[str, Path]]
) -> None:
    results = made[1]
    few = {n: results[n] for n in ("stage1_checkpoint", "megatron_checkpoint", "hf_model")}
    run_step("report", *flags(few), "--save-dir=out", cwd=tmp_path)
    page = Page((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    assert page.text.count("not in this run") == 4 and "stage 2" not in page.text
    assert "starts from" not in page.spaced


def test_paths_of_the_user_are_shown(tmp_path: Path) -> None:
    reads = {
        "megatron_load_dir": {"path": "mine", "digest": "1"},
        "data_path": {"path": "/shared/docs", "digest": "2"},
    }
    shown = seal(
        tmp_path, "sft_checkpoint", "stage1_checkpoint", {"metrics.jsonl": losses(2.0, 5)},
        {"steps": 5, "last_loss": 0.5, "samples": 5, "tokens": 5}, reads,
    )  # fmt: skip
    run_step("report", f"--results=sft_checkpoint={shown}", "--save-dir=out", cwd=tmp_path)
    page = Page((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    assert "starts from ./mine" in page.spaced and "data /shared/docs" in page.spaced


def test_names_of_rules_are_text(tmp_path: Path, made: tuple[Path, dict[str, Path]]) -> None:
    given = f"--results=<b>\x07_checkpoint={made[1]['sft_checkpoint']}"
    run_step("report", given, "--save-dir=out", cwd=tmp_path)
    page = Page((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    assert "stage <b>\ufffd" in page.text and "<b>\ufffd checkpoint" in page.text
    assert "\x07" not in page.text and page.of_class("pipeline") == ["svg"]
    assert not [a for _, attrs in page.tags for a in attrs.values() if a and "\x07" in a]
    assert "\ud800" not in charts.drawing("\ud800", "") + html.words("\ud800_audit")


def test_kinds_of_names(made: tuple[Path, dict[str, Path]]) -> None:
    def part(name: str, step: str) -> kinds.Part:
        return kinds.part(name, Input(Path(), "", {"step": step}, shown="dir"), "--results")

    known = {
        ("a_b_tar_shards", "tar_shards"): ("tar_shards", "a_b", None),
        ("sft_checkpoint", "stage1_checkpoint"): ("checkpoint", "sft", None),
        ("hf_export", "hf_export"): ("hf_export", "", None),
        ("x_hf_export", "hf_export"): ("export", "x_hf", None),
        ("a_step3_evaluation", "evaluation"): ("evaluation", "a", 3),
        ("a_step3_export", "hf_export"): ("export", "a_step3", None),
        ("mine", "stage2_audit"): ("audit", "mine", None),
        ("stage1_checkpoint", "stage2_checkpoint"): ("checkpoint", "stage1", None),
    }
    for (name, step), wanted in known.items():
        found = part(name, step)
        assert (found.kind, found.of, found.step) == wanted, name
    with pytest.raises(InputError, match="result of tar_shards, not of sft_checkpoint"):
        part("sft_checkpoint", "tar_shards")


def test_a_result_that_is_given_twice_is_refused(
    tmp_path: Path, made: tuple[Path, dict[str, Path]]
) -> None:
    export = made[1]["hf_export"]
    found = run_step("report", f"--hf-export={export}", f"--results=hf_export={export}",
                     "--save-dir=out", cwd=tmp_path, check=False)  # fmt: skip
    assert found.returncode == InputError.exit_code and "given twice" in found.stderr
