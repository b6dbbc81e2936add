"""The training loop: `train` is the story, everything else here is one of its sentences."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as ps
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from llava_steps.core import commit
from llava_steps.core.config import Stage
from llava_steps.core.errors import ConfigError, DivergedError, StepError, StoppedError
from llava_steps.core.geometry import Geometry
from llava_steps.core.layout import pipeline_split
from llava_steps.core.log import Progress
from llava_steps.data.batch import MicroBatch
from llava_steps.data.loader import TrainLoader
from llava_steps.model.checkpoint import load_weights
from llava_steps.model.fresh import draw_weights
from llava_steps.model.llava import Llava, build_llava
from llava_steps.model.lora import Lora
from llava_steps.model.options import ModelOptions
from llava_steps.training import parallel, state
from llava_steps.training.answers import Answers
from llava_steps.training.exchange import whole_images
from llava_steps.training.guard import Counters, Guard
from llava_steps.training.job import Job
from llava_steps.training.metrics import ANSWERS, METRICS, Lines, Speed, peak_memory
from llava_steps.training.optimizer import Optimizer, wrap
from llava_steps.training.schedule import learning_rate
from llava_steps.training.stop import StopRequest
from llava_steps.training.sums import Sums, by_dataset, counts
from llava_steps.training.trackers import Trackers
from llava_steps.training.validate import Validation
from llava_steps.training.watch import Beat


def train(job: Job, log: logging.Logger, stop: StopRequest, beat: Beat) -> None:
    """Train one stage to its end, from its last checkpoint if there is one.

    Raises DivergedError when loss or gradient were not finite more often than the settings allow
    (nothing was updated with them) and StoppedError on request, with everything saved.
    """
    stage = job.stage
    # The loader's thread plans while this one feeds the GPU: neither may wait long for the other.
    sys.setswitchinterval(SWITCH)
    stop.limit(stage.exit_before)
    model = build(job, log)
    wrapped = wrap(stage, model)
    optimizer = Optimizer(stage, wrapped)
    done, loader = restore_or_start(job, model, optimizer, log)
    if stage.save:
        state.check_space(job.entry, model, optimizer)
    guard = Guard(stage, done, log)
    looks = Looks(job, wrapped, optimizer, beat)
    names = loader.datasets if len(loader.datasets) > 1 else []
    reports = Reports(job, done.step, names, log)
    batches = iter(loader)
    first = done.step

    def save() -> None:
        began = time.monotonic()
        reports.answers(done.step - 1, looks.answers())
        with beat.busy():
            reports.sync()
            path = state.save(job.entry, done, stage, model, optimizer, loader.state())
        stop.set_aside(time.monotonic() - began)
        log.info("saved %s", path.name)

    with reports:
        saved = done.step
        while done.step < stage.train_steps and not parallel.on_any_rank(stop.requested):
            began = time.monotonic()
            # Loader workers have a limit of their own, and name what they stand still at.
            with beat.busy() if stage.num_workers else contextlib.nullcontext():
                batch = next(batches)
            waited = time.monotonic() - began
            if guard.skips():
                reports.no_update(done.step, "asked to skip", batch, looks.validation(done.step))
            else:
                sums = forward_backward(wrapped, optimizer, batch, names, beat)
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
ROW = 128
"""Rows of compiled layers are multiples of this, as the tiles of matrix products are."""


def build(job: Job, log: logging.Logger) -> list[Llava]:
    """This rank's chunks of the model, with uninitialised weights, frozen as the stage says."""
    stage = job.stage
    geometry = Geometry.from_hf(json.loads((job.hf_dir / "config.json").read_bytes()))
    options = ModelOptions(
        precision=stage.precision,
        tp=stage.tensor_model_parallel,
        pp=stage.pipeline_model_parallel,
        vp=stage.virtual_pipeline,
        split=pipeline_split(geometry, stage),
        sequence_parallel=stage.sequence_parallel,
        freeze_vision=stage.freeze_vision,
        freeze_projector=stage.freeze_projector,
        freeze_lm=bool(stage.freeze_lm),
        recompute=stage.recompute,
        lora=adapters(stage),
        compiled=compiles(stage),
    )
    if options.compiled:
        log.info("layers are compiled; the first step takes longer")
    elif torch.cuda.is_available():
        reason = "as asked" if stage.compile == "none" else stage.not_compiled() or "not bf16"
        log.info("layers are not compiled (%s)", reason)
    return [
        build_llava(
            geometry,
            replace(
                options,
                chunk=chunk,
                pre_process=parallel.is_first_stage() and chunk == 0,
                post_process=parallel.is_last_stage() and chunk == options.vp - 1,
            ),
        )
        for chunk in range(options.vp)
    ]


