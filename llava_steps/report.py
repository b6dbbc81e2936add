"""Write the report of a run: report.html, one page that needs no network and no script.

    llava-steps report --title demo --evaluation results/demo/evaluation \\
        --stage2-checkpoint results/demo/stage2_checkpoint --save-dir results/demo/report

The page shows pipeline, data, curves of both stages, evaluation with sample answers, conversion
certificates, costs and provenance, each from the results that are given. For a result from the
store it shows the time that computing it took.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_steps.core import filesystem
from llava_steps.core.errors import ConfigError, InputError
from llava_steps.settings.forms import FIRST_STAGES
from llava_steps.settings.report import Report
from llava_steps.store.run import main
from llava_steps.store.step import Context, Step
from llava_steps.store.store import Input

PAGE = "report.html"
MADE_BY = {f"{stage}_export": "hf_export" for stage in FIRST_STAGES}
"""Result -> step that makes it, where the names differ."""


def run(ctx: Context, cfg: Report) -> Mapping[str, Any]:
    """Write the page.

    Raises:
        ConfigError: no result is given.
        InputError: a result is not of the step that its flag names, or of another version.
    """
    from llava_steps.reporting import collect, html

    if not ctx.inputs:
        raise ConfigError("no results given: give at least one, such as --evaluation")
    results: dict[str, Input] = {}
    for key, item in ctx.inputs.items():
        field, _, given = key.partition(".")
        name, flag = given or field, "--" + field.replace("_", "-")
        results[name] = item
        made_by = (item.manifest or {}).get("step")
        if made_by is None:
            raise InputError(f"{flag} {item.shown} has no manifest; give the result of a step")
        if not given and made_by != MADE_BY.get(name, name):
            raise InputError(f"{flag} {item.shown}: this is the result of {made_by}, not of {name}")
        ctx.log.info("reading %s", name)
    try:
        page = collect.page(results, cfg.title or "run", cfg.samples)
    except KeyError as error:
        raise InputError(
            f"a result has no {error}; another version made it: run its step again"
        ) from error
    text = html.render(page).encode()
    filesystem.write_bytes(ctx.entry / PAGE, text)
    return {"bytes": len(text), "sections": sorted(results)}


STEP = Step(
    name="report",
    config=Report,
    run=run,
    doc=__doc__,
)

if __name__ == "__main__":
    main(STEP)
