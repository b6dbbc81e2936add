"""A LLaVA record with its image files to a checked sample."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from llava_steps.data.decode import check_jpeg
from llava_steps.data.samples import Sample, SampleError, check_text, check_turns, parse_turns
from llava_steps.data.sources import referenced_images

_BYTES_PER_PIXEL = 4
"""A file with more bytes than this per allowed pixel is not read at all."""


def to_sample(value: Any, index: int, root: Path, max_pixels: int) -> Sample:
    """The sample of record `index`.

    Args:
        value: decoded JSON {"id", "image", "conversations", ...}.
        index: number of the record, used as id when it has none.
        root: directory that image paths are relative to and must stay in.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        SampleError: any reason for which this record cannot be trained on.
    """
    if not isinstance(value, dict):
        raise SampleError(f"not an object: the record is a {type(value).__name__}")
    name = value.get("id", index)
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        raise SampleError(f"unusable id: {ascii(name)[:60]}")
    check_text(str(name), "id")
    turns = parse_turns(value.get("conversations"))
    paths = _image_paths(value.get("image"))
    check_turns(turns, len(paths))
    images = []
    for path in paths:
        data = read_image(root, path, max_pixels * _BYTES_PER_PIXEL)
        try:
            check_jpeg(data, max_pixels)
        except SampleError as error:
            raise SampleError(f"{error} ({path})") from error
        images.append(data)
    known = {"id", "image", "conversations"}
    extra = {key: value[key] for key in value if key not in known}
    return Sample(str(name), turns, tuple(images), extra)


def content_files(path: Path) -> tuple[Path, list[Path]]:
    """Root and files that a source file's content consists of: the file itself and its images."""
    root = path.parent
    files = {path}
    for name in referenced_images(path):
        try:
            image = inside(root, name)
            if image.is_file():
                files.add(image)
        except (SampleError, OSError):
            continue  # whoever reads the sample refuses it whatever that file's content is
    return root, sorted(files)


def inside(root: Path, name: Any) -> Path:
    """Path of an image below `root`.

    Raises:
        SampleError: not a relative path, or one that leaves `root`.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise SampleError(f"unusable image path: {ascii(name)[:80]}")
    check_text(name, "image path")
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise SampleError(f"image path outside the data: {name}")
    return root / name


def read_image(root: Path, name: Any, limit: int) -> bytes:
    """The bytes of an image file of at most `limit` bytes.

    Raises:
        SampleError: outside the root, not there, not a plain file, or too large.
    """
    path = inside(root, name)
    try:
        # Asked before opening: opening a pipe would wait for a writer for ever.
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise SampleError(f"not a plain file: {name}")
        if found.st_size > limit:
            raise SampleError(f"image file too large: {found.st_size} bytes ({name})")
        return path.read_bytes()
    except OSError as error:
        raise SampleError(f"unreadable file: {error.strerror} ({name})") from error


def _image_paths(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]
