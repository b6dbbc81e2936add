"""What a rule asks Slurm for, and the command that starts a training on several nodes.

Commands are lists of words: the caller quotes each word before a shell runs them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_steps.settings.cluster import Cluster
from llava_steps.settings.fields import StepConfig
from llava_steps.settings.stage.stage import Stage
from llava_steps.store import lease

TASK = (
    "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURMD_NODENAME",
    "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
"""Variables that srun sets in each task."""
TRAINING = {"runtime": 1440, "mem_mb": 200_000}
"""Minutes and MB per node that a training requests unless `cluster` has other numbers."""
HAND_ON = (
    f'for name in {" ".join(TASK)}; do value=$(printenv "$name") && '
    'export "APPTAINERENV_$name=$value"; done; exec "$@"'
)
"""Slurm knows TASK inside the task only, so this fixed line of shell hands it to the container;
everything that comes from the configuration is an argument after it."""


def launchers(stage: Stage, module: str, gres: str, container: Sequence[str] = ()) -> list[str]:
    """Words of the command, which the stage's flags follow.

    `gres` is Slurm's name of a node's GPUs, empty to ask for none. `container` are the words that
    enter an image; with several nodes each task does so itself, with one the workflow does.
    """
    python = ["python", "-m", module]
    return (
        python if stage.nodes == 1 else [*tasks(stage.nodes, stage.gpus, gres, container), *python]
    )


def tasks(nodes: int, gpus: int, gres: str, container: Sequence[str] = ()) -> list[str]:
    """Words before a command that runs once on each node, inside a container if there is one."""
    words = [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
    ]
    if gres:
        words.append(f"--gres={gres}:{gpus}")
    return [*words, "sh", "-c", HAND_ON, "sh", *container] if container else words


def asks(names: Sequence[str], settings: StepConfig, cluster: Cluster) -> dict[str, Any]:
    """Snakemake's resources of a rule's job, as far as the configuration decides them.

    `names` are those under which `cluster` may have its numbers, the first one first.
    """
    wanted: dict[str, Any] = {}
    for resource, asked in (
        ("runtime", cluster.runtime),
        ("mem_mb", cluster.mem_mb),
        ("cpus_per_task", cluster.cpus),
    ):
        for name in names:
            if name in asked:
                wanted.setdefault(resource, asked[name])
    if isinstance(settings, Stage):
        wanted = TRAINING | wanted
        wanted.setdefault("cpus_per_task", settings.gpus * (1 + settings.num_workers))
        wanted["nodes"] = settings.nodes
        if cluster.gres:
            wanted |= {"gres": f"{cluster.gres}:{settings.gpus}", "tasks_per_gpu": 0}
        if settings.nodes > 1:
            wanted |= {"mpi": "srun", "tasks": settings.nodes}
    return wanted


def wait_for_jobs(directories: Mapping[Path, str]) -> None:
    """Wait for the jobs that a killed controller left running and that write these results.

    `directories` show the results; each has its rule.
    """
    for out, name in directories.items():
        job = lease.slurm_job(out / "work/.work")
        while job and shutil.which("squeue") and _is_queued(job):
            print(f"waiting for Slurm job {job}, which computes {name}", file=sys.stderr)
            time.sleep(10)


def _is_queued(job: str) -> bool:
    """Whether Slurm still has the job, running or waiting to be run again."""
    asked = subprocess.run(
        ["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True
    )
    return bool(asked.stdout.strip())
