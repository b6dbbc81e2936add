"""What a training reports while it runs: metrics, samples, answers, progress, validation."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state as ps

from llava_steps.core.log import Progress
from llava_steps.data.loader.batch import MicroBatch
from llava_steps.launch.job import Job
from llava_steps.launch.watchdog import Beat
from llava_steps.training import parallel
from llava_steps.training.answers import Answers
from llava_steps.training.batch_stats import BatchStats
from llava_steps.training.metrics import ANSWERS, METRICS, Lines, Speed
from llava_steps.training.optimizer import Optimizer
from llava_steps.training.trackers import Trackers
from llava_steps.training.validation import Validation


class Evaluations:
    """Validation and sample answers, at the steps that the settings name; collective calls."""

    def __init__(self, job: Job, wrapped: Any, optimizer: Optimizer, beat: Beat) -> None:
        self._stage, self._wrapped, self._beat = job.stage, wrapped, beat
        self._optimizer = optimizer
        self._validation = Validation(job) if job.stage.eval_interval else None
        self._answers = Answers(job) if job.stage.eval_answers else None

    def validation(self, step: int) -> dict[str, float]:
        """The figures after step `step`, counted from 0; nothing when it is not due."""
        number, interval = step + 1, self._stage.eval_interval
        if not self._validation or (number % interval and number < self._stage.train_steps):
            return {}
        # Each replica validates its own share: no weights may have to be fetched on the way.
        self._optimizer.settle()
        return self._validation(self._wrapped, self._beat)

    def answers(self) -> list[dict[str, str]]:
        """Sample answers of the model as it is; nothing unless asked for."""
        if not self._answers:
            return []
        self._optimizer.settle()
        return self._answers(self._wrapped, self._beat)


def sample_line(step: int, batch: list[MicroBatch]) -> dict[str, Any]:
    """Which samples this rank trained on, and their slots in the global batch."""
    return {
        "step": step,
        "ids": [m.sample_ids for m in batch],
        "places": [m.slots for m in batch],
    }


def finite(row: Mapping[str, float]) -> dict[str, float | None]:
    """The value as JSON allows it: None when it is not finite."""
    return {key: value if math.isfinite(value) else None for key, value in row.items()}


class Reports:
    """Metrics, sample ids, tracker and progress of a training; a context manager."""

    def __init__(self, job: Job, start: int, datasets: Sequence[str], log: logging.Logger) -> None:
        stage = job.stage
        self._datasets = datasets
        self._interval = stage.log_interval
        self._lead = dist.get_rank() == 0
        self._samples = self._metrics = self._answers = None
        self._trackers = self._progress = self._speed = None
        if parallel.is_model_lead():
            name = f"dp_{ps.get_data_parallel_rank():04d}.jsonl"
            self._samples = Lines(job.entry / "samples" / name, start)
        if self._lead:
            self._metrics = Lines(job.entry / METRICS, start)
            if stage.eval_answers or (job.entry / ANSWERS).exists():
                self._answers = Lines(job.entry / ANSWERS, start)
            self._trackers = Trackers.of(stage, job.work, start, log)
            self._speed = Speed(job)
            self._progress = Progress(log, f"stage {stage.stage}", stage.train_steps, start)

    def __enter__(self) -> Reports:
        if self._progress:
            self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._progress:
            self._progress.__exit__(*error)
        with contextlib.ExitStack() as stack:  # each is closed, whatever becomes of the others
            for part in (self._trackers, self._answers, self._metrics, self._samples):
                if part:
                    stack.callback(part.close)

    def sync(self) -> None:
        """Have all lines on stable storage before a checkpoint says that their steps are done."""
        for lines in (self._samples, self._metrics, self._answers):
            if lines:
                lines.sync()

    def answers(self, step: int, rows: list[dict[str, str]]) -> None:
        """Report answers to the sample questions."""
        if self._answers and rows:
            self._answers.write({"step": step, "answers": rows})
        if self._trackers:
            self._trackers.answers(step, rows)

    def no_update(
        self, step: int, reason: str, batch: list[MicroBatch], seen: dict[str, float]
    ) -> None:
        """Report a step that left the weights as they were, and what validation saw after it."""
        if self._samples:
            self._samples.write(sample_line(step, batch))
        if self._metrics and self._trackers and self._progress:
            row: dict[str, Any] = {"step": step, "skipped": reason, **finite(seen)}
            self._metrics.write(row)
            if seen:
                self._trackers.write(row)
            self._advance(step, f"skipped: {reason}", seen)

    def update(
        self,
        step: int,
        stats: BatchStats,
        batch: list[MicroBatch],
        seconds: float,
        more: dict[str, float],
    ) -> None:
        """Report one finished optimizer step, counted from 0; `more` goes into its line too."""
        if self._samples:
            self._samples.write(sample_line(step, batch))
        if not (self._metrics and self._trackers and self._progress and self._speed):
            return
        row: dict[str, Any] = {"step": step, "loss": stats.mean, "loss_hex": stats.mean.hex()}
        row |= self._speed(stats, seconds) | finite(more)
        if self._datasets:
            row["loss_by_dataset"] = stats.by_dataset
        self._metrics.write(row)
        self._trackers.write(row)
        note = f"loss {stats.mean:.4f}, lr {row['lr']:.2e}, {row['tokens_per_s']:.0f} tokens/s"
        note += f", MFU {row['mfu']:.1%}" if "mfu" in row else ""
        self._advance(step, note, more)

    def _advance(self, step: int, note: str, seen: Mapping[str, float]) -> None:
        """One step more on the progress line: its note where one is due, and what was validated."""
        assert self._progress
        due = (step + 1) % self._interval == 0
        notes = [note] if due else []
        if "val_loss" in seen:
            notes += [f"val loss {seen['val_loss']:.4f}, accuracy {seen['val_accuracy']:.3f}"]
        self._progress.advance(1, ", ".join(notes), due or "val_loss" in seen)
