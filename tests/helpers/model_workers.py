"""What the ranks of the model tests do. Run through tests.helpers.dist_helpers.spawn."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers.models.auto.modeling_auto
import transformers.models.clip.modeling_clip  # noqa: F401 - before the fork, not in each rank
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from llava_steps.conversion.lora import Lora
from llava_steps.core.errors import IntegrityError
from llava_steps.geometry.geometry import Geometry
from llava_steps.model.llava import build_llava
from llava_steps.model.options import ModelOptions
from llava_steps.model.weights import load_weights, save_weights
from tests.helpers.dist_helpers import model_parallel
from tests.helpers.model_fixtures import Batch


@dataclass(frozen=True)
class Layout:
    """One way to cut the model."""

    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    precision: str = "fp32"

    def __str__(self) -> str:
        extra = "sp" * self.sequence_parallel + self.recompute.replace("none", "")
        return f"tp{self.tp}pp{self.pp}{extra}{self.precision}"


@dataclass(frozen=True)
class Job:
    """One model in one layout. Results go below `out`: `grads` and `weights` checkpoints."""

    hf: Path
    weights: Path
    layout: Layout
    freeze_vision: bool
    batches: tuple[Batch, ...]
    out: Path
    freeze_lm: bool = False
    lora: Lora | None = None


def build(job: Job) -> Any:
    """The rank's chunk with the job's weights loaded."""

    layout = job.layout
    model = build_llava(
        Geometry.load(job.hf),
        ModelOptions(
            precision=layout.precision,  # type: ignore[arg-type]
            tp=layout.tp,
            pp=layout.pp,
            sequence_parallel=layout.sequence_parallel,
            freeze_vision=job.freeze_vision,
            freeze_lm=job.freeze_lm,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            recompute=layout.recompute,  # type: ignore[arg-type]
            lora=job.lora,
        ),
    )
    load_weights(model, job.weights)
    return model.train()


def run_schedule(model: Any, batches: tuple[Batch, ...], with_labels: bool) -> list[Tensor]:
    """megatron-core's own schedule; with labels a backward pass too. Last stage: its outputs.

    One call for each length of the rows, because the stages agree on one.
    """
    length = batches[0].tokens.shape[1]
    other = tuple(batch for batch in batches if batch.tokens.shape[1] != length)
    if other:
        same = batches[: len(batches) - len(other)]
        return run_schedule(model, same, with_labels) + run_schedule(model, other, with_labels)
    outputs: list[Tensor] = []

    def loss(out: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        outputs.append(out.detach().clone())
        return out.sum(), torch.tensor(out.numel(), dtype=torch.int), {}

    def step(iterator: Iterator[Batch], chunk: Any) -> tuple[Tensor, Any]:
        batch = next(iterator)
        out = chunk(
            batch.tokens,
            batch.position_ids,
            batch.cu_seqlens,
            batch.max_seqlen,
            batch.pixel_values,
            batch.labels if with_labels else None,
        )
        return out, loss

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1],
        micro_batch_size=1,
        forward_only=not with_labels,
    )
    return outputs


def reduce_gradients(model: Any, layout: Layout) -> None:
    """What megatron-core's finalize_model_grads does where there is no DDP wrapper."""

    group = parallel_state.get_tensor_model_parallel_group()
    for name, parameter in model.named_parameters():
        heads = "q_layernorm" in name or "k_layernorm" in name  # each rank has its own heads
        whole = not (heads or getattr(parameter, "sequence_parallel", False))
        if not whole and parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=group)
    ends = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
    if layout.pp > 1 and model.share_embeddings_and_output_weights and ends:
        weight = model.shared_embedding_or_output_weight()
        dist.all_reduce(weight.grad, group=parallel_state.get_embedding_group())


def layouts(rank: int, jobs: list[Job]) -> list[dict[str, Any]]:
    """For each job: logits, losses, names without a gradient; saves weights and gradients."""

    results = {}
    for sizes in sorted({(job.layout.tp, job.layout.pp) for job in jobs}):
        with model_parallel(*sizes):
            for place, job in enumerate(jobs):
                if (job.layout.tp, job.layout.pp) == sizes:
                    results[place] = one(job)
    return [results[place] for place in range(len(jobs))]


def one(job: Job) -> dict[str, Any]:
    """One job within its process groups."""
    model = build(job)
    logits = run_schedule(model, job.batches, with_labels=False)
    save_weights(model, job.out / "weights")
    losses = run_schedule(model, job.batches, with_labels=True)
    reduce_gradients(model, job.layout)
    silent = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    with torch.no_grad():
        for parameter in model.parameters():
            zero = torch.zeros_like(parameter)
            parameter.data = zero if parameter.grad is None else parameter.grad
    save_weights(model, job.out / "grads")
    return {"logits": logits, "losses": losses, "silent": silent}


def save_only(rank: int, job: Job) -> str:
    """Load and save, twice; the second from the first, as DDP keeps it: views of one buffer.

    Then what loading says when the file of the last rank is cut off.
    """
    with model_parallel(job.layout.tp, job.layout.pp):
        model = build(job)
        save_weights(model, job.out / "first")
        load_weights(model, job.out / "first")
        parameters = list(model.parameters())
        sizes = [parameter.numel() for parameter in parameters]
        parts = torch.cat([parameter.data.flatten() for parameter in parameters]).split(sizes)
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = part.view_as(parameter)
        save_weights(model, job.out / "second")
        damaged = job.out / "damaged"
        save_weights(model, damaged)
        if rank == 0:
            os.truncate(damaged / "__3_0.distcp", 1000)
        dist.barrier()
        try:
            load_weights(model, damaged)
        except IntegrityError as error:
            return str(error)
        return "loaded"
