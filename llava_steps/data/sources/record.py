"""A record with named columns to a checked sample: what LLaVA files, tables and parquet share."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from llava_steps.core.errors import ConfigError, InputError
from llava_steps.data.samples import formats
from llava_steps.data.samples.decode import check_image, convert, not_kept
from llava_steps.data.samples.sample import (
    Sample,
    SampleError,
    Turn,
    check_text,
    check_turns,
    images_first,
    parse_turns,
)
from llava_steps.data.samples.unread import unread_field
from llava_steps.data.sources.base import Options

COLUMNS = {
    "id": ("id",),
    "image": ("image", "images", "file_name"),
    "conversations": ("conversations", "messages"),
    "question": ("question",),
    "answer": ("answer", "text", "caption"),
}
"""Field -> names of the column that it is read from, the first that a record has."""

_ERRORS = {
    errno.ENOENT: "no such file", errno.ENOTDIR: "no such file", errno.EACCES: "no permission",
    errno.ENAMETOOLONG: "the name is too long", errno.ELOOP: "a link that leads to itself",
    errno.EIO: "the storage failed",
}  # fmt: skip
_BASE64 = ("/9j/", "iVBORw0KGg", "UklGR", "R0lGOD")
"""How JPEG, PNG, WebP and GIF files begin in base64."""
_LONGEST_NAME = 255
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/(?=/)")
_RELATIVE = "paths are relative to the folder of the source file"
_BYTES_PER_PIXEL = 4
"""A file with more bytes than this per allowed pixel is not read at all."""


def check_columns(columns: Mapping[str, str]) -> None:
    """Raise ConfigError when `tar_shards.columns` names an unknown field."""
    if unknown := set(columns) - set(COLUMNS):
        raise ConfigError(
            f"tar_shards.columns: {sorted(unknown)} are not fields; fields are {list(COLUMNS)}, "
            "written as FIELD: NAME OF THE COLUMN"
        )


def column(field: str, names: Collection[str], options: Options) -> str | None:
    """Name of the column that holds `field`, None if `names` has none."""
    wanted = options.columns.get(field)
    candidates = COLUMNS[field] if wanted is None else (wanted,)
    return next((name for name in candidates if name in names), None)


@lru_cache(maxsize=256)
def _columns(
    names: tuple[str, ...], given: tuple[tuple[str, str], ...]
) -> Mapping[str, str | None]:
    """Field -> its column, None if it has none."""
    return {field: column(field, names, Options(dict(given))) for field in COLUMNS}


def check_header(path: Path, names: Collection[str], options: Options) -> None:
    """Raise InputError when a fixed set of columns cannot give samples."""
    missing = [n for n in options.columns.values() if n not in names]
    has = {field for field in COLUMNS if column(field, names, options)}
    if missing or not has & {"conversations", "answer"}:
        what = f"has no column {missing}" if missing else "has no column of conversations or texts"
        raise InputError(
            f"{path} {what}; there are {list(names)}. Say which is which with tar_shards.columns, "
            f"such as `answer: {next(iter(names), 'text')}`"
        )
    if has.isdisjoint({"conversations", "question"}) and not options.question:
        raise InputError(
            f"{path} has texts without questions; set tar_shards.question to the question to ask "
            "for each of them, such as `Describe the image.`, or name a column of questions in "
            "tar_shards.columns"
        )


def to_sample(
    value: Any,
    index: int,
    options: Options,
    load: Callable[[Any], bytes],
    spare: bool = False,
    left_out: Mapping[str, Any] | None = None,
) -> Sample:
    """The sample of record `index`.

    Args:
        value: decoded record, names to values.
        index: number of the record, used as id when it has none.
        options: columns, limits and what is done with images of other formats.
        load: gives an image's bytes for the content of the image column; raises SampleError.
        spare: leave out further columns whose names the tar contract reserves.
        left_out: further columns that do not get into the sample; none may be its image.

    Raises:
        SampleError: any reason for which this record cannot be trained on.
    """
    if not isinstance(value, dict):
        raise SampleError(f"not an object: the record is a {type(value).__name__}")
    columns = _columns(tuple(value), tuple(options.columns.items()))
    name = value[columns["id"]] if columns["id"] else index
    if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
        raise SampleError(f"unusable id: {ascii(name)[:60]}")
    check_text(str(name), "id")
    images = _as_list(value[columns["image"]]) if columns["image"] else []
    if columns["conversations"] or not columns["answer"]:
        turns = parse_turns(value.get(columns["conversations"] or "conversations"))
        used = {"id", "image", "conversations"}
    else:
        question = value[columns["question"]] if columns["question"] else options.question
        turns = pair(question, value[columns["answer"]], len(images))
        used = set(COLUMNS)
    taken = {columns[field] for field in used}
    unread = {key: item for key, item in value.items() if key not in taken} | dict(left_out or {})
    setting = ", or set tar_shards.columns to image=NAME" if options.other_images else ""
    if lost := unread_field(unread, len(images), f"; call the field `image`{setting}"):
        raise SampleError(lost)
    check_turns(turns, len(images))
    loaded = tuple(accept(load(image), options, image) for image in images)
    if spare:
        taken |= {"question", "images", "conversations"}
    extra = {key: item for key, item in value.items() if key not in taken}
    return Sample(str(name), turns, loaded, extra)


def pair(question: Any, answer: Any, images: int) -> tuple[Turn, ...]:
    """One question and one answer; the images come before the question unless it places them.

    Raises:
        SampleError: one of them is not text.
    """
    for what, text in (("question", question), ("answer", answer)):
        if not isinstance(text, str):
            raise SampleError(f"not a text: the {what} is {ascii(text)[:40]}")
    return (Turn("user", images_first(question, images)), Turn("assistant", answer))


def accept(data: bytes, options: Options, name: Any) -> bytes:
    """The bytes that go into the tar: JPEG, PNG, WebP as they are, others as `other_images` says.

    Raises:
        SampleError: unusable, with the image's name.
    """
    try:
        if len(data) > options.max_pixels * _BYTES_PER_PIXEL:
            raise SampleError(f"image file too large: {len(data)} bytes")
        if formats.kind(data) not in formats.KEPT and options.other_images == "jpeg":
            return convert(data, options.max_pixels)
        if reason := not_kept(data):
            setting = ", or set other_images to jpeg" if options.other_images else ""
            raise SampleError(f"{reason}; save it as PNG{setting}")
        check_image(data, options.max_pixels, options.decode_images)
        return data
    except SampleError as error:
        where = f" ({_short(name)})" if isinstance(name, str) else ""
        raise SampleError(f"{error}{where}") from error


def inside(root: Path, name: Any) -> str:
    """Path of an image below `root`.

    Raises:
        SampleError: not a relative path, or one that leaves `root`.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise SampleError(f"unusable image path: {ascii(name)[:80]}")
    check_text(name, "image path")
    if name[:5].lower() == "data:":
        raise SampleError(f"image as a data: URI: {_short(name, 30)}; save it as a file")
    if len(name) > _LONGEST_NAME and name.startswith(_BASE64):
        raise SampleError(f"image in base64: {_short(name, 30)}; save it as a file")
    if scheme := _URL.match(name):
        raise SampleError(
            f"image path is a URL: {_short(name)}; "
            + (_RELATIVE if scheme[0].lower() == "file:/" else "download it, nothing is fetched")
        )
    if os.path.isabs(name) or name.startswith("~") or (".." in name and ".." in name.split("/")):
        raise SampleError(f"image path outside the data: {_short(name)}; {_RELATIVE}")
    return f"{root}/{name}"


