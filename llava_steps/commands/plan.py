"""What a run will compute and what that takes, before anything runs.

    llava-steps plan --configfile mine.yaml
    llava-steps plan --configfile mine.yaml --gpu H200 --efficiency 0.5
    llava-steps plan --configfile mine.yaml --search 2

It reads only the configuration and the models' config.json. It shows which steps are done and what
the others wait for; parameters, tokens, memory of a process by part, operations, time and disk. For
a stage that does not fit it shows settings that would. --search ranks the layouts of a number of
nodes. Times rest on --efficiency, the assumed share of the GPUs' peak that training reaches.
Lengths are those of the audit once that is done, and assumed before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava_steps.core.errors import ConfigError, InputError, report_error
from llava_steps.core.format import size
from llava_steps.geometry.hardware import GPUS, Gpu
from llava_steps.pipeline import outlook
from llava_steps.pipeline.rules import Rule, chain
from llava_steps.planning import stages, text
from llava_steps.planning.models import Model, model_of
from llava_steps.settings import cli, load
from llava_steps.settings.config import Config
from llava_steps.settings.recipe import stage_title
from llava_steps.settings.stage.stage import Stage
from llava_steps.store import container

EXPORTS = ("export", "hf_export")
"""Kinds of rules that write the model once more."""


def main(arguments: list[str] | None = None) -> int:
    """Print the plan; returns the exit code."""
    given = parser().parse_args(arguments)
    try:
        config = load.with_overlays(given.configfile)
        for line in lines(config, given):
            print(line)
    except Exception as error:
        return report_error("plan", error)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.tool_parser("plan", __doc__)
    cli.add_configfile(made)
    made.add_argument(
        "--gpu", choices=[*GPUS, "none"], default="H100", help="GPU; none: processes on a CPU"
    )
    made.add_argument(
        "--efficiency", type=float, default=0.4, help="assumed share of the GPUs' peak (0.4)"
    )
    made.add_argument(
        "--text-tokens",
        type=int,
        default=200,
        help="assumed text tokens of a sample before its audit (200)",
    )
    made.add_argument("--search", type=int, metavar="NODES", help="rank layouts of NODES nodes")
    made.add_argument("--show", type=int, default=10, help="layouts that --search prints (10)")
    made.add_argument("--json", action="store_true", help="figures as one line of JSON")
    return made


def lines(
    config: Config, given: argparse.Namespace, outlooks: Mapping[str, outlook.State] | None = None
) -> Iterator[str]:
    """The plan of a run, line by line.

    `given` are the parsed arguments, `outlooks` the states of the rules.

    Raises:
        InputError: a model's configuration is missing.
        ConfigError: a layout does not fit the model, an argument is out of range, or the image is
            neither a file nor pinned.
    """
    if not 0 < given.efficiency <= 1:
        raise ConfigError(f"--efficiency {given.efficiency}: a share above 0, at most 1")
    for name in ("text_tokens", "search", "show"):
        number = getattr(given, name)
        if number is not None and number < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {number}: a whole number above 0")
    image = container.image_digest(config.image, Path(config.store))
    rules = chain(config, image)
    if outlooks is None:
        outlooks = outlook.outlook(config, rules, image)
    gpu = GPUS.get(given.gpu)
    built = "hf_model" in outlooks and outlooks["hf_model"].outlook == "done"
    model = model_of(config.variants[0].config, built)
    trainings = [rule for rule in rules.values() if isinstance(rule.settings, Stage)]
    plans = {rule.name: _stage(_model(rule, model), rule, outlooks, given) for rule in trainings}
    if given.json:
        yield json.dumps(figures(model, plans, outlooks, gpu, given.efficiency))
        return
    yield f"Plan of run {config.run}"
    yield from text.steps_text(list(outlooks.values()))
    yield from text.model_text(model)
    titles = {rule.name: _title(rule) for rule in trainings}
    for name, plan in plans.items():
        title = titles[name][:1].upper() + titles[name][1:]
        yield from text.stage_text(title, plan, gpu, given.efficiency)
        if gpu and not plan.fits(gpu):
            yield "  to fit: " + stages.suggestion(
                model.geometry, plan.stage, plan.data, gpu, given.efficiency
            )
    yield from _disk(model, [*plans.values()], sum(r.kind in EXPORTS for r in rules.values()))
    if given.search:
        if gpu is None:
            raise ConfigError("--search ranks GPUs: name one with --gpu")
        for name, plan in plans.items():
            where = f"{given.search} x {plan.stage.gpus} {gpu.name}"
            yield f"Layouts of {titles[name]} on {where}"
            ranked = stages.search(
                model.geometry, plan.stage, plan.data, given.search, gpu, given.efficiency
            )
            yield from text.search_text(plan.stage, ranked, given.show)


def refuse(config: Config, name: str) -> None:
    """ConfigError unless the model can be cut as the layout of a stage says.

    A model that is not fetched yet is skipped: training checks the layout when it starts.
    """
    try:
        model = model_of(config)
    except InputError:
        return
    stage = config.stages[name].settings
    data = stages.Data.assumed(model.geometry, 200, stage.seq_length)
    try:
        stages.stage_plan(model.geometry, stage, data)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _title(rule: Rule) -> str:
    title = stage_title(rule.declared.stage)
    return f"{title} ({rule.label})" if rule.label else title


def _model(rule: Rule, model: Model) -> Model:
    """The model that a rule trains; `model` is that of the first variant."""
    return model if not rule.label else model_of(rule.config)


def _stage(
    model: Model, rule: Rule, outlooks: Mapping[str, outlook.State], given: argparse.Namespace
) -> stages.StagePlan:
    stage = rule.settings
    assert isinstance(stage, Stage)
    report = outlook.audit_of(outlooks, rule.after)
    data = (
        stages.Data.audited(report)
        if report
        else stages.Data.assumed(model.geometry, given.text_tokens, stage.seq_length)
    )
    return stages.stage_plan(model.geometry, stage, data, cuda=given.gpu != "none")


def _disk(model: Model, plans: list[stages.StagePlan], exports: int) -> Iterator[str]:
    weights = stages.weight_bytes(model.geometry, plans[0])
    checkpoints = [stages.disk(model.geometry, plan) for plan in plans]
    yield (
        f"Disk: {size(2 * weights)} for the model before training, "
        f"{size(exports * weights)} for {exports} exports, "
        f"at most {size(sum(checkpoints))} for checkpoints while training, "
        "and the raw images once more as tars"
    )


def figures(
    model: Model,
    plans: Mapping[str, stages.StagePlan],
    outlooks: Mapping[str, outlook.State],
    gpu: Gpu | None,
    efficiency: float,
) -> dict[str, Any]:
    """The plan as JSON: bytes, operations, hours."""
    return {
        "steps": {s.rule: s.outlook for s in outlooks.values()},
        "model": model.source,
        "stages": [
            {
                "rule": name,
                "stage": plan.stage.stage,
                "samples": plan.samples,
                "tokens": plan.tokens,
                "parameters": plan.parameters,
                "trained_parameters": plan.trained_parameters,
                "row": asdict(plan.row),
                "memory": plan.memory.parts() | {"total": plan.memory.total},
                "operations_per_step": plan.operations.parts() | {"total": plan.operations.total},
                "fits": plan.fits(gpu) if gpu else None,
                "hours": plan.hours(gpu, efficiency) if gpu else None,
                "checkpoint_bytes": stages.disk(model.geometry, plan),
            }
            for name, plan in plans.items()
        ],
    }
