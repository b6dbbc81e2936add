"""Print the results of a run: the evaluation table, the path of the model, how to ask it.

    llava-steps summary [--configfile mine.yaml] [--started UNIX_SECONDS]

The last line is JSON with the accuracy on `what_digit`, the mean of both languages, before training
and after each stage. `wall_s` counts from --started.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from llava_steps.core.errors import InputError, report_error
from llava_steps.settings import cli, load
from llava_steps.settings.config import Config

KIND = "what_digit"
MODELS = {
    "accuracy_before": "before",
    "accuracy_stage1": "after_stage1",
    "accuracy_stage2": "after_stage2",
}


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
    evaluation, export = run / "evaluation", run / "hf_export"
    try:
        table = (evaluation / "table.md").read_text()
        results = json.loads((evaluation / "results.json").read_bytes())
        answer: dict[str, Any] = {
            key: accuracy(results[model]) for key, model in MODELS.items() if model in results
        }
    except FileNotFoundError as error:
        raise InputError(
            f"{error.filename} is missing: run `snakemake --cores all` first"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(evaluation, error) from None
    answer["hf_export"] = str(export)
    if started is not None:
        answer["wall_s"] = round(time.time() - started, 1)
    lines = [
        f"Held-out questions answered right ({evaluation / 'results.json'}):",
        "",
        table,
        f"The model: {export} (LlavaForConditionalGeneration, AutoProcessor)",
        f'Ask it:    {sys.executable} -m llava_steps chat {export} IMAGE "What digit is this?"',
    ]
    if example := heldout_image(run):
        lines[-1] = lines[-1].replace("IMAGE", str(example))
    return "\n".join([*lines, "", json.dumps(answer)])


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
