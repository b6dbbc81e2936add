"""Compare the variants of a sweep: comparison.html and comparison.json.

    llava-steps compare --settings 'lr_1e-5={"stages.stage2.lr": 1e-5}' \\
        --evaluations lr_1e-5=results/x/lr_1e-5/evaluation --save-dir results/x/comparison

The page has a table of the settings that differ against scores, and the losses in one chart for
each stage. The best variant has the highest exact match over all questions after its last stage.
Among equal ones it is the one with the lowest last loss.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llava_steps.core import filesystem
from llava_steps.core.errors import ConfigError, InputError
from llava_steps.settings.comparison import Comparison
from llava_steps.store.run import main
from llava_steps.store.step import Context, Step

if TYPE_CHECKING:
    from llava_steps.reporting.comparison import Variant


def run(ctx: Context, cfg: Comparison) -> Mapping[str, Any]:
    """Write the page and its figures.

    Raises:
        ConfigError: no variants, one without an evaluation, or settings that are not JSON.
        InputError: a result is not of the step that its flag names, or lacks scores.
    """
    from llava_steps.reporting import comparison, html

    variants = _variants(ctx, cfg)
    try:
        figures = comparison.figures(variants)
        page = comparison.page(figures, variants, cfg.title or "sweep")
    except KeyError as error:
        raise InputError(
            f"a result has no {error}; another version made it: run its step again"
        ) from error
    filesystem.write_json(ctx.entry / "comparison.json", figures)
    filesystem.write_bytes(ctx.entry / "comparison.html", html.render_comparison(page).encode())
    return {"variants": len(variants), "best": figures["best"], "metric": figures["metric"]}


def _variants(ctx: Context, cfg: Comparison) -> list[Variant]:
    """The variants in the order of their settings, with what was given for each."""
    from llava_steps.reporting import kinds
    from llava_steps.reporting.comparison import Variant

    if not cfg.settings:
        raise ConfigError("no variants given: give --settings VARIANT={...}")
    trainings: dict[str, dict[str, Any]] = {}
    for key in cfg.trainings:
        label, _, stage = key.rpartition("/")
        if not label or not stage:
            raise ConfigError(f"--trainings {key}: expected VARIANT/STAGE=DIRECTORY")
        item = ctx.inputs[f"trainings.{key}"]
        kinds.part(f"{stage}_checkpoint", item, "--trainings")
        trainings.setdefault(label, {})[stage] = item
    flags = (("--evaluations", cfg.evaluations), ("--trainings", trainings))
    for flag, labels in (*flags, ("--last-stages", cfg.last_stages)):
        if unknown := [label for label in labels if label not in cfg.settings]:
            raise ConfigError(f"{flag}: {unknown[0]!r} is not a variant of --settings")
    made = []
    for label, text in cfg.settings.items():
        if label not in cfg.evaluations:
            raise ConfigError(f"the variant {label!r} has no evaluation; give --evaluations")
        evaluation = ctx.inputs[f"evaluations.{label}"]
        kinds.part("evaluation", evaluation, "--evaluations")
        own = trainings.get(label, {})
        last = cfg.last_stages.get(label) or next(reversed(own), "")
        if not last:
            raise ConfigError(
                f"the last stage of the variant {label!r} is not known; give --last-stages"
            )
        made.append(Variant(label, _settings(label, text), evaluation, own, last))
    return made


def _settings(label: str, text: str) -> dict[str, Any]:
    """What a variant sets, from JSON."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--settings {label}: {text!r} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--settings {label}: expected {{KEY: VALUE}}, got {text!r}")
    return values


STEP = Step(name="comparison", config=Comparison, run=run, doc=__doc__)

if __name__ == "__main__":
    main(STEP)
