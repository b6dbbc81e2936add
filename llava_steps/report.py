"""Write the report of a run: report.html, one page that needs no network and no script.

    llava-steps report --title demo --evaluation results/demo/evaluation \\
        --stage2-checkpoint results/demo/stage2_checkpoint --save-dir results/demo/report

The page shows pipeline, data, curves of every stage, evaluation with sample answers, conversion
certificates, costs and provenance, each from the results that are given. Results without a flag
are given by the name of their rule: --results pretrain_tar_shards=DIRECTORY. For a result from the
store it shows the time that computing it took.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llava_steps.core import filesystem
from llava_steps.core.errors import ConfigError, InputError
from llava_steps.settings.report import Report
from llava_steps.store.run import main
from llava_steps.store.step import Context, Step

if TYPE_CHECKING:
    from llava_steps.reporting.kinds import Part

PAGE = "report.html"


def run(ctx: Context, cfg: Report) -> Mapping[str, Any]:
    """Write the page.

    Raises:
        ConfigError: no result is given.
        InputError: a result is given twice, is not of the step that its flag names, or was made by
            another version.
    """
    from llava_steps.reporting import collect, html, kinds

    if not ctx.inputs:
        raise ConfigError("no results given: give at least one, such as --evaluation")
    parts: dict[str, Part] = {}
    for key, item in ctx.inputs.items():
        field, _, given = key.partition(".")
        name, flag = given or field, "--" + field.replace("_", "-")
        if name in parts:
            raise InputError(f"{flag} {name}: this result is given twice; leave one out")
        parts[name] = kinds.part(name, item, flag)
        ctx.log.info("reading %s", name)
    try:
        page = collect.page([*parts.values()], cfg.title or "run", cfg.samples)
    except KeyError as error:
        raise InputError(
            f"a result has no {error}; another version made it: run its step again"
        ) from error
    text = html.render(page).encode()
    filesystem.write_bytes(ctx.entry / PAGE, text)
    return {"bytes": len(text), "sections": sorted(parts)}


STEP = Step(
    name="report",
    config=Report,
    run=run,
    doc=__doc__,
)

if __name__ == "__main__":
    main(STEP)
