"""Ask Hugging Face LLaVA models the questions of a held-out file and score their answers.

    llava-steps evaluate --data held/heldout.json --before results/x/hf_model \\
        --after-stage2 results/x/hf_export --save-dir results/x/evaluation

Models are loaded and run by plain transformers (AutoProcessor, LlavaForConditionalGeneration),
as their users will. An answer is right when it equals the reference, except for white space at its
ends. --metrics adds other scores. --prompts adds questions about the file's first images, whose
answers are shown but not scored. Writes results.json, table.md, samples.json, generations.json, and
the images of the samples as thumbnails.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_steps.core import filesystem
from llava_steps.core.errors import ConfigError, InputError
from llava_steps.settings.evaluation import Evaluation
from llava_steps.store.run import main
from llava_steps.store.step import Context, Step

if TYPE_CHECKING:
    from llava_steps.evaluation.ask import Model, Question

MODELS = ("before", "after_stage1", "after_stage2")
"""Models with their own flag; --models names others."""


def run(ctx: Context, cfg: Evaluation) -> Mapping[str, Any]:
    """Evaluate each given model; metrics hold the scores of every question kind.

    Raises:
        ConfigError: no model is given, or a metric's library is not installed.
        InputError: a model or a sample cannot be used.
    """
    from llava_steps.data.samples.thumbnails import Thumbnails
    from llava_steps.evaluation import ask, metrics, score

    models = {name: ctx.inputs[name] for name in MODELS if name in ctx.inputs}
    models |= {name: ctx.inputs[f"models.{name}"] for name in cfg.models}
    if not models:
        raise ConfigError(
            "nothing to evaluate: give --before, --after-stage1, --after-stage2 or --models"
        )
    metrics.check(cfg.metrics)
    questions = read_questions(ctx.inputs["data"].path)
    prompts = prompted(questions, cfg.prompts, cfg.prompt_images)
    results: dict[str, Any] = {}
    samples: dict[str, Any] = {}
    generations: dict[str, list[str]] = {}
    for name, directory in models.items():
        model = ask.Model(directory.path)
        with ctx.progress(f"evaluating {name}", len(questions)) as bar:
            replies = model.replies(questions, cfg.batch_size, cfg.max_new_tokens, bar.advance)
        answers = [reply.text for reply in replies]
        if cut := {number for number, reply in enumerate(replies) if reply.is_cut}:
            ctx.log.info(
                "%s: %d of %d answers were cut at max_new_tokens %d",
                name,
                len(cut),
                len(answers),
                cfg.max_new_tokens,
            )
        results[name] = _scores(ctx, cfg, name, model, questions, answers)
        samples[name] = score.some(questions, answers, cfg.samples_shown, cut)
        if prompts:
            with ctx.progress(f"fixed prompts, {name}", len(prompts)) as bar:
                generations[name] = model.answers(
                    prompts, cfg.batch_size, cfg.prompt_tokens, bar.advance
                )
    thumbnails = Thumbnails(ctx.entry, "images")
    for row, number in enumerate(score.chosen(questions, cfg.samples_shown)):
        images = thumbnails.add(questions[number].images)
        for name in models:
            samples[name][row]["images"] = images
    filesystem.write_json(ctx.entry / "results.json", results)
    filesystem.write_json(ctx.entry / "samples.json", samples)
    if prompts:
        rows = [
            {
                "prompt": prompt.turns[-1]["content"],
                "images": thumbnails.add(prompt.images),
                "answers": {name: generations[name][i] for name in models},
            }
            for i, prompt in enumerate(prompts)
        ]
        filesystem.write_json(ctx.entry / "generations.json", rows)
    filesystem.write_bytes(ctx.entry / "table.md", score.tables(results).encode())
    return {"questions": len(questions), "results": results}


def _scores(
    ctx: Context,
    cfg: Evaluation,
    name: str,
    model: Model,
    questions: Sequence[Question],
    answers: Sequence[str],
) -> dict[str, Any]:
    from llava_steps.evaluation import metrics, score

    scores: dict[str, list[float]] = {
        metric: metrics.score(metric, questions, answers)
        for metric in cfg.metrics
        if metric != "perplexity"
    }
    surprise = None
    if "perplexity" in cfg.metrics:
        from llava_steps.evaluation import perplexity

        with ctx.progress(f"perplexity {name}", len(questions)) as bar:
            surprise = perplexity.surprise(model, questions, cfg.batch_size, bar.advance)
    return score.by_kind(questions, answers, scores, surprise)


def prompted(questions: Sequence[Question], prompts: Sequence[str], images: int) -> list[Question]:
    """Every prompt about each of the first `images` single images, without their conversation."""
    from llava_steps.data.samples.sample import images_first

    shown = dict.fromkeys(q.images for q in questions if len(q.images) == 1)
    return [
        replace(
            questions[0],
            id=f"prompt {number} image {position}",
            turns=({"role": "user", "content": images_first(prompt, 1)},),
            images=image,
            reference="",
            answers=(),
        )
        for position, image in enumerate(list(shown)[:images])
        for number, prompt in enumerate(prompts)
    ]


def read_questions(path: Path) -> list[Question]:
    """The last question of every conversation in a LLaVA JSON or JSONL file.

    Raises:
        InputError: the file, or any of its samples, cannot be used: leaving samples out would
            change what an accuracy means.
    """
    from llava_steps.data import sources
    from llava_steps.data.samples import sample as samples
    from llava_steps.evaluation.ask import Question

    source = sources.open_source(path, "llava")
    questions = []
    for chunk in source.chunks(1000):
        for record in source.read(chunk):
            try:
                sample = source.sample(record)
            except samples.SampleError as error:
                raise InputError(f"{path}, record {record.index}: {error}") from error
            turns = tuple({"role": t.role, "content": t.content} for t in sample.turns)
            names = [sample.extra.get(key) for key in ("kind", "lang")]
            group = "/".join(str(name) for name in names if name) or "questions"
            reference = turns[-1]["content"]
            answers = _answers(sample.extra.get("answers"), f"{path}, record {record.index}")
            questions.append(
                Question(sample.id, group, turns[:-1], sample.images, reference, answers)
            )
    if not questions:
        raise InputError(f"{path} holds no questions; it must be a LLaVA JSON or JSONL file")
    return questions


def _answers(given: Any, where: str) -> tuple[str, ...]:
    """What several people answered: a list of texts, or of objects with `answer`, as in VQA."""
    if given is None:
        return ()
    rows = given if isinstance(given, list) else [given]
    values = [row.get("answer") if isinstance(row, dict) else row for row in rows]
    texts = tuple(answer for answer in values if isinstance(answer, str))
    if not texts or len(texts) < len(values):
        raise InputError(f"{where}: answers must be a list of texts, or of objects with `answer`")
    return texts


def _data_files(path: Path, cfg: Evaluation) -> tuple[Path, Iterable[Path]]:
    from llava_steps.data.sources import Options, content_files

    return content_files(path, "llava", Options())


STEP = Step(
    name="evaluation",
    config=Evaluation,
    run=run,
    doc=__doc__,
    parts={"data": _data_files},
)

if __name__ == "__main__":
    main(STEP)
