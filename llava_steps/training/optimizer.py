"""AdamW with its state sharded over data-parallel ranks: megatron-core's DistributedOptimizer.

Its parameter state is saved in the `fully_reshardable` form: per parameter the fp32 master and both
moments in the parameter's own shape, so that any layout can load it. What megatron-core would keep
beside them (param groups, step) is a function of the settings and of the training step here, and
is set anew instead of saved; that also avoids two defects of 0.16.1 when AdamW is torch's own: the
state of an optimizer that never stepped cannot be saved, and after loading all parameters share
one `step` tensor, which AdamW then increments once per parameter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import MegatronModule

from llava_steps.core.config import Stage

METADATA = {"distrib_optim_fully_reshardable_mem_efficient": False}


def wrap(model: MegatronModule) -> DistributedDataParallel:
    """Data-parallel wrapper with one fp32 gradient buffer, reduced (summed) after the backward.

    One bucket: with several, 0.16.1 saves misaligned optimizer state (padded bucket ends).
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
    )
    return DistributedDataParallel(model.config, config, model, disable_bucketing=True)


class Optimizer:
    """AdamW over the trainable parameters of one rank; may hold none (a frozen pipeline stage)."""

    def __init__(
        self, stage: Stage, model: DistributedDataParallel, fused: bool | None = None
    ) -> None:
        """`fused`: clip and update all parameters in one go; on CUDA unless told."""
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
        )
        self._stage = stage
        chained = get_megatron_optimizer(config, [model], use_gloo_process_groups=False)
        assert isinstance(chained, ChainedOptimizer)
        (self._inner,) = chained.chained_optimizers
        assert isinstance(self._inner, DistributedOptimizer)
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
                group["lr"] = lr
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

    def reload_weights(self) -> None:
        """Take the model's weights as the new fp32 masters, after weights were loaded alone."""
        if not self.empty:
            self._inner.reload_model_params()

    def sharded_state(self, weights: dict[str, Any], loading: bool) -> dict[int, Any]:
        """Masters and moments as sharded tensors; `weights` is the model's sharded state dict."""
        if self.empty:
            return {}
        # Before the first update there are no moments yet; zeros are what AdamW starts from.
        if loading or not self._inner.optimizer.state:
            self._allocate()
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
