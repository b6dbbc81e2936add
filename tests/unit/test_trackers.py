"""Trackers: what they are told, that they go on after a restart, that they hold nothing up."""

from __future__ import annotations

import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from llava_steps.settings.stage.stage import Stage
from llava_steps.training import trackers
from llava_steps.training.trackers import Trackers


class Broken:
    """A sink that fails, or hangs, where it is told to."""

    name = "broken"

    def __init__(self, where: str, hangs: bool) -> None:
        self._where, self._hangs = where, hangs
        self.never = threading.Event()

    def _pass(self, where: str) -> None:
        if where == self._where:
            if self._hangs:
                self.never.wait()
            raise ConnectionError("no way there")

    def open(self) -> None:
        self._pass("open")

    def numbers(self, step: int, values: Any) -> None:
        self._pass("numbers")

    def answers(self, step: int, rows: Any) -> None:
        self._pass("answers")

    def close(self) -> None:
        self._pass("close")


@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("where", ["open", "numbers", "answers", "close"])
def test_a_broken_tracker_is_told_of_once_and_holds_nothing_up(
    where: str, hangs: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "PATIENCE", 0.3)
    monkeypatch.setattr(trackers, "WAITING", 20)
    sink = Broken(where, hangs)
    both = Trackers([sink], logging.getLogger("trackers"))
    for step in range(100):
        both.write({"step": step, "loss": 1.0})
        both.answers(step, [{"id": "a", "answer": "b"}])
    both.close()
    both.close()
    lost = [r for r in caplog.records if "training continues without it" in r.getMessage()]
    assert len(lost) == 1 and ("behind" in caplog.text or hangs or "no way there" in caplog.text)
    sink.never.set()


