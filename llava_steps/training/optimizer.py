"""AdamW with its state sharded over data-parallel ranks: megatron-core's DistributedOptimizer.

Its parameter state is saved in the `fully_reshardable` form: per parameter the fp32 master and both
moments in the parameter's own shape, so that any layout can load it. What megatron-core would keep
beside them (param groups, step) is a function of the settings and of the training step here, and
is set again instead of saved; that also avoids two defects of 0.16.1 when AdamW is torch's own: the
state of an optimizer that never stepped cannot be saved, and after loading all parameters share
one `step` tensor, which AdamW then increments once per parameter.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    ChainedOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from llava_steps.model.llava import Llava
from llava_steps.settings.stage.stage import Stage

METADATA = {"distrib_optim_fully_reshardable_mem_efficient": False}


def wrap(stage: Stage, chunks: Sequence[Llava]) -> list[DistributedDataParallel]:
    """Data-parallel wrappers with fp32 gradient buffers, which accumulate over microbatches.

    One bucket each, reduced after the backward; with `overlap_grad_reduce` several for the first
    chunk of the first pipeline rank (what waits for the others is hidden anyway), each on its way
    as soon as its gradients are complete. Layers whose weights autograd does not know
    call a weight's `complete`.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=stage.overlap_grad_reduce,
        overlap_param_gather=stage.overlap_param_gather,
        bucket_size=stage.bucket_size or None,
    )
    wrapped = [
        DistributedDataParallel(
            chunk.config,
            config,
            chunk,
            disable_bucketing=number > 0 or not stage.overlap_grad_reduce,
        )
        for number, chunk in enumerate(chunks)
    ]
    if stage.overlap_grad_reduce:
        for chunk in wrapped:
            for weight, group in chunk.param_to_bucket_group.items():
                weight.complete = partial(group.register_grad_ready, weight)
    if stage.overlap_param_gather and chunks[-1].post_process:
        _gather_head(wrapped[-1], chunks[-1])
    return wrapped


def _gather_head(wrapped: DistributedDataParallel, model: Llava) -> None:
    """Have the head's weight waited for: it is read outside of the module that owns it, whose hook
    thus never runs.
    """
    lm = model.language_model
    weight = lm.shared_embedding_or_output_weight() if model.geometry.tied else None
    weight = lm.output_layer.weight if weight is None else weight
    if weight.requires_grad:
        group = wrapped.param_to_bucket_group[weight]
        lm.decoder.final_layernorm.register_forward_pre_hook(lambda *_: group.finish_param_sync())


