"""Checks of where steps run: the image, its GPUs, and whether processes reach each other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_steps.checks.finding import Finding
from llava_steps.core.errors import ConfigError
from llava_steps.pipeline import slurm
from llava_steps.settings.config import Config
from llava_steps.settings.recipe import stage_title
from llava_steps.settings.stage.stage import Stage
from llava_steps.store import container

PROBE = "llava_steps.launch.probe"
INSTALL = "Install Apptainer, or leave image empty to use the current environment"


def image(config: Config) -> Iterator[Finding]:
    """Whether the image exists, and its digest."""
    if not config.image:
        yield Finding("ok", "image", f"none: steps run in {sys.prefix}")
        return
    try:
        digest = container.image_digest(config.image, Path(config.store))
    except ConfigError as error:
        yield Finding("fail", "image", str(error).removeprefix("image: "))
        return
    yield Finding("ok", "image", f"{config.image} is {digest}")
    if container.runtime() is None:
        yield Finding("fail", "image", "neither apptainer nor singularity is installed", INSTALL)


def here(config: Config, arguments: Sequence[str]) -> Iterator[Finding]:
    """Two processes on this machine, in the image if there is one."""
    inside = _inside(config, arguments)
    if inside is None:
        return
    with tempfile.TemporaryDirectory(dir=config.store, prefix=".probe-") as directory:
        line = [*inside, "python" if config.image else sys.executable, "-m", PROBE]
        line += _options(_last(config), Path(directory))
        running = []
        for rank in ("0", "1"):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
            own |= {f"APPTAINERENV_{name}": value for name, value in own.items()}
            plain = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
            running.append(
                subprocess.Popen(
                    line, env=plain | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            )
        answers = [process.communicate() for process in running]
    yield from _findings("this machine", answers, _last(config))


def _last(config: Config) -> Stage:
    return config.stages[config.last_stage].settings


def on_nodes(config: Config, name: str, site: Sequence[str], arguments: Sequence[str]
             ) -> Iterator[Finding]:  # fmt: skip
    """The nodes of a stage, requested with srun; waits until Slurm allocates them."""
    stage, what = config.stages[name].settings, f"nodes of {stage_title(name)}"
    if not shutil.which("srun"):
        yield Finding(
            "fail", what, "srun is missing here", "Run the doctor where jobs are submitted"
        )
        return
    inside = _inside(config, arguments)
    if inside is None:
        return
    with tempfile.TemporaryDirectory(dir=config.store, prefix=".probe-") as directory:
        wanted = slurm.asks((f"{name}_checkpoint", "checkpoint"), stage, config.cluster)
        line = [
            *slurm.tasks(stage.nodes, stage.gpus, config.cluster.gres, inside),
            *("python", "-m", PROBE),
        ]
        line[1:1] = [f"--cpus-per-task={wanted['cpus_per_task']}", "--time=10", *site]
        done = subprocess.run(
            [*line, *_options(stage, Path(directory))], capture_output=True, text=True
        )
    yield from _findings(what, [(done.stdout, done.stderr)], stage, stage.nodes)


def _inside(config: Config, arguments: Sequence[str]) -> list[str] | None:
    """Command that runs in the image; None if it cannot run, which `image` has reported."""
    if not config.image:
        return []
    program = container.runtime()
    if program is None or not Path(config.image).is_file():
        return None
    return container.exec_words(program, str(Path(config.image).absolute()), arguments)


def _options(stage: Stage, directory: Path) -> list[str]:
    return [
        f"--place={directory.absolute()}",
        f"--interface={stage.interface}",
        f"--master-addr={stage.master_addr}",
        f"--backend={stage.backend}",
    ]


def _findings(
    what: str, answers: list[tuple[str, str]], stage: Stage, count: int = 2
) -> Iterator[Finding]:
    """Findings from what the processes printed."""
    rows = sorted(
        (json.loads(line) for out, _ in answers for line in out.splitlines() if line[:1] == "{"),
        key=lambda row: row["rank"],
    )
    wrong = [f"{row['host']}: {row['error']}" for row in rows if "error" in row]
    if len(rows) < count and not wrong:
        last = [line for _, error in answers for line in error.strip().splitlines()[-1:]]
        wrong = last or [f"{len(rows)} of {count} processes answered"]
    if wrong:
        fix = "On machines with several networks, set interface or master_addr of the stage"
        yield Finding("fail", what, "; ".join(dict.fromkeys(wrong)), fix)
        return
    row: dict[str, Any] = rows[0]
    hosts = ", ".join(dict.fromkeys(row["host"] for row in rows))
    yield Finding("ok", what, f"torch {row['torch']}, megatron-core {row['megatron']} on {hosts}")
    if "backend" in row:
        slowest = min(row["mb_per_s"] for row in rows)
        message = f"{count} processes connected, all-reduce by {row['backend']}: {slowest} MB/s"
        yield Finding("ok", what, message)
    for row in rows:
        few = len(row["gpus"]) < stage.gpus
        seen = f"{row['host']} shows {len(row['gpus'])} GPUs ({', '.join(row['gpus']) or 'none'})"
        if few and count == stage.nodes and what.startswith("nodes"):
            fix = (
                "Set --nv in apptainer-args of the profile, and cluster.gres, to make them visible"
            )
            message = f"{seen}, {stage.gpus} are requested"
            yield Finding("fail" if row["gpus"] else "note", what, message, fix)
        elif row["rank"] == 0:
            yield Finding("ok" if row["gpus"] else "note", what, seen)
