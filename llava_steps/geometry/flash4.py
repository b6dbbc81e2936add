"""The requirements of FlashAttention 4. No torch: the launcher of a training uses it too."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Literal

VERSION = "4.0.0b36"
"""The release of flash-attn-4 that was tested."""
HEAD_DIMS = (64, 128)
"""Sizes whose gradients were compared with float64. On Hopper, size 16 gives wrong gradients."""
Asked = Literal["auto", "torch", "fa4"]


def missing(head_dim: int, capability: Sequence[int] | None, asked: Asked = "fa4") -> str:
    """What FlashAttention 4 lacks if `asked` for; empty if it is used.

    `capability` is the GPU's, None without one.
    """
    if head_dim not in HEAD_DIMS:
        return f"a head_dim of {' or '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    try:
        installed = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return f"the package flash-attn-4=={VERSION} (pip install 'llava-steps[flash]')"
    if installed != VERSION:
        return f"flash-attn-4=={VERSION}, and {installed} is installed"
    if capability is None:
        return "a GPU"
    # Measured and compared only on Hopper: on Blackwell it must be set.
    able = {9: "Hopper"} if asked == "auto" else {9: "Hopper", 10: "Blackwell"}
    if capability[0] not in able:
        wanted = f"{' or '.join(map(str, able))} ({', '.join(able.values())})"
        has = ".".join(map(str, capability))
        return f"compute capability {wanted}, and this GPU has {has}"
    return ""
