"""The demo as it is shipped: what it is asked about scans that training never saw, it answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava_steps.demo import questions
from tests.helpers.chain import ROOT, environment
from tests.helpers.patience import PATIENCE

LEAST = dict.fromkeys(questions.ABOUT_ONE_SCAN, 0.9) | {
    questions.TWO_SCANS: 0.85,
    questions.TEXT_ONLY: 1.0,
}


@pytest.mark.slow
def test_every_kind_of_question_is_learned(tmp_path: Path) -> None:
    """Two images as well: neither the untrained projector nor a guess reaches these scores."""
    for name in ("workflow", "config"):
        shutil.copytree(ROOT / name, tmp_path / name)
    os.symlink(ROOT / "llava_steps", tmp_path / "llava_steps")
    ran = subprocess.run(
        [sys.executable, "-m", "snakemake", "evaluation", "--cores", "2"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=2 * PATIENCE,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    results = json.loads((tmp_path / "results/demo/evaluation/results.json").read_text())
    after = results["after_stage2"]
    scores = {
        f"{kind}/{lang}": after[f"{kind}/{lang}"]["accuracy"]
        for kind in LEAST
        for lang in questions.LANGS
    }
    low = {name: score for name, score in scores.items() if score < LEAST[name.partition("/")[0]]}
    assert not low, scores
    for lang in questions.LANGS:
        assert results["before"][f"{questions.TWO_SCANS}/{lang}"]["accuracy"] < 0.7
