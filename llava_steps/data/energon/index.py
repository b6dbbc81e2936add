"""The samples of a tar: where they are and whether energon will read them as they are meant.

energon groups neighbouring members by the name up to the first dot. What it skips silently is an
error here: a dot in a key (samples collapse), a key that comes twice in a row (samples
merge), the same part twice, members of no sample, and, with `deep`, parts that are missing or
cannot be read.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llava_steps.core import filesystem
from llava_steps.core.errors import InputError
from llava_steps.core.format import listing
from llava_steps.data.energon import long_images
from llava_steps.data.energon.field_map import FieldMap
from llava_steps.data.energon.long_images import LongImage
from llava_steps.data.samples.decode import check_image
from llava_steps.data.samples.sample import SampleError, from_parts, is_image_part
from llava_steps.data.samples.unread import IMAGE_SUFFIXES, medium
from llava_steps.data.shards import tars

_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
_IGNORED = re.compile(r"__[^/]*__/")
"""Members that energon never reads."""
_SHOWN = 10


@dataclass(frozen=True)
class SampleRow:
    """A sample in a tar."""

    key: str
    start: int
    size: int
    """Bytes from its first header to the next sample's first header."""


@dataclass(frozen=True)
class PartRow:
    """A part of a sample."""

    sample: int
    """Number of the sample in the tar."""
    name: str
    data: int
    size: int


@dataclass(frozen=True)
class TarIndex:
    """What energon's index files say of a tar."""

    name: str
    size: int
    sha256: str
    samples: tuple[SampleRow, ...]
    parts: tuple[PartRow, ...]
    long: tuple[LongImage, ...]
    """Images that are many times as long as wide."""

    def offsets(self) -> bytes:
        """Content of the .tar.idx file: native uint64 offsets of the samples and of the end."""
        last = self.samples[-1]
        return array("Q", [*(s.start for s in self.samples), last.start + last.size]).tobytes()


def index_tar(root: Path, fields: FieldMap, deep: bool, name: str) -> TarIndex:
    """Walk through `root/name`; runs in a worker.

    Args:
        root: directory of the tars.
        fields: where the samples keep image, question and answer.
        deep: read every sample and look at its images too; without it only names and structure.
        name: path of the tar relative to `root`.

    Raises:
        InputError: anything that energon would not read as it is meant.
    """
    path = root / name
    samples: list[SampleRow] = []
    parts: list[PartRow] = []
    bad: list[str] = []
    end = 0
    for key, members in samples_of(path):
        number = len(samples)
        samples.append(SampleRow(key, next(iter(members.values())).start, 0))
        parts += [PartRow(number, part, m.data, m.size) for part, m in members.items()]
        end = max(member.end for member in members.values())
    if not samples:
        raise InputError(f"{path} holds no samples")
    borders = [*(sample.start for sample in samples), end]
    rows = tuple(
        SampleRow(sample.key, sample.start, borders[n + 1] - sample.start)
        for n, sample in enumerate(samples)
    )
    if deep:
        bad = _check_contents(path, fields, rows, parts)
    else:
        bad = _unread_images(fields, rows, parts)
    if bad:
        raise InputError(f"{path}: unusable samples: {listing(bad, _SHOWN, '; ')}")
    digest, size = filesystem.sha256_file(path), path.stat().st_size
    long = long_images.longest(_sizes(path, name, fields, rows, parts))
    return TarIndex(name, size, digest, rows, tuple(parts), long)


def _sizes(
    path: Path, name: str, fields: FieldMap, samples: tuple[SampleRow, ...], parts: list[PartRow]
) -> Iterator[LongImage]:
    """The sizes of all images whose headers can be read."""
    with open(path, "rb") as file:
        for part in parts:
            if is_image_part(part.name, fields):
                sides = long_images.sides(file, part.data, part.size)
                if sides is not None:
                    yield LongImage(name, samples[part.sample].key, part.name, *sides)


def _unread_images(
    fields: FieldMap, samples: tuple[SampleRow, ...], parts: list[PartRow]
) -> list[str]:
    """Parts that are images by their names, but not read as such."""
    return [
        f"{samples[part.sample].key}: part {part.name!r} is {what}, which field_map.image does "
        f"not name: {','.join(fields.image_parts)}"
        for part in parts
        if not is_image_part(part.name, fields) and (what := medium(part.name))
    ]


def samples_of(path: Path) -> Iterator[tuple[str, dict[str, tars.Member]]]:
    """Key and parts of each sample of a tar, in order.

    Raises:
        InputError: damaged, or names that other readers would take for other samples.
    """
    key, seen = "", set()
    parts: dict[str, tars.Member] = {}
    for member in tars.members(path):
        base, part = split_name(path, member.name)
        if base != key:
            if parts:
                yield key, parts
            if base in seen:
                raise InputError(f"{path}: the parts of sample {base!r} are not adjacent")
            seen.add(base)
            key, parts = base, {}
        if part in parts:
            raise InputError(f"{path}: {member.name!r} occurs twice in a row; samples would merge")
        parts[part] = member
    if parts:
        yield key, parts


def split_name(path: Path, name: str) -> tuple[str, str]:
    """Key and part of a member's name, as energon splits them, or InputError."""
    if name.startswith("/") or ".." in name.split("/"):
        raise InputError(f"{path}: member {name!r} points outside the archive")
    match = _NAME.fullmatch(name)
    if match is None or _IGNORED.match(name):
        raise InputError(
            f"{path}: member {name!r} belongs to no sample; names must be KEY.PART, without dots "
            "in the key, such as 000001.jpg"
        )
    number, dot, kind = match[2].rpartition(".")
    further_image = number.isdecimal() and kind.lower() in IMAGE_SUFFIXES
    if dot and not further_image:
        raise InputError(
            f"{path}: the key of member {name!r} has a dot; everything after the first dot counts "
            "as the part's name, so that samples collapse: write keys without dots"
        )
    return match[1], match[2]


def _check_contents(
    path: Path, fields: FieldMap, samples: tuple[SampleRow, ...], parts: list[PartRow]
) -> list[str]:
    """What is wrong with the contents of the samples, one line for each bad one."""
    bad, next_part = [], 0
    with open(path, "rb") as file:
        for number, sample in enumerate(samples):
            content = {}
            while next_part < len(parts) and parts[next_part].sample == number:
                part = parts[next_part]
                file.seek(part.data)
                content[part.name] = file.read(part.size)
                next_part += 1
            try:
                for image in from_parts(sample.key, content, fields).images:
                    check_image(image)
            except SampleError as error:
                bad.append(f"{sample.key}: {error}")
    return bad
