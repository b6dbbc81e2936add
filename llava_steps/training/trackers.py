"""Weights & Biases and TensorBoard: copies of metrics.jsonl.

Each has a separate thread, so that one that fails, hangs or waits for a network never delays
training: the failure is logged once, then it is no longer used. The API key comes from the
environment and is never written.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llava_steps.core import filesystem
from llava_steps.settings.stage.stage import Stage

PATIENCE = 60.0
"""Seconds that a tracker has to finish."""
WAITING = 10_000
"""Messages that may wait for a tracker."""
RUN = "wandb.json"
"""File in the entry's work directory with the W&B id of this training."""


class Sink(Protocol):
    """One tracker; any of these may raise or hang."""

    name: str

    def open(self) -> None:
        """Begin, or resume after a restart."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step."""

    def answers(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        """Questions and answers of a step."""

    def close(self) -> None:
        """End."""


class Wandb:
    """A W&B run, the same one after a restart; offline by default."""

    name = "W&B"

    def __init__(self, stage: Stage, work: Path, settings: Mapping[str, Any]) -> None:
        self._stage, self._work, self._settings = stage, work, settings
        self._run: Any = None

    def open(self) -> None:
        import wandb

        stage = self._stage
        self._run = wandb.init(
            project=stage.wandb_project,
            entity=stage.wandb_entity or None,
            name=stage.name or None,
            group=stage.wandb_group or None,
            tags=[f"stage{stage.stage}", *([stage.lang] if stage.lang else []), *stage.wandb_tags],
            id=self._id(),
            resume="allow",
            dir=str(self._work),
            mode=os.environ.get("WANDB_MODE") or stage.wandb_mode,  # type: ignore[arg-type]
            config=dict(self._settings),
            settings=wandb.Settings(console="off", save_code=False, disable_git=True),
        )

    def _id(self) -> str:
        """The id of this training: made once, kept beside its logs."""
        path = self._work / RUN
        if not path.exists():
            filesystem.write_json(path, {"id": uuid.uuid4().hex[:12]})
        return str(json.loads(path.read_bytes())["id"])

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def answers(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        import wandb

        columns = list(rows[0])
        data = [[row[column] for column in columns] for row in rows]
        self._run.log({"answers": wandb.Table(columns=columns, data=data)}, step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files in the entry's work directory; a resumed training purges repeated steps."""

    name = "TensorBoard"

    def __init__(self, work: Path, start: int, settings: Mapping[str, Any]) -> None:
        self._place, self._start, self._settings = work / "tensorboard", start, settings
        self._writer: Any = None

    def open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._place), purge_step=self._start)
        text = "".join(f"    {key}: {value}\n" for key, value in self._settings.items())
        self._writer.add_text("settings", text, self._start)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def answers(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        for row in rows:
            text = "".join(f"    {key}: {value}\n" for key, value in row.items())
            self._writer.add_text(f"answers/{row['id']}", text, step)

    def close(self) -> None:
        self._writer.close()


class _SinkThread(threading.Thread):
    """A sink in a separate thread; its errors stay there."""

    def __init__(self, sink: Sink, log: logging.Logger) -> None:
        super().__init__(name=sink.name, daemon=True)
        self._sink, self._log = sink, log
        self._queue: queue.Queue[tuple[str, tuple[Any, ...]] | None] = queue.Queue(WAITING)
        self._lost, self._lock = False, threading.Lock()
        self.start()

    def send(self, what: str, *arguments: Any) -> None:
        """Pass a message on, unless the sink is lost."""
        if self._lost:
            return
        try:
            self._queue.put_nowait((what, arguments))
        except queue.Full:
            self._lose(f"it is {WAITING} messages behind")

    def run(self) -> None:
        try:
            self._sink.open()
            while (message := self._queue.get()) is not None:
                getattr(self._sink, message[0])(*message[1])
            self._sink.close()
        except BaseException as error:
            self._lose(f"{type(error).__name__}: {error}")

    def finish(self, seconds: float) -> None:
        """Wait until everything has been passed on, but no longer than this."""
        with self._lock:  # the thread that loses the sink reports it
            if self._lost:
                return
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            self._lose(f"it is {WAITING} messages behind")
            return
        self.join(seconds)
        if self.is_alive():
            self._lose(f"it did not finish within {seconds:g} s")

    def _lose(self, why: str) -> None:
        with self._lock:
            if not self._lost:
                self._lost = True
                self._log.error("%s: %s; training continues without it", self._sink.name, why)


class Trackers:
    """All configured trackers."""

    def __init__(self, sinks: Sequence[Sink], log: logging.Logger) -> None:
        self._sinks = [_SinkThread(sink, log) for sink in sinks]

    @classmethod
    def of(cls, stage: Stage, work: Path, start: int, log: logging.Logger) -> Trackers:
        """For a training that is at step `start`."""
        job = stage.slurm_job_id or os.environ.get("SLURM_JOB_ID", "")
        settings = stage.model_dump() | {"slurm_job_id": job}
        sinks: list[Sink] = []
        if stage.wandb:
            sinks.append(Wandb(stage, work, settings))
        if stage.tensorboard:
            sinks.append(TensorBoard(work, start, settings))
        return cls(sinks, log)

    def write(self, row: Mapping[str, Any]) -> None:
        """Numbers of a line of metrics.jsonl; those of datasets as loss/NAME."""
        values = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        values |= {f"loss/{name}": v for name, v in row.get("loss_by_dataset", {}).items()}
        for sink in self._sinks:
            sink.send("numbers", row["step"], values)

    def answers(self, step: int, rows: Sequence[Mapping[str, str]]) -> None:
        """Questions and answers of a step."""
        for sink in self._sinks if rows else ():
            sink.send("answers", step, rows)

    def close(self) -> None:
        """End all of them, waiting no longer than `PATIENCE` for each."""
        for sink in self._sinks:
            sink.finish(PATIENCE)