class FakeWandb:
    """A module that takes what it is told."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.finished = False

    def init(self, **settings: Any) -> FakeWandb:
        self.settings = settings
        return self

    def Settings(self, **given: Any) -> dict[str, Any]:
        return given

    def Table(self, columns: list[str], data: list[list[str]]) -> Any:
        return (columns, data)

    def log(self, row: dict[str, Any], step: int) -> None:
        self.rows.append(row | {"step": step})

    def finish(self) -> None:
        self.finished = True


def track(monkeypatch: pytest.MonkeyPatch, work: Path, **settings: Any) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    stage = Stage.model_validate({"wandb": True, "stage": 2} | settings)
    both = Trackers.of(stage, work, 0, logging.getLogger("trackers"))
    both.write({"step": 3, "loss": 1.5, "loss_hex": "0x1", "loss_by_dataset": {"talk": 2.0}})
    both.answers(3, [{"id": "a", "question": "q"}])
    both.close()
    return fake


def test_wandb_is_told_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake = track(
        monkeypatch, tmp_path, name="n", wandb_project="p", wandb_entity="e", wandb_group="g",
        wandb_tags=["t"], lang="jp", lr=0.25, slurm_job_id="9",
    )  # fmt: skip
    given = fake.settings
    assert [given[k] for k in ("project", "entity", "group", "name")] == ["p", "e", "g", "n"]
    assert given["tags"] == ["stage2", "jp", "t"] and given["mode"] == "offline"
    assert given["config"]["lr"] == 0.25 and given["config"]["slurm_job_id"] == "9"
    numbers, answers = fake.rows
    assert numbers == {"loss": 1.5, "loss/talk": 2.0, "step": 3}
    assert answers == {"answers": (["id", "question"], [["a", "q"]]), "step": 3} and fake.finished
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert track(monkeypatch, tmp_path).settings["mode"] == "disabled"


def test_a_restart_goes_on_with_the_same_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, again = (track(monkeypatch, tmp_path).settings for _ in range(2))
    assert first["id"] == again["id"] and first["resume"] == "allow"
    assert json.loads((tmp_path / trackers.RUN).read_text()) == {"id": first["id"]}
    (tmp_path / "other").mkdir()
    assert track(monkeypatch, tmp_path / "other").settings["id"] != first["id"]


def test_wandb_itself_takes_it_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    stage = Stage.model_validate({"wandb": True, "lr": 0.125})
    both = Trackers.of(stage, tmp_path, 0, logging.getLogger("trackers"))
    both.write({"step": 0, "loss": 1.5})
    both.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_tensorboard_forgets_what_is_done_again(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def write(start: int, stop: int, loss: float) -> None:
        stage = Stage.model_validate({"tensorboard": True})
        both = Trackers.of(stage, tmp_path, start, logging.getLogger("trackers"))
        for step in range(start, stop):
            both.write({"step": step, "loss": loss, "loss_by_dataset": {"talk": 1.0}})
        both.answers(stop - 1, [{"id": "a", "answer": "seven"}])
        both.close()

    write(0, 6, 0.5)
    write(0, 6, 1.0)  # stopped before its first checkpoint
    write(4, 8, 2.0)
    found = accumulators.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    values = [(event.step, event.value) for event in found.Scalars("loss")]
    assert values == [(s, 1.0) for s in range(4)] + [(s, 2.0) for s in range(4, 8)]
    assert "loss/talk" in found.Tags()["scalars"]
    assert any(name.startswith("answers/a") for name in found.Tags()["tensors"])


def test_tensorboard_is_asked_for_before_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from llava_steps.core.errors import ConfigError
    from llava_steps.launch import preflight

    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"llava-steps\[tensorboard\]"):
        preflight.check_trackers(Stage.model_validate({"tensorboard": True}))
    preflight.check_trackers(Stage())


def test_losses_are_told_apart_by_dataset() -> None:
    import torch

    from llava_steps.data.loader.batch import MicroBatch
    from llava_steps.training.batch_stats import BatchStats, by_dataset, counts

    labels = torch.tensor([[-100, 5, 5, -100, 5, 5, -100, 5, -100, -100]])
    row = MicroBatch(
        tokens=labels, labels=labels, position_ids=labels, max_seqlen=4, pixel_values=None,
        cu_seqlens=torch.tensor([0, 3, 6, 8, 10], dtype=torch.int32), num_images=2,
        sample_ids=["a", "b", "c"], keys=[], slots=[], datasets=["x", "y", "x"],
        num_supervised=5, num_tokens=8,
    )  # fmt: skip
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    found = by_dataset(losses, row, ["x", "y", "z"])
    assert found.tolist() == [19.0, 12.0, 0.0, 3, 2, 0]
    assert counts([row, row]) == [10, 16, 4, 2 * (9 + 9 + 4), 6]
    sums = BatchStats(torch.cat([torch.tensor([31.0, *counts([row])]), found]), [], ["x", "y", "z"])
    assert sums.by_dataset == {"x": 19 / 3, "y": 6.0} and sums.mean == 31 / 5
    assert (sums.images, sums.squares, sums.samples) == (2, 22, 3)


def test_speed_counts_what_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from llava_steps.geometry.costs import Trained, Work
    from llava_steps.geometry.hardware import peak_tflops
    from llava_steps.launch.job import Job
    from llava_steps.training import metrics
    from llava_steps.training.batch_stats import BatchStats

    geometry = object()
    monkeypatch.setattr(metrics.Geometry, "load", lambda path: geometry)
    asked: list[Any] = []

    def counted(*arguments: Any) -> Any:
        asked.append(arguments)
        return type("Total", (), {"total": 6e12})()

    monkeypatch.setattr(metrics, "flops", counted)
    values = torch.tensor([31.0, 5, 8, 2, 22, 3], dtype=torch.float64)

    def row(**settings: Any) -> dict[str, float]:
        stage = Stage.model_validate({"gpus": 2, "global_batch_size": 2, "stage": 1} | settings)
        job = Job(stage, tmp_path, tmp_path, tmp_path, tmp_path, tmp_path, "f")
        return metrics.Speed(job)(BatchStats(values, []), 4.0)

    told = row(peak_tflops=10.0)
    assert told["mfu"] == pytest.approx(6 / 4 / 20) and told["samples_per_s"] == 0.75
    assert told["tokens_per_s"] == 2.0
    work = Work(tokens=8, supervised=5, images=2, squares=22)
    assert asked == [(geometry, Trained(False, True, False), work, "supervised")]
    if not torch.cuda.is_available():
        assert "mfu" not in row(), "nobody knows the peak of a CPU"
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16") == 989.4
    assert peak_tflops("NVIDIA H100 PCIe", "bf16") == 756.0
    assert peak_tflops("NVIDIA H100 80GB HBM3", "fp32") == 0.0 == peak_tflops("T4", "bf16")
    assert metrics.peak_memory() > 0.01
