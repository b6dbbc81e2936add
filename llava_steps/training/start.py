"""How a training begins: its part of the model, the checkpoint it continues from, its loader."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from llava_steps.conversion.lora import Lora
from llava_steps.core.errors import ConfigError, DivergedError
from llava_steps.data.loader.loader import TrainLoader
from llava_steps.geometry.geometry import Geometry
from llava_steps.geometry.hf_directory import read_object
from llava_steps.geometry.layout import pipeline_split
from llava_steps.launch.job import Job
from llava_steps.model import flash
from llava_steps.model.init_weights import draw_weights
from llava_steps.model.llava import Llava, build_llava
from llava_steps.model.options import ModelOptions
from llava_steps.model.weights import load_weights
from llava_steps.settings.stage.stage import Stage
from llava_steps.store import commit
from llava_steps.training import checkpoints, parallel
from llava_steps.training.forward import compiles
from llava_steps.training.guard import Counters
from llava_steps.training.optimizer import Optimizer
from llava_steps.training.share import loader_spec


def build(job: Job, log: logging.Logger) -> list[Llava]:
    """This rank's chunks of the model, with uninitialised weights, frozen as configured."""
    stage = job.stage
    geometry = Geometry.load(job.hf_dir)
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
        spec="te" if stage.transformer_engine else "local",
        fp8=stage.fp8_recipe if stage.fp8 else None,
        flash=flash.choose(stage.flash_attention, geometry.head_dim),
    )
    if dist.get_rank() == 0:
        job.note(
            device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            flash_attention=options.flash if flash.used(options.dtype) else "none",
            compiled=options.compiled,
            layer_spec=options.spec,
            fp8=options.fp8 or "none",
        )
    if torch.cuda.is_available() and stage.precision == "bf16":
        auto = stage.flash_attention == "auto"
        lacking = flash.missing_for_fa4(geometry.head_dim, "auto") if auto else ""
        log.info("flash attention: %s%s", options.flash, lacking and f"; fa4 needs {lacking}")
    if options.spec == "te" or options.fp8:
        whose = "Transformer Engine's" if options.spec == "te" else "our own"
        how = f"FP8 ({options.fp8})" if options.fp8 else "bf16"
        log.info("linears of the decoder layers: %s, %s", whose, how)
    if options.compiled:
        log.info("layers are compiled; the first step takes longer")
    elif torch.cuda.is_available():
        reason = "as configured" if stage.compile == "none" else stage.not_compiled() or "not bf16"
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
    """The configured LoRA adapters."""
    if not stage.lora_rank:
        return None
    return Lora(stage.lora_rank, stage.lora_alpha, tuple(stage.lora_targets), stage.seed)


def restore_or_start(
    job: Job, model: list[Llava], optimizer: Optimizer, log: logging.Logger
) -> tuple[Counters, TrainLoader]:
    """Load the newest checkpoint, or what to start from; open the loader there."""
    path = checkpoints.find(job.entry, log)
    continues = path is None and job.stage.load_optim
    if path is None and job.checkpoint is None:
        start_fresh(job, model, log)
        optimizer.reload_weights()
        return Counters(), TrainLoader(loader_spec(job, "train"))
    if continues:
        path = checkpoints.verified(latest(job))
    if path is None:
        load_weights(model, checkpoints.verified(latest(job)) / checkpoints.WEIGHTS)
        optimizer.reload_weights()
        log.info("starting from %s", job.checkpoint)
        return Counters(), TrainLoader(loader_spec(job, "train"))
    counters, kept = checkpoints.load(path, job.stage, model, optimizer)
    loader = TrainLoader(loader_spec(job, "train"), kept["consumed_samples"])
    loader.check_state(kept)
    if continues and counters.step >= job.stage.train_steps:
        raise ConfigError(
            f"train_steps {job.stage.train_steps}: {path} has already done {counters.step} steps; "
            "load_optim continues from there, so set train_steps higher"
        )
    log.info("resuming after step %d from %s", counters.step, path.name)
    return counters, loader


def latest(job: Job) -> Path:
    """The checkpoint to start from."""
    assert job.checkpoint is not None
    return commit.latest_commit(job.checkpoint)


def start_fresh(job: Job, model: list[Llava], log: logging.Logger) -> None:
    """Draw all weights, with the deviation of the language model's config."""
    config = read_object(job.hf_dir / "config.json")
    deviation = float(config.get("text_config", {}).get("initializer_range", 0.02))
    draw_weights(model, job.stage.seed, deviation)
    log.info("starting from random weights with deviation %g", deviation)
    names = {
        "vision tower": job.stage.freeze_vision,
        "projector": job.stage.freeze_projector,
        "language model": job.stage.freeze_lm,
    }
    if frozen := [name for name, is_frozen in names.items() if is_frozen]:
        log.warning("init: these parts are frozen and so stay random: %s", ", ".join(frozen))


def roll_back(
    job: Job, done: Counters, model: list[Llava], optimizer: Optimizer, log: logging.Logger
) -> None:
    """Weights, optimizer and generators as in the last checkpoint; schedule and stream continue.

    Raises DivergedError if nothing was saved yet.
    """
    path = checkpoints.find(job.entry, log)
    if path is None:
        raise DivergedError(
            f"step {done.step}: too many rejected steps, and no checkpoint yet to roll back to; "
            "the log names the samples; lower lr, or raise max_rejected_steps"
        )
    before, _ = checkpoints.load(path, job.stage, model, optimizer)
    done.updates, done.recent, done.rejected = before.updates, before.recent, 0
    done.rollbacks += 1
    log.error("step %d: rolled back to %s, rollback %d", done.step, path.name, done.rollbacks)
