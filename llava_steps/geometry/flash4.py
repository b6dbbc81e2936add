"""What FlashAttention 4 needs. No torch: the launcher of a training asks as well."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Literal

VERSION = "4.0.0b36"
"""The release of flash-attn-4 that was tested."""
HEAD_DIMS = (64, 128)
"""Those whose gradients were compared with float64. On Hopper those of 16 are wrong, silently."""
Asked = Literal["auto", "torch", "fa4"]


def missing(head_dim: int, capability: Sequence[int] | None, asked: Asked = "fa4") -> str:
    """What FlashAttention 4 lacks to be taken when so `asked`; empty when it is taken.

    `capability` is the GPU's, None without one.
    """
    if head_dim not in HEAD_DIMS:
        return f"a head_dim of {' or '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    try:
        found = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return f"the package flash-attn-4=={VERSION} (pip install 'llava-steps[flash]')"
    if found != VERSION:
        return f"flash-attn-4=={VERSION}, and {found} is installed"
    if capability is None:
        return "a GPU"
    # Measured and compared on Hopper alone: on Blackwell it has to be asked for.
    able = {9: "Hopper"} if asked == "auto" else {9: "Hopper", 10: "Blackwell"}
    if capability[0] not in able:
        wanted = f"{' or '.join(map(str, able))} ({', '.join(able.values())})"
        has = ".".join(map(str, capability))
        return f"compute capability {wanted}, and this GPU has {has}"
    return ""
