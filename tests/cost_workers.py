"""What a real model costs, counted by torch. Run through tests.dist_helpers.spawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers.models.auto.modeling_auto
import transformers.models.clip.modeling_clip  # noqa: F401 - before the fork
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_steps.core.costs import Trained
from llava_steps.core.geometry import Geometry
from llava_steps.model.llava import Llava, build_llava
from llava_steps.model.options import ModelOptions
from tests.dist_helpers import model_parallel
from tests.model_fixtures import Batch


@dataclass(frozen=True)
class Case:
    """A model's config and what is trained of it, over rows of one sample each."""

    hf: Path
    trained: Trained
    rows: tuple[Batch, ...]


@dataclass(frozen=True)
class Counted:
    """Parameters by name with whether they are trained; operations of both passes."""

    parameters: dict[str, tuple[int, bool]]
    operations: int


def count(rank: int, cases: list[Case]) -> list[Counted]:
    """For each case the built model's parameters and the operations of one pass over its rows."""
    with model_parallel(1, 1):
        return [_count(case) for case in cases]


def _count(case: Case) -> Counted:
    model = build_llava(
        Geometry.load(case.hf),
        ModelOptions(
            freeze_vision=not case.trained.vision,
            freeze_projector=not case.trained.projector,
            freeze_lm=not case.trained.language_model,
        ),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    sizes = {name: (p.numel(), p.requires_grad) for name, p in model.named_parameters()}
    return Counted(sizes, _operations(model, case.rows))


def _operations(model: Llava, rows: tuple[Batch, ...]) -> int:
    # As products that the counter sees one by one, over whole squares, without recomputation.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for row in rows:
            model(
                row.tokens,
                row.position_ids,
                row.cu_seqlens,
                row.max_seqlen,
                row.pixel_values,
                row.labels,
            ).sum().backward()
    return counter.get_total_flops()
