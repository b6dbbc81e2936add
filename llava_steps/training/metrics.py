"""What a training step reports: one JSON line per step, sample ids, and how fast it was.

`metrics.jsonl` has a line per optimizer step; a resumed training cuts off the lines of steps that
it will do again, so the file always has one history. `samples/dp_0000.jsonl` names the samples
that each data-parallel replica consumed.
"""

from __future__ import annotations

import json
import math
import os
import resource
from pathlib import Path
from typing import Any

import torch

from llava_steps.core import filesystem
from llava_steps.geometry.costs import Trained, Work, flops
from llava_steps.geometry.geometry import Geometry
from llava_steps.geometry.hardware import peak_tflops
from llava_steps.launch.job import Job
from llava_steps.training.batch_stats import BatchStats

METRICS = "metrics.jsonl"
ANSWERS = "answers.jsonl"


class Lines:
    """An append-only file of JSON lines, each with a `step`; lines from `start` on are dropped."""

    def __init__(self, path: Path, start: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n") or _step(line) >= start:
                    break
                kept.append(line)
        filesystem.write_bytes(path, b"".join(kept))
        # Unbuffered: bytes that a full disk refused must not be written again at closing.
        self._path, self._file = path, path.open("ab", buffering=0)

    def write(self, row: dict[str, Any]) -> None:
        """Append one line; visible to readers at once."""
        rest = memoryview(filesystem.dump_json(row, indent=None).encode())
        with filesystem.named(self._path):
            while rest:  # a disk that is nearly full takes a part of it
                rest = rest[self._file.write(rest) :]

    def sync(self) -> None:
        """Put all lines on stable storage."""
        with filesystem.named(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        try:
            self.sync()
        finally:
            self._file.close()


def _step(line: bytes) -> float:
    """The step of a line. A line that a killed writer or a lost machine left damaged counts as
    later than every finished step.
    """
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf


class Speed:
    """Rates of a step, and the share of the hardware's peak that the model makes use of (MFU).

    The operations are those of geometry/costs.py: frozen parts are counted for what they do,
    padding and recomputation are not.
    """

    def __init__(self, job: Job) -> None:
        stage = job.stage
        self._geometry, self._trained = Geometry.load(job.hf_dir), Trained.by(stage)
        peak = stage.peak_tflops
        if not peak and torch.cuda.is_available():
            peak = peak_tflops(torch.cuda.get_device_name(), stage.precision)
        self._peak = peak * 1e12 * stage.world_size

    def __call__(self, stats: BatchStats, seconds: float) -> dict[str, float]:
        """The rates of a step that took `seconds`, waiting for data included."""
        row = {
            "supervised_tokens": int(stats.supervised),
            "tokens": int(stats.tokens),
            "tokens_per_s": round(stats.tokens / seconds, 1),
            "samples_per_s": round(stats.samples / seconds, 2),
            "step_s": round(seconds, 4),
        }
        if self._peak:
            work = Work(
                int(stats.tokens), int(stats.supervised), int(stats.images), int(stats.squares)
            )
            total = flops(self._geometry, self._trained, work, "supervised").total
            row["mfu"] = round(total / seconds / self._peak, 5)
        return row


def peak_memory() -> float:
    """Peak memory of this process in GiB, on its GPU or, without one, in all."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
