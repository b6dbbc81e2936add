"""LoRA on the language model's linears, in every layout; conversion/lora.py has the formula.

W is frozen. A and B are split like W: a column-parallel linear splits B by rows, a row-parallel one
A by columns, so ranks exchange only [T, rank].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.utils import make_sharded_tensor_for_checkpoint as replicated
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint as cut
from torch import Tensor

from llava_steps.conversion.lora import PARENTS, PREFIX, Lora
from llava_steps.geometry.geometry import Geometry


class Adapter(torch.nn.Module):
    """The low-rank part of one linear, this tensor-parallel rank's share of it.

    A is drawn from U(-1/sqrt(in), 1/sqrt(in)), the same in every layout; B is 0.
    """

    def __init__(self, linear: torch.nn.Module, lora: Lora, target: str, layer: int) -> None:
        super().__init__()
        weight = linear.weight
        assert isinstance(weight, Tensor)
        self.column = isinstance(linear, ColumnParallelLinear)
        self.sequence_parallel = bool(linear.sequence_parallel)
        self.scale = lora.scale
        tp = parallel_state.get_tensor_model_parallel_world_size()
        out, width = weight.shape
        index = list(PARENTS).index(target)
        generator = torch.Generator().manual_seed((lora.seed * 100003 + layer) * 8 + index)
        whole = width if self.column else width * tp
        first = torch.empty(lora.rank, whole).uniform_(-1, 1, generator=generator)
        first /= math.sqrt(whole)
        if not self.column:
            first = first.chunk(tp, dim=1)[parallel_state.get_tensor_model_parallel_rank()]
        self.a = torch.nn.Parameter(first.to(weight.device, weight.dtype, copy=True).contiguous())
        self.b = torch.nn.Parameter(weight.new_zeros(out, lora.rank))
        own, shared = (self.b, self.a) if self.column else (self.a, self.b)
        set_tensor_model_parallel_attributes(own, True, 0 if self.column else 1, 1)
        # Each rank sees its own part of the sequence: megatron-core sums such gradients.
        shared.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Its part of the linear's output: x [T (/tp), 1, in (/tp)] -> [T (/tp), 1, out (/tp)].

        x and the result are split like those of the linear.
        """
        z = F.linear(x, self.a)
        if self.column and self.sequence_parallel:
            z = tensor_parallel.gather_from_sequence_parallel_region(
                z, tensor_parallel_output_grad=True
            )
        elif self.column:
            z = tensor_parallel.copy_to_tensor_model_parallel_region(z)
        elif self.sequence_parallel:
            z = tensor_parallel.reduce_scatter_to_sequence_parallel_region(z)
        else:
            z = tensor_parallel.reduce_from_tensor_model_parallel_region(z)
        return F.linear(z, self.b) * self.scale


class Adapters(torch.nn.Module):
    """The adapters of the decoder layers of one pipeline chunk, hooked to their linears.

    They are not children of the linears, so names and checkpoint of the frozen weights do not
    change.
    """

    def __init__(self, lora: Lora, layers: Sequence[Any], geometry: Geometry) -> None:
        super().__init__()
        self.lora, self._layers = lora, geometry.layers
        self.layers = torch.nn.ModuleList()
        self._numbers = [int(layer.layer_number) - 1 for layer in layers]
        for number, layer in zip(self._numbers, layers, strict=True):
            own = torch.nn.ModuleDict()
            for target in lora.targets:
                linear = getattr(getattr(layer, PARENTS[target]), target)
                own[target] = adapter = Adapter(linear, lora, target, number)
                linear.register_forward_hook(_added(adapter))
            self.layers.append(own)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The adapters as parts of stacked tensors, in megatron-core's format."""
        state: dict[str, Any] = {}
        for index, (number, own) in enumerate(zip(self._numbers, self.layers, strict=True)):
            assert isinstance(own, torch.nn.ModuleDict)
            layer = [(0, number, self._layers)]
            for target, adapter in own.items():
                assert isinstance(adapter, Adapter)
                for name, value in (("a", adapter.a), ("b", adapter.b)):
                    key = f"{PREFIX}{target}.{name}"
                    if (name == "b") != adapter.column:
                        part = replicated(value, key, prepend_offsets=layer)
                    else:
                        axis = 0 if adapter.column else 1
                        part = cut(value, key, axis, prepend_offsets=layer)
                        if target == "linear_fc1":  # a rank has its rows of gate, then of up
                            part = apply_swiglu_sharded_factory(part, layer)
                    state[f"{prefix}layers.{index}.{target}.{name}"] = part
        return state


def _added(adapter: Adapter) -> Any:
    def hook(_: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Any]) -> Any:
        return outputs[0] + adapter(inputs[0]), outputs[1]

    return hook
