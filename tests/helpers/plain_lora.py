"""LoRA in plain PyTorch on transformers' LLaVA: hooks on its own linears, nothing fused.

Nothing of llava_steps is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Megatron's fused linear -> transformers' module, its linears in order
FUSED = {
    "linear_qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "linear_proj": ("self_attn", ("o_proj",)),
    "linear_fc1": ("mlp", ("gate_proj", "up_proj")),
    "linear_fc2": ("mlp", ("down_proj",)),
}


def add(model: Any, read: Callable[[str], Tensor], targets: tuple[str, ...], scale: float) -> None:
    """Give every decoder layer adapters: `read("linear_qkv.a")` [layers, rank, in], "....b"
    [layers, out, rank], whose rows are ordered as Megatron fuses the linears.
    """
    text = model.config.text_config
    for number, layer in enumerate(model.model.language_model.layers):
        for target in targets:
            place, names = FUSED[target]
            a, b = (read(f"{target}.{k}")[number].clone() for k in "ab")
            parts = [b]
            if target == "linear_qkv":
                groups = text.num_key_value_heads
                share = b.reshape(groups, -1, layer.self_attn.head_dim, b.shape[-1])
                cuts = (share[:, :-2], share[:, -2:-1], share[:, -1:])
                parts = [cut.reshape(-1, b.shape[-1]) for cut in cuts]
            elif target == "linear_fc1":
                parts = list(b.chunk(2))
            shared = torch.nn.Parameter(a)
            layer.register_parameter(f"lora_{target}_a", shared)
            for name, part in zip(names, parts, strict=True):
                linear = getattr(getattr(layer, place), name)
                own = torch.nn.Parameter(part.contiguous())
                linear.register_parameter("lora_b", own)
                linear.register_forward_hook(_hook(shared, own, scale))


def _hook(a: Tensor, b: Tensor, scale: float) -> Any:
    return lambda module, inputs, out: out + scale * ((inputs[0] @ a.T) @ b.T)
