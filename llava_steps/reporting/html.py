"""The page's HTML: one file without scripts or network access."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from llava_steps.core.format import count, duration, size

HERE = Path(__file__).parent
LONGEST = 800
"""Largest number of characters of a text from the data that is shown."""
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render(page: Mapping[str, Any]) -> str:
    """HTML of the content from collect.page; every text in it is escaped."""
    return _filled("page.html.j2", page)


def render_comparison(page: Mapping[str, Any]) -> str:
    """HTML of the content from comparison.page; every text in it is escaped."""
    return _filled("comparison.html.j2", page)


def _filled(template: str, page: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "clean": clean,
        "compact": count,
        "duration": duration,
        "size": size,
        "words": words,
        "percent": percent,
    }
    style = Markup((HERE / "style.css").read_text(encoding="utf-8"))  # noqa: S704  our own file
    return environment.get_template(template).render(page, style=style)


def clean(text: object, longest: int = LONGEST) -> str:
    """A text of the data, without characters that HTML cannot contain, and not too long."""
    shown = _UNSEEN.sub("\ufffd", str(text))
    return shown if len(shown) <= longest else shown[:longest] + " \u2026"


def words(name: str) -> str:
    """An identifier as words: stage1_checkpoint is `stage 1 checkpoint`."""
    spaced = re.sub(r"^(after_)?stage(\d)", r"\1stage \2", clean(name)).replace("_", " ")
    return re.sub(r"^hf(?= )", "HF", re.sub(r"^megatron(?= )", "Megatron", spaced))


def percent(share: float) -> str:
    """A share as 97.3 %."""
    return f"{share:.1%}".replace("%", "\u202f%")