def adapters(stage: Stage) -> Lora | None:
    """The LoRA adapters that the stage asks for."""
    if not stage.lora_rank:
        return None
    return Lora(stage.lora_rank, stage.lora_alpha, tuple(stage.lora_targets), stage.seed)


def compiles(stage: Stage) -> bool:
    """Whether this training compiles its layers."""
    if stage.compile != "auto":
        return stage.compile == "layers"
    return torch.cuda.is_available() and stage.precision == "bf16" and not stage.not_compiled()


def row_multiple(stage: Stage) -> int:
    """What the length of every row is a multiple of."""
    if compiles(stage):
        return ROW
    return stage.tensor_model_parallel if stage.sequence_parallel else 1


def restore_or_start(
    job: Job, model: list[Llava], optimizer: Optimizer, log: logging.Logger
) -> tuple[Counters, TrainLoader]:
    """Load the newest checkpoint, or what to start from; open the loader there."""
    found = state.find(job.entry, log)
    goes_on = found is None and job.stage.load_optim
    if found is None and job.checkpoint is None:
        start_fresh(job, model, log)
        optimizer.reload_weights()
        return Counters(), open_loader(job, 0)
    if goes_on:
        found = state.verified(latest(job))
    if found is None:
        load_weights(model, state.verified(latest(job)) / state.WEIGHTS)
        optimizer.reload_weights()
        log.info("starting from %s", job.checkpoint)
        return Counters(), open_loader(job, 0)
    counters, kept = state.load(found, job.stage, model, optimizer)
    loader = open_loader(job, kept["consumed_samples"])
    loader.check_state(kept)
    if goes_on and counters.step >= job.stage.train_steps:
        raise ConfigError(
            f"train_steps {job.stage.train_steps}: {found} has done {counters.step} steps already; "
            "load_optim goes on from there, so set train_steps higher"
        )
    log.info("resuming after step %d from %s", counters.step, found.name)
    return counters, loader


def latest(job: Job) -> Path:
    """The checkpoint to start from."""
    assert job.checkpoint is not None
    return commit.latest_commit(job.checkpoint)


def start_fresh(job: Job, model: list[Llava], log: logging.Logger) -> None:
    """Draw all weights, with the deviation that the language model's config names."""
    config = json.loads((job.hf_dir / "config.json").read_bytes())
    deviation = float(config.get("text_config", {}).get("initializer_range", 0.02))
    draw_weights(model, job.stage.seed, deviation)
    log.info("starting from weights drawn anew with deviation %g", deviation)
    names = {
        "vision tower": job.stage.freeze_vision,
        "projector": job.stage.freeze_projector,
        "language model": job.stage.freeze_lm,
    }
    if frozen := [name for name, is_frozen in names.items() if is_frozen]:
        log.warning("init: frozen and therefore random to the end: %s", ", ".join(frozen))


def roll_back(
    job: Job, done: Counters, model: list[Llava], optimizer: Optimizer, log: logging.Logger
) -> None:
    """Weights, optimizer and generators as in the last checkpoint; schedule and stream go on.

    Raises DivergedError when nothing was saved yet.
    """
    found = state.find(job.entry, log)
    if found is None:
        raise DivergedError(
            f"step {done.step}: too many rejected steps, and no checkpoint yet to roll back to; "
            "the log names the samples"
        )
    before, _ = state.load(found, job.stage, model, optimizer)
    done.updates, done.recent, done.rejected = before.updates, before.recent, 0
    done.rollbacks += 1
    log.error("step %d: rolled back to %s, rollback %d", done.step, found.name, done.rollbacks)


def open_loader(job: Job, consumed: int) -> TrainLoader:
    """This rank's loader, `consumed` samples into the stream."""
    stage = job.stage
    return TrainLoader(
        job.dataset,
        "train",
        job.hf_dir,
        stage.seq_length,
        stage.global_batch_size,
        stage.micro_batch_size,
        ps.get_data_parallel_rank(),
        ps.get_data_parallel_world_size(),
        stage.seed,
        stage.num_workers,
        consumed,
        need_pixels=parallel.is_first_stage(),
        image_part=ps.get_tensor_model_parallel_rank(),
        image_parts=stage.tensor_model_parallel,
        pad_to_multiple=row_multiple(stage),
        equal_lengths=stage.pipeline_model_parallel > 1,
        rows_multiple=stage.pipeline_model_parallel if stage.virtual_pipeline > 1 else 1,
        packing=stage.packing,
        pack_length=stage.pack_length,
        pad_to=stage.pad_to,
        patience=stage.loader_timeout,
        scratch=Path(tempfile.gettempdir()),  # the launcher's
        truncate=stage.too_long == "truncate",
    )


