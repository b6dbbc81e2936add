"""glibc.py FILE...: bind 64-bit programs that were built against glibc 2.38 to an older one.

Since then headers turn strtol and its relatives into __isoc23_strtol and so on, which also read
"0b1". A program whose only newer symbols are those is bound to the old names: the name of such a
symbol is a tail of itself, so its offset moves by the length of the prefix, and the version that
it asks for becomes the oldest one. Nothing is added or moved. Another newer symbol is an error.
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

PREFIX = b"__isoc23_"
PT_LOAD, PT_DYNAMIC, SHT_DYNSYM = 1, 2, 11
DT_STRTAB, DT_SYMTAB, DT_VERSYM, DT_VERNEED, DT_VERNEEDNUM = (
    5,
    6,
    0x6FFFFFF0,
    0x6FFFFFFE,
    0x6FFFFFFF,
)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def bind(path: Path, host: tuple[int, ...]) -> int:
    """Rewrite `path`; returns how many symbols were bound to their older names."""
    data = bytearray(path.read_bytes())
    (programs,) = struct.unpack_from("<Q", data, 32)
    (sections,) = struct.unpack_from("<Q", data, 40)
    size, count, section_size, section_count = struct.unpack_from("<HHHH", data, 54)
    loads, dynamic = [], 0
    for at in range(programs, programs + size * count, size):
        kind, _, offset, address, _, length = struct.unpack_from("<IIQQQQ", data, at)
        if kind == PT_LOAD:
            loads.append((address, offset, length))
        elif kind == PT_DYNAMIC:
            dynamic = offset
    tags = {}
    while dynamic and (pair := struct.unpack_from("<qQ", data, dynamic))[0]:
        tags[pair[0]] = pair[1]
        dynamic += 16

    def place(address: int) -> int:
        return next(address - a + o for a, o, length in loads if a <= address < a + length)

    def name(offset: int) -> bytes:
        start = place(tags[DT_STRTAB]) + offset
        return bytes(data[start : data.index(0, start)])

    oldest, newer, at = None, {}, place(tags[DT_VERNEED])
    for _ in range(tags[DT_VERNEEDNUM]):
        _, entries, _, first, following = struct.unpack_from("<HHIII", data, at)
        entry = at + first
        for _ in range(entries):
            digest, _, index, text, step = struct.unpack_from("<IHHII", data, entry)
            version = name(text).decode()
            if version == "GLIBC_2.2.5" and oldest is None:
                oldest = (digest, text)
            if version.startswith("GLIBC_2") and numbers(version[6:]) > host:
                newer[index] = entry
            entry += step
        at += following
    if not newer:
        return 0
    headers = range(sections, sections + section_size * section_count, section_size)
    table = next(h for h in headers if struct.unpack_from("<I", data, h + 4)[0] == SHT_DYNSYM)
    bound = 0
    for i in range(struct.unpack_from("<Q", data, table + 32)[0] // 24):
        index = struct.unpack_from("<H", data, place(tags[DT_VERSYM]) + 2 * i)[0] & 0x7FFF
        if index not in newer:
            continue
        symbol = place(tags[DT_SYMTAB]) + 24 * i
        (offset,) = struct.unpack_from("<I", data, symbol)
        if not name(offset).startswith(PREFIX) or oldest is None:
            sys.exit(f"{path}: needs {name(offset).decode()} of a newer glibc")
        struct.pack_into("<I", data, symbol, offset + len(PREFIX))
        bound += 1
    for entry in newer.values():
        _, flags, index, _, step = struct.unpack_from("<IHHII", data, entry)
        struct.pack_into("<IHHII", data, entry, oldest[0], flags, index, oldest[1], step)
    mode = path.stat().st_mode
    path.write_bytes(data)
    path.chmod(mode)
    return bound


if __name__ == "__main__":
    here = numbers(str(os.confstr("CS_GNU_LIBC_VERSION")).split()[1])
    for argument in sys.argv[1:]:
        print(f"{argument}: {bind(Path(argument), here)} symbols bound to older names")