def _short(name: str, length: int = 200) -> str:
    return name if len(name) <= length else f"{name[:length]}..."


def read_image(root: Path, name: Any, max_pixels: int) -> bytes:
    """The bytes of an image file that may have `max_pixels` pixels.

    Raises:
        SampleError: outside the root, missing, not a plain file, or too large.
    """
    path = inside(root, name)
    try:
        # Without waiting: opening a pipe would otherwise last until a process writes to it.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise SampleError(f"not a plain file: {_short(name)}")
            if status.st_size > max_pixels * _BYTES_PER_PIXEL:
                raise SampleError(f"image file too large: {status.st_size} bytes ({_short(name)})")
            data = os.read(file, status.st_size)
            while len(data) < status.st_size and (
                more := os.read(file, status.st_size - len(data))
            ):
                data += more
            return data
        finally:
            os.close(file)
    except OSError as error:
        raise SampleError(f"unreadable file: {_why(error, name)}") from error


def _why(error: OSError, name: str) -> str:
    """In our own words: those of the system depend on library and locale."""
    number = error.errno or 0
    why = _ERRORS.get(number) or errno.errorcode.get(number, "unknown error")
    if number == errno.ENAMETOOLONG:
        return f"{why} ({_short(name, 30)})"
    hint = "; write paths with / instead of \\" if "\\" in name else ""
    return f"{why} ({_short(name)}){hint}"


def image_files(root: Path, names: Any) -> list[Path]:
    """The files that an image column names, as far as there are any."""
    paths = []
    for name in _as_list(names):
        try:
            path = Path(inside(root, name))
            if path.is_file():
                paths.append(path)
        except (SampleError, OSError):
            continue  # the reader of the sample refuses it, whatever that file contains
    return paths


def _as_list(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]