class Looks:
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
        # Replicas look at shares of their own: no weights may have to be fetched on the way.
        self._optimizer.settle()
        return self._validation(self._wrapped, self._beat)

    def answers(self) -> list[dict[str, str]]:
        """Sample answers of the model as it is; nothing unless asked for."""
        if not self._answers:
            return []
        self._optimizer.settle()
        return self._answers(self._wrapped, self._beat)


def forward_backward(
    wrapped: list[DistributedDataParallel],
    optimizer: Optimizer,
    batch: list[MicroBatch],
    datasets: Sequence[str],
    beat: Callable[[], None],
) -> Sums:
    """Gradients of the token mean over the global batch, left in the gradient buffers.

    With `datasets` the loss of each of them is told as well. There is a `beat` for each microbatch.
    The pixels of `batch` are gone afterwards.
    """
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    config, several = wrapped[0].config, len(wrapped) > 1
    config.finalize_model_grads_func = finalize_model_grads
    waits = [chunk.no_sync for chunk in wrapped]
    config.no_sync_func = waits if several else waits[0]
    streams = [beating(batch, beat) for _ in wrapped]
    losses = get_forward_backward_func()(
        forward_step_func=functools.partial(forward_step, datasets=datasets),
        data_iterator=streams if several else streams[0],
        model=wrapped,
        num_microbatches=len(batch),
        seq_length=batch[0].tokens.shape[1],
        micro_batch_size=1,
        forward_only=False,
    )
    # Giving back their memory takes a while, in which the GPU has still work to do.
    batch[:] = [replace(m, pixel_values=None) for m in batch]
    place = parallel.device()
    found = torch.stack(losses) if losses else torch.zeros(0, 1 + 2 * len(datasets), device=place)
    micro = found[:, 0].tolist()
    first = torch.tensor([sum(micro), *counts(batch)], dtype=torch.float64, device=place)
    own = torch.cat([first, found[:, 1:].double().sum(dim=0)])
    return Sums(parallel.total(own), micro, datasets)


def beating(batch: list[MicroBatch], beat: Callable[[], None]) -> Iterator[MicroBatch]:
    """The microbatches, with a beat before each."""
    for item in batch:
        beat()
        yield item


def forward_step(
    batches: Iterator[MicroBatch], wrapped: Any, datasets: Sequence[str] = ()
) -> tuple[Tensor, Any]:
    """One microbatch through this chunk, in the form that Megatron's schedules ask for."""
    batch = next(batches)
    images = whole_images(batch) if unwrap_model(wrapped).pre_process else None
    output = wrapped(
        batch.tokens,
        batch.position_ids,
        batch.cu_seqlens,
        batch.max_seqlen,
        images,
        batch.labels,
    )

    def loss_sum(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = losses.sum()
        # Filled on the device: a number from the host would wait for all work before it.
        count = torch.full((), losses.numel(), dtype=torch.int, device=losses.device)
        parts = [total.detach().double()[None]]
        if datasets:
            parts.append(by_dataset(losses, batch, datasets))
        return total, count, torch.cat(parts)

    return output, loss_sum


def sample_line(step: int, batch: list[MicroBatch]) -> dict[str, Any]:
    """Which samples this rank trained on, and their places in the global batch."""
    return {
        "step": step,
        "ids": [m.sample_ids for m in batch],
        "places": [m.places for m in batch],
    }


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
        for part in (self._samples, self._metrics, self._answers, self._trackers):
            if part:
                part.close()

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
        if self._metrics and self._progress:
            self._metrics.write({"step": step, "skipped": reason} | seen)
            self._progress.advance(1, due=(step + 1) % self._interval == 0)

    def update(
        self, step: int, sums: Sums, batch: list[MicroBatch], seconds: float, more: dict[str, float]
    ) -> None:
        """Report one finished optimizer step, counted from 0; `more` goes into its line too."""
        if self._samples:
            self._samples.write(sample_line(step, batch))
        if not (self._metrics and self._trackers and self._progress and self._speed):
            return
        row = {"step": step, "loss": sums.mean, "loss_hex": sums.mean.hex()}
        row |= self._speed(sums, seconds) | more
        if self._datasets:
            row["loss_by_dataset"] = sums.by_dataset
        self._metrics.write(row)
        self._trackers.write(row)
        due = (step + 1) % self._interval == 0
        note = ""
        if due:
            note = f"loss {sums.mean:.4f}, lr {row['lr']:.2e}, {row['tokens_per_s']:.0f} tokens/s"
            note += f", MFU {row['mfu']:.1%}" if "mfu" in row else ""
        if "val_loss" in row:
            note += f", val loss {row['val_loss']:.4f}, accuracy {row['val_accuracy']:.3f}"
            note, due = note.removeprefix(", "), True
        self._progress.advance(1, note, due)
