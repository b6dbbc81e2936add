"""The number and workers of this launcher, among those of one training.

Each node runs a launcher (or each process, where torchrun or srun starts one for every GPU).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from llava_steps.core.errors import ConfigError
from llava_steps.settings.stage.stage import Stage


@dataclass(frozen=True)
class Launcher:
    """A launcher, and which of the job's processes it starts."""

    index: int
    """Number among the launchers; 0 leads."""
    count: int
    """Launchers in all."""
    first: int
    """Rank of its first worker."""
    workers: int
    """Workers that it starts."""
    local: int = 0
    """LOCAL_RANK of its first worker."""
    launch: str = ""
    """Name of the job that started the launchers, so that two jobs do not mix."""

    @property
    def leads(self) -> bool:
        return self.index == 0


def this_launcher(stage: Stage, env: Mapping[str, str] = os.environ) -> Launcher:
    """This process's launcher, from torchrun, from srun, or from --node and --rank.

    Under torchrun and srun there is one launcher for each node, or one for each process. Raises
    ConfigError when their number fits neither.
    """
    if "TORCHELASTIC_RUN_ID" in env:
        tasks, index = int(env["WORLD_SIZE"]), int(env["RANK"])
        local, launch = int(env["LOCAL_RANK"]), f"torchrun {env['TORCHELASTIC_RUN_ID']}"
        starter = "torchrun"
    elif "SLURM_STEP_ID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        tasks, index = int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_PROCID"])
        local, launch = int(env["SLURM_LOCALID"]), f"{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}"
        starter = "srun"
    else:
        if stage.rank >= stage.nodes:
            raise ConfigError(
                f"--rank {stage.rank}: nodes are numbered from 0 to {stage.nodes - 1}"
            )
        return Launcher(stage.rank, stage.nodes, stage.rank * stage.gpus, stage.gpus)
    if tasks == stage.world_size:
        return Launcher(index, tasks, index, 1, local, launch)
    if tasks == stage.nodes:
        return Launcher(index, tasks, index * stage.gpus, stage.gpus, 0, launch)
    raise ConfigError(
        f"{starter} starts {tasks} tasks: start one for each node (nodes {stage.nodes}) or one "
        f"for each process (gpus x nodes = {stage.world_size})"
    )
