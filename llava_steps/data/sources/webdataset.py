"""Webdataset tars that others have made: KEY.jpg, KEY.txt, KEY.json.

A question is taken from `json[question]`, an answer from `txt`, whole dialogues from
`json[conversations]`. A tar that is damaged or unclear anywhere is refused as a whole: what cannot
be counted cannot be accounted for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from llava_steps.core.errors import InputError
from llava_steps.data.energon.field_map import SEED, FieldMap
from llava_steps.data.energon.index import samples_of
from llava_steps.data.samples.sample import Sample, SampleError, from_parts
from llava_steps.data.samples.unread import IMAGE_SUFFIXES
from llava_steps.data.sources import record
from llava_steps.data.sources.base import Chunk, Options, Record, Source

IMAGES = (*SEED.image_parts, *sorted(IMAGE_SUFFIXES - set(SEED.image_parts)))
TEXTS = ("txt", "json")
FIELDS = FieldMap(
    tuple((name,) for name in IMAGES), (("json", "question"),), (("txt",), ("json", "answer"))
)
_LARGEST_TEXT = 1 << 24
_HEAD = 1000
"""Bytes of another part that say whether it is an image."""
Parts = tuple[tuple[str, int, int], ...]
"""(part, offset, size) of each part of a sample."""


def _read(part: str) -> bool:
    """Whether parts of this name get into a sample."""
    return part.lower() in TEXTS or part.lower().rpartition(".")[2] in IMAGE_SUFFIXES


class Webdataset(Source):
    """A tar, or all below a directory in the order of their names."""

    name = "webdataset"

    def __init__(self, path: Path, options: Options) -> None:
        super().__init__(path, options)
        if options.columns:
            raise InputError(f"{path}: tar_shards.columns are for tables, parquet and JSON")
        paths = [path] if path.is_file() else list(path.rglob("*.tar"))
        if not paths:
            raise InputError(f"{path} holds no .tar files")
        self.names = tuple(sorted(p.relative_to(self.root).as_posix() for p in paths))
        self._left_out: Counter[str] = Counter()

    def count(self) -> int:
        self._left_out.clear()
        samples = 0
        for name in self.names:
            for _, parts in self._samples(name):
                samples += 1
                self._left_out.update(part for part, _, _ in parts if not _read(part))
        return samples

    def notes(self) -> list[str]:
        names = [f"{part} ({count})" for part, count in sorted(self._left_out.items())]
        return [f"parts left out: {', '.join(names)}"] if names else []

    def chunks(self, size: int) -> Iterator[Chunk]:
        start, work = 0, []
        for name in self.names:
            for number, (key, parts) in enumerate(self._samples(name)):
                work.append((name, number, key, parts))
                if len(work) == size:
                    yield Chunk(start, size, tuple(work))
                    start, work = start + size, []
        if work:
            yield Chunk(start, len(work), tuple(work))

    def read(self, chunk: Chunk) -> Iterator[Record]:
        for index, (name, number, key, parts) in enumerate(chunk.work, chunk.start):
            yield Record(index, name, number, (key, parts))

    def sample(self, item: Record) -> Sample:
        key, parts = item.value
        limit = 4 * self.options.max_pixels
        content = {}
        with open(self.root / item.file, "rb") as file:
            for name, offset, size in parts:
                part = name.lower()
                if part.rpartition(".")[2] in IMAGES:
                    if size > limit:
                        raise SampleError(f"image file too large: {size} bytes ({name})")
                elif part not in TEXTS:
                    size = min(size, _HEAD)
                elif size > _LARGEST_TEXT:
                    raise SampleError(f"text too large: {size} bytes ({name})")
                if part in content:
                    raise SampleError(f"ambiguous part: {name} is there in another case too")
                file.seek(offset)
                content[part] = file.read(size)
        sample = from_parts(key, content, FIELDS, self.options.question)
        images = tuple(record.accept(data, self.options, None) for data in sample.images)
        return Sample(sample.id, sample.turns, images, sample.extra)

    def label(self, item: Record) -> str:
        return str(item.value[0])

    def files(self) -> Iterable[Path]:
        return [self.root / name for name in self.names]

    def _samples(self, name: str) -> Iterator[tuple[str, Parts]]:
        """Key and parts of the samples of a tar.

        Raises:
            InputError: damaged, or names that other readers would take for other samples.
        """
        for key, members in samples_of(self.root / name):
            yield key, tuple((part, m.data, m.size) for part, m in members.items())
