"""Is this machine, or this cluster, ready for a run? Checked before it costs a night.

    llava-steps doctor --configfile mine.yaml
    llava-steps doctor --configfile mine.yaml --profile workflow/profiles/slurm
    llava-steps doctor --configfile mine.yaml --profile workflow/profiles/slurm --on-nodes

Checks the image and its digest; two processes that meet on this machine, inside the image; the file
systems of results and store, and their free space; what jobs request against Slurm's partitions
(with --profile); W&B; the harnesses of benchmarks. --on-nodes asks Slurm for the nodes of each
stage and waits for them. A process on each then checks its GPUs and reaches the others.

Exit codes: 0 ready · 3 a check failed; its line says what to do.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from llava_steps.checks import disk, partitions, processes, tracking
from llava_steps.checks.finding import Finding
from llava_steps.core.errors import ConfigError, InputError, StepError, report_error
from llava_steps.evaluation import harness
from llava_steps.pipeline.rules import chain
from llava_steps.planning import stages
from llava_steps.planning.models import model_of
from llava_steps.settings import cli, load
from llava_steps.settings.config import Config


def main(arguments: list[str] | None = None) -> int:
    """Print the findings; returns the exit code."""
    given = parser().parse_args(arguments)
    failed = 0
    try:
        config = load.with_overlays(given.configfile)
        for finding in findings(config, given):
            failed += finding.level == "fail"
            print(json.dumps(asdict(finding)) if given.json else finding, flush=True)
    except Exception as error:
        return report_error("doctor", error)
    if not given.json:
        print(f"failed checks: {failed or 'none'}")
    return InputError.exit_code if failed else 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.tool_parser("doctor", __doc__)
    cli.add_configfile(made)
    made.add_argument(
        "--profile",
        type=Path,
        metavar="DIR",
        help="Snakemake profile that submits the jobs to Slurm",
    )
    made.add_argument(
        "--on-nodes", action="store_true", help="ask Slurm for the nodes of each stage, and wait"
    )
    made.add_argument(
        "--srun", default="", metavar="WORDS", help="flags for srun, as '-A account -p gpu'"
    )
    made.add_argument(
        "--apptainer-args", default="--nv --cleanenv", help="as in the profile (%(default)s)"
    )
    made.add_argument("--json", action="store_true", help="each finding as a line of JSON")
    return made


def findings(config: Config, given: argparse.Namespace) -> Iterator[Finding]:
    """All checks, the quick ones first.

    Raises:
        ConfigError: the profile cannot be read, or flags for srun or apptainer are not words.
    """
    inside = words("--apptainer-args", given.apptainer_args)
    srun = words("--srun", given.srun)
    store = Path(config.store)
    yield from disk.check("store", store)
    yield from disk.check("results", Path(config.results))
    if store.is_dir():
        yield disk.free_space("store", store, needed(config))
    yield from tracking.check([stage.settings for stage in config.stages.values()])
    yield from harnesses(config)
    yield from processes.image(config)
    if given.profile:
        profile = given.profile / "config.yaml" if given.profile.is_dir() else given.profile
        yield from partitions.check(chain(config), config.cluster, profile)
    yield from processes.here(config, inside)
    if given.on_nodes:
        for name in config.stages:
            yield from processes.on_nodes(config, name, srun, inside)


def harnesses(config: Config) -> Iterator[Finding]:
    """Whether the harnesses of the requested benchmarks are installed: a run needs them last."""
    for section, package in harness.PACKAGES.items():
        settings = getattr(config, section)
        if not settings.tasks:
            continue
        if config.image:
            yield Finding("note", section, "runs in the image, which was not searched")
            continue
        try:
            installed = harness.find(package, section, settings.python)
        except ConfigError as error:
            yield Finding("fail", section, str(error))
        else:
            device = "a GPU" if installed.cuda else "no GPU"
            yield Finding(
                "ok", section, f"{package} {installed.version} in {installed.python}, {device}"
            )


def words(flag: str, text: str) -> list[str]:
    """The words of a flag that carries several; ConfigError when a quotation has no end."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{flag} {text!r}: {error}") from None


def needed(config: Config) -> int | None:
    """Bytes that models and checkpoints of a run take at most; None while its model is not known.

    The data are left out: they are copied once, as tars.
    """
    try:
        geometry = model_of(config).geometry
        plans = [
            stages.stage_plan(geometry, stage, stages.Data.assumed(geometry, 200, stage.seq_length))
            for stage in (section.settings for section in config.stages.values())
        ]
    except StepError:
        return None
    # Before training as HF and as Megatron, and an export of each stage.
    return (2 + len(plans)) * stages.weight_bytes(geometry, plans[0]) + sum(
        stages.disk(geometry, plan) for plan in plans
    )
