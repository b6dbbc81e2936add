"""Ask Hugging Face LLaVA models the questions of a held-out file and count right answers.

    python -m llava_steps.evaluate --data held/heldout.json --before results/x/hf_model \\
        --after-stage2 results/x/hf_export --save-dir results/x/evaluation

Models are loaded and run by plain transformers (AutoProcessor, LlavaForConditionalGeneration),
as their users will. An answer counts when it equals the reference, white space at its ends aside.
Writes results.json, table.md and samples.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_steps.core import fsio
from llava_steps.core.config import Evaluation
from llava_steps.core.errors import ConfigError, InputError
from llava_steps.core.run import Context, Step, main

if TYPE_CHECKING:
    from llava_steps.evaluation.ask import Question

MODELS = ("before", "after_stage1", "after_stage2")
MAX_PIXELS = 25_000_000


def run(ctx: Context, cfg: Evaluation) -> Mapping[str, Any]:
    """Evaluate each given model; metrics hold the accuracy of every question kind."""
    from llava_steps.evaluation import ask, score

    models = [name for name in MODELS if name in ctx.inputs]
    if not models:
        raise ConfigError("nothing to evaluate: give --before, --after-stage1 or --after-stage2")
    questions = read_questions(ctx.inputs["data"].path)
    results: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    for name in models:
        model = ask.Model(ctx.inputs[name].path)
        with ctx.progress(f"asking {name}", len(questions)) as bar:
            answers = model.answers(questions, cfg.batch_size, cfg.max_new_tokens, bar.advance)
        results[name] = score.by_kind(questions, answers)
        samples[name] = score.some(questions, answers, cfg.samples_shown)
    fsio.write_json(ctx.entry / "results.json", results)
    fsio.write_json(ctx.entry / "samples.json", samples)
    fsio.write_bytes(ctx.entry / "table.md", score.table(results).encode())
    return {"questions": len(questions), "results": results}


def read_questions(path: Path) -> list[Question]:
    """The last question of every conversation in a LLaVA JSON or JSONL file.

    Raises:
        InputError: the file, or any of its samples, cannot be used: leaving out what is difficult
            would change what an accuracy means.
    """
    from llava_steps.data import samples, sources
    from llava_steps.evaluation.ask import Question

    source = sources.open_source(path, "llava", sources.Options(max_pixels=MAX_PIXELS))
    found = []
    for chunk in source.chunks(1000):
        for row in source.rows(chunk):
            try:
                sample = source.sample(row)
            except samples.SampleError as error:
                raise InputError(f"{path}, record {row.index}: {error}") from error
            turns = tuple({"role": t.role, "content": t.content} for t in sample.turns)
            names = [sample.extra.get(key) for key in ("kind", "lang")]
            group = "/".join(str(name) for name in names if name) or "questions"
            reference = turns[-1]["content"]
            found.append(Question(sample.id, group, turns[:-1], sample.images, reference))
    if not found:
        raise InputError(f"{path} holds no questions")
    return found


def _data_files(path: Path, cfg: Evaluation) -> tuple[Path, Iterable[Path]]:
    from llava_steps.data.sources import Options, content_files

    return content_files(path, "llava", Options(max_pixels=MAX_PIXELS))


STEP = Step(
    name="evaluation",
    config=Evaluation,
    run=run,
    doc=__doc__,
    optional=frozenset(MODELS),
    parts={"data": _data_files},
)

if __name__ == "__main__":
    main(STEP)
