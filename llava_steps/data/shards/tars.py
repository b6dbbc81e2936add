"""Tar archives: written so that equal content gives equal bytes, read strictly.

Written headers are USTAR with owner 0, time 0 and one mode. Reading walks the headers only and
refuses what Python's tarfile and energon skip silently: a broken header in mid-file, a
missing end of archive, bytes after it, links and devices.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from llava_steps.core.errors import InputError

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
_RECORD = tarfile.RECORDSIZE
_OWNER = b"0000644\0" + 2 * b"0000000\0"
"""Mode, user and group."""
_TIME = b"00000000000\0"
_REST = (b"0" + bytes(100) + b"ustar\x0000").ljust(356, b"\0")
_SUM = sum(_OWNER) + sum(_TIME) + 8 * ord(" ") + sum(_REST)
"""Checksum of a header without its name and size."""
_PADDING = [bytes(length) for length in range(BLOCK)]
_LONGEST_EXTENSION = 1 << 20
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_GLOBAL = (b"path", b"size", b"linkpath")


def header(name: str, size: int) -> bytes:
    """USTAR header of one regular file; ValueError unless the name is plain and short."""
    raw = name.encode("ascii")
    if len(raw) > 100 or not 0 <= size < 1 << 33:
        raise ValueError(f"no USTAR header for {name!r} of {size} bytes")
    length = b"%011o\0" % size
    return b"%b%b%b%b%06o\0 %b" % (
        raw.ljust(100, b"\0"), _OWNER, length, _TIME, _SUM + sum(raw) + sum(length), _REST
    )  # fmt: skip


def member(name: str, data: bytes) -> tuple[bytes, bytes, bytes]:
    """Header, data and padding of one regular file."""
    return header(name, len(data)), data, _PADDING[-len(data) % BLOCK]


def ending(size: int) -> bytes:
    """What closes an archive whose members take `size` bytes: zeros up to a full record."""
    return bytes(len(END) + -(size + len(END)) % _RECORD)


@dataclass(frozen=True)
class Member:
    """A regular file in an archive."""

    name: str
    start: int
    """Offset of its first header block."""
    data: int
    """Offset of its bytes."""
    size: int
    end: int
    """Offset after its padding, where the next header is."""


def members(path: Path) -> Iterator[Member]:
    """The regular files of a tar in order; directories are passed over.

    Raises:
        InputError: anything but a whole, uncompressed tar of plain files; names file and offset.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise InputError(f"{path} is empty")
        offset = start = 0
        long_name: str | None = None
        long_size: int | None = None
        while True:
            info = _header(path, file, offset)
            if info is None:
                _check_end(path, file, offset)
                return
            length = info.size if long_size is None else long_size
            data, end = offset + BLOCK, offset + BLOCK + -(-length // BLOCK) * BLOCK
            if length < 0 or end > size:
                raise InputError(f"{path} is cut off in the member at byte {offset}")
            if info.type in _REGULAR:
                name = info.name if long_name is None else long_name
                yield Member(name, start, data, length, end)
            elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE):
                records = _pax(path, _extension(path, file, data, length), offset)
                if info.type == tarfile.XGLTYPE and any(key in records for key in _GLOBAL):
                    raise InputError(f"{path}: global header at byte {offset} changes all members")
                if info.type != tarfile.XGLTYPE:
                    if b"path" in records:
                        long_name = records[b"path"].decode("utf-8", "surrogateescape")
                    if b"size" in records:
                        long_size = _number(path, records[b"size"], offset)
                    offset = end
                    continue
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                text = _extension(path, file, data, length).rstrip(b"\0")
                long_name = text.decode("utf-8", "surrogateescape")
                offset = end
                continue
            elif info.type != tarfile.DIRTYPE:
                raise InputError(
                    f"{path}: {info.name!r} at byte {offset} is a link, a device or something else "
                    "that no sample can be read from; write plain files only"
                )
            long_name = long_size = None
            offset = start = end


def _header(path: Path, file: IO[bytes], offset: int) -> tarfile.TarInfo | None:
    """The header at `offset`; None where the archive ends."""
    file.seek(offset)
    block = file.read(BLOCK)
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if len(block) == BLOCK and not any(block):
            return None
        if offset == 0 and block[:2] == b"\x1f\x8b":
            raise InputError(f"{path} is compressed; random access needs a plain tar") from error
        what = "has no end-of-archive mark" if not block else f"has no valid header ({error})"
        raise InputError(
            f"{path} {what} at byte {offset}: it is cut off or damaged; write it again"
        ) from error


def _check_end(path: Path, file: IO[bytes], offset: int) -> None:
    """Two zero blocks and nothing but zeros after them."""
    file.seek(offset)
    zeros = 0
    while chunk := file.read(1 << 20):
        if any(chunk):
            raise InputError(
                f"{path} has data after the end-of-archive mark at byte {offset}, which no reader "
                "will see; concatenated tars must be written again"
            )
        zeros += len(chunk)
    if zeros < len(END):
        raise InputError(f"{path} is cut off in its end-of-archive mark at byte {offset}")


def _extension(path: Path, file: IO[bytes], data: int, length: int) -> bytes:
    if length > _LONGEST_EXTENSION:
        raise InputError(f"{path}: extended header of {length} bytes at byte {data - BLOCK}")
    file.seek(data)
    return file.read(length)


def _pax(path: Path, text: bytes, offset: int) -> dict[bytes, bytes]:
    """Records "LENGTH KEY=VALUE\\n" of an extended header."""
    records: dict[bytes, bytes] = {}
    while text.strip(b"\0"):
        digits, _, _ = text.partition(b" ")
        length = _number(path, digits, offset)
        record = text[:length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if length <= len(digits) + 1 or len(record) < length or not equals:
            raise InputError(f"{path}: damaged extended header at byte {offset}")
        records[key] = value
        text = text[length:]
    return records


def _number(path: Path, digits: bytes, offset: int) -> int:
    if not digits.isdigit() or len(digits) > 18:
        raise InputError(f"{path}: damaged extended header at byte {offset}")
    return int(digits)
