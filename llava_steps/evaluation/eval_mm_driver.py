"""Answers the questions of llm-jp-eval-mm; runs as a script in the environment that has it.

    python eval_mm_driver.py job.json

llava_steps/llm_jp_eval_mm.py writes the job. This project need not be installed there: this script
imports the code that runs the model by its path. Writes scores.json and TASK.jsonl into job["raw"].
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

SCORES = "scores.json"
DEEP_MODES = ("I", "I;16", "F")
"""Of more than 8 bits, which not every Pillow writes as PNG."""
KEPT_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", *DEEP_MODES)


def main(path: str) -> None:
    """Run the job; the caller shows the last lines of a traceback."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    sys.path.append(str(Path(__file__).parents[2]))
    from llava_steps.evaluation.ask import Model

    model = Model(Path(job["model"]))
    rows = [row for task, metrics in job["tasks"].items() for row in run(job, model, task, metrics)]
    text = json.dumps(rows, ensure_ascii=False, indent=2)
    Path(job["raw"], SCORES).write_text(text, encoding="utf-8")


def run(job: dict[str, Any], model: Any, name: str, metrics: list[str]) -> list[dict[str, Any]]:
    """Write the answers of a task; returns its numbers as keyword arguments of `harness.Score`."""
    from eval_mm import ScorerConfig, ScorerRegistry, TaskConfig, TaskRegistry

    task = TaskRegistry.load_task(name, TaskConfig())
    if job["limit"]:
        # max_dataset_len of eval_mm fails on a task with fewer.
        task.dataset = task.dataset.select(range(min(job["limit"], len(task.dataset))))
    docs = list(task.dataset)
    questions = [question(task, name, doc) for doc in docs]
    answers = model.answers(questions, job["batch_size"], job["max_new_tokens"])
    references = [task.doc_to_answer(doc) for doc in docs]
    with Path(job["raw"], f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for asked, answer, reference in zip(questions, answers, references, strict=True):
            row = {"id": asked.id, "answer": answer, "reference": reference}
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
    numbers = []
    for metric in metrics:
        options = {"docs": task.dataset, "judge_model": job["judge_model"]}
        judge = judged(metric) if job["judge_model"] else Unjudged(metric)
        scorer = ScorerRegistry.load_scorer(metric, ScorerConfig(**options, client=judge))
        total = scorer.aggregate(scorer.score(references, answers))
        numbers.append({"task": name, "metric": metric, "value": float(total.overall_score)})
        numbers += [
            {"task": name, "metric": f"{metric}, {part}", "value": float(value)}
            for part, value in (total.details or {}).items()
            if part.replace("_", "-") != metric and isinstance(value, int | float)
        ]
    return numbers


def judged(metric: str) -> Any:
    """The judge of eval_mm, for which a missing answer is an error.

    eval_mm would use an empty text, which scores nothing.
    """
    from eval_mm import OpenAIChatAPI

    class Judge(OpenAIChatAPI):  # type: ignore[misc]
        def batch_generate_chat_response(self, *args: Any, **kwargs: Any) -> list[str]:
            texts: list[str] = super().batch_generate_chat_response(*args, **kwargs)
            if missing := sum(not text for text in texts):
                raise RuntimeError(
                    f"{metric}: the judge gave no answer to {missing} of {len(texts)} questions; "
                    "the output of its service is above this message"
                )
            return texts

    return Judge()


class Unjudged:
    """Replaces a judge that is not set: the error of a metric that needs one."""

    def __init__(self, metric: str) -> None:
        self._metric = metric

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{self._metric} needs a judge: set llm_jp_eval_mm.judge_model")


def question(task: Any, name: str, doc: Any) -> Any:
    """The images, encoded without loss, before the text, in place of the task's own marks."""
    from llava_steps.data.samples.sample import PLACEHOLDER
    from llava_steps.evaluation.ask import Question

    images = []
    for image in task.doc_to_visual(doc):
        data = io.BytesIO()
        # As it is: the model's own reader treats transparency, and refuses more than 8 bits.
        kept = image if image.mode in KEPT_MODES else image.convert("RGB")
        kept.save(data, "TIFF" if image.mode in DEEP_MODES else "PNG")
        images.append(data.getvalue())
    text = f"{PLACEHOLDER}\n" * len(images) + task.doc_to_text(doc).replace(PLACEHOLDER, "").strip()
    turns = ({"role": "user", "content": text},)
    return Question(str(task.doc_to_id(doc)), name, turns, tuple(images), "")


if __name__ == "__main__":
    main(sys.argv[1])
