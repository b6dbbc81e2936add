"""Run tasks of llm-jp-eval-mm on an exported model.

    llava-steps llm_jp_eval_mm --model results/x/hf_export --tasks ja-vg-vqa-500=rougel \\
        --python ~/eval-mm/bin/python --save-dir results/x/llm_jp_eval_mm

llm-jp-eval-mm (https://github.com/llm-jp/llm-jp-eval-mm, package eval-mm) is not installed with
this project: --python names the Python of an environment that has it, with torch and transformers.
A task is given with its metrics, separated by commas; --tasks may be repeated. llm-jp-eval-mm gives
the questions and scores, `evaluate` the greedy answers. A metric with a judge needs --judge-model,
the network, and the keys that eval_mm reads from the environment. Writes scores.json
and raw/TASK.jsonl with all answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llava_steps.core import filesystem
from llava_steps.core.errors import InputError, reason
from llava_steps.evaluation import eval_mm_driver, harness
from llava_steps.evaluation.harness import Score
from llava_steps.settings.evaluation import LlmJpEvalMm
from llava_steps.store.run import main
from llava_steps.store.step import Context, Step

SECTION = "llm_jp_eval_mm"


def run(ctx: Context, cfg: LlmJpEvalMm) -> Mapping[str, Any]:
    """Run the tasks; metrics hold each number.

    Raises:
        ConfigError: llm-jp-eval-mm is not installed, or no tasks are given.
        InputError: it failed, or gave no number for a task.
    """
    installed, log = harness.begin(SECTION, cfg.tasks, cfg.python, ctx)
    raw = ctx.entry / "raw"
    raw.mkdir()
    job = {
        "model": str(ctx.inputs["model"].path.absolute()),
        "tasks": {task: metrics.split(",") for task, metrics in cfg.tasks.items()},
        "limit": cfg.limit,
        "max_new_tokens": cfg.max_new_tokens,
        "batch_size": cfg.batch_size,
        "judge_model": cfg.judge_model,
        "raw": str(raw.absolute()),
    }
    filesystem.write_json(ctx.work / "job.json", job)
    line = [str(eval_mm_driver.__file__), str(ctx.work / "job.json")]
    harness.run(installed, line, log)
    path = raw / eval_mm_driver.SCORES
    try:
        scores = [Score(**row) for row in json.loads(path.read_bytes())]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {reason(error)}") from error
    summary = harness.summary(installed, list(cfg.tasks), scores, SECTION)
    filesystem.write_json(ctx.entry / "scores.json", summary)
    return summary


STEP = Step(name="llm_jp_eval_mm", config=LlmJpEvalMm, run=run, doc=__doc__, volatile=("raw/*",))

if __name__ == "__main__":
    main(STEP)
