"""Checkpoints of a training step: everything that resuming needs, committed as one.

    iter_0000200/
      weights/            model, torch_dist format, any layout loads it
      optimizer/          fp32 masters and Adam moments, torch_dist format, any layout loads it
      rng/rank_0000.safetensors
      train_state.json    step, loader state, layout
      commit.json         sizes and sha256 of all of these, written last

A checkpoint without its commit does not exist; a damaged one is never loaded.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from llava_steps.conversion import torch_dist_write
from llava_steps.core import filesystem
from llava_steps.core.errors import ConfigError, InputError, IntegrityError, StepError
from llava_steps.core.format import size
from llava_steps.model.llava import Llava
from llava_steps.model.weights import (
    load_weights,
    save_sharded,
    save_weights,
    sharded_weights,
)
from llava_steps.settings.stage.stage import Stage
from llava_steps.store import commit
from llava_steps.training import parallel
from llava_steps.training.async_save import Commits
from llava_steps.training.guard import Counters
from llava_steps.training.optimizer import Optimizer

WEIGHTS, OPTIMIZER, RNG, STATE = "weights", "optimizer", "rng", "train_state.json"
DAMAGED = ".work/damaged"
T = TypeVar("T")


def save(
    root: Path,
    counters: Counters,
    stage: Stage,
    model: list[Llava],
    optimizer: Optimizer,
    loader: dict[str, Any],
    commits: Commits | None = None,
) -> Path:
    """Commit a checkpoint after `counters.step` steps, by `commits` or at once; a collective call.

    Keeps the newest `stage.keep_checkpoints` and, with `stage.keep_every`, each whose step is a
    multiple of it. Returns the committed directory. Raises on rank 0 what the last commit raised.
    """
    final = root / commit.iteration_name(counters.step)
    temporary = root / f"{filesystem.TEMPORARY}{final.name}"
    commits = commits or Commits()
    if dist.get_rank() == 0:
        commits.finish()
        filesystem.remove_temporaries(root)
    check_space(root, model, optimizer)
    optimizer.settle()
    if dist.get_rank() == 0:
        for name in (WEIGHTS, RNG):
            (temporary / name).mkdir(parents=True)
    dist.barrier()
    with filesystem.named(temporary):
        save_weights(model, temporary / WEIGHTS)
        if stage.save_optim or counters.step < stage.train_steps:
            sharded = optimizer.sharded_state(sharded_weights(model), loading=False)
            save_sharded(sharded, temporary / OPTIMIZER)
        filesystem.write_bytes(temporary / RNG / _rank_file(), to_bytes(_rng_state()))
    dist.barrier()
    if dist.get_rank() == 0:
        info = asdict(counters)  # now, because the counters change
        filesystem.write_json(temporary / STATE, info | {"loader": loader, "layout": layout(stage)})

        def complete() -> None:
            commit.commit_dir(temporary, final, info)
            commit.prune(root, stage.keep_checkpoints, stage.keep_every)

        commits.begin(complete)
    dist.barrier()
    return final


def check_space(root: Path, model: list[Llava], optimizer: Optimizer) -> None:
    """InputError unless the disk of `root` has room for one more checkpoint; a collective call."""
    # Tensor-parallel ranks all count replicated tensors, so this is never too little.
    own = torch.tensor(optimizer.state_bytes(), device=parallel.device())
    if parallel_state.get_data_parallel_rank() == 0:
        parameters = [p for chunk in model for p in chunk.parameters()]
        own += sum(p.numel() * p.element_size() for p in parameters)
    dist.all_reduce(own)
    free = shutil.disk_usage(root).free
    short = parallel.on_any_rank(free < own.item())
    if short:
        raise InputError(
            f"{root}: a checkpoint takes up to {size(own.item())} and "
            f"{size(free)} are free; free some space there and run again"
        )


def find(root: Path, log: logging.Logger) -> Path | None:
    """The newest valid checkpoint of an unfinished training; None to start from the beginning.

    Damaged ones that are newer are set aside in `.work/damaged`, with an error in the log. Raises
    IntegrityError if all are damaged: a begun training never silently starts over. A
    collective call.
    """
    return _on_rank_0(lambda: _newest_valid(root, log))


def _on_rank_0(read: Callable[[], T]) -> T:
    """What `read` returns on rank 0, on every rank; so is its IntegrityError. Collective."""
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = read()
        except IntegrityError as error:
            outcome[0] = error
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], IntegrityError):
        raise IntegrityError(str(outcome[0]))
    return cast(T, outcome[0])


def _newest_valid(root: Path, log: logging.Logger) -> Path | None:
    filesystem.remove_temporaries(root)
    damaged: list[tuple[Path, StepError]] = []
    for _, path in reversed(commit.iterations(root)):
        try:
            commit.read_commit(path)
        except (IntegrityError, InputError) as error:  # InputError: its marker is lost
            damaged.append((path, error))
            continue
        for bad, reason in damaged:
            aside = root / DAMAGED / bad.name
            filesystem.remove(aside)
            aside.parent.mkdir(parents=True, exist_ok=True)
            bad.rename(aside)
            log.error("DAMAGED CHECKPOINT: %s; set aside; resuming from %s", reason, path.name)
        return path
    if damaged:
        raise IntegrityError(
            f"{damaged[0][1]}; no older checkpoint is whole either. Restore it, or move "
            f"{damaged[0][0].parent}/iter_* away to train from the beginning"
        )
    return None


def verified(path: Path) -> Path:
    """`path`, after all bytes of this committed checkpoint were compared with its marker.

    A collective call: rank 0 reads, every rank raises the same IntegrityError.
    """
    _on_rank_0(lambda: commit.read_commit(path))
    return path


def load(
    path: Path, stage: Stage, model: list[Llava], optimizer: Optimizer
) -> tuple[Counters, dict[str, Any]]:
    """Restore a verified checkpoint of a training; returns (counters, loader state).

    In the layout that it was saved in, everything is restored bit for bit; in another one the
    generators start from the seed. Raises InputError if it has only weights, ConfigError if weights
    are trained here that were frozen there.
    """
    for name in (STATE, OPTIMIZER):
        if not (path / name).exists():
            raise InputError(
                f"{path} has no {name}: it was not saved by a training, or without save_optim; "
                "leave load_optim out to start from its weights"
            )
    state = json.loads((path / STATE).read_bytes())
    optimizer.settle()  # no update may arrive after the load
    load_weights(model, path / WEIGHTS)
    wanted = optimizer.sharded_state(sharded_weights(model), loading=True)
    _check_trained(path, wanted)
    loaded = dist_checkpointing.load(wanted, str(path / OPTIMIZER))
    counters = Counters(**{f.name: state[f.name] for f in fields(Counters)})
    optimizer.load_sharded_state(loaded, counters.updates)
    if state["layout"] == layout(stage):
        _restore_rng(load_file(path / RNG / _rank_file()))
    return counters, state["loader"]


def _check_trained(path: Path, wanted: dict[int, Any]) -> None:
    own = {shard.key for shard in nested_values(wanted)}
    gathered: list[set[str]] = [set()] * dist.get_world_size()
    # All ranks raise it: if only one did, the others would end with connection errors.
    dist.all_gather_object(
        gathered, own - torch_dist_write.Reader(path / OPTIMIZER).shapes().keys()
    )
    if missing := sorted(set().union(*gathered)):
        raise ConfigError(
            f"load_optim: the optimizer of {path} has no {missing[0]}, and {len(missing) - 1} more "
            "of what is trained here, because it was frozen there: set freeze_vision, "
            "freeze_projector, freeze_lm and the lora settings as they were, or leave load_optim "
            "out to start from its weights"
        )


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
