"""Run tasks of lmms-eval on an exported model.

    llava-steps lmms_eval --model results/x/hf_export --tasks mme pope \\
        --python ~/lmms/bin/python --save-dir results/x/lmms_eval

lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval) is not installed with this project, whose
versions it does not share: --python names the Python of an environment that has it, with decord,
which its `llava_hf` model needs. `llava_hf` loads the export and asks one question at a time, with
the prompts of the chat template. lmms-eval downloads its own data, and its numbers are not changed.
Answers that failed are an error; lmms-eval would count them as wrong. --task-files is a folder with
your own tasks. Writes scores.json, and all output files of lmms-eval below raw/.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_steps.core import filesystem
from llava_steps.core.errors import ConfigError, InputError
from llava_steps.evaluation import harness
from llava_steps.evaluation.harness import Score
from llava_steps.settings.evaluation import LmmsEval
from llava_steps.store.run import main
from llava_steps.store.step import Context, Step

SECTION = "lmms_eval"
RESULTS = "*_results.json"
_UNANSWERED = re.compile(r"Error (.*) (?:in generating|when loading video)")
"""Printed by llava_hf when generation failed and it uses an empty text as the answer."""


def run(ctx: Context, cfg: LmmsEval) -> Mapping[str, Any]:
    """Run the tasks; metrics hold each number.

    Raises:
        ConfigError: lmms-eval is not installed, no tasks are given, or a path cannot be passed on.
        InputError: it failed, or gave no number for a task.
    """
    installed, log = harness.begin(SECTION, cfg.tasks, cfg.python, ctx)
    raw = ctx.entry / "raw"
    from llava_steps.evaluation import same_prompts

    model = same_prompts.directory(ctx.inputs["model"].path, ctx.work / "model")
    line = [*arguments(cfg, model, raw, installed.cuda)]
    if "task_files" in ctx.inputs:
        line.append(f"--include_path={ctx.inputs['task_files'].path}")
    output = harness.run(installed, line, log, environment())
    if unanswered := _UNANSWERED.findall(output):
        raise InputError(
            f"{SECTION}.tasks: lmms-eval could not answer {len(unanswered)} of its questions and "
            f"would count them as wrong: {unanswered[0]}. Its llava_hf model needs an image in "
            f"each question; name tasks with images. Its output is in {log}"
        )
    if not list(raw.rglob(RESULTS)):
        raise harness.failure(installed, "wrote no results", output, log)
    summary = harness.summary(installed, *scores(raw), SECTION)
    filesystem.write_json(ctx.entry / "scores.json", summary)
    return summary


def environment() -> dict[str, str]:
    """The environment of lmms-eval, changed in two variables.

    lmms-eval prints HF_TOKEN, so the token has its older name, which the hub's library reads too.
    And Python would write the bytecode of task functions into task_files, an input of this step.
    """
    variables = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    if token := variables.pop("HF_TOKEN", ""):
        variables["HUGGING_FACE_HUB_TOKEN"] = token
    return variables


def arguments(cfg: LmmsEval, model: Path, raw: Path, cuda: bool) -> list[str]:
    """The command line of lmms-eval after its Python.

    Raises:
        ConfigError: a value contains a comma, which lmms-eval uses as the separator.
    """
    device = "cuda" if cuda else "cpu"
    # The default device_map of lmms-eval, an empty text, is refused by transformers 5.
    given = {"pretrained": str(model.absolute()), "device_map": device, **cfg.model_args}
    texts = [*given.items(), ("--save-dir or --store", str(raw))]
    for key, value in (*texts, *((f"{SECTION}.tasks", task) for task in cfg.tasks)):
        if "," in value:
            raise ConfigError(
                f"{key}: {value!r} contains a comma, where lmms-eval splits it; use another"
            )
    line = [
        "-m",
        harness.PACKAGES[SECTION],
        "--model=llava_hf",
        "--model_args=" + ",".join(f"{key}={value}" for key, value in given.items()),
        "--tasks=" + ",".join(cfg.tasks),
        # Its llava_hf model refuses more than one.
        "--batch_size=1",
        f"--device={device}",
        f"--output_path={raw}",
        "--log_samples",
    ]
    return [*line, f"--limit={cfg.limit}"] if cfg.limit else line


def scores(raw: Path) -> tuple[list[str], list[Score]]:
    """The tasks that lmms-eval ran, by its *_results.json below `raw`, and their numbers.

    A group of tasks may have its own numbers. A key is METRIC,FILTER; the filter is named if it is
    not `none`.

    Raises:
        InputError: the file is not a result of lmms-eval.
    """
    file = max(raw.rglob(RESULTS))
    try:
        results = json.loads(file.read_bytes())
        rows = {task: harness.numbers(row) for task, row in results["results"].items()}
        groups = {name for name, tasks in results.get("group_subtasks", {}).items() if tasks}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{file} is not a result file of lmms-eval: {error!r}") from error
    numbers = []
    for task, row in rows.items():
        for key, value in row.items():
            metric, _, filtered = key.partition(",")
            if key.startswith(" ") or "_stderr" in metric or not filtered:
                continue
            name = metric if filtered == "none" else f"{metric}, {filtered}"
            stderr = row.get(f"{metric}_stderr,{filtered}")
            numbers.append(Score(task, name, value, stderr))
    return [task for task in rows if task not in groups], numbers


STEP = Step(
    name="lmms_eval",
    config=LmmsEval,
    run=run,
    doc=__doc__,
    volatile=("raw/*",),
)

if __name__ == "__main__":
    main(STEP)
