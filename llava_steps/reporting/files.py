"""Small files of results, as the pages read them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from llava_steps.core.errors import InputError

TINY = 64
"""Images with sides of at most this many pixels are drawn with sharp pixels."""


def read_json(path: Path) -> Any:
    """A JSON file of a result; InputError names it when it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: {error}; if another version made it, run its step again"
        ) from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file of a result; InputError names it when it cannot be read."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error


def series(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps, counted from 1, and values of one key of metrics.jsonl."""
    pairs = [(row["step"] + 1, row[key]) for row in rows if isinstance(row.get(key), int | float)]
    return [step for step, _ in pairs], [number for _, number in pairs]


def picture(path: Path) -> dict[str, Any]:
    """A JPEG as a data URL, and whether it is small enough to show sharp pixels."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            tiny = max(image.size) <= TINY
    except OSError as error:
        raise InputError(f"{path}: {error}") from error
    return {"url": "data:image/jpeg;base64," + base64.b64encode(data).decode(), "tiny": tiny}
