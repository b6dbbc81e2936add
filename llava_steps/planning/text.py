"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llava_steps.core.format import count, duration, size
from llava_steps.geometry.costs import parameters
from llava_steps.geometry.hardware import GIB, SET_ASIDE, Gpu
from llava_steps.pipeline.outlook import State
from llava_steps.planning.models import Model
from llava_steps.planning.stages import StagePlan, bubble, changes, microbatches_per_step

WORDS = {"done": "done ", "run": "run  ", "after": "later"}


def steps_text(states: Sequence[State]) -> list[str]:
    """A line for each step."""
    return [f"  {WORDS[s.outlook]}  {s.rule:<20} {s.why}" for s in states]


def model_text(model: Model) -> list[str]:
    """Sizes of the model by part."""
    g, p = model.geometry, parameters(model.geometry)
    language = p.embedding + p.layers + p.final_norm + p.head
    vocabulary = f"vocabulary {g.vocab:,}" + ("" if model.sure else " (estimated: no tokenizer)")
    return [
        f"Model: {p.total:,} parameters, from {model.source}",
        f"  vision tower {p.vision_read + p.vision_rest:,} ({p.vision_read:,} of them used), "
        f"projector {p.projector:,}, language model {language:,}",
        f"  {g.tokens_per_image} tokens per image, {vocabulary}",
    ]


def stage_text(title: str, plan: StagePlan, gpu: Gpu | None, efficiency: float) -> list[str]:
    """A paragraph for a stage."""
    s, m = plan.stage, plan.memory
    dp, tp, pp = s.data_parallel, s.tensor_model_parallel, s.pipeline_model_parallel
    parts = ", ".join(f"{name} {size(number)}" for name, number in m.parts().items())
    lines = [
        f"{title}: {plan.trained_parameters:,} of {plan.parameters:,} parameters trained",
        f"  {s.train_steps:,} steps of {s.global_batch_size} samples: {plan.samples:,} samples, "
        f"{count(plan.tokens)} tokens ({plan.data.tokens:.0f} per sample, {plan.data.source})",
        f"  {s.world_size} processes: tp {tp}, pp {pp}, dp {dp}; "
        f"{microbatches_per_step(s)} microbatches of at most {plan.row.tokens:,} tokens; "
        f"{s.precision}, recompute {s.recompute}",
        f"  memory per process: {size(m.total)} ({parts})",
        f"  {plan.operations.total:.3g} operations per step, "
        f"{plan.operations.total * s.train_steps:.3g} in all",
    ]
    if gpu:
        room = gpu.gib * GIB * (1 - SET_ASIDE)
        hours = plan.hours(gpu, efficiency)
        lines += [
            f"  on {s.world_size} {gpu.name}: "
            + ("fits" if plan.fits(gpu) else "does not fit")
            + f" ({size(m.total)} of {size(room)} usable); "
            f"{duration(hours * 3600)}, {hours * s.world_size:.3g} GPU-hours at {efficiency:.0%} "
            f"of the peak" + (f" and {bubble(s):.0%} pipeline bubble" if pp > 1 else "")
        ]
    return lines


def search_text(stage: Any, ranked: Sequence[tuple[float, StagePlan]], count: int) -> list[str]:
    """A table of the best layouts."""
    lines = ["  seconds per step  memory      settings"]
    for seconds, plan in ranked[:count]:
        settings = ", ".join(f"{k}: {v}" for k, v in changes(stage, plan.stage).items())
        lines.append(
            f"  {seconds:>16.3g}  {size(plan.memory.total):<10}  {settings or 'as configured'}"
        )
    return lines
