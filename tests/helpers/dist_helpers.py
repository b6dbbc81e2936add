"""Runs a function in N processes (gloo; NCCL with as many GPUs) and gives back their results.

    results = spawn("tests.helpers.model_workers:layouts", 4, tmp_path, argument, ...)

The function gets (rank, *arguments) in an initialised world; arguments and results are pickled.
One fresh process imports everything and forks the ranks, so that the imports are paid for once.
When a rank fails, the others are stopped and its traceback is the AssertionError.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.helpers.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]


def spawn(
    function: str, ranks: int, directory: Path, *arguments: Any, timeout: float = PATIENCE
) -> list[Any]:
    """The results of `module:function` by rank; AssertionError with the failures' traces."""
    work = directory / f"spawn-{function.rpartition(':')[2]}-{time.monotonic_ns()}"
    work.mkdir(parents=True)
    (work / "job.pkl").write_bytes(pickle.dumps((function, ranks, arguments)))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        # Looking for GPUs must not begin to use them: CUDA outlives no fork.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }  # fmt: skip
    with (work / "log").open("w") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.dist_helpers", str(work)],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = launcher.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
    if code != 0:
        state = f"timed out after {timeout} s" if code is None else f"exit code {code}"
        traces = [
            f"--- {path.name}\n{path.read_text(errors='replace')[-6000:]}"
            for path in (*sorted(work.glob("*.err")), work / "log")
        ]
        raise AssertionError("\n".join((f"{function}: {state}", *traces)))
    return [pickle.loads((work / f"{rank}.out").read_bytes()) for rank in range(ranks)]  # noqa: S301


def _launch(work: Path) -> int:
    """Import, fork the ranks, wait; the first failure stops all of them."""
    function, ranks, arguments = pickle.loads((work / "job.pkl").read_bytes())  # noqa: S301
    from llava_steps.model import cpu_shim

    cpu_shim.import_megatron()
    cpu_shim.install()
    module, name = function.split(":")
    worker = getattr(importlib.import_module(module), name)
    children = {}
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            _rank(work, rank, ranks, worker, arguments)
        children[child] = rank
    while children:
        child, status = os.wait()
        children.pop(child, None)
        if status:
            time.sleep(0.5)  # the others may be writing their traces
            for other in children:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


def _rank(work: Path, rank: int, ranks: int, worker: Any, arguments: tuple[Any, ...]) -> None:
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.device_count() >= ranks
    try:
        if gpus:
            torch.cuda.set_device(rank)
        store = dist.FileStore(str(work / "store"), ranks)
        dist.init_process_group(
            "nccl" if gpus else "gloo", store=store, rank=rank, world_size=ranks
        )
        result = worker(rank, *arguments)
        (work / f"{rank}.out").write_bytes(pickle.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (work / f"{rank}.err").write_text(traceback.format_exc())
        # Not sys.exit: gloo's threads would wait for the ranks that are left hanging.
        os._exit(1)
    os._exit(0)


@contextlib.contextmanager
def model_parallel(tp: int, pp: int) -> Iterator[None]:
    """megatron-core's process groups for one layout, the rest of the world data parallel."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(tp, pp)
    tensor_parallel.model_parallel_cuda_manual_seed(1234, force_reset_rng=True)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    sys.exit(_launch(Path(sys.argv[1])))
