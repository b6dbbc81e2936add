"""The pipeline as a diagram: two branches that join in training, with a figure in each box."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup, escape

WIDTH, BOX, HIGH, GAP = 404, 196, 58, 26
_LEFT, _RIGHT, _MIDDLE = 1, WIDTH - BOX - 1, (WIDTH - BOX) // 2
BOXES = {
    "tar_shards": ("1", "tar shards", _LEFT, 1),
    "energon_dataset": ("2", "energon dataset", _LEFT, 2),
    "hf_model": ("3", "HF model", _RIGHT, 1),
    "megatron_checkpoint": ("4", "Megatron checkpoint", _RIGHT, 2),
    "stage1_checkpoint": ("5", "stage 1", _MIDDLE, 3),
    "stage2_checkpoint": ("6", "stage 2", _MIDDLE, 4),
    "hf_export": ("7", "HF export", _MIDDLE, 5),
    "evaluation": ("8", "evaluation", _MIDDLE, 6),
}
"""Rule -> number, words, left edge and row of its box."""


def picture(figures: Mapping[str, str]) -> Markup:
    """The diagram; `figures` has a short text for each rule of the run, others are drawn faint."""
    parts = [
        _source("images and conversations", _LEFT),
        _source("tower + language model", _RIGHT),
    ]
    for name, (sign, words, left, row) in BOXES.items():
        top = _top(row)
        state = "" if name in figures else " absent"
        parts.append(_arrow(name))
        parts.append(
            f'<g class="box{state}"><rect x="{left}" y="{top}" width="{BOX}" height="{HIGH}" '
            f'rx="9"/><circle cx="{left + 20}" cy="{top + 21}" r="11"/>'
            f'<text class="sign" x="{left + 20}" y="{top + 25}">{sign}</text>'
            f'<text class="name" x="{left + 38}" y="{top + 25}">{escape(words)}</text>'
            f'<text class="figure" x="{left + 12}" y="{top + 47}">'
            f"{escape(figures.get(name, 'not in this run'))}</text></g>"
        )
    height = _top(6) + HIGH + 2
    label = "The pipeline: " + "; ".join(
        f"{BOXES[name][1]}, {figure}" for name, figure in figures.items() if name in BOXES
    )
    return Markup(  # noqa: S704  every text above is escaped
        f'<svg class="pipeline" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(label)}"><defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" '
        f'markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z"/></marker></defs>'
        f"{''.join(parts)}</svg>"
    )


def _top(row: int) -> int:
    return 30 + GAP + (row - 1) * (HIGH + GAP)


def _source(words: str, left: int) -> str:
    middle = left + BOX // 2
    return (
        f'<text class="source" x="{middle}" y="20">{escape(words)}</text>'
        f'<path class="arrow" d="M{middle} 30V{_top(1) - 2}"/>'
    )


def _arrow(name: str) -> str:
    """From the box above into this one; both branches lead into stage 1."""
    _, _, left, row = BOXES[name]
    if row == 1:
        return ""
    middle, top = left + BOX // 2, _top(row)
    above = top - GAP
    if name != "stage1_checkpoint":
        return f'<path class="arrow" d="M{middle} {above}V{top - 2}"/>'
    turn = above + GAP // 2
    sides = (_LEFT + BOX // 2, _RIGHT + BOX // 2)
    lines = "".join(f"M{side} {above}V{turn}H{middle}" for side in sides)
    return f'<path class="line" d="{lines}"/><path class="arrow" d="M{middle} {turn}V{top - 2}"/>'
