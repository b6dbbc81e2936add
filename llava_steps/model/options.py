"""How a model is laid out and computed, as opposed to what it is (`Geometry`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from llava_steps.conversion.lora import Lora
from llava_steps.geometry.geometry import Geometry
from llava_steps.geometry.layout import check_fp8, check_layout, even_split
from llava_steps.model.flash import Kernel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ModelOptions:
    """Layout and compute options of one model chunk.

    `split`: decoder layers of each of the pp x vp chunks, in the order of the model; empty: even.
    `chunk`: the number of this chunk among the vp chunks of its pipeline rank.
    `pre_process` / `post_process`: this chunk is the first / last of the model.
    `lora`: adapters on the language model, which is frozen then.
    `recompute`: activations that are recomputed in the backward pass.
    `compiled`: layers, tower and head are compiled functions (compiled.py), with `spec` te only
    tower and head; needs tp 1.
    `spec`: the linears of the decoder layers: local, or Transformer Engine's (te_spec.py).
    `fp8`: the recipe of their products, or None for bf16; with `spec` local only tensorwise, and
    compiled (fp8.py).
    `flash`: the flash attention kernel (flash.py).
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    tp: int = 1
    pp: int = 1
    vp: int = 1
    split: tuple[int, ...] = ()
    chunk: int = 0
    sequence_parallel: bool = False
    freeze_vision: bool = True
    freeze_projector: bool = False
    freeze_lm: bool = False
    pre_process: bool = True
    post_process: bool = True
    recompute: Literal["none", "core_attn", "full"] = "none"
    compiled: bool = False
    spec: Literal["local", "te"] = "local"
    fp8: Literal["tensorwise", "blockwise"] | None = None
    flash: Kernel = "torch"
    lora: Lora | None = None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]


def transformer_config(geometry: Geometry, options: ModelOptions) -> TransformerConfig:
    """megatron-core's configuration from the geometry. No dropout, no fusion, no init."""
    chunks = options.pp * options.vp
    check_layout(geometry, options.tp, options.pp, options.vp, options.split or "even")
    products = transformer_engine(geometry, options)
    split = options.split or even_split(geometry.layers, chunks)
    pipeline: dict[str, Any] = {}
    if chunks > 1:
        cut = [["decoder"] * layers for layers in split]
        cut[0].insert(0, "embedding")
        cut[-1].append("loss")
        pipeline = {"pipeline_model_parallel_layout": cut}
    if options.vp > 1:
        # With two ranks each is next and previous of the other: batched transfers would mix up.
        pipeline |= {
            "virtual_pipeline_model_parallel_size": options.vp,
            "overlap_p2p_comm": True,
            "batch_p2p_comm": False,
        }
    recomputes: dict[str, dict[str, Any]] = {
        "none": {},
        "core_attn": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    }
    return TransformerConfig(
        num_layers=geometry.layers,
        hidden_size=geometry.hidden,
        ffn_hidden_size=geometry.ffn,
        num_attention_heads=geometry.heads,
        num_query_groups=geometry.kv_heads,
        kv_channels=geometry.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=geometry.rms_eps,
        qk_layernorm=geometry.qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=geometry.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=options.dtype,
        pipeline_dtype=options.dtype,
        bf16=options.precision == "bf16",
        tensor_model_parallel_size=options.tp,
        pipeline_model_parallel_size=options.pp,
        sequence_parallel=options.sequence_parallel,
        # Weights always come from a checkpoint; megatron-core would draw them all first.
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        # A sum over tokens, divided once by the number of tokens in the global batch.
        calculate_per_token_loss=True,
        batch_p2p_sync=False,
        # Each of these needs Apex, Transformer Engine or a compiler at run time.
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        cross_entropy_loss_fusion=False,
        **pipeline,
        **recomputes[options.recompute],
        **products,
    )


def transformer_engine(geometry: Geometry, options: ModelOptions) -> dict[str, Any]:
    """The part of megatron-core's configuration for Transformer Engine's linears.

    ConfigError when FP8 products do not fit the geometry.
    """
    if options.fp8:
        check_fp8(geometry, options.tp, options.fp8)
    if options.spec != "te":
        return {}
    # Otherwise all microbatches use the FP8 weights of the first one, and its gradients replace
    # main_grad. Both are right only if each step begins with a call that announces it.
    settings: dict[str, Any] = {"disable_parameter_transpose_cache": True}
    if options.fp8:
        settings |= {
            # Gradients by tensor need the range of E5M2; blocks of them do not.
            "fp8": "hybrid" if options.fp8 == "tensorwise" else "e4m3",
            "fp8_recipe": options.fp8,
        }
    return settings
