"""Losses, gradients and weights that are not finite: nothing is updated, the samples are named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llava_steps.core.errors import DivergedError
from llava_steps.launch import launch as launching
from llava_steps.launch.job import Job
from llava_steps.settings.stage.stage import Stage
from tests.helpers.chain import ROOT, Chain, metrics
from tests.helpers.poisoned_worker import CASES, MICRO

STEPS = 2 * len(CASES) + 2


def train(
    chain: Chain, entry: Path, monkeypatch: pytest.MonkeyPatch, poisoned: str = "", **values: object
) -> Path:
    """Train beside poisoned_worker's cases, or poisoned in these steps; returns the entry."""
    (entry / "work/logs").mkdir(parents=True)
    common: dict[str, object] = {
        "stage": 2, "gpus": 2, "precision": "fp32", "micro_batch_size": 1, "num_workers": 0,
        "global_batch_size": 2 * MICRO, "seq_length": 256, "lr": 1e-3,
    }  # fmt: skip
    stage = Stage.model_validate(common | values)
    hf, checkpoint, dataset = (p.resolve() for p in (chain.hf, chain.checkpoint, chain.dataset))
    job = Job(stage, entry, entry / "work", checkpoint, hf, dataset, "f")
    real = subprocess.Popen

    def popen(line: list[str], **kwargs: object) -> subprocess.Popen[bytes]:
        return real([sys.executable, "-m", "tests.helpers.poisoned_worker", line[-1]], **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(launching.subprocess, "Popen", popen)
    monkeypatch.setenv("POISONED_STEPS", poisoned)
    monkeypatch.chdir(ROOT)
    launching.launch(job)
    return entry


def state(checkpoint: Path) -> dict[str, Any]:
    """Counters and place in the data."""
    found: dict[str, Any] = json.loads((checkpoint / "train_state.json").read_bytes())
    return found


def weights(entry: Path) -> dict[str, bytes]:
    """Bytes of the newest checkpoint's weights and optimizer."""
    newest = max(entry.glob("iter_*"))
    files = [p for part in ("weights", "optimizer") for p in newest.glob(f"{part}/*.distcp")]
    assert files
    return {path.name: path.read_bytes() for path in files}


def test_a_rejected_step_changes_nothing(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = train(
        chain, tmp_path / "entry", monkeypatch, train_steps=STEPS, spike_factor=8.0,
        max_rejected_steps=len(CASES), eval_interval=2, eval_samples=2,
    )  # fmt: skip
    for rank in (0, 1):
        lines = (entry / f"work/verdict_{rank}.jsonl").read_text().splitlines()
        verdicts = [json.loads(line) for line in lines]
        assert [tuple(v["case"]) for v in verdicts] == CASES
        wrong = [v["case"] for v in verdicts if not v["same"]]
        assert not wrong, f"rank {rank}: weights or optimizer changed by {wrong}"
    rows = metrics(entry)
    poisoned = set(range(1, 2 * len(CASES), 2))
    rejected = {row["step"]: row["skipped"] for row in rows if "skipped" in row}
    assert set(rejected) == poisoned
    for (kind, _, _), reason in zip(CASES, rejected.values(), strict=True):
        assert reason == ("spike" if kind == "100x loss" else "not finite")
    assert all("loss" in row for row in rows if row["step"] not in poisoned)
    # Each of them is looked at while its poison is there; JSON has no word for what comes of a NaN.
    for (kind, _, _), step in zip(CASES, sorted(poisoned), strict=True):
        assert (rows[step]["val_loss"] is None) == (kind == "nan weight"), rows[step]
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
        assert line.count(".tar/") == count, "an id may occur twice; tar and key do not"


def test_a_rollback_undoes_what_came_since_the_last_checkpoint(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates 10 to 13 are gone either way: rejected, rolled back, or never asked for."""
    common = {"train_steps": 18, "save_interval": 5}
    rolled = train(
        chain, tmp_path / "rolled", monkeypatch, "10,12,13", max_rejected_steps=2, **common
    )
    log = (rolled / "work/logs/rank-0000.log").read_text()
    assert "step 13: rolled back to iter_0000010, rollback 1" in log
    counters = json.loads(next(rolled.glob("iter_0000018/train_state.json")).read_text())
    assert (counters["updates"], counters["rejected"], counters["rollbacks"]) == (14, 0, 1)
    # What is only fetched ahead is not consumed: going on from a checkpoint begins with it.
    states = {s["step"]: s["loader"]["consumed_samples"] for s in map(state, rolled.glob("iter_*"))}
    assert len(states) > 1 and states == {step: step * 2 * MICRO for step in states}
    skipped = train(
        chain, tmp_path / "skipped", monkeypatch, "999", skip_train_iteration_range=["11-14"],
        **common,
    )  # fmt: skip
    assert weights(rolled) == weights(skipped)
    with pytest.raises(DivergedError, match="after 1 rollbacks of at most 1"):
        train(chain, tmp_path / "lost", monkeypatch, "6,7,8,9,10", max_rejected_steps=1, **common)
    with pytest.raises(DivergedError, match="no checkpoint yet"):
        train(chain, tmp_path / "early", monkeypatch, "1,2", max_rejected_steps=1, **common)
