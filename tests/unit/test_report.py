"""The report: what stands in it, what is escaped, what is left out; charts and code version."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from llava_steps.core.errors import InputError
from llava_steps.core.format import count, duration, size
from llava_steps.pipeline.rules import chain
from llava_steps.reporting import charts, html
from llava_steps.settings import forms
from llava_steps.settings.config import Config
from llava_steps.store import code_version
from tests.helpers.chain import run_step
from tests.helpers.page import Page
from tests.helpers.report_fixtures import HOSTILE, make_run
from tests.helpers.sealed import seal
from tests.workflow.project import RULES


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    root = tmp_path_factory.mktemp("report")
    results = make_run(root)
    flags = [f"--{name.replace('_', '-')}={path}" for name, path in results.items()]
    run_step("report", f"--title=run {HOSTILE[0]}", *flags, "--save-dir=out", cwd=root)
    return root, results


@pytest.fixture(scope="module")
def page(made: tuple[Path, dict[str, Path]]) -> Page:
    return Page((made[0] / "out/report.html").read_text(encoding="utf-8"))


def test_everything_of_the_run_is_told(page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert len(ids) == len(set(ids))
    assert {"pipeline", "results", "answers", "benchmarks", "data", "training",
            "conversion", "costs", "provenance"} <= set(ids)  # fmt: skip
    for words in ("12,310 samples, 13 tars", "1.81B parameters", "unreadable image", "92.0\u202f%",
                  "ROUGE-L", "Perplexity", "0, bit for bit", "3.1e-07", "48.000", "1,000 of 12,000",
                  "torch", "0123456789abcdef", "Fixed prompts", "lmms-eval 0.7.3",
                  "llm-jp-eval-mm 0.7.3", "0.3142", "0.012", "61.8"):  # fmt: skip
        assert words in page.text, words
    charts = [a for tag, a in page.tags if tag == "svg" and a["class"] == "chart"]
    assert len(charts) == 4 + 4 + 1, "four curves a stage, lengths of both audits once"
    assert all(a["aria-label"] for tag, a in page.tags if tag == "svg")
    links = {a["href"] for tag, a in page.tags if tag == "a"}
    assert links <= {f"#{name}" for name in ids}


def test_texts_of_the_data_are_text(page: Page) -> None:
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "iframe", "object", "form"})
    assert sum(tag == "h1" for tag, _ in page.tags) == 1
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:", "#")), target
    for text in (*HOSTILE[:3], HOSTILE[5]):
        assert text in page.text
    assert "\x00" not in page.text and "\x07" not in page.text and "49" not in HOSTILE[2]


def test_times_are_those_of_all_attempts(tmp_path: Path) -> None:
    made = seal(tmp_path, "hf_model", "hf_model", {"x": "w"}, {"parameters": 5}, earlier_s=107.5)
    run_step("report", f"--hf-model={made}", "--save-dir=out", cwd=tmp_path)
    shown = Page((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    assert shown.text.count("2 min 00 s") == 5 and "13 s" not in shown.text


def test_what_was_not_run_is_left_out(made: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    _, results = made
    run_step("report", f"--hf-model={results['hf_model']}", "--save-dir=out", cwd=tmp_path)
    few = Page((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    sections = [a["id"] for tag, a in few.tags if tag == "section"]
    assert sections == ["pipeline", "costs", "provenance"]
    assert few.text.count("not in this run") == 7
    found = run_step("report", "--save-dir=none", cwd=tmp_path, check=False)
    assert found.returncode == 2 and "no results given" in found.stderr
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/x").write_text("x")
    found = run_step("report", "--hf-model=plain", "--save-dir=none", cwd=tmp_path, check=False)
    assert (
        found.returncode == InputError.exit_code
        and "--hf-model plain has no manifest" in found.stderr
    )


def test_the_report_asks_for_nothing_that_the_run_does_not_need() -> None:
    def config(**more: object) -> Config:
        common = {"tar_shards": {"source": "x.json"}, "evaluation": {"data": "y.json"}}
        model = {"vision_tower": "a/b", "text_model": "c/d"}
        values = {**common, "hf_model": model, **more}
        return Config.model_validate(forms.canonical(values))

    two: dict[str, object] = {"stage1": {"stage": 1}, "stage2": {"stage": 2}}
    everything = chain(config(**two))["report"]
    assert set(everything.upstream) == {*RULES} - {"demo_assets", "report"}
    assert everything.settings.model_dump()["title"] == "demo"
    asked = {"lmms_eval": {"tasks": ["mme"]}, "llm_jp_eval_mm": {"tasks": {"a": "b"}}}
    told = chain(config(**two, **asked))["report"]
    assert set(told.upstream) - set(everything.upstream) == set(asked)
    own = {"data_path": "/elsewhere"}
    fewer = chain(config(stage1={"stage": 1, **own}, stage2={"stage": 2, **own}))["report"]
    assert set(everything.upstream) - set(fewer.upstream) == {"tar_shards", "energon_dataset"}


def test_points_of_a_curve_keep_order_mean_and_range() -> None:
    ys = [float(n % 7) for n in range(1000)]
    ys[3] = float("nan")
    points = charts.thin(range(1000), ys, 100)
    assert len(points) <= 100 and [p.x for p in points] == sorted(p.x for p in points)
    assert all(p.low <= p.mean <= p.high for p in points)
    assert {p.low for p in points} == {0.0} and {p.high for p in points} == {6.0}
    assert charts.thin([1, 2], [5.0, 6.0]) == [charts.Point(1, 5, 5, 5), charts.Point(2, 6, 6, 6)]
    assert charts.curve("none", [1], [float("nan")], "x") == ""


@pytest.mark.parametrize(("low", "high"), [(0, 4.2), (0.013, 0.0131), (-3, 8e9), (5, 5), (0, 0)])
def test_ticks_are_few_round_and_cover(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8
    steps = {round((b - a) / (found[1] - found[0]), 6) for a, b in pairwise(found)}
    assert steps == {1.0}


def test_numbers_and_texts_for_people() -> None:
    shown = {0: "0", 0.002: "2e-3", 0.00025: "2.5e-4", 0.5: "0.5", 12000: "12k", 3.2e6: "3.2M"}
    assert {value: charts.number(value) for value in shown} == shown
    assert [count(n) for n in (451_072, 6_630_000, 1_812_345_678)] == [
        "451,072", "6.63M", "1.81B",
    ]  # fmt: skip
    assert [duration(s) for s in (0.4, 47.2, 403, 12_000, 216_000)] == [
        "0.4 s", "48 s", "6 min 43 s", "3 h 20 min", "2 d 12 h",
    ]  # fmt: skip
    assert [size(n) for n in (999, 1_804_288, 69e9, 2**41)] == [
        "999 bytes", "1.7 MiB", "64.3 GiB", "2.0 TiB",
    ]  # fmt: skip
    assert (
        html.clean("a\x00b\ud800\nc") == "a\ufffdb\ufffd\nc" and len(html.clean("x" * 5000)) < 900
    )
    assert html.words("stage1_checkpoint") == "stage 1 checkpoint"


def test_a_template_is_code_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(code_version.PACKAGE, tmp_path / "llava_steps"))
    monkeypatch.setattr(code_version, "PACKAGE", copy)

    def version(module: str) -> str:
        for function in (code_version._read, code_version.modules_of, code_version.code_version):
            function.cache_clear()
        return code_version.code_version(module)

    before = [version(f"llava_steps.{name}") for name in ("report", "evaluate")]
    with (copy / "reporting/style.css").open("a") as file:
        file.write("p { color: red; }")
    after = [version(f"llava_steps.{name}") for name in ("report", "evaluate")]
    assert before[0] != after[0] and before[1] == after[1]
    monkeypatch.undo()
    assert version("llava_steps.report") == before[0]


def test_a_result_of_another_version_is_named(
    made: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    _, results = made
    shutil.copytree(results["evaluation"].resolve(), tmp_path / "old", symlinks=False)
    manifest = json.loads((tmp_path / "old/manifest.json").read_text())
    del manifest["metrics"]["questions"]
    (tmp_path / "old/manifest.json").write_text(json.dumps(manifest))
    found = run_step("report", "--evaluation=old", "--save-dir=out", cwd=tmp_path, check=False)
    assert found.returncode == InputError.exit_code, found.stderr
    assert "a result has no 'questions'" in found.stderr


def test_a_result_of_another_step_is_named(
    made: tuple[Path, dict[str, Path]], tmp_path: Path
) -> None:
    place = made[1]["evaluation"].resolve()
    found = run_step(
        "report", f"--stage2-checkpoint={place}", "--save-dir=out", cwd=tmp_path, check=False
    )
    assert found.returncode == InputError.exit_code, found.stderr
    assert "this is the result of evaluation, not of stage2_checkpoint" in found.stderr
    (tmp_path / "file").write_text("")
    found = run_step(
        "report", f"--evaluation={place}", "--save-dir=o", "--store=file", cwd=tmp_path, check=False
    )
    assert "--store file is a file" in found.stderr and "Traceback" not in found.stderr
