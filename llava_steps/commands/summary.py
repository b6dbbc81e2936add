"""Print the results of a run: the evaluation table, the path of the model, how to ask it.

    llava-steps summary [--configfile mine.yaml] [--started UNIX_SECONDS]

The last line is JSON with the accuracy on `what_digit`, the mean of both languages, before training
and after each stage, as accuracy_before and accuracy_STAGE. Of a sweep it prints the comparison of
the variants; the last line names the best one. `wall_s` counts from --started.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_steps.core.errors import InputError, report_error
from llava_steps.evaluation import score
from llava_steps.pipeline import expand, variants
from llava_steps.settings import cli, load, sweep
from llava_steps.settings.config import Config

KIND = "what_digit"


def main(arguments: list[str] | None = None) -> int:
    """Print the summary; returns the exit code."""
    given = parser().parse_args(arguments)
    try:
        print(summary(load.with_overlays(given.configfile), given.started))
    except Exception as error:
        return report_error("summary", error)
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.tool_parser("summary", __doc__)
    cli.add_configfile(made)
    made.add_argument(
        "--started", type=float, default=None, help="when the run began, in Unix seconds"
    )
    return made


def summary(config: Config, started: float | None) -> str:
    """The text; InputError when the run has not been evaluated, or a file of it is damaged."""
    run = Path(config.results, config.run)
    lines, answer = _compared(config, run) if config.sweep else _evaluated(config, run)
    export = answer["hf_export"]
    if started is not None:
        answer["wall_s"] = round(time.time() - started, 1)
    lines += [
        f"The model: {export} (LlavaForConditionalGeneration, AutoProcessor)",
        f'Ask it:    {sys.executable} -m llava_steps chat {export} IMAGE "What digit is this?"',
    ]
    if example := heldout_image(run):
        lines[-1] = lines[-1].replace("IMAGE", str(example))
    return "\n".join([*lines, "", json.dumps(answer)])


def _evaluated(config: Config, run: Path) -> tuple[list[str], dict[str, Any]]:
    """The scores of a run, as lines and as the answer for scripts."""
    evaluation = run / "evaluation"
    models = {"accuracy_before": "before"}
    models |= {f"accuracy_{stage}": f"after_{stage}" for stage in config.ordered_stages()}
    with _reading(evaluation):
        table = (evaluation / "table.md").read_text()
        results = json.loads((evaluation / "results.json").read_bytes())
        answer: dict[str, Any] = {
            key: accuracy(results[model]) for key, model in models.items() if model in results
        }
    answer["hf_export"] = str(run / "hf_export")
    title = f"Held-out questions answered right ({evaluation / 'results.json'}):"
    return [title, "", table], answer


def _compared(config: Config, run: Path) -> tuple[list[str], dict[str, Any]]:
    """The variants of a sweep, as lines and as the answer for scripts."""
    comparison = run / "comparison"
    with _reading(comparison):
        figures = json.loads((comparison / "comparison.json").read_bytes())
        rows = figures["variants"]
        best = figures["best"]
        answer = {
            "best": best,
            "metric": figures["metric"],
            "scores": {row["label"]: row["scores"]["all"][figures["metric"]] for row in rows},
        }
        table = _table(rows, figures["metric"])
    exports = _exports(config)
    if best not in exports:
        raise InputError(
            f"{comparison} is about {best}, which is not a variant of the configuration: run "
            "`snakemake --cores all` first"
        )
    answer["hf_export"] = str(exports[best])
    title = f"Held-out questions answered right ({comparison / 'comparison.json'}):"
    return [title, "", table, f"Best:      {best}"], answer


def _table(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    """A Markdown table with a row for each variant: what differs, scores, last loss."""
    settings = [row["settings"] for row in rows]
    keys = sweep.varied(settings)
    groups = [*dict.fromkeys(["all", *(group for row in rows for group in row["scores"])])]
    heads = ["variant", *(key.removeprefix("stages.") for key in keys), *groups, "last loss"]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for row in rows:
        loss = row["last_loss"]
        lines.append(
            [
                row["label"],
                *(sweep.written(row["settings"][k]) if k in row["settings"] else "" for k in keys),
                *(f"{row['scores'][g][metric]:.1%}" if g in row["scores"] else "" for g in groups),
                "" if loss is None else f"{loss:.4g}",
            ]
        )
    return score.aligned(lines)


def _exports(config: Config) -> dict[str, Path]:
    """The export of each variant of a sweep, by its label."""
    assignments = [variant.assignments for variant in config.variants]
    declared = [expand.declared(variant.config) for variant in config.variants]
    named = variants.instances(assignments, declared)
    return {
        label: Path(config.results, config.run, own["hf_export"].label, "hf_export")
        for label, own in zip(sweep.labels(assignments), named, strict=True)
    }


@contextlib.contextmanager
def _reading(result: Path) -> Iterator[None]:
    """Errors of files of a result that are missing, or not what its step wrote."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(
            f"{error.filename} is missing: run `snakemake --cores all` first"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(result, error) from None


def accuracy(result: dict[str, Any]) -> float | None:
    """Mean over the languages of the accuracy on `what_digit`; None when it was not evaluated."""
    shares = [v["accuracy"] for group, v in result.items() if group.split("/")[0] == KIND]
    return round(sum(shares) / len(shares), 4) if shares else None


def heldout_image(run: Path) -> Path | None:
    """An image of the demo that training never saw; None in a run of other data."""
    raw = run / "demo_assets/raw"
    if not (raw / "heldout.json").is_file():
        return None
    try:
        samples = json.loads((raw / "heldout.json").read_bytes())
        images = [s["image"] for s in samples if isinstance(s.get("image"), str)]
    except (ValueError, TypeError, AttributeError) as error:
        raise damaged(raw.parent, error) from None
    return raw / images[0] if images else None


def damaged(result: Path, error: Exception) -> InputError:
    """The error for a result whose files are not what its step wrote."""
    return InputError(
        f"{result} cannot be read ({error!r}); llava-steps verify {result} compares its files"
    )
