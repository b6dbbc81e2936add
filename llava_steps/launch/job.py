"""The job description that a launcher gives its workers: one JSON file."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from llava_steps.core import filesystem
from llava_steps.settings.stage.stage import Stage

FILE = "job.json"


@dataclass(frozen=True)
class Job:
    """One training step: its settings and paths."""

    stage: Stage
    entry: Path
    """Store entry: checkpoints and metrics go here."""
    work: Path
    """Bookkeeping: rendezvous, failure report, tracker files."""
    checkpoint: Path | None
    """Megatron checkpoint directory to start from; None: random weights."""
    hf_dir: Path
    """HF directory with config, tokenizer and processor."""
    dataset: Path
    """Energon dataset."""
    fingerprint: str
    HOW: ClassVar[str] = "how.json"

    def write(self, launcher: int = 0) -> Path:
        """Write the job for the workers of one launcher; returns the file."""
        values = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self).items()}
        path = self.work / (f"node-{launcher:04d}.json" if launcher else FILE)
        filesystem.write_json(path, values | {"stage": self.stage.model_dump()})
        return path

    def note(self, **how: object) -> None:
        """Record how the processes compute, for the manifest; the first process does it for all."""
        filesystem.write_json(self.work / self.HOW, how)

    def noted(self) -> dict[str, object]:
        """The record of `note` in the last attempt; empty if it did not get that far."""
        path = self.work / self.HOW
        notes: dict[str, object] = json.loads(path.read_bytes()) if path.exists() else {}
        return notes

    @classmethod
    def read(cls, path: Path) -> Job:
        """The job that `write` wrote."""
        values = json.loads(path.read_bytes())
        stage = Stage.model_validate(values.pop("stage"))
        fingerprint = values.pop("fingerprint")
        paths = {k: None if v is None else Path(v) for k, v in values.items()}
        return cls(stage=stage, fingerprint=fingerprint, **paths)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Failure:
    """Why a worker ended: written by the first that fails, read by the launcher."""

    rank: int
    exit_code: int
    message: str

    FILE = "failure.json"

    def write(self, work: Path) -> None:
        """Keep the first report of an attempt; later ones are consequences.

        On a full disk it is printed instead, and the exit code still shows the kind of error.
        """
        path = work / self.FILE
        if not path.exists():
            try:
                filesystem.write_json(path, asdict(self))
            except OSError:
                print(f"rank {self.rank}: {self.message}", file=sys.stderr)

    @classmethod
    def forget(cls, work: Path) -> None:
        """Remove the report of an earlier attempt."""
        (work / cls.FILE).unlink(missing_ok=True)

    @classmethod
    def read(cls, work: Path) -> Failure | None:
        """The report of this attempt, or None."""
        path = work / cls.FILE
        return cls(**json.loads(path.read_bytes())) if path.exists() else None
