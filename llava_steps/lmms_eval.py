"""Run tasks of lmms-eval on an exported model.

    python -m llava_steps.lmms_eval --model results/x/hf_export --tasks mme pope \\
        --python ~/lmms/bin/python --save-dir results/x/lmms_eval

lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval) is not installed with this project, whose
versions it does not share: --python names the Python of an environment that has it. It loads the
export by its own `llava_hf`, fetches its data as it does elsewhere, and its numbers are taken as
they are. Writes scores.json, and all that lmms-eval wrote below raw/. An export that older versions
of transformers can read is made by `hf_export.export_format: transformers-4`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_steps.core import fsio
from llava_steps.core.config import LmmsEval
from llava_steps.core.errors import ConfigError, InputError
from llava_steps.core.run import Context, Step, main
from llava_steps.evaluation import harness
from llava_steps.evaluation.harness import Score

PACKAGE, SECTION = "lmms_eval", "lmms_eval"


def run(ctx: Context, cfg: LmmsEval) -> Mapping[str, Any]:
    """Run the tasks; metrics hold each number.

    Raises:
        ConfigError: lmms-eval is not there, no tasks are given, or a path cannot be passed on.
        InputError: it failed, or a task came out without a number.
    """
    if not cfg.tasks:
        raise ConfigError(f"{SECTION}.tasks: name at least one task of lmms-eval")
    found = harness.find(PACKAGE, SECTION, cfg.python)
    raw = ctx.entry / "raw"
    fsio.remove(raw)
    ctx.log.info("lmms-eval %s in %s: %s", found.version, found.python, ", ".join(cfg.tasks))
    model = ctx.inputs["model"].path
    line = [*arguments(cfg, model, raw, found.cuda)]
    if "task_files" in ctx.inputs:
        line.append(f"--include_path={ctx.inputs['task_files'].path}")
    harness.run(found, line, ctx.work / "lmms_eval.log")
    told = harness.summary(found, cfg.tasks, scores(raw), SECTION)
    fsio.write_json(ctx.entry / "scores.json", told)
    return told


def arguments(cfg: LmmsEval, model: Path, raw: Path, cuda: bool) -> list[str]:
    """The command line of lmms-eval behind its Python.

    Raises:
        ConfigError: a value holds a comma, with which lmms-eval separates them.
    """
    given = {"pretrained": str(model.absolute()), **cfg.model_args}
    for key, value in (*given.items(), *((f"{SECTION}.tasks", task) for task in cfg.tasks)):
        if "," in value:
            raise ConfigError(f"{key}: {value!r} holds a comma, which lmms-eval takes apart")
    line = [
        "-m",
        PACKAGE,
        "--model=llava_hf",
        "--model_args=" + ",".join(f"{key}={value}" for key, value in given.items()),
        "--tasks=" + ",".join(cfg.tasks),
        f"--batch_size={cfg.batch_size}",
        f"--device={'cuda' if cuda else 'cpu'}",
        f"--output_path={raw}",
        "--log_samples",
    ]
    return [*line, f"--limit={cfg.limit}"] if cfg.limit else line


def scores(raw: Path) -> list[Score]:
    """The numbers in what lmms-eval wrote below `raw`: its *_results.json.

    A key is METRIC,FILTER; the filter is named where it is not `none`.

    Raises:
        InputError: there is no such file, or it is none of lmms-eval.
    """
    files = sorted(raw.rglob("*_results.json"))
    if not files:
        raise InputError(f"{raw}: lmms-eval wrote no *_results.json")
    try:
        results = json.loads(files[-1].read_bytes())["results"]
        rows = {task: harness.numbers(row) for task, row in results.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{files[-1]} is no result of lmms-eval: {error!r}") from error
    found = []
    for task, row in rows.items():
        for key, value in row.items():
            metric, _, filtered = key.partition(",")
            if key.startswith(" ") or "_stderr" in metric or not filtered:
                continue
            name = metric if filtered == "none" else f"{metric}, {filtered}"
            stderr = row.get(f"{metric}_stderr,{filtered}")
            found.append(Score(task, name, value, stderr))
    return found


STEP = Step(
    name="lmms_eval",
    config=LmmsEval,
    run=run,
    doc=__doc__,
    volatile=("raw/*",),
    optional=frozenset({"task_files"}),
)

if __name__ == "__main__":
    main(STEP)
