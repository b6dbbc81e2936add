"""python -m llava_steps.launch.probe --place store/.probe

Reports the machine of each process of a job, and whether the processes reach each other. The doctor
starts it where a training would run, one process per node. The first process writes its address to
--place, as in a training. Then a sum over all processes is computed twice and timed. Each process
prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from llava_steps.core import filesystem
from llava_steps.core.errors import ConfigError
from llava_steps.launch.address import interface_environment, own_address
from llava_steps.settings.stage.stage import Stage

PATIENCE = timedelta(seconds=120)
WORDS = 4 << 20
"""Numbers in the sum: 16 MB."""


def main() -> int:
    """Connect, compute the sum, print the result; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--place", type=Path, required=True, help="directory that all processes can see"
    )
    parser.add_argument("--interface", default="", help="network interface, as in a training")
    parser.add_argument("--master-addr", default="", help="address of the first node")
    parser.add_argument("--backend", choices=("auto", "nccl", "gloo"), default="auto")
    given = parser.parse_args()
    rank = int(os.environ.get("SLURM_PROCID", os.environ.get("RANK", "0")))
    world = int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("WORLD_SIZE", "1")))
    report = sees()
    try:
        if world > 1:
            report |= meets(given, rank, world)
    except (OSError, RuntimeError, ConfigError) as error:
        print(json.dumps(report | {"rank": rank, "error": str(error)}), flush=True)
        return 1
    print(json.dumps(report | {"rank": rank}), flush=True)
    os._exit(0)  # without waiting for threads of the backend


def sees() -> dict[str, Any]:
    """Machine, versions and GPUs."""
    import megatron.core
    import torch

    return {
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "torch": torch.__version__,
        "megatron": megatron.core.__version__,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def meets(given: argparse.Namespace, rank: int, world: int) -> dict[str, Any]:
    """Backend and speed of a sum over all processes.

    Raises:
        RuntimeError: they do not connect, or the sum is wrong.
    """
    import torch
    from torch import distributed

    os.environ.update(interface_environment(given.interface))
    gpus = torch.cuda.device_count()
    # NCCL refuses two processes on one GPU.
    alone = gpus > int(os.environ.get("LOCAL_RANK", "0"))
    backend = given.backend
    if backend == "auto":
        backend = "nccl" if alone else "gloo"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) if gpus else 0)
    address, port = _where(given, rank, world)
    begun = time.monotonic()
    distributed.init_process_group(
        backend, f"tcp://{address}:{port}", timeout=PATIENCE, rank=rank, world_size=world
    )
    met = time.monotonic() - begun
    ones = torch.ones(WORDS, device=device if backend == "nccl" else "cpu")
    for _ in range(2):
        numbers = ones * (rank + 1)
        begun = time.monotonic()
        distributed.all_reduce(numbers)
        total = float(numbers[-1])  # waits for a GPU
        seconds = time.monotonic() - begun
    if total != world * (world + 1) / 2:
        raise RuntimeError(f"the sum of ranks is wrong: {total}")
    distributed.barrier()
    distributed.destroy_process_group()
    return {
        "backend": backend,
        "meet_s": round(met, 2),
        "mb_per_s": round(4 * WORDS / seconds / 1e6),
    }


def _where(given: argparse.Namespace, rank: int, world: int) -> tuple[str, int]:
    """Address and port of the first process, by its note."""
    path = given.place / f"meet-{os.environ.get('SLURM_JOB_ID', '0')}.json"
    if rank == 0:
        stage = Stage(
            nodes=world, global_batch_size=world,
            interface=given.interface, master_addr=given.master_addr,
        )  # fmt: skip
        with socket.create_server(("", 0)) as free:
            own = (own_address(stage), free.getsockname()[1])
        given.place.mkdir(parents=True, exist_ok=True)
        filesystem.write_json(path, own)
        return own
    until = time.monotonic() + PATIENCE.total_seconds()
    while time.monotonic() < until:
        try:
            address, port = json.loads(path.read_bytes())
            return address, port
        except FileNotFoundError:
            time.sleep(0.2)
    raise RuntimeError(f"{path}, which the first process writes, is not visible here")


if __name__ == "__main__":
    sys.exit(main())
