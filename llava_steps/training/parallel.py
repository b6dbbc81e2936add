"""Process groups, seeds and the ranks of a training process."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from llava_steps.core.errors import ConfigError
from llava_steps.launch.rendezvous import LISTENING, RENDEZVOUS
from llava_steps.model import cpu_shim
from llava_steps.settings.stage.stage import Stage

cpu_shim.install()

from megatron.core import parallel_state as ps  # noqa: E402  (needs the shim first)
from megatron.core import tensor_parallel  # noqa: E402

TIMEOUT = timedelta(minutes=60)
"""Of a collective. Long, because the launcher notices a hanging rank much earlier (watchdog.py)."""


@contextlib.contextmanager
def processes(stage: Stage) -> Iterator[None]:
    """Join the process group of the job and set up its parallel layout, seeds and determinism.

    Reads RANK, LOCAL_RANK, WORLD_SIZE and what `launch` says of the meeting point from the
    environment.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = choose_backend(stage.backend)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    where = _meeting_point(os.environ[RENDEZVOUS], rank, world)
    dist.init_process_group(backend, **where, rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        lay_out(stage)
        yield
    finally:
        # Only after success: a failed rank must not wait for the others here.
        if not _failing():
            ps.destroy_model_parallel()
            dist.destroy_process_group()


def lay_out(stage: Stage) -> None:
    """Set up the parallel layout, seeds and determinism within the processes that there are."""
    ps.initialize_model_parallel(
        stage.tensor_model_parallel,
        stage.pipeline_model_parallel,
        stage.virtual_pipeline if stage.virtual_pipeline > 1 else None,
        create_gloo_process_groups=False,
    )
    seed_all(stage.seed)
    if stage.precision == "fp32":
        forbid_tf32()
    if stage.deterministic:
        make_deterministic()


def _meeting_point(url: str, rank: int, world: int) -> dict[str, Any]:
    """The arguments of init_process_group that say where the processes meet."""
    if not url.startswith("tcp:"):
        return {"init_method": url}
    # Not as an init_method: under torchrun that would ask for the store of its agent. The port
    # listens since before the launchers met, so no other process can have taken it.
    where = urlsplit(url)
    listening = os.environ[LISTENING]
    store = TCPStore(
        str(where.hostname),
        where.port or 0,
        world,
        is_master=rank == 0,
        timeout=TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=int(listening) if listening else None,
    )
    return {"store": store}


def _failing() -> bool:
    import sys

    return sys.exc_info()[0] is not None


def choose_backend(wanted: str) -> str:
    """`auto` is nccl with GPUs and gloo without; nccl without GPUs is refused."""
    if wanted == "nccl" and not torch.cuda.is_available():
        raise ConfigError("--backend nccl needs a GPU, but none is visible; use auto or gloo")
    if wanted != "auto":
        return wanted
    return "nccl" if torch.cuda.is_available() else "gloo"


def seed_all(seed: int) -> None:
    """Seed python, numpy, torch and Megatron's tensor-parallel generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def forbid_tf32() -> None:
    """fp32 means fp32: torch lets cuDNN's convolutions round their inputs to TF32 by default."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def make_deterministic() -> None:
    """Refuse kernels whose result differs from run to run."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Otherwise every new tensor is first filled with NaN, to show reads of unwritten values.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def is_first_stage() -> bool:
    """Whether this rank holds the embeddings, the tower and the projector."""
    return bool(ps.is_pipeline_first_stage())


def is_last_stage() -> bool:
    """Whether this rank holds the head and computes the loss."""
    return bool(ps.is_pipeline_last_stage())


def is_model_lead() -> bool:
    """Whether this is the one rank of its data-parallel replica that writes for it."""
    return ps.get_tensor_model_parallel_rank() == 0 and is_first_stage()


def device() -> torch.device:
    """The device of this rank."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum of `values` over the data-parallel replicas, the same on every rank.

    Of each replica the values of one rank count: the last pipeline stage's, tensor rank 0.
    """
    if not (is_last_stage() and ps.get_tensor_model_parallel_rank() == 0):
        values = torch.zeros_like(values)
    dist.all_reduce(values)
    return values


def highest(values: list[float]) -> list[float]:
    """The highest of each value over all ranks of the job; the same answer on every rank."""
    if dist.get_world_size() == 1:
        return values  # asking the GPU would wait for all its work
    maxima = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(maxima, dist.ReduceOp.MAX)
    return list(maxima.tolist())


def on_any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank of the job; the same answer on every rank."""
    if dist.get_world_size() == 1:
        return flag  # asking the GPU would wait for all its work
    raised = torch.tensor(int(flag), device=device())
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised.item())
