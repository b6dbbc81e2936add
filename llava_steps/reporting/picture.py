"""The pipeline as a diagram: data and model join in the stages, with figures in each box.

Several datasets are listed in one box. Stages follow in the order of their training; where
they branch, each has the name of what it starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from llava_steps.core.format import count
from llava_steps.reporting.content import Run, Stage, manifest
from llava_steps.reporting.html import clean
from llava_steps.reporting.kinds import Part
from llava_steps.reporting.training import start_words
from llava_steps.settings.forms import FIRST_STAGES
from llava_steps.settings.recipe import stage_title

WIDTH, BOX, HIGH, GAP, LINE = 424, 206, 58, 26, 18
_LEFT, _RIGHT, _MIDDLE = 1, WIDTH - BOX - 1, (WIDTH - BOX) // 2
_TOP = 30 + GAP
MOST = 6
"""Datasets that a box lists; the others are counted."""
NAME_FITS, FIGURE_FITS = 19, 27
"""Characters of a name and of a figure that fit into a box."""
ABSENT = "not in this run"


@dataclass(frozen=True)
class _Box:
    """A box of the diagram."""

    sign: int
    name: str
    lines: Sequence[str]
    """Its figures; none for what is not in this run."""
    left: int
    top: int

    @property
    def bottom(self) -> int:
        return self.top + HIGH + LINE * max(0, len(self.lines) - 1)

    @property
    def middle(self) -> int:
        return self.left + BOX // 2


def picture(run: Run) -> Markup:
    """The diagram of a run; what every run has and this one has not is drawn faint."""
    data = _column(run, _LEFT, 1, [
        ("tar_shards", "tar shards", _shards),
        ("energon_dataset", "energon dataset", _prepared),
    ])  # fmt: skip
    model = _column(run, _RIGHT, 3, [
        ("hf_model", "HF model", lambda m: f"{count(m['parameters'])} parameters"),
        ("megatron_checkpoint", "Megatron checkpoint",
         lambda m: f"{m['certificate']['megatron_tensors']} tensors"),
    ])  # fmt: skip
    parts = [
        _source("images and conversations", data[0]),
        _source("tower + language model", model[0]),
    ]
    parts += [_arrow(column[0].bottom, column[1]) for column in (data, model)]
    joined = max(data[-1].bottom, model[-1].bottom)
    trained = _trained(run, joined + GAP)
    parts.append(_join([data[-1], model[-1]], joined, trained[0]))
    names = [stage.name for stage in run.stages]
    for number, box in enumerate(trained[1:], 1):
        stage = run.stages[number] if number < len(names) else None
        # A stage that starts elsewhere says so in its box.
        if stage is None or run.is_chain or stage.start == names[number - 1]:
            parts.append(_arrow(trained[number - 1].bottom, box))
    boxes = [*data, *model, *trained]
    drawn = "".join([*parts, *map(_drawn, boxes)])
    label = "The pipeline: " + "; ".join(
        ", ".join([box.name, *box.lines]) for box in boxes if box.lines
    )
    return Markup(  # noqa: S704  every text above is escaped
        f'<svg class="pipeline" viewBox="0 0 {WIDTH} {trained[-1].bottom + 2}" role="img" '
        f'aria-label="{escape(clean(label))}"><defs>'
        f'<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" '
        f'markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>'
        f"{drawn}</svg>"
    )


Figure = Callable[[Mapping[str, Any]], str]


def _column(run: Run, left: int, sign: int, rows: Iterable[tuple[str, str, Figure]]) -> list[_Box]:
    """Boxes below each other at the top: kind, words and figure of each."""
    made: list[_Box] = []
    for kind, words, figure in rows:
        of_kind = run.kind(kind)
        lines = [_line(part, figure, len(of_kind)) for part in of_kind[:MOST]]
        if len(of_kind) > MOST:
            lines.append(f"and {len(of_kind) - MOST} more")
        top = made[-1].bottom + GAP if made else _TOP
        name = f"{words}s" if len(of_kind) > 1 and not words.endswith("s") else words
        made.append(_Box(sign + len(made), name, lines, left, top))
    return made


def _line(part: Part, figure: Figure, count_of_kind: int) -> str:
    text = figure(manifest(part).get("metrics", {}))
    return f"{part.of}: {text.partition(', ')[0]}" if count_of_kind > 1 else text


def _trained(run: Run, top: int) -> list[_Box]:
    """The stages, the export and the evaluation."""
    rows = [(stage_title(stage.name), _stage_lines(run, stage)) for stage in run.stages]
    rows = rows or [(stage_title(name), []) for name in FIRST_STAGES]
    export, held_out = run.one("hf_export"), run.one("evaluation")
    tensors = manifest(export)["metrics"]["certificate"]["hf_tensors"] if export else 0
    rows.append(("HF export", [f"{tensors} tensors"] if export else []))
    questions = manifest(held_out)["metrics"]["questions"] if held_out else 0
    rows.append(("evaluation", [f"{questions:,} questions"] if held_out else []))
    made: list[_Box] = []
    for name, lines in rows:
        at = made[-1].bottom + GAP if made else top
        made.append(_Box(5 + len(made), name, lines, _MIDDLE, at))
    return made


def _stage_lines(run: Run, stage: Stage) -> list[str]:
    metrics = stage.metrics
    lines = [f"{metrics['steps']:,} steps, loss {metrics['last_loss']:.3g}"]
    if not run.is_chain and stage.start:
        lines.append(f"from {start_words(stage.start)}")
    return lines


def _shards(metrics: Mapping[str, Any]) -> str:
    return f"{metrics['samples_written']:,} samples, {metrics['shards']} tars"


def _prepared(metrics: Mapping[str, Any]) -> str:
    return f"{metrics['samples']['train']:,} to train on"


def _drawn(box: _Box) -> str:
    state = "" if box.lines else " absent"
    figures = "".join(
        f'<text class="figure" x="{box.left + 12}" y="{box.top + 47 + LINE * number}">'
        f"{escape(_fitted(line, FIGURE_FITS))}</text>"
        for number, line in enumerate(box.lines or [ABSENT])
    )
    return (
        f'<g class="box{state}"><rect x="{box.left}" y="{box.top}" width="{BOX}" '
        f'height="{box.bottom - box.top}" rx="9"/>'
        f'<circle cx="{box.left + 20}" cy="{box.top + 21}" r="11"/>'
        f'<text class="sign" x="{box.left + 20}" y="{box.top + 25}">{box.sign}</text>'
        f'<text class="name" x="{box.left + 37}" y="{box.top + 25}">'
        f"{escape(_fitted(box.name, NAME_FITS))}</text>{figures}</g>"
    )


def _fitted(text: str, most: int) -> str:
    shown = clean(text)
    return shown if len(shown) <= most else shown[: most - 1] + "\u2026"


def _source(words: str, box: _Box) -> str:
    return (
        f'<text class="source" x="{box.middle}" y="20">{escape(words)}</text>'
        f'<path class="arrow" d="M{box.middle} 30V{box.top - 2}"/>'
    )


def _arrow(above: int, box: _Box) -> str:
    return f'<path class="arrow" d="M{box.middle} {above}V{box.top - 2}"/>'


def _join(columns: Sequence[_Box], joined: int, box: _Box) -> str:
    """From the boxes of both columns into the first stage."""
    turn = joined + GAP // 2
    lines = "".join(f"M{each.middle} {each.bottom}V{turn}H{box.middle}" for each in columns)
    return (
        f'<path class="line" d="{lines}"/>'
        f'<path class="arrow" d="M{box.middle} {turn}V{box.top - 2}"/>'
    )
