"""Settings of `report`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import PositiveInt, create_model

from llava_steps.settings.fields import StepConfig, source, value
from llava_steps.settings.forms import FIRST_STAGES
from llava_steps.settings.steps import STEPS


class _Page(StepConfig):
    """A report page about a run, from the results of its other steps."""

    title: str = value("", "title of the page; in a run the name of the run")
    samples: PositiveInt = value(2, "sample answers shown per question kind")
    results: dict[str, str] = source(
        {}, "further results by the name of their rule, as NAME=DIRECTORY", optional=True
    )


def _named() -> list[str]:
    """Rules whose results have a flag: those of one dataset and two stages."""
    names = []
    for kind, step in STEPS.items():
        if kind in ("report", "comparison", "blend"):
            continue
        stages = FIRST_STAGES if step.each == "stage" else [""]
        names += [f"{stage}_{kind}" if stage else kind for stage in stages]
    return names


if TYPE_CHECKING:
    Report = _Page
else:
    # A field for each step whose result the page can show.
    Report = create_model(
        "Report",
        __base__=_Page,
        __module__=__name__,
        __doc__=_Page.__doc__,
        **{rule: (str, source("", f"result of {rule}", optional=True)) for rule in _named()},
    )
