"""What a real model costs, counted by torch. Run through tests.helpers.dist_helpers.spawn."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers.models.auto.modeling_auto
import transformers.models.clip.modeling_clip  # noqa: F401 - before the fork
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llava_steps.geometry.costs import Trained
from llava_steps.geometry.geometry import Geometry
from llava_steps.model.llava import Llava, build_llava
from llava_steps.model.options import ModelOptions
from llava_steps.settings.stage.stage import Stage
from tests.helpers.dist_helpers import model_parallel
from tests.helpers.model_fixtures import Batch
from tests.helpers.model_workers import run_schedule


@dataclass(frozen=True)
class Case:
    """A model's config and what is trained of it, over rows of one sample each; a row of text."""

    hf: Path
    trained: Trained
    rows: tuple[Batch, ...]
    text: Batch


@dataclass(frozen=True)
class Counted:
    """Parameters by name with whether they are trained; operations of both passes over the rows;
    for the first of them and for the row of text the modules with trained parameters of their own,
    in the order of the forward pass.
    """

    parameters: dict[str, tuple[int, bool]]
    operations: int
    orders: list[list[str]]


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
    operations = _operations(model, case.rows)
    return Counted(sizes, operations, [_order(model, row) for row in (case.rows[0], case.text)])


def _operations(model: Llava, rows: tuple[Batch, ...]) -> int:
    # As products that the counter sees one by one, over whole squares, without recomputation.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        for row in rows:
            _forward(model, row).sum().backward()
    return counter.get_total_flops()


def _order(model: Llava, row: Batch) -> list[str]:
    called: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    with torch.no_grad():
        _forward(model, row)
    for hook in hooks:
        hook.remove()
    return called


def _forward(model: Llava, row: Batch) -> torch.Tensor:
    out: torch.Tensor = model(
        row.tokens, row.position_ids, row.cu_seqlens, row.max_seqlen, row.pixel_values, row.labels
    )
    return out


@dataclass(frozen=True)
class Training:
    """A model's config and stage, and the microbatches of each data-parallel rank."""

    hf: Path
    stage: Stage
    rows: tuple[tuple[Batch, ...], ...]


@dataclass(frozen=True)
class Kept:
    """Bytes of a rank that lasts, by part, and the most that autograd kept at a time."""

    weights: int
    gradients: int
    optimizer: int
    saved: int


class Saved:
    """Bytes of the storages that autograd holds, now and at most, without those to be ignored."""

    def __init__(self, ignored: set[int]) -> None:
        self._ignored, self._held, self._now, self.most = ignored, Counter[int](), 0, 0

    def pack(self, tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self._ignored:
            return tensor
        if not self._held[storage.data_ptr()]:
            self._now += storage.nbytes()
            self.most = max(self.most, self._now)
        self._held[storage.data_ptr()] += 1
        return Holder(tensor, self)

    def release(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self._held[storage.data_ptr()] -= 1
        if not self._held[storage.data_ptr()]:
            self._now -= storage.nbytes()


class Holder:
    """A saved tensor; autograd drops it with the graph."""

    def __init__(self, tensor: torch.Tensor, saved: Saved) -> None:
        self.tensor, self._saved = tensor, saved

    def __del__(self) -> None:
        self._saved.release(self.tensor)


def unpack(held: Any) -> torch.Tensor:
    tensor: torch.Tensor = held.tensor if isinstance(held, Holder) else held
    return tensor


def keep(rank: int, trainings: list[Training]) -> list[Kept]:
    """What each training keeps on this rank over one optimizer step."""
    found = []
    for training in trainings:
        tp, pp = training.stage.tensor_model_parallel, training.stage.pipeline_model_parallel
        with model_parallel(tp, pp):
            found.append(_keep(training))
    return found


def _keep(training: Training) -> Kept:
    from llava_steps.training.optimizer import Optimizer, wrap

    stage = training.stage
    model = build_llava(
        Geometry.load(training.hf),
        ModelOptions(
            precision=stage.precision,
            tp=stage.tensor_model_parallel,
            pp=stage.pipeline_model_parallel,
            sequence_parallel=stage.sequence_parallel,
            recompute=stage.recompute,
            freeze_vision=stage.freeze_vision,
            freeze_projector=stage.freeze_projector,
            freeze_lm=bool(stage.freeze_lm),
            compiled=stage.compiles(cuda=False),
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        ),
    ).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    (wrapped,) = wrap(stage, [model])
    optimizer = Optimizer(stage, [wrapped])
    optimizer.reload_weights()
    wrapped.zero_grad_buffer()
    buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
    gradients = [b.grad_data for b in buffers]
    # What lasts: compiled layers keep the gradients that they add to.
    ignored = [*model.parameters(), *gradients]
    saved = Saved({t.untyped_storage().data_ptr() for t in ignored})
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, unpack):
        run_schedule(wrapped, training.rows[parallel_state.get_data_parallel_rank()], True)
    finalize_model_grads([wrapped], torch.tensor(1, dtype=torch.int))
    optimizer.step(1e-3, optimizer.gradient_norm())
    states: list[torch.Tensor] = []
    if not optimizer.empty:
        inner = optimizer._inner
        states = [t for s in inner.optimizer.state.values() for t in s.values() if t.dim()]
        states += [p for group in inner.optimizer.param_groups for p in group["params"]]
    lasting = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return Kept(
        weights=storages(list(model.parameters()), set()),
        gradients=storages(gradients, set()),
        optimizer=storages(states, lasting),
        saved=saved.most,
    )


def storages(tensors: list[torch.Tensor], without: set[int]) -> int:
    """Bytes of the distinct storages."""
    each = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for place, size in each.items() if place not in without)
