"""Settings of `compare`: the variants of a sweep."""

from __future__ import annotations

from llava_steps.settings.fields import StepConfig, source, value


class Comparison(StepConfig):
    """Scores and losses of the variants of a sweep beside the settings that differ."""

    title: str = value("", "title of the page; in a run the name of the run")
    settings: dict[str, str] = value(
        {},
        "what each variant sets, as VARIANT={...}: JSON of dotted keys and values",
    )
    last_stages: dict[str, str] = value(
        {},
        "stage after which a variant is compared, as VARIANT=STAGE; without it the last one of "
        "its trainings",
    )
    evaluations: dict[str, str] = source(
        {}, "result of the evaluation of each variant, as VARIANT=DIRECTORY"
    )
    trainings: dict[str, str] = source(
        {}, "results of trainings, as VARIANT/STAGE=DIRECTORY", optional=True
    )
