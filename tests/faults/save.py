"""python -m tests.faults.save CHAIN ROOM CASES: saves of a checkpoint, each with one fault.

Runs with the shim preloaded; started by tests.faults.drive. CASES is JSON, [[number, action], ...]
as fault_arm takes them. Imports once, and forks for each case a process that has two committed
checkpoints and saves a third beside them, and, where that failed, a second that tries again. Writes
a JSON line a case: what is the newest valid checkpoint after the fault, and at last.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from llava_steps.core.errors import StepError
from llava_steps.launch.job import Job
from llava_steps.settings.stage.stage import Stage
from llava_steps.store import commit
from llava_steps.training import checkpoints as state
from llava_steps.training import parallel, start
from llava_steps.training.guard import Counters
from llava_steps.training.optimizer import Optimizer, wrap

from megatron.core import parallel_state  # isort: skip  (needs the shim of llava_steps first)

LOADER = {"consumed_samples": 0}


def prepare(chain: Path, room: Path) -> tuple[Stage, Any, Any]:
    """A small model and its optimizer, in a process group of one that needs no threads to fork."""
    stage = Stage(stage=2, precision="fp32", keep_checkpoints=2)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1, 1, create_gloo_process_groups=False)
    parallel.seed_all(1)
    hf, checkpoint = (chain / "results" / n for n in ("hf_model", "megatron_checkpoint"))
    job = Job(stage, room, room, checkpoint, hf, room, "f")
    model = start.build(job, logging.getLogger("save"))
    return stage, model, Optimizer(stage, wrap(stage, model))


def fill(model: Any, optimizer: Any, value: float) -> None:
    """Weights and optimizer state that belong to checkpoint number `value`."""
    with torch.no_grad():
        for number, weight in enumerate(model[0].parameters()):
            weight.fill_(value + number / 1000)
    optimizer.reload_weights()


def child(
    made: tuple[Stage, Any, Any], room: Path, root: Path, number: int, action: int, old: bool
) -> None:
    """Save checkpoint 3, armed; with `old` save 1 and 2 instead, unarmed."""
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
    stage, model, optimizer = made
    for step in (1, 2) if old else (3,):
        fill(model, optimizer, float(step))
        if not old:
            shim.fault_arm(str(root).encode(), number, action)
        try:
            state.save(root, Counters(step=step), stage, model, optimizer, LOADER)
        finally:
            operations = shim.fault_count()
            shim.fault_arm(b"", 0, 0)
            (room / "operations").write_text(str(operations))


def in_a_fork(room: Path, *arguments: Any) -> tuple[int, str]:
    """(wait status, error text) of `child`."""
    (room / "error").unlink(missing_ok=True)
    (room / "operations").write_text("0")
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            child(*arguments)
        except BaseException as error:
            (room / "error").write_text(f"{type(error).__name__}: {error}")
            code = 1
        os._exit(code)
    status = os.waitpid(pid, 0)[1]
    error = room / "error"
    return status, error.read_text() if error.exists() else ""


def main() -> None:
    torch.set_num_threads(1)
    chain, room = Path(sys.argv[1]), Path(sys.argv[2])
    made = prepare(chain, room)
    before = room / "before"
    before.mkdir()
    status, error = in_a_fork(room, made, room, before, 0, 0, True)
    assert status == 0, error
    for number, action in json.loads(sys.argv[3]):
        root = room / f"case-{number}-{action}"
        shutil.copytree(before, root)
        status, error = in_a_fork(room, made, room, root, number, action, False)
        operations = int((room / "operations").read_text())
        row = {"case": [number, action], "operations": operations, "ended": status, "error": error}
        row["after"] = newest(root)
        if not (root / "iter_0000003/commit.json").exists():
            row["again"], row["again_error"] = in_a_fork(room, made, room, root, 0, 0, False)
        row["at_last"] = newest(root)
        shutil.rmtree(root)
        print(json.dumps(row), flush=True)


def newest(root: Path) -> list[Any] | str:
    """[iteration, digests of the files] of the newest checkpoint, after comparing its bytes."""
    try:
        iteration, path = commit.committed(root)[-1]
        commit.read_commit(path)
    except (StepError, IndexError) as error:
        return f"{type(error).__name__}: {error}"
    return [iteration, json.loads((path / commit.MARKER).read_bytes())["files"]]


if __name__ == "__main__":
    main()
