"""The summary of a run: the table, the way to ask the model, and the JSON line at the end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llava_steps.commands import summary
from llava_steps.core.errors import ConfigError, InputError
from tests.helpers.chain import ROOT, environment


def group(accuracy: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "questions": 10}


def results(english: float, japanese: float) -> dict[str, Any]:
    return {
        "all": group(0.123),
        "what_digit/en": group(english),
        "what_digit/ja": group(japanese),
        "what_digit_else/en": group(0.0),
        "odd_even/en": group(0.5),
    }


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which the shipped configuration's run has been evaluated."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_bytes((ROOT / "config/config.yaml").read_bytes())
    out = tmp_path / "results/demo"
    raw = out / "demo_assets/raw"
    (raw / "images").mkdir(parents=True)
    samples = [{"id": "t"}, {"image": ["images/1.jpg", "images/2.jpg"]}, {"image": "images/3.jpg"}]
    (raw / "heldout.json").write_text(json.dumps(samples))
    evaluate(out, before=(0.1, 0.2), after_stage1=(0.5, 0.625), after_stage2=(0.99, 0.97))
    return out


def evaluate(out: Path, **accuracies: tuple[float, float]) -> None:
    found = {name: results(*pair) for name, pair in accuracies.items()}
    (out / "evaluation").mkdir(parents=True, exist_ok=True)
    (out / "evaluation/results.json").write_text(json.dumps(found))
    (out / "evaluation/table.md").write_text("| the | table |\n")


def test_the_last_line_is_the_json_that_scripts_read(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert summary.main(["--started", str(time.time() - 100)]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    answer = json.loads(last)
    assert 100 <= answer.pop("wall_s") < 110
    assert answer == {
        "accuracy_before": 0.15,
        "accuracy_stage1": 0.5625,
        "accuracy_stage2": 0.98,
        "hf_export": "results/demo/hf_export",
    }
    assert "| the | table |" in text
    (ask,) = (line for line in text if line.startswith("Ask it:"))
    assert ask.endswith(
        "-m llava_steps chat results/demo/hf_export results/demo/demo_assets/raw/images/3.jpg "
        '"What digit is this?"'
    )


def test_other_runs_and_models_that_were_not_evaluated(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text("run: mine\n")
    evaluate(run.parent / "mine", after_stage2=(1.0, 1.0))
    assert summary.main(["--configfile", "mine.yaml"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == {
        "accuracy_stage2": 1.0,
        "hf_export": "results/mine/hf_export",
    }
    assert 'results/mine/hf_export IMAGE "What' in out
    assert summary.accuracy({"all": group(0.4), "questions": group(0.4)}) is None


def test_stages_of_any_name(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(
        "run: mine\n"
        "datasets: {captions: {source: x.json}}\n"
        "stages:\n"
        "  stage1: null\n"
        "  stage2: null\n"
        "  sft: {train: all, data: captions}\n"
        "  polish: {train: projector, data: captions}\n"
    )
    evaluate(run.parent / "mine", before=(0.1, 0.1), after_polish=(1.0, 0.5), after_sft=(0.5, 0.5))
    assert summary.main(["--configfile", "mine.yaml"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert list(json.loads(last)) == [
        "accuracy_before", "accuracy_sft", "accuracy_polish", "hf_export",
    ]  # fmt: skip
    assert json.loads(last)["accuracy_polish"] == 0.75


def test_a_sweep_shows_its_comparison(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("run: mine\nsweep: {stages.stage2.lr: [1.0e-5, 2.0e-5]}\n")
    rows = [
        {
            "label": f"lr_{rate}", "settings": {"stages.stage2.lr": value}, "last_loss": 0.25,
            "scores": {"all": group(share), "odd_even/en": group(0.5)}, "best": share == 0.75,
        }
        for rate, value, share in (("1e-5", 1e-5, 0.5), ("2e-5", 2e-5, 0.75))
    ]  # fmt: skip
    out = run.parent / "mine/comparison"
    assert summary.main(["--configfile", "mine.yaml"]) == InputError.exit_code
    assert "comparison/comparison.json is missing" in capsys.readouterr().err
    out.mkdir(parents=True)
    figures = {"best": "lr_2e-5", "metric": "accuracy", "variants": rows}
    (out / "comparison.json").write_text(json.dumps(figures))
    assert summary.main(["--configfile", "mine.yaml"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {
        "best": "lr_2e-5",
        "metric": "accuracy",
        "scores": {"lr_1e-5": 0.5, "lr_2e-5": 0.75},
        "hf_export": "results/mine/lr_2e-5/hf_export",
    }
    table = [line.replace(" ", "") for line in text if line.startswith("|")]
    assert table[0] == "|variant|stage2.lr|all|odd_even/en|lastloss|"
    assert table[3] == "|lr_2e-5|2e-5|75.0%|50.0%|0.25|"
    figures["best"] = "other"
    (out / "comparison.json").write_text(json.dumps(figures))
    assert summary.main(["--configfile", "mine.yaml"]) == InputError.exit_code
    assert "not a variant" in capsys.readouterr().err
    (out / "comparison.json").write_text("{}")
    assert summary.main(["--configfile", "mine.yaml"]) == InputError.exit_code
    assert "llava-steps verify" in capsys.readouterr().err


def test_it_says_what_is_missing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "evaluation/results.json").unlink()
    assert summary.main([]) == InputError.exit_code
    out, err = capsys.readouterr()
    assert not out and "results/demo/evaluation/results.json is missing" in err
    assert "run `snakemake" in err
    Path("config/config.yaml").write_text("run: 7\n")
    assert summary.main([]) == ConfigError.exit_code
    assert "run" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["summary", "chat"])
def test_nothing_heavy_is_loaded_for_it(run: Path, module: str) -> None:
    flags = ["--help"] if module == "chat" else []
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "llava_steps", module, *flags],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "transformers", "megatron", "snakemake"}
