"""One spelling for weight names that differ between transformers versions.

The canonical names are those that transformers 5 saves: `language_model.model.*`,
`language_model.lm_head.weight`, `multi_modal_projector.*` and `vision_tower.*` without the
`vision_model.` of older versions.
"""

from __future__ import annotations

from collections.abc import Iterable

from llava_steps.core.errors import IntegrityError

PREFIXES: tuple[tuple[str, str], ...] = (
    # transformers 4.52 and later in memory, and some checkpoints saved from there
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.", "vision_tower."),
    # transformers before 5
    ("vision_tower.vision_model.", "vision_tower."),
)


def canonical(name: str) -> str:
    """The canonical spelling of an HF weight name; unknown names come back as they are."""
    for old, new in PREFIXES:
        if name.startswith(old):
            name = new + name.removeprefix(old)
    return name


def by_canonical_name(names: Iterable[str], where: str) -> dict[str, str]:
    """canonical name -> the name as `where` spells it; IntegrityError if two coincide."""
    spelled: dict[str, str] = {}
    for name in names:
        other = spelled.setdefault(canonical(name), name)
        if other != name:
            raise IntegrityError(
                f"{where}: {other!r} and {name!r} are two names of one weight; remove one of them"
            )
    return spelled
