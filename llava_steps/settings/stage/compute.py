"""Computation of a stage: precision, kernels, recomputation, overlap."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import NonNegativeInt as Count
from pydantic import model_validator

from llava_steps.settings.fields import StepConfig, value


class Compute(StepConfig):
    """Precision, kernels, recomputation in the backward pass, and overlap."""

    precision: Literal["bf16", "fp32"] = value("bf16", "compute dtype; masters stay fp32")
    recompute: Literal["none", "core_attn", "full"] = value(
        "none", "activations that the backward pass recomputes instead of keeping them"
    )
    compile: Literal["auto", "layers", "none"] = value(
        "auto",
        "layers: decoder layers, vision layers and head are compiled once, for any length; needs "
        "tensor_model_parallel 1; auto: layers on a GPU in bf16 if possible, else none; with "
        "layer_spec te the decoder layers are not compiled",
    )
    flash_attention: Literal["auto", "torch", "fa4"] = value(
        "auto",
        "attention on a GPU in bf16: torch's kernels, or FlashAttention 4 (package flash-attn-4; "
        "Hopper and Blackwell); auto: fa4 on Hopper if possible, else torch",
    )
    overlap_grad_reduce: bool = value(
        False, "data parallel: send gradients during the backward pass"
    )
    overlap_param_gather: bool = value(
        False,
        "data parallel: fetch updated weights during the next forward pass; layers are then not "
        "compiled",
    )
    bucket_size: Count = value(
        0,
        "weights whose gradients are sent together with overlap_grad_reduce; 0: 40 million, or one "
        "million for each data parallel rank if that is more",
    )
    fp8: bool = value(
        False,
        "matrix products of the decoder layers in FP8; needs Hopper or later (or Ada) and "
        "precision bf16; layer_spec selects the linears",
    )
    fp8_recipe: Literal["tensorwise", "blockwise"] = value(
        "tensorwise",
        "FP8: one scale per tensor, or one per 128 values (128 x 128 of a weight), computed "
        "from the values of every microbatch",
    )
    layer_spec: Literal["auto", "local", "te"] = value(
        "auto",
        "linears of the decoder layers: local, or Transformer Engine's (te), with the same "
        "checkpoint; auto: te with fp8, else local; local with fp8: products of torch in compiled "
        "layers, tensorwise",
    )
    deterministic: bool = value(
        True, "refuse kernels whose results are not bit-identical in every run"
    )

    @property
    def transformer_engine(self) -> bool:
        """Whether the decoder layers have Transformer Engine's linears."""
        return self.layer_spec == "te" or (self.fp8 and self.layer_spec == "auto")

    @model_validator(mode="after")
    def _flash_attention_has_its_precision(self) -> Self:
        if self.flash_attention == "fa4" and self.precision != "bf16":
            raise ValueError(
                f"flash_attention: fa4 needs precision bf16, not {self.precision}; set it to auto, "
                "which then uses no flash attention"
            )
        return self

    @model_validator(mode="after")
    def _overlap_options_are_for_overlap(self) -> Self:
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ValueError("overlap_param_gather needs overlap_grad_reduce; set it too")
        if self.bucket_size and not self.overlap_grad_reduce:
            raise ValueError(
                "bucket_size needs overlap_grad_reduce; set that, or leave bucket_size out"
            )
        return self

    @model_validator(mode="after")
    def _recipe_is_for_fp8(self) -> Self:
        if self.fp8_recipe != "tensorwise" and not self.fp8:
            raise ValueError(
                f"fp8_recipe {self.fp8_recipe} needs fp8; set that, or leave fp8_recipe out"
            )
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
                "recompute; set recompute to none or full"
            )
        return self

    def _transformer_engine_by(self) -> str:
        """The setting that selects Transformer Engine's layers."""
        return "fp8" if self.fp8 else "layer_spec te"
