"""What a training step reports: one JSON line per step, sample ids, and W&B where wanted.

`metrics.jsonl` has a line per optimizer step; a resumed training cuts off the lines of steps that
it will do again, so the file always tells one history. `samples/dp_0000.jsonl` names the samples
that each data-parallel replica consumed.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from llava_steps.core import fsio
from llava_steps.core.config import Stage

METRICS = "metrics.jsonl"
ANSWERS = "answers.jsonl"


class Lines:
    """An append-only file of JSON lines, each with a `step`; lines from `start` on are dropped."""

    def __init__(self, path: Path, start: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                # A killed writer may leave half a line at the end; its step is done again.
                if not line.endswith(b"\n") or json.loads(line)["step"] >= start:
                    break
                kept.append(line)
        fsio.write_bytes(path, b"".join(kept))
        self._file = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """Append one line; visible to readers at once."""
        self._file.write(fsio.dump_json(row, indent=None))
        self._file.flush()

    def sync(self) -> None:
        """Put all lines on stable storage."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush, sync and close."""
        self.sync()
        self._file.close()


def _job_id(stage: Stage) -> str:
    return stage.slurm_job_id or os.environ.get("SLURM_JOB_ID", "")


class Tracker:
    """Weights & Biases, when the settings ask for it; its failures are logged, never fatal.

    Offline unless WANDB_MODE says otherwise; the same run goes on after a restart. The API key
    comes from the environment and is never written by us.
    """

    def __init__(self, stage: Stage, work: Path, fingerprint: str, log: logging.Logger) -> None:
        self._run: Any = None
        self._log = log
        if not stage.wandb:
            return
        try:
            import wandb

            self._run = wandb.init(
                project=stage.wandb_project,
                name=stage.name or None,
                id=fingerprint,
                resume="allow",
                dir=str(work),
                mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
                config=stage.model_dump() | {"slurm_job_id": _job_id(stage)},
                tags=[f"stage{stage.stage}", *([stage.lang] if stage.lang else [])],
                settings=wandb.Settings(console="off", save_code=False, disable_git=True),
            )
        except Exception as error:
            log.error("W&B did not start (%s); training goes on without it", error)

    def write(self, row: dict[str, Any]) -> None:
        """Send the numbers of one step."""
        if self._run is None:
            return
        try:
            numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
            self._run.log(numbers, step=row["step"])
        except Exception as error:
            self._log.error("W&B failed (%s); training goes on without it", error)
            self._run = None

    def close(self) -> None:
        """End the run in the tracker."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._log.error("W&B did not finish (%s)", error)
