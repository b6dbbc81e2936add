"""The training loop: `train` is the order of events, `Training` holds the parts."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator

from llava_steps.core.errors import ConfigError, StepError, StoppedError
from llava_steps.data.loader.batch import MicroBatch
from llava_steps.launch.job import Job
from llava_steps.launch.stop import StopRequest
from llava_steps.launch.watchdog import Beat
from llava_steps.settings.stage.stage import Stage
from llava_steps.training import checkpoints, parallel
from llava_steps.training.async_save import Commits
from llava_steps.training.batch_stats import BatchStats
from llava_steps.training.gradients import forward_backward
from llava_steps.training.guard import Guard
from llava_steps.training.lr_schedule import learning_rate
from llava_steps.training.metrics import peak_memory
from llava_steps.training.monitor import Evaluations, Reports
from llava_steps.training.optimizer import Optimizer, wrap
from llava_steps.training.prefetch import Prefetch
from llava_steps.training.start import build, restore_or_start, roll_back

SWITCH = 0.0005
"""Seconds after which a thread yields the interpreter to another."""


def train(job: Job, log: logging.Logger, stop: StopRequest, beat: Beat) -> None:
    """Train one stage to its end, from its last checkpoint if there is one.

    Raises DivergedError when loss or gradient were not finite more often than the settings allow
    (nothing was updated with them) and StoppedError on request, with everything saved.
    """
    stage = job.stage
    # The loader's thread plans while this one feeds the GPU: neither may wait long for the other.
    sys.setswitchinterval(SWITCH)
    training = Training(job, log, beat)
    done = training.done
    first = saved = done.step
    with training.finishing():
        while done.step < stage.train_steps and not parallel.on_any_rank(stop.requested):
            began = time.monotonic()
            training.step()
            beat.settled()
            stop.set_aside(time.monotonic() - began)
            due = done.step == stage.train_steps or done.step % stage.save_interval == 0
            if stage.save and due:
                stop.set_aside(training.save())
                saved = done.step
        if stage.save and done.step > saved:
            stop.set_aside(training.save())
    if done.step < stage.train_steps:
        raise stopped(done.step, first, parallel.on_any_rank(stop.signalled), stage)


class Training:
    """The parts of a training; `done` counts what has been trained."""

    def __init__(self, job: Job, log: logging.Logger, beat: Beat) -> None:
        stage = job.stage
        self._job, self._stage, self._log, self._beat = job, stage, log, beat
        self._model = build(job, log)
        self._wrapped = wrap(stage, self._model)
        self._optimizer = Optimizer(stage, self._wrapped)
        self.done, loader = restore_or_start(job, self._model, self._optimizer, log)
        if stage.save:
            checkpoints.check_space(job.entry, self._model, self._optimizer)
        self._guard = Guard(stage, self.done, log)
        self._evaluations = Evaluations(job, self._wrapped, self._optimizer, beat)
        self._datasets = loader.datasets if len(loader.datasets) > 1 else []
        self._reports = Reports(job, self.done.step, self._datasets, log)
        # Loader workers have a separate limit, whose error names the sample.
        busy = beat.busy if stage.num_workers else contextlib.nullcontext
        self._batches = Prefetch(loader, busy)
        self._commits = Commits(stage.async_save)

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Afterwards the last commit and the trackers are waited for."""
        with self._reports, self._commits, self._beat.ending():
            yield

    def step(self) -> None:
        """Train on the next global batch, unless the settings skip it or the guard rejects it."""
        began = time.monotonic()
        batch, waited = self._batches.next()
        if self._guard.skips():
            self._report_no_update("asked to skip", batch)
        else:
            stats = self._forward_backward(batch)
            norm = self._optimizer.gradient_norm()
            if self._guard.accepts(stats.mean, norm, batch, stats.micro):
                self._update(batch, stats, norm, waited, began)
            else:
                self._report_no_update(self._guard.reason, batch)
                self._roll_back_if_needed()
        self.done.step += 1

    def _forward_backward(self, batch: list[MicroBatch]) -> BatchStats:
        more = self.done.step + 1 < self._stage.train_steps
        return forward_backward(
            self._wrapped,
            self._optimizer,
            batch,
            self._datasets,
            self._beat,
            self._batches.fetch if more else nothing,
        )

    def _update(
        self, batch: list[MicroBatch], stats: BatchStats, norm: float, waited: float, began: float
    ) -> None:
        step = self.done.step
        lr = learning_rate(self._stage, step)
        # Before the update, so that no rank waits for it.
        waited, memory = parallel.highest([waited, peak_memory()])
        self._optimizer.step(lr, norm)
        self.done.updates += 1
        seconds = time.monotonic() - began
        figures = self._evaluations.validation(step)
        line = {"lr": lr, "grad_norm": norm, "memory_gib": round(memory, 3)}
        line |= {"data_wait_s": round(waited, 4)} | figures
        self._reports.update(step, stats, batch, seconds, line)

    def _report_no_update(self, reason: str, batch: list[MicroBatch]) -> None:
        figures = self._evaluations.validation(self.done.step)
        self._reports.no_update(self.done.step, reason, batch, figures)

    def _roll_back_if_needed(self) -> None:
        if self._guard.must_roll_back:
            with self._beat.busy():
                self._commits.finish()
                roll_back(self._job, self.done, self._model, self._optimizer, self._log)

    def save(self) -> float:
        """Save a checkpoint; returns the seconds that the training stood still for it."""
        began = time.monotonic()
        self._reports.answers(self.done.step - 1, self._evaluations.answers())
        with self._beat.busy():
            self._reports.sync()
            path = checkpoints.save(
                self._job.entry,
                self.done,
                self._stage,
                self._model,
                self._optimizer,
                self._batches.state(),
                self._commits,
            )
        seconds = time.monotonic() - began
        self._log.info("saved %s" if not self._stage.async_save else "committing %s", path.name)
        return seconds


def nothing() -> None:
    """Nothing to do meanwhile."""


def stopped(step: int, first: int, signalled: bool, stage: Stage) -> StepError:
    """Why a training that began at step `first` ended before its last one.

    A time limit that leaves no time for a single step would end every further run as well. That is
    not a stop in order, or a caller that runs it again on code 75 would do so for ever.
    """
    if step > first:
        kept = "saved; run again" if stage.save else "and nothing saved, as configured"
        return StoppedError(f"stopped on request after step {step}, {kept}")
    if signalled:
        return StoppedError(f"stopped on request before step {step + 1}; run again")
    return ConfigError(
        f"exit_before: {stage.exit_before:g} minutes passed before the first step of this run "
        "could begin, and would again; raise it"
    )
