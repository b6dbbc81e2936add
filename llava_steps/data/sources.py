"""What people have, as raw records: LLaVA JSON and JSONL.

A source gives chunks of records in a fixed order; a record is a decoded JSON value or, for JSONL,
the line's bytes, so that the workers do the parsing. Other kinds of sources are another function
in `READERS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from llava_steps.core.errors import InputError
from llava_steps.data.samples import SampleError


@dataclass(frozen=True)
class Chunk:
    """Some consecutive records of a source."""

    start: int
    """Number of the first record in the source, from 0."""
    records: tuple[Any, ...]
    """JSON values, or bytes holding one JSON value each."""


def chunks(path: Path, size: int) -> Iterator[Chunk]:
    """The records of a source file in chunks of `size`.

    Raises:
        InputError: not a file of a known kind, or unreadable as a whole.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None or not path.is_file():
        raise InputError(f"{path} is not a file of a known kind ({', '.join(sorted(READERS))})")
    records = iter(reader(path))
    start = 0
    while chunk := tuple(islice(records, size)):
        yield Chunk(start, chunk)
        start += len(chunk)


def parse(record: Any) -> Any:
    """The JSON value of a record.

    Raises:
        SampleError: a line that is not JSON in UTF-8.
    """
    if not isinstance(record, bytes):
        return record
    try:
        return json.loads(record.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise SampleError(f"not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise SampleError(f"not JSON: {error}") from error


def referenced_images(path: Path) -> Iterator[Any]:
    """What the readable records of a source give as image paths."""
    for chunk in chunks(path, 1000):
        for record in chunk.records:
            try:
                value = parse(record)
            except SampleError:
                continue  # sharding will say so; here only the readable images matter
            if isinstance(value, dict):
                images = value.get("image")
                yield from images if isinstance(images, list) else [images]


def _json(path: Path) -> Iterable[Any]:
    try:
        records = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not JSON in UTF-8: {error}; for one record a line use .jsonl"
        ) from error
    if not isinstance(records, list):
        raise InputError(f"{path} must hold a list of records, it holds a {type(records).__name__}")
    return records


def _jsonl(path: Path) -> Iterable[bytes]:
    with open(path, "rb") as file:
        first = True
        for line in file:
            line = line.strip()
            if first:
                line, first = line.removeprefix(b"\xef\xbb\xbf"), False
            if line:
                yield line


READERS: dict[str, Callable[[Path], Iterable[Any]]] = {".json": _json, ".jsonl": _jsonl}
