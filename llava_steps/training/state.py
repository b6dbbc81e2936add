"""Checkpoints of a training step: everything that resuming needs, committed as one.

    iter_0000200/
      weights/            model, torch_dist format, any layout loads it
      optimizer/          fp32 masters and Adam moments, torch_dist format, any layout loads it
      rng/rank_0000.safetensors
      train_state.json    step, loader state, layout
      commit.json         sizes and sha256 of all of these, written last

A checkpoint without its commit does not exist; a damaged one is an IntegrityError.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from llava_steps.core import commit, fsio
from llava_steps.core.config import Stage
from llava_steps.core.errors import InputError, IntegrityError
from llava_steps.model.checkpoint import load_weights, save_sharded, save_weights
from llava_steps.model.llava import Llava
from llava_steps.training.optimizer import Optimizer

WEIGHTS, OPTIMIZER, RNG, STATE = "weights", "optimizer", "rng", "train_state.json"


def save(
    root: Path,
    step: int,
    stage: Stage,
    model: Llava,
    optimizer: Optimizer,
    loader: dict[str, Any],
    keep: int,
) -> Path:
    """Commit a checkpoint after `step` optimizer steps; a collective call.

    Keeps the newest `keep` checkpoints. Returns the committed directory.
    """
    final = root / commit.iteration_name(step)
    temporary = root / f"{fsio.TEMPORARY}{final.name}"
    if dist.get_rank() == 0:
        fsio.remove_temporaries(root)
        for name in (WEIGHTS, OPTIMIZER, RNG):
            (temporary / name).mkdir(parents=True)
    dist.barrier()
    save_weights(model, temporary / WEIGHTS)
    sharded = optimizer.sharded_state(model.sharded_state_dict(), loading=False)
    save_sharded(sharded, temporary / OPTIMIZER)
    fsio.write_bytes(temporary / RNG / _rank_file(), to_bytes(_rng_state()))
    dist.barrier()
    if dist.get_rank() == 0:
        state = {"step": step, "loader": loader, "layout": layout(stage)}
        fsio.write_json(temporary / STATE, state)
        commit.commit_dir(temporary, final, {"step": step})
        commit.prune(root, keep)
    dist.barrier()
    return final


def find(root: Path) -> Path | None:
    """The newest committed checkpoint of an unfinished training, verified; None to start anew.

    A collective call: rank 0 looks and verifies, the others are told.
    """
    answer: list[str | None] = [None]
    problem: list[IntegrityError | None] = [None]
    if dist.get_rank() == 0:
        found = commit.committed(root)
        try:
            if found:
                commit.read_commit(found[-1][1])
                answer[0] = str(found[-1][1])
        except IntegrityError as error:
            problem[0] = IntegrityError(
                f"{error}; to go on from an older checkpoint, move {found[-1][1]} away"
            )
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise problem[0]
    dist.broadcast_object_list(answer, src=0)
    return Path(answer[0]) if answer[0] else None


def load(
    path: Path, stage: Stage, model: Llava, optimizer: Optimizer
) -> tuple[int, dict[str, Any]]:
    """Restore a verified checkpoint of this very training; returns (step, loader state)."""
    state = json.loads((path / STATE).read_bytes())
    if state["layout"] != layout(stage):
        raise InputError(
            f"{path} was saved with {state['layout']}, this training runs with {layout(stage)}"
        )
    load_weights(model, path / WEIGHTS)
    wanted = optimizer.sharded_state(model.sharded_state_dict(), loading=True)
    loaded = dist_checkpointing.load(wanted, str(path / OPTIMIZER))
    optimizer.load_sharded_state(loaded, state["step"])
    _restore_rng(load_file(path / RNG / _rank_file()))
    return state["step"], state["loader"]


def layout(stage: Stage) -> dict[str, int]:
    """The parallel sizes that a checkpoint's generator states belong to."""
    return {
        "tensor_model_parallel": stage.tensor_model_parallel,
        "pipeline_model_parallel": stage.pipeline_model_parallel,
        "data_parallel": stage.data_parallel,
    }


def _rank_file() -> str:
    return f"rank_{dist.get_rank():04d}.safetensors"


def _rng_state() -> dict[str, Tensor]:
    """Generator states of this rank: torch's and those of Megatron's tensor-parallel regions."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    return state | {f"tracker.{name}": value.clone() for name, value in tracker.items()}


def _restore_rng(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    tracker = {n.removeprefix("tracker."): v for n, v in state.items() if n.startswith("tracker.")}
    tensor_parallel.get_cuda_rng_tracker().set_states(tracker)
