"""The forward check of a conversion: layers computed in both formats must agree.

The first and the last decoder layer, each followed by the final norm, run in fp32 on the same
random input: once as the module of transformers with the HF tensors, once written out here with the
fused Megatron tensors of the checkpoint. Only one layer is in memory at a time. The byte counts of
the certificate do not notice two tensors that are exchanged or fused in another order; this check
does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_steps.conversion import torch_dist_write
from llava_steps.conversion.hf_names import by_canonical_name
from llava_steps.conversion.mapping import entries
from llava_steps.conversion.rope import RotaryTable, rotate
from llava_steps.conversion.tensors import TensorDirectory
from llava_steps.core.errors import IntegrityError
from llava_steps.geometry.geometry import Geometry

TOKENS = 12
TOLERANCE = 1e-4
"""Largest difference, relative to the largest value that transformers computes."""
_LAYERS = "language_model.decoder.layers."
_NORM = "language_model.decoder.final_layernorm.weight"
_HF = "language_model.model."
Weight = Callable[[str], Tensor | None]


@torch.no_grad()
def compare_layers(
    geometry: Geometry,
    text_config: Mapping[str, Any],
    hf: TensorDirectory,
    reader: torch_dist_write.Reader,
) -> dict[str, float]:
    """Layer -> largest difference relative to the largest value, for the manifest.

    `text_config` is that of config.json. Values of the checkpoint are rounded to the dtype of
    their HF tensors. IntegrityError if a layer differs.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, geometry.hidden, generator=generator)
    spelled = by_canonical_name(hf.slots, str(hf.directory))
    # The tower is not checked here.
    items = {(e.megatron, e.layer): e for e in entries(geometry, {})}
    differences = {}
    for layer in sorted({0, geometry.layers - 1}):

        def weight(name: str, layer: int = layer) -> Tensor | None:
            key = (name, None) if name == _NORM else (_LAYERS + name, layer)
            if key not in items:
                return None
            dtype = hf.slots[spelled[items[key].hf[0]]].dtype
            return reader.read(*key).to(dtype).float()

        theirs = _transformers(geometry, text_config, hf, spelled, layer, x)
        ours = _megatron(geometry, weight, x)
        scale = theirs.abs().max().item()
        delta = (ours - theirs).abs().max().item()
        if not delta <= TOLERANCE * scale:
            raise IntegrityError(
                f"{reader.directory} and {hf.directory}: decoder layer {layer} differs by {delta} "
                f"where values reach {scale}; they are not the same model, convert it again"
            )
        differences[f"layer_{layer}"] = delta / scale if scale else 0.0
    return differences


def _transformers(
    geometry: Geometry,
    text_config: Mapping[str, Any],
    hf: TensorDirectory,
    spelled: Mapping[str, str],
    layer: int,
    x: Tensor,
) -> Tensor:
    """x [T, hidden] through one layer and the final norm of transformers' module, fp32."""
    from transformers import CONFIG_MAPPING, AutoModel
    from transformers.initialization import no_init_weights

    dropped = ("model_type", "layer_types", "dtype", "torch_dtype", "quantization_config")
    settings = {k: v for k, v in text_config.items() if k not in dropped}
    one = {"num_hidden_layers": 1, "vocab_size": 1, "attention_dropout": 0.0}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = CONFIG_MAPPING[geometry.family](**{**settings, **one, **tokens})
    with no_init_weights():
        model = AutoModel.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if not name.startswith("embed_tokens."):
            source = _HF + name.replace("layers.0.", f"layers.{layer}.", 1)
            parameter.copy_(hf.read(spelled[source]))
    out: Tensor = model(inputs_embeds=x[None], use_cache=False).last_hidden_state[0]
    return out


def _megatron(g: Geometry, weight: Weight, x: Tensor) -> Tensor:
    """x [T, hidden] through one layer and the final norm, from fused weights, fp32."""

    def linear(x: Tensor, name: str) -> Tensor:
        matrix = weight(f"{name}.weight")
        assert matrix is not None
        return F.linear(x, matrix, weight(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        scale = weight(name)
        return x if scale is None else F.rms_norm(x, scale.shape, scale, g.rms_eps)

    queries, tokens = g.heads // g.kv_heads, x.shape[0]
    hidden = norm(x, "input_layernorm.weight")
    groups = linear(hidden, "self_attention.linear_qkv")
    groups = groups.view(tokens, g.kv_heads, queries + 2, g.head_dim)
    query = norm(groups[:, :, :-2].flatten(1, 2), "self_attention.q_layernorm.weight")
    key = norm(groups[:, :, -2], "self_attention.k_layernorm.weight")
    cos, sin = RotaryTable(g)(torch.arange(tokens), torch.float32)
    query, key = (rotate(part, cos[:, None], sin[:, None]) for part in (query, key))
    q, k, v = (part.transpose(0, 1)[None] for part in (query, key, groups[:, :, -1]))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=queries > 1)
    x = x + linear(mixed[0].transpose(0, 1).flatten(1), "self_attention.linear_proj")
    gate, up = linear(norm(x, "pre_mlp_layernorm.weight"), "mlp.linear_fc1").chunk(2, dim=-1)
    return norm(x + linear(F.silu(gate) * up, "mlp.linear_fc2"), _NORM)
