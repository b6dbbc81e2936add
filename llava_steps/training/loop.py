"""The training loop: `train` is the story, everything else here is one of its sentences."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor

from llava_steps.core.errors import ConfigError, StepError, StoppedError
from llava_steps.data.loader.batch import MicroBatch
from llava_steps.launch.job import Job
from llava_steps.launch.stop import StopRequest
from llava_steps.launch.watchdog import Beat
from llava_steps.settings.stage.stage import Stage
from llava_steps.training import checkpoints, forward, parallel
from llava_steps.training.async_save import Commits
from llava_steps.training.batch_stats import Sums, by_dataset, counts
from llava_steps.training.guard import Guard
from llava_steps.training.lr_schedule import learning_rate
from llava_steps.training.metrics import peak_memory
from llava_steps.training.monitor import Looks, Reports
from llava_steps.training.optimizer import Optimizer, wrap
from llava_steps.training.prefetch import Ahead
from llava_steps.training.start import build, restore_or_start, roll_back


def train(job: Job, log: logging.Logger, stop: StopRequest, beat: Beat) -> None:
    """Train one stage to its end, from its last checkpoint if there is one.

    Raises DivergedError when loss or gradient were not finite more often than the settings allow
    (nothing was updated with them) and StoppedError on request, with everything saved.
    """
    stage = job.stage
    # The loader's thread plans while this one feeds the GPU: neither may wait long for the other.
    sys.setswitchinterval(SWITCH)
    model = build(job, log)
    wrapped = wrap(stage, model)
    optimizer = Optimizer(stage, wrapped)
    done, loader = restore_or_start(job, model, optimizer, log)
    if stage.save:
        checkpoints.check_space(job.entry, model, optimizer)
    guard = Guard(stage, done, log)
    looks = Looks(job, wrapped, optimizer, beat)
    names = loader.datasets if len(loader.datasets) > 1 else []
    reports = Reports(job, done.step, names, log)
    # Loader workers have a limit of their own, and name what they stand still at.
    batches = Ahead(loader, beat.busy if stage.num_workers else contextlib.nullcontext)
    commits = Commits(stage.async_save)
    first = done.step

    def save() -> None:
        began = time.monotonic()
        reports.answers(done.step - 1, looks.answers())
        with beat.busy():
            reports.sync()
            path = checkpoints.save(
                job.entry, done, stage, model, optimizer, batches.state(), commits
            )
        stop.set_aside(time.monotonic() - began)
        log.info("saved %s" if not stage.async_save else "committing %s", path.name)

    # Behind the last step the last commit and the trackers are waited for.
    with reports, commits, beat.ending():
        saved = done.step
        while done.step < stage.train_steps and not parallel.on_any_rank(stop.requested):
            began = time.monotonic()
            batch, waited = batches.next()
            if guard.skips():
                reports.no_update(done.step, "asked to skip", batch, looks.validation(done.step))
            else:
                then = batches.fetch if done.step + 1 < stage.train_steps else nothing
                sums = forward_backward(wrapped, optimizer, batch, names, beat, then)
                norm = optimizer.gradient_norm()
                if guard.accepts(sums.mean, norm, batch, sums.micro):
                    lr = learning_rate(stage, done.step)
                    # Before the update, so that nobody waits for it.
                    waited, memory = parallel.highest([waited, peak_memory()])
                    optimizer.step(lr, norm)
                    done.updates += 1
                    seconds = time.monotonic() - began
                    seen = looks.validation(done.step)
                    row = {"lr": lr, "grad_norm": norm, "memory_gib": round(memory, 3)}
                    row |= {"data_wait_s": round(waited, 4)} | seen
                    reports.update(done.step, sums, batch, seconds, row)
                else:
                    seen = looks.validation(done.step)
                    reports.no_update(done.step, guard.reason, batch, seen)
                    if guard.must_roll_back:
                        with beat.busy():
                            commits.finish()
                            roll_back(job, done, model, optimizer, log)
            done.step += 1
            beat.settled()
            stop.set_aside(time.monotonic() - began)
            due = done.step == stage.train_steps or done.step % stage.save_interval == 0
            if stage.save and due:
                save()
                saved = done.step
        if stage.save and done.step > saved:
            save()
    if done.step < stage.train_steps:
        raise stopped(done.step, first, parallel.on_any_rank(stop.signalled), stage)


def stopped(step: int, first: int, signalled: bool, stage: Stage) -> StepError:
    """Why a training that began at step `first` ended before its last one.

    A time limit that leaves no time for a single step would end every further run as well: that
    is no stop in order, or whoever runs it again on code 75 would do so for ever.
    """
    if step > first:
        kept = "saved; run me again" if stage.save else "and nothing saved, as asked for"
        return StoppedError(f"stopped on request after step {step}, {kept}")
    if signalled:
        return StoppedError(f"stopped on request before step {step + 1}; run me again")
    return ConfigError(
        f"exit_before {stage.exit_before:g} minutes were over when the first step of this run "
        "could have begun, and would be again: set it higher"
    )


SWITCH = 0.0005
"""Seconds after which a thread gives the interpreter to another."""


def forward_backward(
    wrapped: list[DistributedDataParallel],
    optimizer: Optimizer,
    batch: list[MicroBatch],
    datasets: Sequence[str],
    beat: Callable[[], None],
    meanwhile: Callable[[], None],
) -> Sums:
    """Gradients of the token mean over the global batch, left in the gradient buffers.

    With `datasets` the loss of each of them is told as well. There is a `beat` for each microbatch.
    `meanwhile` is called when a GPU has all its work and this process none. The pixels of `batch`
    are gone afterwards.
    """
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    config = wrapped[0].config

    def finalize(*args: Any, **kwargs: Any) -> None:
        # All work is on its way to the GPU, for which the host is about to wait. Giving back the
        # memory of pixels takes a while, and so does the next batch.
        batch[:] = [replace(m, pixel_values=None) for m in batch]
        meanwhile()
        finalize_model_grads(*args, **kwargs)

    config.finalize_model_grads_func = finalize
    waits = [chunk.no_sync for chunk in wrapped]
    config.no_sync_func = waits if len(waits) > 1 else waits[0]
    step = functools.partial(forward_step, datasets=datasets)
    losses = forward.run(step, wrapped, batch, functools.partial(beating, beat=beat))
    place = parallel.device()
    found = torch.stack(losses) if losses else torch.zeros(0, 1 + 2 * len(datasets), device=place)
    micro = found[:, 0].tolist()
    first = torch.tensor([sum(micro), *counts(batch)], dtype=torch.float64, device=place)
    own = torch.cat([first, found[:, 1:].double().sum(dim=0)])
    return Sums(parallel.total(own), micro, datasets)


def nothing() -> None:
    """Nothing to do meanwhile."""


def beating(batch: Sequence[MicroBatch], beat: Callable[[], None]) -> Iterator[MicroBatch]:
    """The microbatches, with a beat before each."""
    for item in batch:
        beat()
        yield item


def forward_step(
    batches: Iterator[MicroBatch], wrapped: Any, datasets: Sequence[str] = ()
) -> tuple[Tensor, Any]:
    """One microbatch through this chunk, in the form that Megatron's schedules ask for."""
    batch = next(batches)

    def loss_sum(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = losses.sum()
        parts = [total.detach().double()[None]]
        if datasets:
            parts.append(by_dataset(losses, batch, datasets))
        return total, forward.count(losses, losses.numel()), torch.cat(parts)

    return forward.through(batch, wrapped), loss_sum
