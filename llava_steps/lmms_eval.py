"""Run tasks of lmms-eval on an exported model.

    llava-steps lmms_eval --model results/x/hf_export --tasks mme pope \\
        --python ~/lmms/bin/python --save-dir results/x/lmms_eval

lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval) is not installed with this project, whose
versions it does not share: --python names the Python of an environment that has it, with decord,
which its own `llava_hf` needs. That loads the export and asks, one question at a time, in the words
of the chat template. It fetches its data as it does elsewhere, and its numbers are taken as they
are; answers that failed are an error, where it would count them as wrong. --task-files is a folder
with tasks of your own. Writes scores.json, and all that lmms-eval wrote below raw/.
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
from llava_steps.settings.config import LmmsEval
from llava_steps.store.run import Context, Step, main

SECTION = "lmms_eval"
PACKAGE = harness.PACKAGES[SECTION]
RESULTS = "*_results.json"
_UNANSWERED = re.compile(r"Error (.*) (?:in generating|when loading video)")
"""What llava_hf says when it takes an empty text for an answer that it could not get."""


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
    filesystem.remove(raw)
    log = ctx.work / "lmms_eval.log"
    ctx.log.info("lmms-eval %s in %s: %s", found.version, found.python, ", ".join(cfg.tasks))
    ctx.log.info("what it says goes to %s", log)
    from llava_steps.evaluation import same_prompts

    model = same_prompts.directory(ctx.inputs["model"].path, ctx.work / "model")
    line = [*arguments(cfg, model, raw, found.cuda)]
    if "task_files" in ctx.inputs:
        line.append(f"--include_path={ctx.inputs['task_files'].path}")
    said = harness.run(found, line, log, environment())
    if unanswered := _UNANSWERED.findall(said):
        raise InputError(
            f"{SECTION}.tasks: lmms-eval could not answer {len(unanswered)} of its questions and "
            f"would count that as wrong: {unanswered[0]}. Its llava_hf takes no question without "
            f"an image; name tasks with images. All it said is in {log}"
        )
    if not list(raw.rglob(RESULTS)):
        raise harness.failure(found, "wrote no results", said, log)
    told = harness.summary(found, *scores(raw), SECTION)
    filesystem.write_json(ctx.entry / "scores.json", told)
    return told


def environment() -> dict[str, str]:
    """This one, with what keeps lmms-eval from two things.

    It prints HF_TOKEN; the hub's library takes a token from an older name as well. And Python would
    write the bytecode of task functions into task_files, an input of this step.
    """
    found = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    if token := found.pop("HF_TOKEN", ""):
        found["HUGGING_FACE_HUB_TOKEN"] = token
    return found


def arguments(cfg: LmmsEval, model: Path, raw: Path, cuda: bool) -> list[str]:
    """The command line of lmms-eval behind its Python.

    Raises:
        ConfigError: a value holds a comma, with which lmms-eval separates them.
    """
    device = "cuda" if cuda else "cpu"
    # Its own device_map, an empty text, is refused by transformers 5.
    given = {"pretrained": str(model.absolute()), "device_map": device, **cfg.model_args}
    texts = [*given.items(), ("--save-dir or --store", str(raw))]
    for key, value in (*texts, *((f"{SECTION}.tasks", task) for task in cfg.tasks)):
        if "," in value:
            raise ConfigError(f"{key}: {value!r} holds a comma, which lmms-eval takes apart")
    line = [
        "-m",
        PACKAGE,
        "--model=llava_hf",
        "--model_args=" + ",".join(f"{key}={value}" for key, value in given.items()),
        "--tasks=" + ",".join(cfg.tasks),
        # More than one are refused by its llava_hf.
        "--batch_size=1",
        f"--device={device}",
        f"--output_path={raw}",
        "--log_samples",
    ]
    return [*line, f"--limit={cfg.limit}"] if cfg.limit else line


def scores(raw: Path) -> tuple[list[str], list[Score]]:
    """The tasks that lmms-eval ran, by its *_results.json below `raw`, and their numbers.

    A group of tasks may have numbers of its own. A key is METRIC,FILTER; the filter is named where
    it is not `none`.

    Raises:
        InputError: the file is none of lmms-eval.
    """
    file = max(raw.rglob(RESULTS))
    try:
        told = json.loads(file.read_bytes())
        rows = {task: harness.numbers(row) for task, row in told["results"].items()}
        groups = {name for name, tasks in told.get("group_subtasks", {}).items() if tasks}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{file} is no result of lmms-eval: {error!r}") from error
    found = []
    for task, row in rows.items():
        for key, value in row.items():
            metric, _, filtered = key.partition(",")
            if key.startswith(" ") or "_stderr" in metric or not filtered:
                continue
            name = metric if filtered == "none" else f"{metric}, {filtered}"
            stderr = row.get(f"{metric}_stderr,{filtered}")
            found.append(Score(task, name, value, stderr))
    return [task for task in rows if task not in groups], found


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
