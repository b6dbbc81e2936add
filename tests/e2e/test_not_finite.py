"""Losses, gradients and weights that are not finite: nothing is updated, the samples are named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llava_steps.core.config import Stage
from llava_steps.training import launch as launching
from llava_steps.training.job import Job
from tests.chain import ROOT, Chain, metrics
from tests.poisoned_worker import CASES, MICRO

STEPS = 2 * len(CASES) + 2


def train(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train beside all cases of poisoned_worker; returns the entry."""
    entry = tmp_path / "entry"
    (entry / "work/logs").mkdir(parents=True)
    stage = Stage(
        stage=2, gpus=2, precision="fp32", micro_batch_size=1, global_batch_size=2 * MICRO,
        seq_length=256, train_steps=STEPS, lr=1e-3, num_workers=0, max_rejected_steps=len(CASES),
    )  # fmt: skip
    hf, checkpoint, dataset = (p.resolve() for p in (chain.hf, chain.checkpoint, chain.dataset))
    job = Job(stage, entry, entry / "work", checkpoint, hf, dataset, "f")
    real = subprocess.Popen

    def popen(line: list[str], **kwargs: object) -> subprocess.Popen[bytes]:
        return real([sys.executable, "-m", "tests.poisoned_worker", line[-1]], **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(launching.subprocess, "Popen", popen)
    monkeypatch.chdir(ROOT)
    launching.launch(job)
    return entry


def test_a_rejected_step_changes_nothing(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = train(chain, tmp_path, monkeypatch)
    for rank in (0, 1):
        lines = (entry / f"work/verdict_{rank}.jsonl").read_text().splitlines()
        verdicts = [json.loads(line) for line in lines]
        assert [tuple(v["case"]) for v in verdicts] == CASES
        wrong = [v["case"] for v in verdicts if not v["same"]]
        assert not wrong, f"rank {rank}: weights or optimizer changed by {wrong}"
    rows = metrics(entry)
    poisoned = set(range(1, 2 * len(CASES), 2))
    assert {row["step"] for row in rows if row.get("skipped") == "not finite"} == poisoned
    assert all("loss" in row for row in rows if row["step"] not in poisoned)
    (state,) = entry.glob("iter_*/train_state.json")
    counters = json.loads(state.read_text())
    assert counters["rejected"] == len(CASES) and counters["updates"] == STEPS - len(CASES)
    assert counters["loader"]["consumed_samples"] == STEPS * 2 * MICRO
    log = (entry / "work/logs/rank-0000.log").read_text()
    named = [line for line in log.splitlines() if "samples ['train-" in line]
    assert len(named) == len(CASES)
    for line, (kind, _, _) in zip(named, CASES, strict=True):
        count = line.count("'train-")
        # A loss tells its microbatch; a gradient or weight only the global batch.
        assert count == 1 if kind.endswith("loss") else count >= MICRO, line
