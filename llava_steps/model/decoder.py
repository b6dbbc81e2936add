"""The forward pass of one decoder layer over the operations of kernels.py.

Shared by layers whose products and norms are functions of weights (compiled.py) and layers whose
linears are modules (te_spec.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llava_steps.model.kernels import swiglu

Map = Callable[[Tensor], Tensor]


def decoder_layer(
    hidden: Tensor,
    norms: tuple[Map, Map],
    products: tuple[Map, Map, Map, Map],
    qk_norms: tuple[Map, Map] | None,
    attend: Map,
    heads: tuple[int, int, int],
    chosen: Tensor | None = None,
) -> Tensor:
    """hidden [T (/tp), hidden] -> the same; with `chosen`, int64 [n], these positions [n, hidden].

    `norms` before attention and MLP; `products` qkv, proj, fc1 and fc2, biases included; `attend`
    from [T, groups, shared + 2, head_dim] (see `kernels.attention`) to [T, groups * shared,
    head_dim]; `heads`: groups, query heads of each, head_dim, of this rank.

    After attention no position needs another one: the last layer continues with those that the loss
    uses.
    """
    groups, shared, width = heads
    qkv, proj, fc1, fc2 = products
    mixed = qkv(norms[0](hidden)).view(-1, groups, shared + 2, width)
    if qk_norms is not None:
        q, k, v = mixed[:, :, :shared], mixed[:, :, shared:-1], mixed[:, :, -1:]
        mixed = torch.cat((qk_norms[0](q), qk_norms[1](k), v), dim=2)
    attended = attend(mixed).flatten(1)
    if chosen is not None:
        hidden, attended = (x.index_select(0, chosen) for x in (hidden, attended))
    hidden = hidden + proj(attended)
    return hidden + fc2(swiglu(fc1(norms[1](hidden))))
