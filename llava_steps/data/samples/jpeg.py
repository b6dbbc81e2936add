"""JPEG files looked at without decoding them: is this one that the decoder takes to the end?

`simple` follows ITU-T T.81: baseline or extended sequential Huffman, 8 bits, grey or three
components in one scan, tables that are defined and valid, entropy-coded data that holds no marker
up to the end of the image. Whatever is else, among it anything broken, is for the decoder to judge.
Costs about a fiftieth of decoding.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

_SOI = b"\xff\xd8"
_EOI = b"\xff\xd9"
_SOF, _DHT, _SOS, _DQT, _DRI = (0xC0, 0xC1), 0xC4, 0xDA, 0xDB, 0xDD
_SKIPPED = (0xE0, 0xEE, 0xFE)
"""JFIF, Adobe and comments. Other application data (EXIF, several pictures) matters to Pillow."""
_BLOCKS_IN_UNIT = 10
_LONGEST = 65_500
"""Pixels on a side that libjpeg takes."""


def simple(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a plain and whole JPEG; None for everything else."""
    if not data.startswith(_SOI):
        return None
    offset, size = 2, (0, 0)
    quantisers: set[int] = set()
    huffman: set[int] = set()
    components: dict[int, int] = {}
    restarts = False
    while True:
        if data[offset : offset + 1] != b"\xff" or offset + 4 > len(data):
            return None
        marker = data[offset + 1]
        body = offset + 4
        end = offset + 2 + int.from_bytes(data[offset + 2 : body])
        if end < body or end > len(data):
            return None
        if marker == _DQT:
            tables = _quantisers(data[body:end])
            if tables is None:
                return None
            quantisers |= tables
        elif marker == _DHT:
            tables = _huffman(data[body:end])
            if tables is None:
                return None
            huffman |= tables
        elif marker in _SOF and not components:
            frame = _frame(data[body:end])
            if frame is None:
                return None
            size, components = frame
        elif marker == _DRI and end == body + 2:
            restarts = True
        elif marker == _SOS:
            scan = data[body:end]
            if not components or not _scan(scan, components, quantisers, huffman):
                return None
            return size if _entropy(data, end, restarts) else None
        elif marker not in _SKIPPED:
            return None
        offset = end


def _entropy(data: bytes, start: int, restarts: bool) -> bool:
    """Whether only coded data and restarts come before an end mark that ends the file."""
    if not data.endswith(_EOI) or len(data) - start < 3:
        return False
    coded = np.frombuffer(data, np.uint8, offset=start)
    marks = coded[:-1] == 0xFF
    marks &= coded[1:] != 0
    if np.count_nonzero(marks) == 1:  # the end
        return True
    kinds = coded[1:][marks][:-1]
    return restarts and bool(((kinds >= 0xD0) & (kinds <= 0xD7)).all())


def _frame(text: bytes) -> tuple[tuple[int, int], dict[int, int]] | None:
    """(width, height) and the quantiser of each component."""
    if len(text) < 6 or text[0] != 8 or text[5] not in (1, 3) or len(text) != 6 + 3 * text[5]:
        return None
    height, width = int.from_bytes(text[1:3]), int.from_bytes(text[3:5])
    components, blocks = {}, 0
    for offset in range(6, len(text), 3):
        across, down = text[offset + 1] >> 4, text[offset + 1] & 15
        if not (1 <= across <= 4 and 1 <= down <= 4):
            return None
        components[text[offset]] = text[offset + 2]
        blocks += across * down
    if (
        not (0 < width <= _LONGEST and 0 < height <= _LONGEST)
        or len(components) != text[5]
        or blocks > _BLOCKS_IN_UNIT
    ):
        return None
    return (width, height), components


def _scan(text: bytes, components: dict[int, int], quantisers: set[int], huffman: set[int]) -> bool:
    """Whether one scan holds all components, with tables that exist."""
    count = len(components)
    if len(text) != 4 + 2 * count or text[0] != count or text[-3:] != b"\x00\x3f\x00":
        return False
    if list(text[1:-3:2]) != list(components) or not set(components.values()) <= quantisers:
        return False
    return all({pair >> 4, 16 + (pair & 15)} <= huffman for pair in text[2:-3:2])


@lru_cache(maxsize=64)
def _quantisers(text: bytes) -> frozenset[int] | None:
    """Numbers of the quantisation tables."""
    numbers, offset = set(), 0
    while offset < len(text):
        length = 128 if text[offset] >> 4 else 64
        if text[offset] >> 4 > 1 or text[offset] & 15 > 3 or offset + 1 + length > len(text):
            return None
        numbers.add(text[offset] & 15)
        offset += 1 + length
    return frozenset(numbers)


@lru_cache(maxsize=64)
def _huffman(text: bytes) -> frozenset[int] | None:
    """Numbers of the Huffman tables, those of AC coefficients with 16 added."""
    numbers, offset = set(), 0
    while offset < len(text):
        kind, number = text[offset] >> 4, text[offset] & 15
        counts = text[offset + 1 : offset + 17]
        values = text[offset + 17 : offset + 17 + sum(counts)]
        if kind > 1 or number > 3 or len(counts) < 16 or len(values) < sum(counts):
            return None
        code = 0
        for length, count in enumerate(counts, 1):
            code += count
            if count and code >= 1 << length:  # the code of only ones is reserved
                return None
            code <<= 1
        if len(values) > 256 or (kind == 0 and any(value > 15 for value in values)):
            return None
        numbers.add(number + 16 * kind)
        offset += 17 + len(values)
    return frozenset(numbers)
