"""Small copies of images, for people to look at."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from llava_steps.core import filesystem
from llava_steps.data.samples.decode import decode

SIDE = 192
"""Longest side of a thumbnail in pixels; smaller images keep their size."""
_QUALITY = 85


def thumbnail(data: bytes) -> bytes:
    """An image file as a JPEG that is at most `SIDE` pixels wide and high.

    Raises:
        SampleError: not an image, or a truncated one.
    """
    image = decode(data)
    image.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_QUALITY, subsampling=0)
    return out.getvalue()


class Thumbnails:
    """Thumbnails in one folder of an artefact, each image once.

    Args:
        entry: directory of the artefact.
        folder: name of the folder in it; made with the first image.
    """

    def __init__(self, entry: Path, folder: str) -> None:
        self._entry, self._folder = entry, folder
        self._names: dict[bytes, str] = {}

    def add(self, images: Iterable[bytes]) -> Sequence[str]:
        """Paths of the images' thumbnails, relative to the artefact."""
        return [self._names.get(data) or self._write(data) for data in images]

    def _write(self, data: bytes) -> str:
        name = f"{self._folder}/{len(self._names):03d}.jpg"
        (self._entry / self._folder).mkdir(exist_ok=True)
        filesystem.write_bytes(self._entry / name, thumbnail(data))
        self._names[data] = name
        return name
