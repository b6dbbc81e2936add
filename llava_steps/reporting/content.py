"""What a run has: its results by kind, its stages in order, and the models it evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_steps.reporting import overlay
from llava_steps.reporting.kinds import Part, heading
from llava_steps.settings.config import UNTRAINED
from llava_steps.settings.recipe import stage_title
from llava_steps.settings.steps import STEPS

BEFORE = "before"


@dataclass(frozen=True)
class Stage:
    """A training of the run."""

    name: str
    part: Part
    start: str | None
    """The stage that it starts from, UNTRAINED, or a path, which has a slash; None if unknown."""
    tone: str
    """CSS classes of its colour."""

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What its training reported."""
        metrics: Mapping[str, Any] = manifest(self.part).get("metrics", {})
        return metrics


@dataclass(frozen=True)
class Model:
    """A model that was evaluated."""

    name: str
    """In results.json."""
    title: str
    """At the beginning of a line."""
    inside: str
    """In the middle of a sentence."""
    tone: str


@dataclass(frozen=True)
class Run:
    """The results that a page shows."""

    parts: Sequence[Part]
    stages: Sequence[Stage]

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Run:
        """Sort the results of a run: by kind, then by stage."""
        stages = _stages(parts)
        kinds, names = [*STEPS], [stage.name for stage in stages]
        ordered = sorted(
            parts,
            key=lambda part: (
                kinds.index(part.kind),
                names.index(part.of) if part.of in names else len(names),
            ),
        )
        return cls(ordered, stages)

    def kind(self, *kinds: str) -> list[Part]:
        """The results of some kinds, in the order of the run."""
        return [part for part in self.parts if part.kind in kinds]

    def one(self, name: str) -> Part | None:
        """The result of a rule."""
        return next((part for part in self.parts if part.name == name), None)

    @property
    def is_chain(self) -> bool:
        """Whether each stage starts from the one before, the first from the untrained model."""
        before = [UNTRAINED, *(stage.name for stage in self.stages)]
        pairs = zip(self.stages, before, strict=False)
        return all(stage.start in (None, expected) for stage, expected in pairs)

    def models(self, names: Iterable[str]) -> list[Model]:
        """Evaluated models in order: before training, others, after each stage."""
        given = [*names]
        after = {f"after_{stage.name}": stage for stage in self.stages}
        known = [name for name in after if name in given]
        unknown = [n for n in given if n.startswith("after_") and n not in after]
        others = [n for n in given if n not in {BEFORE, *known, *unknown}]
        made = [Model(BEFORE, "Before", "before", "tone-0")] if BEFORE in given else []
        free = len(after)
        for name in [*others, *unknown, *known]:
            if name in after:
                tone = after[name].tone
            else:
                tone, free = overlay.tone(free), free + 1
            of = name.removeprefix("after_")
            made.append(
                Model(name, name, name, tone)
                if of == name
                else Model(name, heading(of), stage_title(of), tone)
            )
        return made


def manifest(part: Part) -> Mapping[str, Any]:
    """The manifest of a result."""
    return part.item.manifest or {}


def source(part: Part, key: str, among: Sequence[Part]) -> Part | None:
    """The result that another one read as its input `key`; None if it is not among those."""
    read = manifest(part).get("inputs", {}).get(key)
    if read is None:
        return None
    equal = [other for other in among if other.item.digest == read["digest"] and other != part]
    named = [other for other in equal if other.name == Path(read["path"]).name]
    return next(iter([*named, *equal]), None)


def _stages(parts: Sequence[Part]) -> list[Stage]:
    """The trainings, each after the one that it starts from, that of the export last."""
    trained = {part.of: part for part in parts if part.kind == "checkpoint"}
    starts = {name: _start(part, parts) for name, part in trained.items()}
    # A stage of the old form has its own flag, and comes after `--results` on the command line.
    left = sorted(trained, key=lambda name: name not in ("stage1", "stage2"))
    export = next((part for part in parts if part.kind == "hf_export"), None)
    last = source(export, "megatron_dir", [*trained.values()]) if export else None
    if last:
        left = [*(name for name in left if name != last.of), last.of]
    order: list[str] = []
    while left:
        free = [name for name in left if starts[name] not in left]
        order.append((free or left)[0])
        left.remove(order[-1])
    return [
        Stage(name, trained[name], starts[name], overlay.tone(position))
        for position, name in enumerate(order)
    ]


def _start(part: Part, parts: Sequence[Part]) -> str | None:
    """What a training starts from."""
    read = manifest(part).get("inputs", {}).get("megatron_load_dir")
    if read is None:
        return None
    trained = source(part, "megatron_load_dir", [p for p in parts if p.kind == "checkpoint"])
    if trained:
        return trained.of
    untrained = [p for p in parts if p.kind == UNTRAINED]
    if source(part, "megatron_load_dir", untrained):
        return UNTRAINED
    path = str(read["path"])
    return path if "/" in path else f"./{path}"
