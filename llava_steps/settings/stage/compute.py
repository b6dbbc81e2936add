"""How a stage computes: precision, kernels, memory against time."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import NonNegativeInt as Count
from pydantic import model_validator

from llava_steps.settings.fields import StepConfig, value


class Compute(StepConfig):
    """Precision, kernels, and what the backward pass overlaps or computes again."""

    precision: Literal["bf16", "fp32"] = value("bf16", "compute dtype; masters stay fp32")
    recompute: Literal["none", "core_attn", "full"] = value(
        "none", "activations that the backward pass computes again instead of keeping them"
    )
    compile: Literal["auto", "layers", "none"] = value(
        "auto",
        "layers: decoder layers, vision layers and head are compiled once, for any length; needs "
        "tensor_model_parallel 1; auto: layers on a GPU in bf16 where that can be, else none; with "
        "layer_spec te the decoder layers are left as they are",
    )
    flash_attention: Literal["auto", "torch", "fa4"] = value(
        "auto",
        "attention on a GPU in bf16: torch's kernels, or FlashAttention 4 (package flash-attn-4; "
        "Hopper and Blackwell); auto: fa4 on Hopper where that can be, else torch",
    )
    overlap_grad_reduce: bool = value(
        False, "data parallel: send gradients while the backward pass goes on"
    )
    overlap_param_gather: bool = value(
        False,
        "data parallel: fetch updated weights while the next forward pass goes on; layers are not "
        "compiled then",
    )
    bucket_size: Count = value(
        0,
        "weights whose gradients are sent together with overlap_grad_reduce; 0: 40 million, or one "
        "million for each data parallel rank if that is more",
    )
    fp8: bool = value(
        False,
        "matrix products of the decoder layers in FP8; needs a GPU from Hopper (or Ada) on, and "
        "precision bf16; layer_spec says by whose linears",
    )
    fp8_recipe: Literal["tensorwise", "blockwise"] = value(
        "tensorwise",
        "FP8: one scale for a tensor, or one for each 128 values (128 x 128 of a weight); taken "
        "anew from the values of every microbatch, nothing is kept",
    )
    layer_spec: Literal["auto", "local", "te"] = value(
        "auto",
        "linears of the decoder layers: our own, or Transformer Engine's; the checkpoint is the "
        "same; auto: te with fp8, else local; fp8 with local: products of torch within compiled "
        "layers, tensorwise",
    )
    deterministic: bool = value(True, "refuse kernels that give other bits in a second run")

    @property
    def transformer_engine(self) -> bool:
        """Whether the decoder layers have Transformer Engine's linears."""
        return self.layer_spec == "te" or (self.fp8 and self.layer_spec == "auto")

    @model_validator(mode="after")
    def _flash_attention_has_its_precision(self) -> Self:
        if self.flash_attention == "fa4" and self.precision != "bf16":
            raise ValueError(
                f"flash_attention fa4 needs precision bf16, not {self.precision}; set it to auto, "
                "which has no flash attention there"
            )
        return self

    @model_validator(mode="after")
    def _overlap_options_are_for_overlap(self) -> Self:
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ValueError("overlap_param_gather needs overlap_grad_reduce; set it as well")
        if self.bucket_size and not self.overlap_grad_reduce:
            raise ValueError("bucket_size is for overlap_grad_reduce; set that, or remove it")
        return self

    @model_validator(mode="after")
    def _recipe_is_for_fp8(self) -> Self:
        if self.fp8_recipe != "tensorwise" and not self.fp8:
            raise ValueError(f"fp8_recipe {self.fp8_recipe} is for fp8; set that, or remove it")
        return self

    @model_validator(mode="after")
    def _fp8_has_its_precision(self) -> Self:
        if (self.fp8 or self.transformer_engine) and self.precision != "bf16":
            asked = self._transformer_engine_by()
            raise ValueError(f"{asked} needs precision bf16, not {self.precision}")
        return self

    @model_validator(mode="after")
    def _transformer_engine_keeps_no_scores(self) -> Self:
        if self.transformer_engine and self.recompute == "core_attn":
            raise ValueError(
                f"{self._transformer_engine_by()}: the attention of its layers keeps no scores to "
                "compute again; set recompute to none or full"
            )
        return self

    def _transformer_engine_by(self) -> str:
        """The setting that asks for Transformer Engine's layers."""
        return "fp8" if self.fp8 else "layer_spec te"
