"""What a sample must not lose silently: images that nothing reads, video and sound."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from llava_steps.data.samples import formats

IMAGE_SUFFIXES = frozenset({
    "jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif",
    "heic", "heif", "jxl", "jp2", "j2k", "ico", "svg", "psd", "ppm", "pgm", "pbm", "pnm", "tga",
})  # fmt: skip
_VIDEO_AND_SOUND_SUFFIXES = frozenset({
    "mp4", "m4v", "mov", "avi", "mkv", "webm", "mpg", "mpeg", "wmv", "flv", "3gp", "wav", "mp3",
    "flac", "ogg", "oga", "ogv", "opus", "m4a", "aac",
})  # fmt: skip
VIDEO_AND_SOUND = ("video", "videos", "audio", "audios")
"""Fields, and placeholders in questions."""
_TEXTS = frozenset({"id", "conversations", "messages", "question", "answer", "text", "caption"})
"""Fields that hold words, which may end in the name of a file."""
_IMAGE_FIELD = re.compile(
    r"(image|img|picture|photo|pic)s?(_?(path|file|filename|name|url|uri|bytes|data|base64)s?)?"
)
"""Fields that hold an image whatever their text looks like, such as a name without extension."""
_LONGEST_NAME = 1000
_SHOWN = 40


def unread_field(fields: Mapping[str, Any], images: int, advice: str = "") -> str:
    """What would be lost of a record, for a message; empty if nothing.

    Args:
        fields: the fields of the record that are not read as text or image.
        images: number of images that are read. Without any, every field is searched for one.
        advice: what to do about an image in such a field.
    """
    for name in VIDEO_AND_SOUND:
        if _present(fields.get(name)):
            return f"{name} is not supported: the field {name!r} is set"
    for name, value in fields.items() if images == 0 else ():
        image = None if name in _TEXTS else _image_in(value)
        if image is None and _IMAGE_FIELD.fullmatch(name.lower()) and _holds_something(value):
            image = ascii(value)[:_SHOWN]
        if image is not None:
            return f"image in the field {name!r}, which is not read: {image}{advice}"
    return ""


def unread_placeholder(text: str) -> str:
    """The placeholder of a video or sound in a question; empty if it has none."""
    marks = (f"<{name}>" for name in VIDEO_AND_SOUND if f"<{name}" in text)
    return next((mark for mark in marks if mark in text), "")


def unread_part(
    parts: Mapping[str, bytes], is_image: Callable[[str], bool], others: Collection[str]
) -> str:
    """What would be lost of a sample in a tar, for a message; empty if nothing.

    A part of another name may be left out beside an image, unless it is an image, a video or
    sound, by its name or its content. In a sample without images it may be one of any form.

    Args:
        parts: names of the parts to their bytes, or to their first bytes.
        is_image: whether a part of this name is read as an image.
        others: names of the other parts that are read.
    """
    unknown = [name for name in parts if name not in others and not is_image(name)]
    for name in unknown:
        if what := medium(name, parts[name]):
            return f"part {name!r} is not read: it is {what}"
    if unknown and not any(map(is_image, parts)):
        return f"no image is recognised: part {unknown[0]!r} is not read"
    return ""


def medium(name: str, data: bytes = b"") -> str:
    """What kind of medium a part is, by its content or else its name; empty for anything else."""
    kind, suffix = formats.kind(data), name.rpartition(".")[2].lower()
    if kind in formats.KEPT or kind in formats.FURTHER_IMAGES or suffix in IMAGE_SUFFIXES:
        return f"an image ({kind or suffix})"
    if kind in formats.SOUND_AND_VIDEO or suffix in _VIDEO_AND_SOUND_SUFFIXES:
        return f"video or sound ({kind or suffix})"
    return ""


def _present(value: Any) -> bool:
    return value is not None and value == value and value not in ("", [], {})


def _holds_something(value: Any) -> bool:
    return isinstance(value, str | bytes | list | dict) and bool(value)


def _image_in(value: Any, depth: int = 3) -> str | None:
    """What names or is an image in a value, as short as a message needs it."""
    if isinstance(value, str):
        text = value.strip().lower()
        if text.startswith("data:image/"):
            return "a data: URI"
        name = text.partition("?")[0].partition("#")[0]
        named = "." in name and name.rpartition(".")[2] in IMAGE_SUFFIXES
        return ascii(value)[:_SHOWN] if named and len(text) <= _LONGEST_NAME else None
    if isinstance(value, bytes):
        kind = formats.kind(value)
        return f"a {kind} file" if kind in formats.KEPT or kind in formats.FURTHER_IMAGES else None
    if depth and isinstance(value, list | dict):
        inner = value.values() if isinstance(value, dict) else value
        return next((image for one in inner if (image := _image_in(one, depth - 1))), None)
    return None
