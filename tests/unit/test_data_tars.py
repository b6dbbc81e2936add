"""Tar writing against Python's tarfile; tar reading against damage of every kind."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_steps.core.errors import InputError
from llava_steps.data.shards import tars
from tests.helpers.data_fixtures import write_tar

FILES = [("000000001.jpg", b"x" * 700), ("000000001.txt", b""), ("000000001.json", b"{}" * 256)]


@given(st.lists(st.binary(max_size=1500), max_size=30))
def test_bytes_equal_those_of_tarfile(contents: list[bytes]) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, data in enumerate(contents):
            info = tarfile.TarInfo(f"{number:09d}.jpg")
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    body = b"".join(
        piece for n, data in enumerate(contents) for piece in tars.member(f"{n:09d}.jpg", data)
    )
    assert body + tars.ending(len(body)) == out.getvalue()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_those_of_tarfile(tmp_path: Path, form: int) -> None:
    path = tmp_path / "x.tar"
    names = ["a.jpg", "folder/" + "long" * 40 + ".txt", "日本.json"]
    with tarfile.open(path, "w", format=form, pax_headers={"comment": "global"}) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, name in enumerate(names if form != tarfile.USTAR_FORMAT else FILES):
            info = tarfile.TarInfo(name if isinstance(name, str) else name[0])
            info.size = 600 * number
            info.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1  # a float needs a PAX record
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert [(m.name, m.data, m.size) for m in tars.members(path)] == expected


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", FILES).read_bytes()
    content = len(whole.rstrip(b"\0"))
    path = tmp_path / "cut.tar"
    for length in range(0, len(whole), 256):
        path.write_bytes(whole[:length])
        if length >= -(-content // 512) * 512 + 1024:
            assert len(list(tars.members(path))) == 3  # only padding is missing
        else:
            with pytest.raises(InputError, match=r"cut\.tar"):
                list(tars.members(path))


def test_a_changed_header_byte_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    whole = bytearray(write_tar(tmp_path / "whole.tar", FILES).read_bytes())
    expected = list(tars.members(tmp_path / "whole.tar"))
    path = tmp_path / "bad.tar"
    start = expected[1].start
    for offset in range(start, start + 512, 7):
        damaged = bytearray(whole)
        damaged[offset] ^= 0x15
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"bad\.tar"):
            list(tars.members(path))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(InputError, match="link, a device"):
        list(tars.members(path))


def test_other_archives_are_refused_with_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(InputError, match="compressed"):
        list(tars.members(path))
    whole = write_tar(tmp_path / "y.tar", FILES).read_bytes()
    path.write_bytes(whole + whole)
    with pytest.raises(InputError, match="data after the end-of-archive"):
        list(tars.members(path))
    path.write_bytes(b"")
    with pytest.raises(InputError, match="empty"):
        list(tars.members(path))


@pytest.mark.parametrize("size", [10, 1 << 40])
def test_hostile_extended_headers_are_refused(tmp_path: Path, size: int) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, size
    body = info.tobuf(tarfile.GNU_FORMAT) + b"99 path=a\n".ljust(512, b"\0")
    path = tmp_path / "x.tar"
    path.write_bytes(body + bytes(2048))
    with pytest.raises(InputError, match=r"extended header|cut off"):
        list(tars.members(path))
