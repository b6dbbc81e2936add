"""What people have, as records in a fixed order. A new kind is one class and one line here."""

from __future__ import annotations

import json
from pathlib import Path

from llava_steps.core.errors import InputError
from llava_steps.data.sources import record
from llava_steps.data.sources.base import Chunk, Options, Record, Source
from llava_steps.data.sources.llava import LINES, Llava, lines
from llava_steps.data.sources.parquet import Parquet
from llava_steps.data.sources.table import SUFFIXES, Table, table_in
from llava_steps.data.sources.webdataset import Webdataset

__all__ = ["SOURCES", "Chunk", "Options", "Record", "Source", "content_files", "open_source"]

SOURCES: dict[str, type[Source]] = {kind.name: kind for kind in (Llava, Parquet, Table, Webdataset)}


def open_source(path: Path, format: str = "auto", options: Options | None = None) -> Source:
    """The source at `path`.

    Args:
        path: file or directory.
        format: a name in `SOURCES`, or `auto`: detected from the suffix and, for JSONL, from the
            first record.
        options: how to read it.

    Raises:
        ConfigError: columns that do not exist.
        InputError: missing, of no known kind, or unreadable as a whole.
    """
    options = options or Options()
    record.check_columns(options.columns)
    if not (path.is_file() or path.is_dir()):
        raise InputError(f"{path} does not exist")
    kind = detect(path) if format == "auto" else format
    if path.is_dir() and kind in ("llava", "table"):
        path = table_in(path)
    return SOURCES[kind](path, options)


def content_files(path: Path, format: str, options: Options) -> tuple[Path, list[Path]]:
    """Root and files that the content of a source consists of."""
    source = open_source(path, format, options)
    return source.root, sorted(source.files())


def detect(path: Path) -> str:
    """Name of the kind of source at `path`.

    Raises:
        InputError: none, or more than one.
    """
    if path.is_dir():
        kinds = {
            kind
            for kind, pattern in (("parquet", "*.parquet"), ("webdataset", "*.tar"))
            if next(path.rglob(pattern), None)
        }
        if any(p.suffix.lower() in SUFFIXES for p in path.iterdir()):
            kinds.add("table")
        if len(kinds) != 1:
            content = (
                f"several kinds of data {sorted(kinds)}" if kinds else "no data of a known kind"
            )
            raise InputError(
                f"{path} holds {content}; name the file, or set tar_shards.source_format to one of "
                f"{sorted(SOURCES)}"
            )
        return _of_file(table_in(path)) if kinds == {"table"} else kinds.pop()
    return _of_file(path)


def _of_file(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in LINES:
        try:
            first = json.loads(next(lines(path), b"{}"))
        except (ValueError, RecursionError):
            return "llava"
        has_texts = isinstance(first, dict) and not {"conversations", "messages"} & set(first)
        return "table" if has_texts and {"text", "caption", "answer"} & set(first) else "llava"
    kinds = {
        ".json": "llava", ".parquet": "parquet", ".csv": "table", ".tsv": "table",
        ".tar": "webdataset",
    }  # fmt: skip
    if suffix not in kinds:
        raise InputError(
            f"{path} is not a file of a known kind ({', '.join(sorted([*kinds, *LINES]))}); if it "
            "is one under another name, set tar_shards.source_format"
        )
    return kinds[suffix]
