"""One page that tells a run: report.html, which needs no network and no script.

    llava-steps report --title demo --evaluation results/demo/evaluation \\
        --stage2-checkpoint results/demo/stage2_checkpoint --save-dir results/demo/report

Pipeline, data, curves of both stages, evaluation with sample answers, conversion certificates,
costs and provenance, each from the results that are given. A run found in the store was timed when
it was computed; these are the times that the page shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_steps.core import filesystem
from llava_steps.core.errors import ConfigError, InputError
from llava_steps.settings.config import Report
from llava_steps.settings.steps import STEPS
from llava_steps.store.run import Context, Step, main

PAGE = "report.html"


def run(ctx: Context, cfg: Report) -> Mapping[str, Any]:
    """Write the page.

    Raises:
        ConfigError: no result is given.
        InputError: a result is not one that its step makes now.
    """
    from llava_steps.reporting import collect, html

    inputs = {name: ctx.inputs[name] for name in STEPS["report"].feeds if name in ctx.inputs}
    if not inputs:
        raise ConfigError("nothing to report: give results, such as --evaluation")
    for name, item in inputs.items():
        made_by = (item.manifest or {}).get("step")
        if made_by is None:
            raise InputError(f"{item.shown} is no result of a step, but a report needs manifests")
        if made_by != ("hf_export" if name == "stage1_export" else name):
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} {item.shown}: this is the result of {made_by}, not of {name}")
        ctx.log.info("reading %s", name)
    try:
        page = collect.page(inputs, cfg.title or "run", cfg.samples)
    except KeyError as error:
        raise InputError(
            f"a result has no {error}; it was made by another version: run its step again"
        ) from error
    text = html.render(page).encode()
    filesystem.write_bytes(ctx.entry / PAGE, text)
    return {"bytes": len(text), "sections": sorted(inputs)}


STEP = Step(
    name="report",
    config=Report,
    run=run,
    doc=__doc__,
    optional=frozenset(STEPS["report"].feeds),
)

if __name__ == "__main__":
    main(STEP)
