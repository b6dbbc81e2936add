"""Images that are many times as long as wide, listed beside a dataset.

A processor that resizes the shorter side makes such an image huge. Which size is too much depends
on the model, so `prepare_energon` lists the sizes, and the audit judges them before a training.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from llava_steps.core import filesystem
from llava_steps.core.errors import InputError
from llava_steps.data.samples.decode import header_size

LIST = "long_images.json"
RATIO = 20
"""Longer side by shorter side from which an image is listed."""
MOST = 100
"""Images of one tar that are listed: the longest."""
_HEADS = (1 << 12, 1 << 16)
"""Bytes of a file that are read first, and if these do not suffice."""


@dataclass(frozen=True)
class LongImage:
    """An image by its place in a dataset."""

    tar: str
    key: str
    part: str
    width: int
    height: int

    @property
    def ratio(self) -> float:
        """Longer side by shorter side."""
        return max(self.width, self.height) / max(1, min(self.width, self.height))


def sides(file: IO[bytes], start: int, size: int) -> tuple[int, int] | None:
    """(width, height) of the image at `start`; None when its header cannot be read."""
    for length in dict.fromkeys((*(min(size, head) for head in _HEADS), size)):
        file.seek(start)
        if (measured := header_size(file.read(length))) is not None:
            return measured
    return None


def longest(images: Iterable[LongImage]) -> tuple[LongImage, ...]:
    """The long ones of the images, at most `MOST`, the longest first."""
    listed = (image for image in images if image.ratio >= RATIO)
    return tuple(heapq.nlargest(MOST, listed, key=lambda image: image.ratio))


def write(root: Path, images: Iterable[LongImage]) -> None:
    """Write the list; no file if it is empty."""
    if rows := [asdict(image) for image in images]:
        filesystem.write_json(root / LIST, rows)


def read(root: Path) -> list[LongImage]:
    """The list of a dataset; empty without a file.

    Raises:
        InputError: the file is damaged.
    """
    path = root / LIST
    if not path.is_file():
        return []
    try:
        return [LongImage(**row) for row in json.loads(path.read_bytes())]
    except (ValueError, TypeError, OSError) as error:
        raise InputError(f"{path} cannot be read; run prepare_energon again") from error
