"""A folder of images with a table of texts: CSV, TSV or JSONL.

The first line of CSV and TSV names the columns. CSV is quoted as RFC 4180 has it; in TSV nothing
is quoted, a line is a record. Image paths are relative to the table's folder.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from llava_steps.core.errors import InputError
from llava_steps.data.samples.sample import SampleError
from llava_steps.data.sources import llava, record
from llava_steps.data.sources.base import Options
from llava_steps.data.sources.sequence import RecordSequence

SUFFIXES = (".csv", ".tsv", *llava.LINES)
_LONGEST_FIELD = 1 << 24


class Table(RecordSequence):
    """`image` or `file_name` beside `text`, `caption` or `question` and `answer`."""

    name = "table"
    spare = True

    def __init__(self, path: Path, options: Options) -> None:
        super().__init__(path, options)
        kind = path.suffix.lower()
        self.header: tuple[str, ...] | None = None
        if kind not in SUFFIXES:
            raise InputError(f"{path}: a table is one of {', '.join(SUFFIXES)}")
        if kind not in llava.LINES:
            self.header = tuple(next(self._fields(), ()))
            if len(set(self.header)) < len(self.header) or not self.header:
                raise InputError(f"{path}: the first line must name the columns, each once")
            if any(_broken(name) for name in self.header):
                raise InputError(f"{path}: the first line is not UTF-8; write the table in UTF-8")
            record.check_header(path, self.header, options)

    def parse(self, item: Any) -> Any:
        """A record by column names.

        Raises:
            SampleError: another number of fields than the header has, or not UTF-8.
        """
        if self.header is None:
            return llava.parse(item)
        if len(item) != len(self.header):
            raise SampleError(
                f"wrong number of columns: {len(item)}, the first line has {len(self.header)}"
            )
        for name, text in zip(self.header, item, strict=True):
            if _broken(text):
                raise SampleError(f"not UTF-8: column {name}")
        return dict(zip(self.header, item, strict=True))

    def records(self) -> Iterable[Any]:
        return llava.lines(self.path) if self.header is None else islice(self._fields(), 1, None)

    def _fields(self) -> Iterator[list[str]]:
        """All lines of a CSV or TSV; bytes that are not UTF-8 become lone surrogates."""
        csv.field_size_limit(_LONGEST_FIELD)
        form: dict[str, Any] = {"strict": True}
        if self.path.suffix.lower() == ".tsv":
            form |= {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        with open(self.path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            if file.read(1) != "\ufeff":
                file.seek(0)
            reader = csv.reader(file, **form)
            try:
                for fields in reader:
                    if fields:
                        yield fields
            except csv.Error as error:
                raise InputError(
                    f"{self.path} cannot be read as {self.path.suffix[1:].upper()} at line "
                    f"{reader.line_num}: {error}; fix the quotes there"
                ) from error


def _broken(text: str) -> bool:
    """Whether a text was not UTF-8: its bytes then are lone surrogates."""
    return not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text)


def table_in(folder: Path) -> Path:
    """The one table of a folder.

    Raises:
        InputError: it has no table, or more than one.
    """
    tables = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if len(tables) != 1:
        raise InputError(
            f"{folder} holds {len(tables)} tables {[p.name for p in tables[:5]]}; name the one to "
            "read in tar_shards.source"
        )
    return tables[0]
