"""LLaVA JSON (a list of records) and JSONL (a record a line), images beside them.

Also of the shape {"messages": [...], "images": [...]}. Lines are parsed by the workers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from llava_steps.core.errors import InputError
from llava_steps.data.samples.sample import SampleError
from llava_steps.data.sources.sequence import RecordSequence

LINES = (".jsonl", ".ndjson")


class Llava(RecordSequence):
    """`id`, `image` and `conversations`, as LLaVA's own files have them."""

    name = "llava"

    def records(self) -> Iterable[Any]:
        if self.path.suffix.lower() in LINES:
            return lines(self.path)
        state = self.path.stat()
        return _json(self.path, state.st_mtime_ns, state.st_size)

    def parse(self, item: Any) -> Any:
        return parse(item)


def parse(value: Any) -> Any:
    """The JSON value of a record.

    Raises:
        SampleError: a line that is not JSON in UTF-8.
    """
    if not isinstance(value, bytes):
        return value
    try:
        return json.loads(value.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise SampleError(f"not UTF-8: byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise SampleError(f"not JSON: character {error.pos} of the line") from error
    except (ValueError, RecursionError) as error:
        raise SampleError("not JSON: too deeply nested, or too long a number") from error


@lru_cache(maxsize=1)
def _json(path: Path, changed: int, size: int) -> Sequence[Any]:
    """The list in a file; it is asked for several times, and large ones take a while to parse."""
    try:
        records = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not JSON in UTF-8: {error}; for one record a line use .jsonl"
        ) from error
    if not isinstance(records, list):
        raise InputError(f"{path} must hold a list of records, it holds a {type(records).__name__}")
    return records


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that are not empty, without its byte order mark."""
    with open(path, "rb") as file:
        first = True
        for line in file:
            line = line.strip()
            if first:
                line, first = line.removeprefix(b"\xef\xbb\xbf"), False
            if line:
                yield line
