"""Trainings in many parallel layouts within one set of processes, so that starts are paid for once.

The trainings are the real ones (`training.loop.train`, checkpoints included); only launcher and
command line are left out. Run through tests.helpers.dist_helpers.spawn.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
import transformers.models.clip.modeling_clip
import transformers.models.llava.modeling_llava  # noqa: F401
from torch.distributed import distributed_c10d

from llava_steps.launch.job import Job
from llava_steps.launch.stop import StopRequest
from llava_steps.launch.watchdog import BEATS, Beat
from llava_steps.settings.stage.stage import Stage
from llava_steps.training import loop, parallel
from tests.helpers import chain

from megatron.core import parallel_state  # isort: skip  (needs the shim of llava_steps first)


@dataclass(frozen=True)
class Training:
    """One training of all processes: settings of Stage, and the checkpoints to start from."""

    name: str
    settings: dict[str, Any] = field(hash=False)
    start: Path
    """Directory of a Megatron checkpoint, such as the entry of another training."""


@dataclass(frozen=True)
class Room:
    """What trainings share: where the model and the data are, and where entries go."""

    hf: Path
    dataset: Path
    root: Path

    def entry(self, name: str) -> Path:
        """Where the training NAME leaves its checkpoints and metrics."""
        return self.root / name.replace(" ", "_")


def train(rank: int, room: Room, trainings: Sequence[Training]) -> list[list[float]]:
    """Losses of the steps of each training, in their order; checkpoints stay in their entries."""
    os.environ[BEATS] = str(room.root)
    stop, beat = StopRequest(), Beat(rank, room.root / "logs")
    log = logging.getLogger("layouts")
    log.setLevel(logging.ERROR)
    found = []
    for training in trainings:
        began = time.monotonic()
        stage = Stage.model_validate({"gpus": dist.get_world_size(), **training.settings})
        entry = room.entry(training.name)
        entry.mkdir(parents=True, exist_ok=True)
        job = Job(stage, entry, entry, training.start, room.hf, room.dataset, "f")
        parallel.lay_out(stage)
        try:
            loop.train(job, log, stop, beat)
        finally:
            leave_layout()
        rows = (entry / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(row)["loss"] for row in rows])
        if rank == 0:
            print(training.name, f"{time.monotonic() - began:.1f} s", flush=True)
    return found


def reductions(rank: int, room: Room, training: Training) -> list[str]:
    """What happens to the gradients of the training, in its order: "start" and "finish" of a
    bucket's reduction.
    """
    from megatron.core.distributed import param_and_grad_buffer

    group, events = param_and_grad_buffer._ParamAndGradBucketGroup, []
    start, finish = group.start_grad_sync, group.finish_grad_sync

    def starting(*args: Any, **kwargs: Any) -> None:
        events.append("start")
        start(*args, **kwargs)

    def finishing(*args: Any, **kwargs: Any) -> None:
        events.append("finish")
        finish(*args, **kwargs)

    group.start_grad_sync, group.finish_grad_sync = starting, finishing
    train(rank, room, [training])
    return events


def leave_layout() -> None:
    """Forget the parallel groups, and end their threads too: Megatron only forgets them."""
    parallel_state.destroy_model_parallel()
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def deep_model(made: chain.Chain, root: Path, layers: int = 4) -> tuple[Path, Path]:
    """(HF directory, Megatron checkpoint) like those of the chain, with random weights and as many
    layers as interleaved pipelines need.
    """
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    hf, megatron = root / "deep_hf", root / "deep_megatron"
    if megatron.exists():
        return hf, megatron
    config = LlavaConfig.from_pretrained(made.hf)
    config.text_config.num_hidden_layers = layers
    # Not those of the demo: what is tested are layouts, whose rounding grows with the width.
    config.text_config.hidden_size = 64
    config.text_config.head_dim = 16
    config.text_config.intermediate_size = 192
    config.text_config.num_attention_heads = 4
    config.text_config.num_key_value_heads = 2
    config.text_config.initializer_range = 0.1
    config.text_config.layer_types = None
    torch.manual_seed(1)
    shutil.copytree(made.hf.resolve(), hf, ignore=shutil.ignore_patterns("manifest.json", "model*"))
    LlavaForConditionalGeneration(config).float().save_pretrained(hf)
    chain.run_step("hf_to_megatron", f"--hf-dir={hf}", f"--save-dir={megatron}", cwd=made.root)
    return hf, megatron
