"""Records one after another in one file, with their images as files beside it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from llava_steps.data.samples.sample import Sample, SampleError
from llava_steps.data.sources import record
from llava_steps.data.sources.base import Chunk, Record, Source


class RecordSequence(Source):
    """A source whose file is read as a sequence of records, which the workers parse."""

    spare = False
    """Leave out further columns whose names the tar contract reserves."""

    @abstractmethod
    def records(self) -> Iterable[Any]:
        """All records, not parsed yet."""

    @abstractmethod
    def parse(self, item: Any) -> Any:
        """The value of a record.

        Raises:
            SampleError: it cannot be parsed.
        """

    def count(self) -> int:
        return sum(1 for _ in self.records())

    def chunks(self, size: int) -> Iterator[Chunk]:
        records, start = iter(self.records()), 0
        while work := tuple(islice(records, size)):
            yield Chunk(start, len(work), work)
            start += len(work)

    def read(self, chunk: Chunk) -> Iterator[Record]:
        for index, item in enumerate(chunk.work, chunk.start):
            yield Record(index, self.path.name, index, item)

    def sample(self, item: Record) -> Sample:
        return record.to_sample(
            self.parse(item.value),
            item.index,
            self.options,
            lambda name: record.read_image(self.root, name, self.options.max_pixels),
            spare=self.spare,
        )

    def label(self, item: Record) -> str:
        try:
            value = self.parse(item.value)
        except SampleError:
            return ""
        return str(value.get("id", ""))[:200] if isinstance(value, dict) else ""

    def files(self) -> Iterable[Path]:
        paths = {self.path}
        for item in self.records():
            try:
                value = self.parse(item)
            except SampleError:
                continue  # sharding will say so; here only the readable images matter
            if isinstance(value, dict) and (name := record.column("image", value, self.options)):
                paths.update(record.image_files(self.root, value[name]))
        return paths
