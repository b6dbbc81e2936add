"""Low-rank adapters in a checkpoint (LoRA, Hu et al. 2021, arXiv:2106.09685).

Nothing here needs megatron-core; model/adapters.py trains them.

A linear x W' becomes x W' + scale (x A') B' with A [rank, in], B [out, rank], scale = alpha / rank.
The adapters belong to megatron-core's fused linears: one A serves q, k and v, one gate and up.

They are stored beside the weights as `lora.TARGET.a` and `.b`, layers stacked, with `lora.json`; a
reader without LoRA support refuses such a checkpoint. `open_weights` reads it as if W were
W + scale B A: an export merges them in this way.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from llava_steps.conversion import torch_dist_write
from llava_steps.core import filesystem
from llava_steps.core.errors import InputError, IntegrityError
from llava_steps.geometry.geometry import Geometry

FILE, PREFIX = "lora.json", "lora."
PARENTS = {
    "linear_qkv": "self_attention",
    "linear_proj": "self_attention",
    "linear_fc1": "mlp",
    "linear_fc2": "mlp",
}
"""Target -> the module of a decoder layer that contains it."""
_LAYERS = "language_model.decoder.layers."


@dataclass(frozen=True)
class Lora:
    """Rank, scale and targets of adapters; `seed` is for the initial values of A."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def write(self, weights: Path) -> None:
        """Write `lora.json` into the directory of a checkpoint's weights."""
        filesystem.write_json(weights / FILE, asdict(self))

    @classmethod
    def read(cls, weights: Path) -> Lora | None:
        """The adapters of a checkpoint's weights, if any."""
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
    shapes: dict[str, tuple[int, ...]] = {}
    for target in lora.targets:
        width, out = sizes(geometry)[target]
        shapes[f"{PREFIX}{target}.a"] = (geometry.layers, lora.rank, width)
        shapes[f"{PREFIX}{target}.b"] = (geometry.layers, out, lora.rank)
    return shapes


def check_same(wanted: Lora | None, weights: Path) -> bool:
    """Whether a checkpoint's weights have the adapters of `wanted`; False if they have none.

    InputError if they have others, or any and `wanted` is None.
    """
    stored = Lora.read(weights)
    if stored is None:
        return False
    if wanted is None:
        raise InputError(
            f"{weights} has LoRA adapters, which this training does not: give the lora_rank, "
            "lora_alpha and lora_targets that it was trained with, or merge them into its weights "
            "with megatron_to_hf and hf_to_megatron"
        )
    for name in ("rank", "alpha", "targets"):
        if getattr(stored, name) != getattr(wanted, name):
            raise InputError(
                f"lora_{name} {getattr(wanted, name)}: {weights} was trained with "
                f"{getattr(stored, name)}; set that, or merge the adapters with megatron_to_hf and "
                "hf_to_megatron"
            )
    return True


class Merged(torch_dist_write.Reader):
    """A checkpoint with adapters, read as one of merged weights."""

    def __init__(self, directory: Path, lora: Lora) -> None:
        super().__init__(directory)
        self._lora = lora

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> whole shape of every tensor, without the adapters."""
        return {k: v for k, v in super().shapes().items() if not k.startswith(PREFIX)}

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """One tensor, or one layer of it; W + scale B A, added in fp32, if it has adapters."""
        value = super().read(name, layer)
        for target in self._lora.targets:
            if name == f"{_LAYERS}{PARENTS[target]}.{target}.weight":
                a, b = (super(Merged, self).read(f"{PREFIX}{target}.{k}", layer) for k in "ab")
                delta = self._lora.scale * (b.float() @ a.float())
                return (value.float() + delta).to(value.dtype)
        return value


def open_weights(weights: Path) -> torch_dist_write.Reader:
    """The reader of a checkpoint's weights, adapters merged if it has some."""
    lora = Lora.read(weights)
    return torch_dist_write.Reader(weights) if lora is None else Merged(weights, lora)
