"""What a result is: its kind and what it belongs to, from its rule's name and its manifest."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llava_steps.core.errors import InputError
from llava_steps.settings.recipe import stage_title
from llava_steps.settings.steps import STEPS
from llava_steps.store.store import Input

_MADE_BY = {"checkpoint": r"stage\d+_checkpoint", "audit": r"stage\d+_audit", "export": "hf_export"}
"""Kind of rule -> name of its step in manifests, where they differ."""
_KEPT = re.compile(r"(.+)_step(\d+)")


@dataclass(frozen=True)
class Part:
    """A result of a run."""

    name: str
    """Of its rule."""
    kind: str
    item: Input
    of: str = ""
    """Its dataset or stage; empty where the run has one result of this kind."""
    step: int | None = None
    """Of a kept checkpoint: the step after which the stage was like this."""


def part(name: str, item: Input, flag: str) -> Part:
    """A result by the name of its rule, such as `pretrain_tar_shards`.

    A name that says no kind is that of a dataset or stage whose kind the manifest says.

    Raises:
        InputError: it is not a result, or not one of the kind that the name says.
    """
    step = (item.manifest or {}).get("step")
    if step is None:
        raise InputError(f"{flag} {item.shown} has no manifest; give the result of a step")
    kind, of = _named(name)
    if not kind:
        kind, of = next((k for k in STEPS if _makes(k, step)), step), name
    if not _makes(kind, step):
        raise InputError(f"{flag} {item.shown}: this is the result of {step}, not of {name}")
    kept = _KEPT.fullmatch(of) if kind == "evaluation" else None
    if kept:
        return Part(name, kind, item, kept[1], int(kept[2]))
    return Part(name, kind, item, of)


def heading(stage: str) -> str:
    """A stage at the beginning of a line: `Stage 1` for stage1, `Stage NAME` for others."""
    return "S" + stage_title(stage).removeprefix("s")


def _named(name: str) -> tuple[str, str]:
    """Kind and dataset or stage that a name says; a kind that is empty if it says none."""
    if name in STEPS:
        return name, ""
    for kind, step in STEPS.items():
        before = name.removesuffix(f"_{kind}")
        if before != name and (step.each or (kind == "evaluation" and _KEPT.fullmatch(before))):
            return kind, before
    return "", ""


def _makes(kind: str, step: str) -> bool:
    return re.fullmatch(_MADE_BY.get(kind, re.escape(kind)), step) is not None
