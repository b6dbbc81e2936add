"""The settings of a training stage: groups of fields, and the rules that span several groups."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from llava_steps.settings.stage.batch import Batch, Loader
from llava_steps.settings.stage.checkpoint import Checkpoint, Saving
from llava_steps.settings.stage.compute import Compute
from llava_steps.settings.stage.guard import Guard, TimeLimits
from llava_steps.settings.stage.model import Expected, Model
from llava_steps.settings.stage.optimizer import Lora, Optimizer, Schedule
from llava_steps.settings.stage.parallel import Parallel, Processes
from llava_steps.settings.stage.tracking import Tracking, Validation


# Fields, flags and rules come in the order of the groups from the last one to the first, because
# pydantic collects them from the last base class. Rules of two groups must not share a name.
class Stage(
    Processes,
    Tracking,
    Validation,
    Saving,
    Loader,
    TimeLimits,
    Guard,
    Expected,
    Checkpoint,
    Compute,
    Optimizer,
    Lora,
    Schedule,
    Batch,
    Parallel,
    Model,
):
    """One training stage."""

    def compiles(self, cuda: bool) -> bool:
        """Whether layers are compiled, on a machine with GPUs (`cuda`) or without."""
        if self.compile != "auto":
            return self.compile == "layers"
        return cuda and self.precision == "bf16" and not self.not_compiled()

    def not_compiled(self) -> str:
        """The setting that prevents compiled layers, with the needed value; empty if none does."""
        if self.tensor_model_parallel > 1:
            return f"tensor_model_parallel 1, not {self.tensor_model_parallel}"
        if self.recompute == "core_attn":
            return "recompute none or full: compiled attention keeps no scores"
        for name in ("lora_rank", "overlap_param_gather"):
            if getattr(self, name):
                return f"no {name}: compiled layers do not call the hooks that it needs"
        return ""

    def no_fp8_of_torch(self) -> str:
        """The setting that prevents FP8 by torch, with the needed value; empty if none does."""
        if self.fp8_recipe != "tensorwise":
            return f"fp8_recipe tensorwise, not {self.fp8_recipe}"
        if self.compile == "none":
            return "compile auto or layers"
        return self.not_compiled()

    @model_validator(mode="after")
    def _batch_is_shared_evenly(self) -> Self:
        share = self.micro_batch_size * self.data_parallel
        if self.global_batch_size % share:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of "
                f"micro_batch_size x data parallel size = {share}"
            )
        return self

    @model_validator(mode="after")
    def _virtual_pipeline_is_filled(self) -> Self:
        pp = self.pipeline_model_parallel
        share = self.micro_batch_size * self.data_parallel * pp
        if self.virtual_pipeline > 1 and self.global_batch_size % share:
            raise ValueError(
                f"virtual_pipeline {self.virtual_pipeline} needs as many microbatches on each rank "
                f"as a multiple of pipeline_model_parallel {pp}: set global_batch_size "
                f"{self.global_batch_size} to a multiple of micro_batch_size x data parallel size "
                f"x {pp} = {share}"
            )
        return self

    @model_validator(mode="after")
    def _layers_can_be_compiled(self) -> Self:
        if self.compile == "layers" and (obstacle := self.not_compiled()):
            raise ValueError(f"compile: layers needs {obstacle}; or set compile to auto or none")
        if self.fp8 and self.layer_spec == "local" and (obstacle := self.no_fp8_of_torch()):
            raise ValueError(
                f"fp8 with layer_spec local uses compiled layers, which needs {obstacle}; or set "
                "layer_spec to te"
            )
        return self

    @model_validator(mode="after")
    def _adapters_are_on_our_linears(self) -> Self:
        if self.lora_rank and self.transformer_engine:
            raise ValueError(
                f"{self._transformer_engine_by()} does not support LoRA, whose adapters need the "
                "local linears: set lora_rank to 0, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _starts_in_one_way(self) -> Self:
        if self.init and self.load_optim:
            raise ValueError(
                "init starts from random weights, load_optim continues a training: give one of them"
            )
        return self

    @model_validator(mode="after")
    def _every_process_has_a_gpu(self) -> Self:
        ids = self.gpu_ids.split(",") if self.gpu_ids else []
        if ids and (not all(i.strip().isdigit() for i in ids) or len(set(ids)) < self.gpus):
            raise ValueError(
                f"gpu_ids {self.gpu_ids!r} must list at least gpus = {self.gpus} different numbers"
            )
        return self

    @model_validator(mode="after")
    def _rates_are_for_what_is_trained(self) -> Self:
        for rate, frozen in (
            ("vision_lr", "freeze_vision"),
            ("projector_lr", "freeze_projector"),
            ("lm_lr", "freeze_lm"),
        ):
            if getattr(self, rate) is not None and getattr(self, frozen):
                raise ValueError(
                    f"{rate} {getattr(self, rate)} has no effect with {frozen}: leave it out, or "
                    f"set {frozen} to false"
                )
        return self

    @model_validator(mode="after")
    def _adapters_are_trained(self) -> Self:
        if self.lora_rank and self.freeze_lm:
            raise ValueError(
                f"lora_rank {self.lora_rank} trains the language model, which freeze_lm freezes: "
                "set freeze_lm to false (with LoRA its own weights stay frozen), or lora_rank to 0"
            )
        return self
