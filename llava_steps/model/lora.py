"""Low-rank adapters on the language model's linears (LoRA, Hu et al. 2021, arXiv:2106.09685).

A linear x W' becomes x W' + scale (x A') B' with A [rank, in], B [out, rank], scale = alpha / rank;
W is frozen. The adapters belong to megatron-core's fused linears: one A serves q, k and v, one gate
and up. Their parts follow those of W: a column-parallel linear cuts B by rows, a row-parallel one A
by columns, so only [T, rank] is ever exchanged.

In a checkpoint they lie beside the weights as `lora.TARGET.a` and `.b`, layers stacked, with
`lora.json`; a reader that does not know of them refuses such a checkpoint. `open_weights` reads it
as if W were W + scale B A: that is how an export merges them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
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

from llava_steps.core import fsio
from llava_steps.core.errors import InputError, IntegrityError
from llava_steps.core.geometry import Geometry
from llava_steps.model import dcp

FILE, PREFIX = "lora.json", "lora."
PLACES = {
    "linear_qkv": "self_attention",
    "linear_proj": "self_attention",
    "linear_fc1": "mlp",
    "linear_fc2": "mlp",
}
"""Target -> where a decoder layer has it."""
_LAYERS = "language_model.decoder.layers."


@dataclass(frozen=True)
class Lora:
    """What is adapted; `seed` is that of the first values of A."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def write(self, weights: Path) -> None:
        """Leave `lora.json` in the directory of a checkpoint's weights."""
        fsio.write_json(weights / FILE, asdict(self))

    @classmethod
    def read(cls, weights: Path) -> Lora | None:
        """What adapters a checkpoint's weights have, if any."""
        path = weights / FILE
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_bytes())
            return cls(**{**values, "targets": tuple(values["targets"])})
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path} is damaged: {error!r}") from error


def sizes(geometry: Geometry) -> dict[str, tuple[int, int]]:
    """Target -> (in, out) of the whole fused linear."""
    g = geometry
    queries = g.heads * g.head_dim
    return {
        "linear_qkv": (g.hidden, queries + 2 * g.kv_heads * g.head_dim),
        "linear_proj": (queries, g.hidden),
        "linear_fc1": (g.hidden, 2 * g.ffn),
        "linear_fc2": (g.ffn, g.hidden),
    }


def stored_shapes(geometry: Geometry, lora: Lora) -> dict[str, tuple[int, ...]]:
    """Names of the adapters in a checkpoint and their whole shapes."""
    found: dict[str, tuple[int, ...]] = {}
    for target in lora.targets:
        width, out = sizes(geometry)[target]
        found[f"{PREFIX}{target}.a"] = (geometry.layers, lora.rank, width)
        found[f"{PREFIX}{target}.b"] = (geometry.layers, out, lora.rank)
    return found


class Adapter(torch.nn.Module):
    """The low-rank part of one linear, as much of it as belongs to this tensor-parallel rank.

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
        place = list(PLACES).index(target)
        generator = torch.Generator().manual_seed((lora.seed * 100003 + layer) * 8 + place)
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
        """What comes to the linear's output: x [T (/tp), 1, in (/tp)] -> [T (/tp), 1, out (/tp)].

        x and the result are cut as those of the linear are.
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

    They are no children of the linears, so names and checkpoint of the frozen weights stay as they
    are.
    """

    def __init__(self, lora: Lora, layers: Sequence[Any], geometry: Geometry) -> None:
        super().__init__()
        self.lora, self._layers = lora, geometry.layers
        self.layers = torch.nn.ModuleList()
        self._numbers = [int(layer.layer_number) - 1 for layer in layers]
        for number, layer in zip(self._numbers, layers, strict=True):
            own = torch.nn.ModuleDict()
            for target in lora.targets:
                linear = getattr(getattr(layer, PLACES[target]), target)
                own[target] = adapter = Adapter(linear, lora, target, number)
                linear.register_forward_hook(_added(adapter))
            self.layers.append(own)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The adapters as parts of stacked tensors, in megatron-core's terms."""
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


def check_same(wanted: Lora | None, weights: Path) -> bool:
    """Whether a checkpoint's weights have the adapters of `wanted`; none are to be added to.

    InputError when they have others, or any and `wanted` is None.
    """
    found = Lora.read(weights)
    if found is None:
        return False
    if wanted is None:
        raise InputError(
            f"{weights} has LoRA adapters, which this training does not: give the lora_rank, "
            "lora_alpha and lora_targets that it was trained with, or merge them into its weights "
            "with megatron_to_hf and hf_to_megatron"
        )
    for name in ("rank", "alpha", "targets"):
        if getattr(found, name) != getattr(wanted, name):
            raise InputError(
                f"lora_{name} {getattr(wanted, name)}: {weights} was trained with "
                f"{getattr(found, name)}; set it so, or merge the adapters with megatron_to_hf and "
                "hf_to_megatron"
            )
    return True


class Merged(dcp.Reader):
    """A checkpoint with adapters, read as one of merged weights."""

    def __init__(self, directory: Path, lora: Lora) -> None:
        super().__init__(directory)
        self._lora = lora

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> whole shape of every tensor, without the adapters."""
        return {k: v for k, v in super().shapes().items() if not k.startswith(PREFIX)}

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """One tensor, or one layer of it; W + scale B A, added up in fp32, where it is adapted."""
        value = super().read(name, layer)
        for target in self._lora.targets:
            if name == f"{_LAYERS}{PLACES[target]}.{target}.weight":
                a, b = (super(Merged, self).read(f"{PREFIX}{target}.{k}", layer) for k in "ab")
                delta = self._lora.scale * (b.float() @ a.float())
                return (value.float() + delta).to(value.dtype)
        return value


def open_weights(weights: Path) -> dcp.Reader:
    """The reader of a checkpoint's weights, adapters merged if it has some."""
    lora = Lora.read(weights)
    return dcp.Reader(weights) if lora is None else Merged(weights, lora)
