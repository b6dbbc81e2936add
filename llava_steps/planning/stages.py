"""What a training stage needs: tokens, memory, operations, time, disk; and layouts that fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from pydantic import ValidationError

from llava_steps.core.errors import ConfigError
from llava_steps.geometry.costs import (
    Flops,
    Trained,
    Work,
    flops,
    parameters,
    trained_parameters,
)
from llava_steps.geometry.geometry import Geometry
from llava_steps.geometry.hardware import GIB, SET_ASIDE, Gpu
from llava_steps.geometry.memory import Layout, Memory, Row, memory
from llava_steps.settings.stage.stage import Stage


@dataclass(frozen=True)
class Data:
    """An average sample: tokens including those of images, labels, images, and their source."""

    tokens: float
    supervised: float
    images: float
    source: str

    @classmethod
    def assumed(cls, geometry: Geometry, text_tokens: int, longest: int) -> Data:
        """One image and `text_tokens` of text, half of them supervised."""
        tokens = min(geometry.tokens_per_image + text_tokens, longest)
        return cls(
            tokens, text_tokens / 2, 1, f"assumed: an image and {text_tokens} tokens of text"
        )

    @classmethod
    def audited(cls, report: Mapping[str, Any]) -> Data:
        """From the audit of the stage."""
        usable = max(int(report["usable"]), 1)
        tokens = report["tokens"] / usable
        share = report["supervised_share"]
        return cls(tokens, tokens * share, report["images"] / usable, "measured by the audit")


@dataclass(frozen=True)
class StagePlan:
    """Figures of one stage; operations and times of one optimizer step over all GPUs."""

    stage: Stage
    trained: Trained
    data: Data
    parameters: int
    trained_parameters: int
    row: Row
    memory: Memory
    operations: Flops
    recomputed: int
    """Operations repeated in the backward pass; they take time, but are not part of the total."""

    @property
    def samples(self) -> int:
        return self.stage.train_steps * self.stage.global_batch_size

    @property
    def tokens(self) -> int:
        return round(self.samples * self.data.tokens)

    def seconds(self, gpu: Gpu, efficiency: float) -> float:
        """Of one step, at `efficiency` of the peak of all GPUs, with the pipeline bubble."""
        peak = gpu.peak(self.stage.precision) * self.stage.world_size
        busy = (self.operations.total + self.recomputed) / (peak * efficiency)
        return busy * (1 + bubble(self.stage))

    def hours(self, gpu: Gpu, efficiency: float) -> float:
        """Of all steps."""
        return self.stage.train_steps * self.seconds(gpu, efficiency) / 3600

    def fits(self, gpu: Gpu) -> bool:
        """Whether one process fits into `gpu`, without its reserved share."""
        return self.memory.total <= gpu.gib * GIB * (1 - SET_ASIDE)


def bubble(stage: Stage) -> float:
    """Idle over busy time of a pipeline: (p - 1) / (v m) (Narayanan et al. 2021, section 2.2)."""
    pp, vp = stage.pipeline_model_parallel, stage.virtual_pipeline
    return (pp - 1) / max(microbatches_per_step(stage) * vp, 1)


def microbatches_per_step(stage: Stage) -> int:
    """Microbatches of a process in a step; with packing the largest possible number."""
    return stage.global_batch_size // (stage.micro_batch_size * stage.data_parallel)


def largest_microbatch(stage: Stage, data: Data) -> Row:
    """The longest microbatch that the settings allow, filled with average samples."""
    if stage.packing:
        tokens = stage.pack_length or stage.seq_length
        samples = max(round(tokens / data.tokens), 1)
    else:
        tokens = stage.micro_batch_size * stage.seq_length
        samples = stage.micro_batch_size
    share = min(tokens / data.tokens, samples if not stage.packing else tokens / data.tokens)
    return Row(
        tokens=tokens,
        samples=samples,
        longest=min(stage.seq_length, tokens),
        images=round(share * data.images),
        supervised=min(round(tokens * data.supervised / data.tokens), tokens),
    )


def stage_plan(geometry: Geometry, stage: Stage, data: Data, cuda: bool = True) -> StagePlan:
    """The figures of a stage; ConfigError when the model cannot be split as configured."""
    layout = Layout.by(geometry, stage, cuda)
    trained, batch = Trained.by(stage), stage.global_batch_size
    work = Work(
        tokens=round(batch * data.tokens),
        supervised=round(batch * data.supervised),
        images=round(batch * data.images),
        squares=round(batch * data.tokens**2),
    )
    row = largest_microbatch(stage, data)
    operations = flops(geometry, trained, work, head="supervised")
    forward = flops(geometry, Trained(False, False, False), work, head="supervised")
    again = {
        "none": 0,
        "core_attn": forward.attention,
        "full": forward.attention + forward.layers,
    }
    return StagePlan(
        stage=stage,
        trained=trained,
        data=data,
        parameters=parameters(geometry).total,
        trained_parameters=trained_parameters(geometry, trained).total,
        row=row,
        memory=memory(geometry, trained, layout, row, microbatches_per_step(stage)),
        operations=operations,
        recomputed=again[stage.recompute],
    )


def weight_bytes(geometry: Geometry, plan: StagePlan) -> int:
    """Bytes of the model's weights as the Hugging Face directories and the conversion hold them."""
    return plan.parameters * (2 if "16" in geometry.dtype else 4)


