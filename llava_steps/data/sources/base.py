"""What every source is: records in a fixed order, each of which becomes a sample or is refused."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from llava_steps.data.samples.decode import MAX_PIXELS
from llava_steps.data.samples.sample import Sample


@dataclass(frozen=True)
class Options:
    """How records are read; see `TarShards` for the meaning."""

    columns: Mapping[str, str] = field(default_factory=dict)
    question: str = ""
    max_pixels: int = MAX_PIXELS
    other_images: str = ""
    """`refuse` or `jpeg`; empty where nothing is converted and there is no such setting."""
    decode_images: bool = False


@dataclass(frozen=True)
class Chunk:
    """Some consecutive records of a source, as little of them as a worker needs."""

    start: int
    """Number of the first record in the source, from 0."""
    size: int
    """Number of records."""
    work: Any
    """What `Source.rows` reads them from."""


@dataclass(frozen=True)
class Record:
    """One record."""

    index: int
    """Its number in the source, from 0."""
    file: str
    """The file that holds it, relative to the source's root."""
    place: int
    """Its number in that file, from 0."""
    value: Any


class Source(ABC):
    """Records below `root`. Instances travel to the workers, so they hold settings only.

    Args:
        path: file or directory that the user named.
        options: how to read it.

    Raises:
        InputError: unreadable as a whole.
    """

    name: ClassVar[str]

    def __init__(self, path: Path, options: Options) -> None:
        self.path, self.options = path, options
        self.root = path if path.is_dir() else path.parent

    @abstractmethod
    def count(self) -> int:
        """Records in all."""

    @abstractmethod
    def chunks(self, size: int) -> Iterator[Chunk]:
        """All records in order, `size` in each chunk but the last.

        Raises:
            InputError: a file that cannot be read as a whole.
        """

    @abstractmethod
    def read(self, chunk: Chunk) -> Iterator[Record]:
        """The records of a chunk; runs in a worker."""

    @abstractmethod
    def sample(self, item: Record) -> Sample:
        """The checked sample of a record.

        Raises:
            SampleError: any reason for which it cannot be trained on.
        """

    @abstractmethod
    def files(self) -> Iterable[Path]:
        """Every file that the content of this source consists of."""

    def notes(self) -> list[str]:
        """What the user should know about how this source is read; complete after `count`."""
        return []

    def label(self, item: Record) -> str:
        """The record's own id for the quarantine list, whatever it is; empty without one."""
        return str(item.value.get("id", ""))[:200] if isinstance(item.value, dict) else ""
