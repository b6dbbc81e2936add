"""What megatron-core's extension for Transformer Engine gives the `te` spec, on CPU and for tp 1.

Like the real linears these keep an extra state, name their parameters weight and bias, know their
`parallel_mode`, add weight gradients to `main_grad` themselves, and take what `is_first_microbatch`
would do to that from `disable_parameter_transpose_cache`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.extensions import transformer_engine as extension
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x,), weight = ctx.saved_tensors, ctx.weight
        if not weight.requires_grad:
            return grad @ weight, None
        weight.main_grad += grad.flatten(0, -2).t().float() @ x.flatten(0, -2).float()
        weight.grad_added_to_main_grad = True
        return grad @ weight, torch.full_like(weight, torch.nan)  # of no meaning


class TELinear(torch.nn.Module):
    """One class for both modes; only what the spec needs of the real one."""

    parallel_mode = ""

    def __init__(
        self, input_size: int, output_size: int, *, config: Any, bias: bool, skip_bias_add: bool,
        tp_group: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        assert config.disable_parameter_transpose_cache, "else the first microbatch overwrites"
        assert not config.gradient_accumulation_fusion, "the head would need Apex"
        self.fuse_wgrad_accumulation = config.gradient_accumulation_fusion
        self.sequence_parallel, self._tp_group = config.sequence_parallel, tp_group
        dtype = config.params_dtype
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=dtype))
        self.te_return_bias = skip_bias_add and bias
        self.bias = torch.nn.Parameter(torch.zeros(output_size, dtype=dtype)) if bias else None
        column = self.parallel_mode == "column"
        set_tensor_model_parallel_attributes(self.weight, True, 0 if column else 1, 1)
        if self.bias is not None and column:
            set_tensor_model_parallel_attributes(self.bias, True, 0, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        assert x.numel() // x.shape[-1] % 16 == 0, "rows of FP8 products"
        assert self.fuse_wgrad_accumulation, "gradients are added to main_grad in fp32"
        out: Tensor = _Product.apply(x, self.weight)  # type: ignore[no-untyped-call]
        if self.te_return_bias:
            return out, self.bias
        return out if self.bias is None else out + self.bias, None

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        pass

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        axes = {"weight": 0, "bias": 0} if self.parallel_mode == "column" else {"weight": 1}
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, axes, sharded_offsets,
            tp_group=self._tp_group, dp_cp_group=metadata["dp_cp_group"],
        )  # fmt: skip


class TEColumnParallelLinear(TELinear):
    parallel_mode = "column"


class TERowParallelLinear(TELinear):
    parallel_mode = "row"


def install() -> None:
    """Put the stand-in in the place of the real linears, in this process."""
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False  # as where Transformer Engine is installed
    extension.HAVE_TE = True
    extension.TEColumnParallelLinear = TEColumnParallelLinear
    extension.TERowParallelLinear = TERowParallelLinear


def deviations(rank: int) -> dict[str, float]:
    """Tiny model -> deviation of the logits of spec te from those of local; a `spawn` worker."""
    from llava_steps.geometry.geometry import Geometry
    from llava_steps.model.llava import build_llava
    from llava_steps.model.options import ModelOptions
    from llava_steps.settings.stage.stage import Stage
    from llava_steps.training.optimizer import Optimizer, wrap
    from tests.helpers.dist_helpers import model_parallel
    from tests.helpers.model_fixtures import TINY, config_of, pack_samples, samples

    install()
    found = {}
    row = pack_samples(samples(4), (0, 1), 32)
    place = row.tokens, row.position_ids, row.cu_seqlens, row.max_seqlen, row.pixel_values
    with model_parallel(1, 1), torch.no_grad():
        for name in ("biases-uneven", "qwen2-tied", "qwen3"):
            geometry = Geometry.from_hf(config_of(TINY[name]).to_dict())
            local = build_llava(geometry, ModelOptions("bf16"))
            te = build_llava(geometry, ModelOptions("bf16", spec="te", fp8="tensorwise"))
            for n, p in local.named_parameters():
                p.normal_(float(p.dim() == 1 and "norm" in n), 0.2)
                te.get_parameter(n).copy_(p)
            assert set(dict(te.named_parameters())) == set(dict(local.named_parameters()))
            wanted, out = local(*place), te(*place)
            found[name] = float((out - wanted).norm() / wanted.norm())
        stage = Stage(stage=2)
        with torch.enable_grad():
            optimizer = Optimizer(stage, wrap(stage, [te]))
        assert type(optimizer._inner.optimizer) is torch.optim.AdamW
    return found