def disk(geometry: Geometry, plan: StagePlan) -> int:
    """Bytes of the stage's checkpoints while it trains: those kept and the one being written."""
    size = 2 if plan.stage.precision == "bf16" else 4
    one = plan.parameters * size + plan.trained_parameters * 12
    return one * (plan.stage.keep_checkpoints + 1)


def variants(geometry: Geometry, stage: Stage, data: Data, nodes: int) -> Iterator[StagePlan]:
    """The stage in every layout of `nodes` nodes of its GPUs that its settings allow."""
    sizes = [1, 2, 4, 8, 16, 32]
    recomputes: tuple[Literal["none", "core_attn", "full"], ...] = ("none", "core_attn", "full")
    micros = [1] if stage.packing else [1, 2, 4, 8, 16, 32, 64]
    given = stage.model_dump() | {"nodes": nodes}
    possible, why = 0, ""
    for tp, pp, micro, again in product(sizes, sizes, micros, recomputes):
        if tp > stage.gpus:
            continue  # tensor parallel ranks communicate in every layer: keep them on one node
        try:
            changed = Stage.model_validate(
                given
                | {
                    "tensor_model_parallel": tp,
                    "pipeline_model_parallel": pp,
                    "sequence_parallel": tp > 1,
                    "micro_batch_size": micro,
                    "recompute": again,
                }
            )
            plan = stage_plan(geometry, changed, data)
        except ValidationError as error:
            why = why or str(error.errors()[0]["msg"]).removeprefix("Value error, ")
            continue
        except ConfigError as error:
            why = why or str(error)
            continue
        possible += 1
        yield plan
    if not possible:
        raise ConfigError(f"stage {stage.stage} has no layout on {nodes} nodes: {why}")


def step_seconds(geometry: Geometry, plan: StagePlan, gpu: Gpu, efficiency: float) -> float:
    """`seconds` and, without overlap, the communication: layouts are ranked by it.

    Four all-reduces of a row's activations in each layer for tensor parallelism (Shoeybi et al.
    2019, arXiv:1909.08053, section 3), and one reduction of fp32 gradients and one gathering of
    weights for data parallelism, over the slowest link between them.
    """
    stage = plan.stage
    tp, dp = stage.tensor_model_parallel, stage.data_parallel
    size = 2 if stage.precision == "bf16" else 4
    tokens = plan.data.tokens * stage.global_batch_size / dp
    layers = geometry.layers / stage.pipeline_model_parallel
    moved = 4 * 2 * (tp - 1) / tp * tokens * geometry.hidden * size * layers
    share = plan.trained_parameters / (tp * stage.pipeline_model_parallel)
    reduced = (dp - 1) / dp * share * (4 + size)
    between = gpu.net if stage.nodes > 1 else gpu.link
    return plan.seconds(gpu, efficiency) + moved / gpu.link + reduced / between


def search(
    geometry: Geometry, stage: Stage, data: Data, nodes: int, gpu: Gpu, efficiency: float
) -> list[tuple[float, StagePlan]]:
    """(seconds of a step, plan) of every layout that fits, the fastest first.

    Of equally fast ones, those with less recomputation and more free memory come first.
    """
    fitting = [
        (step_seconds(geometry, plan, gpu, efficiency), plan)
        for plan in variants(geometry, stage, data, nodes)
        if plan.fits(gpu)
    ]
    return sorted(fitting, key=lambda pair: (round(pair[0], 6), pair[1].memory.total))


def suggestion(geometry: Geometry, stage: Stage, data: Data, gpu: Gpu, efficiency: float) -> str:
    """Settings that make a stage fit on the same GPUs, or what to do if there are none."""
    ranked = search(geometry, stage, data, stage.nodes, gpu, efficiency)
    if not ranked:
        return (
            f"no layout of {stage.world_size} {gpu.name} fits; use more or larger GPUs, or a "
            "shorter " + ("pack_length" if stage.packing else "seq_length")
        )
    return "set " + ", ".join(f"{k}: {v}" for k, v in changes(stage, ranked[0][1].stage).items())


def changes(before: Stage, after: Stage) -> dict[str, Any]:
    """Settings that differ."""
    old, new = before.model_dump(), after.model_dump()
    return {key: new[key] for key in new if new[key] != old[key]}