@contextlib.contextmanager
def _offsets_without_padding(buffers: Sequence[Any]) -> Iterator[None]:
    """Within it, offsets of parameters are those in a buffer whose buckets are not padded.

    megatron-core 0.16.1 gathers the state of an optimizer without the padding between buckets and
    then cuts the parameters out of it at the padded offsets: silently wrong from the second bucket.
    """
    padded = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        shifts, end = [], 0
        for (start, _), bucket in zip(buffer.bucket_indices, buffer.buckets, strict=True):
            shifts.append(start - end)
            end += bucket.numel_unpadded
        buffer.param_index_map = {
            parameter: (start - shifts[bucket], stop - shifts[bucket], bucket)
            for parameter, (start, stop, bucket) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, index_map in zip(buffers, padded, strict=True):
            buffer.param_index_map = index_map


def rates(stage: Stage) -> dict[str, float]:
    """Part of the model -> its learning rate as a multiple of `lr`, if it has its own."""
    own = {
        "vision_tower": stage.vision_lr,
        "mm_projector": stage.projector_lr,
        "language_model": stage.lm_lr,
        "lora": stage.lm_lr,
    }
    return {part: rate / stage.lr for part, rate in own.items() if rate is not None}


class Optimizer:
    """AdamW over the trainable parameters of one rank; may hold none (a frozen pipeline stage)."""

    def __init__(
        self, stage: Stage, chunks: list[DistributedDataParallel], fused: bool | None = None
    ) -> None:
        """`fused`: clip and update all parameters in one go; default: on CUDA."""
        self._fused = torch.cuda.is_available() if fused is None else fused
        config = OptimizerConfig(
            optimizer="adam",
            lr=stage.lr,
            min_lr=stage.min_lr,
            weight_decay=stage.weight_decay,
            adam_beta1=stage.adam_beta1,
            adam_beta2=stage.adam_beta2,
            adam_eps=stage.adam_eps,
            clip_grad=stage.clip_grad,
            bf16=stage.precision == "bf16",
            params_dtype=torch.bfloat16 if stage.precision == "bf16" else torch.float32,
            use_distributed_optimizer=True,
            overlap_param_gather=stage.overlap_param_gather,
        )
        self._stage = stage
        self._chunks = chunks
        groups = get_standard_config_overrides(config)  # no weight decay for 1-d weights
        for part, factor in rates(stage).items():
            rate: Any = {"lr_mult": factor}
            groups[ParamKey(name=f"*.{part}.*")] = rate
        # Where Transformer Engine is installed megatron-core would take its Adam, whose state and
        # arguments are others.
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = True
        chained = get_megatron_optimizer(config, chunks, groups, use_gloo_process_groups=False)
        assert isinstance(chained, ChainedOptimizer)
        (self._inner,) = chained.chained_optimizers
        assert isinstance(self._inner, DistributedOptimizer)
        assert self.empty or isinstance(self._inner.optimizer, torch.optim.AdamW)
        if self._fused and not self.empty:
            for group in self._inner.optimizer.param_groups:
                group.update(fused=True, foreach=False)

    @property
    def empty(self) -> bool:
        """Whether this rank has nothing to train."""
        return bool(self._inner.is_stub_optimizer)

    def zero_grad(self) -> None:
        """Drop the gradients of the last step."""
        if not self.empty:
            self._inner.zero_grad()

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """L2 norm of the gradient of all trainable parameters, the same on every rank.

        A collective call; not finite when any gradient anywhere is not.
        """
        self._inner.prepare_grads()
        # megatron-core's own way, without Apex, waits for the GPU once per parameter.
        grads = [] if self.empty else self._inner.get_main_grads_for_grad_norm()
        total = torch.zeros((), dtype=torch.float32, device=torch.cuda.current_device())
        if grads:
            total += torch.stack(torch._foreach_norm(grads)).square().sum()
        dist.all_reduce(total, group=self._inner.get_grad_stats_parallel_group())
        return math.sqrt(total.item())

    @torch.no_grad()
    def step(self, lr: float, norm: float) -> None:
        """Clip by the global norm and update; `gradient_norm` must have been called, and finite."""
        assert math.isfinite(norm)
        if not self.empty:
            for group in self._inner.optimizer.param_groups:
                group["lr"] = lr * group["lr_mult"]
                group["weight_decay"] = self._stage.weight_decay * group["wd_mult"]
            self._clip(norm)
        self._inner.step_with_ready_grads()

    def _clip(self, norm: float) -> None:
        limit = self._stage.clip_grad
        if not self._fused:
            if limit > 0:
                clip_grad_by_total_norm_fp32(self._inner.get_parameters(), limit, norm)
            return
        # The fused update divides by this on its way.
        excess = max(1.0, (norm + 1e-6) / limit) if limit > 0 else 1.0
        device = torch.cuda.current_device()
        self._inner.optimizer.grad_scale = torch.full((), excess, device=device)

    def _step_count(self, parameter: torch.Tensor, steps: int) -> torch.Tensor:
        device = parameter.device if self._fused else torch.device("cpu")
        return torch.full((), float(steps), dtype=torch.float32, device=device)

    def settle(self) -> None:
        """Wait until the model has the weights of the last step: with `overlap_param_gather` they
        come while the next one runs. A collective call.
        """
        if self._stage.overlap_param_gather:
            for chunk in self._chunks:
                chunk.start_param_sync(force_sync=True)

    def reload_weights(self) -> None:
        """Take the model's weights as the new fp32 masters, after only weights were loaded."""
        if not self.empty:
            self._inner.reload_model_params()

    def sharded_state(self, weights: dict[str, Any], loading: bool) -> dict[int, Any]:
        """Masters and moments as sharded tensors; `weights` are the model's."""
        if self.empty:
            return {}
        # Before the first update there are no moments yet; zeros are what AdamW starts from.
        if loading or not self._inner.optimizer.state:
            self._allocate()
        with _offsets_without_padding(self._inner.buffers):
            state = self._inner.sharded_param_state_fully_reshardable(weights, loading, METADATA)
        assert state is not None
        return dict(state)

    def load_sharded_state(self, state: dict[int, Any], steps: int) -> None:
        """Put loaded masters and moments in place; `steps` updates were made with them."""
        if self.empty:
            return
        moments = self._inner.optimizer.state
        for parameter in moments:
            moments[parameter].pop("step", None)
        self._inner.load_parameter_state_from_fully_reshardable(state)
        for parameter in moments:
            moments[parameter]["step"] = self._step_count(parameter, steps)

    def state_bytes(self) -> int:
        """Bytes of this rank's masters and moments, as they are saved."""
        if self.empty:
            return 0
        groups = self._inner.optimizer.param_groups
        parameters: list[torch.Tensor] = [p for group in groups for p in group["params"]]
        return 3 * sum(p.numel() * p.element_size() for p in parameters)

    def steps(self) -> set[int]:
        """The distinct update counts that the parameters' states hold."""
        if self.empty:
            return set()
        return {int(s["step"]) for s in self._inner.optimizer.state.values() if "step" in s}

    def _allocate(self) -> None:
        for group in self._inner.optimizer.param_groups:
            for parameter in group["params"]:
                self._inner.optimizer.state[parameter] = {
                    "exp_avg": torch.zeros_like(parameter.data),
                    "exp_avg_sq": torch.zeros_like(parameter.data),
                    "step": self._step_count(parameter, 0),
                }
