"""Optimisation of a stage: steps and learning rates, LoRA adapters, AdamW."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import NonNegativeInt as Count
from pydantic import PositiveInt, model_validator

from llava_steps.settings.fields import StepConfig, value

LoraTarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


class Schedule(StepConfig):
    """The number of steps and the learning rate of each."""

    train_steps: PositiveInt = value(1, "optimizer steps")

    lr: float = value(1e-3, "peak learning rate", gt=0)
    min_lr: float = value(0.0, "final learning rate of the schedule", ge=0)
    vision_lr: float | None = value(
        None, "peak learning rate of the vision tower, min_lr in proportion; default: lr", gt=0
    )
    projector_lr: float | None = value(
        None, "peak learning rate of the projector, min_lr in proportion; default: lr", gt=0
    )
    lm_lr: float | None = value(
        None,
        "peak learning rate of the language model, min_lr in proportion; default: lr",
        gt=0,
    )
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = value(
        "cosine", "decay after warm-up; wsd: constant, then linear over decay_steps"
    )
    decay_steps: Count = value(0, "number of final steps in which the schedule wsd decays")
    warmup_steps: Count = value(0, "steps of linear warm-up, from lr / warmup_steps")

    @model_validator(mode="after")
    def _decay_fits(self) -> Self:
        steps = self.train_steps - self.warmup_steps
        if self.lr_schedule == "wsd" and not 0 < self.decay_steps <= steps:
            raise ValueError(
                f"lr_schedule wsd: decay_steps {self.decay_steps} must be 1 to train_steps - "
                f"warmup_steps = {steps}"
            )
        if self.lr_schedule != "wsd" and self.decay_steps:
            raise ValueError(f"decay_steps needs lr_schedule wsd, not {self.lr_schedule}")
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_steps >= self.train_steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} must be below train_steps {self.train_steps}"
            )
        return self

    @model_validator(mode="after")
    def _rate_falls(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}; lower it")
        return self


class Lora(StepConfig):
    """LoRA adapters on the language model."""

    lora_rank: Count = value(
        0, "rank of LoRA adapters on the language model, which stays frozen; 0: no adapters"
    )
    lora_alpha: float = value(16.0, "LoRA: adapters are scaled by lora_alpha / lora_rank", gt=0)
    lora_targets: list[LoraTarget] = value(
        ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"],
        "LoRA: Megatron's fused linears with adapters: query, key and value; attention output; "
        "gate and up; down",
    )

    @model_validator(mode="after")
    def _targets_are_distinct(self) -> Self:
        if not self.lora_targets or len(set(self.lora_targets)) < len(self.lora_targets):
            raise ValueError(
                f"lora_targets {self.lora_targets}: name each linear once, and at least one"
            )
        return self


class Optimizer(StepConfig):
    """AdamW and gradient clipping."""

    weight_decay: float = value(
        0.0, "AdamW weight decay; not for norms, biases and other 1-d weights", ge=0
    )
    adam_beta1: float = value(0.9, "AdamW beta1", ge=0, lt=1)
    adam_beta2: float = value(0.999, "AdamW beta2", ge=0, lt=1)
    adam_eps: float = value(1e-8, "AdamW epsilon", gt=0)
    clip_grad: float = value(1.0, "global gradient norm limit; 0: no clipping", ge=0)
