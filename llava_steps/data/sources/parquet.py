"""Parquet files with embedded images, as Hugging Face datasets are published.

The image column holds {"bytes", "path"}, bytes, or a list of either. Columns that JSON has no form
for are left out, and named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llava_steps.core.errors import InputError
from llava_steps.data.samples.sample import RESERVED, Sample, SampleError
from llava_steps.data.sources import record
from llava_steps.data.sources.base import Chunk, Options, Record, Source

_BATCH = 64
"""Rows that are in memory at the same time."""


class Parquet(Source):
    """A parquet file, or all below a directory in the order of their names."""

    name = "parquet"

    def __init__(self, path: Path, options: Options) -> None:
        super().__init__(path, options)
        paths = [path] if path.is_file() else list(path.rglob("*.parquet"))
        if not paths:
            raise InputError(f"{path} holds no .parquet files")
        self.names = tuple(sorted(p.relative_to(self.root).as_posix() for p in paths))
        schema = _open(self.root / self.names[0]).schema_arrow
        record.check_header(self.root / self.names[0], schema.names, options)
        used = [record.column(field, schema.names, options) for field in record.COLUMNS]
        self.columns = tuple(
            field.name
            for field in schema
            if field.name in used or (_plain(field.type) and field.name not in RESERVED)
        )
        self.left_out = tuple(name for name in schema.names if name not in self.columns)
        # Read nevertheless: an image in them must not get lost.
        self.files_in = tuple(f.name for f in schema if f.name in self.left_out and _bytes(f.type))

    def notes(self) -> list[str]:
        return [f"columns left out: {', '.join(self.left_out)}"] if self.left_out else []

    def count(self) -> int:
        return sum(_open(self.root / name).metadata.num_rows for name in self.names)

    def chunks(self, size: int) -> Iterator[Chunk]:
        start, work, held = 0, [], 0
        for name in self.names:
            rows, number = _open(self.root / name).metadata.num_rows, 0
            while number < rows:
                take = min(size - held, rows - number)
                work.append((name, number, number + take))
                number, held = number + take, held + take
                if held == size:
                    yield Chunk(start, held, tuple(work))
                    start, work, held = start + held, [], 0
        if held:
            yield Chunk(start, held, tuple(work))

    def read(self, chunk: Chunk) -> Iterator[Record]:
        index = chunk.start
        for name, first, last in chunk.work:
            for number, value in self._read(name, first, last):
                yield Record(index, name, number, value)
                index += 1

    def sample(self, item: Record) -> Sample:
        left_out = {name: item.value[name] for name in self.files_in}
        value = {name: item.value[name] for name in self.columns}
        return record.to_sample(
            value, item.index, self.options, _image, spare=True, left_out=left_out
        )

    def files(self) -> Iterable[Path]:
        return [self.root / name for name in self.names]

    def _read(self, name: str, first: int, last: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, record) of the rows [first, last) of a file, by row groups that hold them."""
        path = self.root / name
        file = _open(path)
        missing = [c for c in self.columns if c not in file.schema_arrow.names]
        if missing:
            raise InputError(f"{path} has no columns {missing}, which {self.names[0]} has")
        begin = 0
        for group in range(file.metadata.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            if begin < last and end > first:
                yield from self._group(path, file, group, begin, first, last)
            begin = end

    def _group(
        self, path: Path, file: Any, group: int, begin: int, first: int, last: int
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        from pyarrow import ArrowException

        batch_first = begin
        try:
            columns = [*self.columns, *self.files_in]
            for batch in file.iter_batches(_BATCH, row_groups=[group], columns=columns):
                low, high = max(first - batch_first, 0), min(last - batch_first, batch.num_rows)
                if low < high:
                    for number, value in enumerate(batch.slice(low, high - low).to_pylist(), low):
                        yield batch_first + number, value
                batch_first += batch.num_rows
                if batch_first >= last:
                    return
        except (ArrowException, OSError, ValueError) as error:
            raise InputError(f"{path}, row group {group}, cannot be read: {error}") from error


def _open(path: Path) -> Any:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path, memory_map=True)
    except (ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path} is not a whole parquet file: {error}") from error


def _plain(kind: Any) -> bool:
    """Whether values of this type are JSON."""
    from pyarrow import types

    if types.is_struct(kind):
        return all(_plain(kind.field(n).type) for n in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind):
        return _plain(kind.value_type)
    tests = (
        types.is_string, types.is_large_string, types.is_integer, types.is_floating,
        types.is_boolean, types.is_null,
    )  # fmt: skip
    return any(test(kind) for test in tests)


def _bytes(kind: Any) -> bool:
    """Whether values of this type may hold a file."""
    from pyarrow import types

    if types.is_struct(kind):
        return any(_bytes(kind.field(n).type) for n in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind):
        return _bytes(kind.value_type)
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _image(value: Any) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise SampleError(
            f"no embedded image: the column holds {ascii(value)[:60]}; embed the files, with "
            "`datasets`: embed_table_storage"
        )
    return data
