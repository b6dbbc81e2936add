"""The processes of a stage: parallel sizes, devices and network."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import NonNegativeInt as Count
from pydantic import PositiveInt, model_validator

from llava_steps.settings.fields import Port, StepConfig, quiet, value


class Parallel(StepConfig):
    """Processes, and the parallel sizes that divide the model among them."""

    gpus: PositiveInt = value(
        1,
        "processes per node: GPUs, or CPU processes without one",
        flag="--gpus",
        short="-g",
        counts_gpus=True,
    )
    nodes: PositiveInt = value(1, "nodes", flag="--node")
    tensor_model_parallel: PositiveInt = value(1, "tensor parallel size", flag="--tp")
    pipeline_model_parallel: PositiveInt = value(1, "pipeline parallel size", flag="--pp")
    virtual_pipeline: PositiveInt = value(
        1,
        "chunks of layers per pipeline rank; above 1: interleaved schedule, with less idle time "
        "and more communication",
    )
    pipeline_split: str = value(
        "auto",
        "decoder layers of each pipeline chunk, in the order of the model, such as 6,9,9; even; or "
        "auto: fewer layers for the chunks with the vision tower and the head",
        pattern=r"^(auto|even|[1-9]\d*(,[1-9]\d*)*)$",
    )
    sequence_parallel: bool = value(False, "shard activations between tensor-parallel regions")

    @property
    def world_size(self) -> int:
        """Processes in all: nodes x processes per node."""
        return self.gpus * self.nodes

    @property
    def data_parallel(self) -> int:
        """World size over tensor and pipeline parallel sizes."""
        return self.world_size // (self.tensor_model_parallel * self.pipeline_model_parallel)

    @model_validator(mode="after")
    def _sizes_divide_the_processes(self) -> Self:
        model = self.tensor_model_parallel * self.pipeline_model_parallel
        if self.world_size % model:
            raise ValueError(
                f"tensor_model_parallel x pipeline_model_parallel = {model} does not divide "
                f"gpus x nodes = {self.world_size}; change gpus, nodes or the parallel sizes"
            )
        return self

    @model_validator(mode="after")
    def _sequence_parallel_has_ranks(self) -> Self:
        if self.sequence_parallel and self.tensor_model_parallel == 1:
            raise ValueError("sequence_parallel needs tensor_model_parallel > 1; leave it out")
        return self

    @model_validator(mode="after")
    def _virtual_pipeline_has_a_pipeline(self) -> Self:
        if self.virtual_pipeline > 1 and self.pipeline_model_parallel == 1:
            raise ValueError(
                f"virtual_pipeline {self.virtual_pipeline} needs a pipeline: set "
                "pipeline_model_parallel above 1, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _split_names_every_chunk(self) -> Self:
        if self.pipeline_split in ("auto", "even"):
            return self
        chunks = len(self.pipeline_split.split(","))
        needed = self.pipeline_model_parallel * self.virtual_pipeline
        if chunks != needed:
            raise ValueError(
                f"pipeline_split {self.pipeline_split} has {chunks} numbers; "
                f"pipeline_model_parallel x virtual_pipeline = {needed} are needed, or auto"
            )
        return self


class Processes(StepConfig):
    """Devices, network and debug output of the processes."""

    debug: bool = quiet(False, "verbose collectives (torch, NCCL) and C++ stacks in the logs")
    gpu_ids: str = quiet("", "GPUs to use, such as 0,1,2; empty: all visible ones")
    interface: str = quiet("", "network interface of NCCL and Gloo, such as eth0")
    backend: Literal["auto", "nccl", "gloo"] = quiet("auto", "collectives; auto: nccl with GPUs")
    master_addr: str = quiet(
        "", "address of the first node; empty: that of its interface, or its name", short="-m"
    )
    master_port: Port = quiet(
        0, "port on the first node for all processes; 0: a free one", short="-p"
    )
    rdzv_port: Port = quiet(0, "port on the first node for the launchers; 0: a free one")
    rank: Count = quiet(
        0, "number of this node; not needed under srun and torchrun", flag="--rank", short="-r"
    )
