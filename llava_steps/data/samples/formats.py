"""What a file is, by its first bytes, whatever its name says; nothing is decoded here."""

from __future__ import annotations

import struct

KEPT = {"JPEG": "jpg", "PNG": "png", "WebP": "webp"}
"""Formats whose bytes go into the tars, with the names of their parts."""
FURTHER_IMAGES = ("GIF", "BMP", "TIFF", "AVIF", "HEIC", "JPEG XL", "JPEG 2000", "ICO", "PSD", "SVG")
SOUND_AND_VIDEO = ("MP4", "Matroska", "AVI", "WAV", "MP3", "FLAC", "Ogg", "MPEG")
LFS = "a Git LFS pointer"
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"), (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"II+\0", "TIFF"), (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"), (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"), (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\1\0", "ICO"), (b"8BPS", "PSD"), (b"%PDF-", "PDF"), (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"\x1a\x45\xdf\xa3", "Matroska"), (b"ID3", "MP3"), (b"\xff\xfb", "MP3"), (b"fLaC", "FLAC"),
    (b"OggS", "Ogg"), (b"\0\0\1\xba", "MPEG"), (b"\0\0\1\xb3", "MPEG"),
    (b"\x1f\x8b", "gzip"), (b"PK\3\4", "ZIP"),
    (b"version https://git-lfs.github.com", LFS),
)  # fmt: skip
_RIFF = {b"WEBP": "WebP", b"AVI ": "AVI", b"WAVE": "WAV"}
_BRANDS = {
    b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"heim": "HEIC",
    b"heis": "HEIC", b"hevc": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC",
}  # fmt: skip
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of JPEG frames."""
_TEXT = 1000
"""Bytes at the beginning of a text in which its first element stands."""


def kind(data: bytes) -> str:
    """Name of the format, such as `PNG`; empty when the first bytes say nothing."""
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF":
        return _RIFF.get(data[8:12], "")
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "MP4")
    if data[:2] == b"BM" and data[6:10] == bytes(4):
        return "BMP"
    return _markup(data[:_TEXT])


def _markup(head: bytes) -> str:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "HTML"
    if text.startswith((b"<svg", b"<?xml", b"<!doctype svg", b"<!--")):
        return "SVG" if b"<svg" in text else "XML"
    return ""


def size(data: bytes) -> tuple[int, int] | None:
    """(width, height) that the header of a PNG or WebP file gives; None for others.

    Pillow reserves memory for a WebP before it reports its size.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) >= 24:
        width, height = struct.unpack(">II", data[16:24])
        return width, height
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack("<HH", data[26:30])
    return width & 0x3FFF, height & 0x3FFF


def jpeg_size(head: bytes) -> tuple[int, int] | None:
    """(width, height) by the frame header of a JPEG; None if `head` does not reach to it."""
    offset = 2
    while head.startswith(b"\xff\xd8") and offset + 9 <= len(head) and head[offset] == 0xFF:
        marker = head[offset + 1]
        if marker in _FRAMES:
            height, width = struct.unpack(">HH", head[offset + 5 : offset + 9])
            return width, height
        # Another 0xff is a fill byte.
        skipped = 2 + int.from_bytes(head[offset + 2 : offset + 4])
        offset += 1 if marker == 0xFF else skipped
    return None
