"""`verify` finds every artefact and every damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_steps import verify
from llava_steps.core import store


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        entry = tmp_path / "store" / name / "abc"
        (entry / "weights").mkdir(parents=True)
        (entry / "weights/data.bin").write_bytes(name.encode())
        store.seal(entry, {"step": name})
        store.publish(entry, tmp_path / "results/demo" / name)
    (tmp_path / "store/three/def/.work").mkdir(parents=True)
    store.show_work(tmp_path / "store/three/def", tmp_path / "results/demo/three")
    return tmp_path


def test_whole_and_unfinished(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(place / "results"), str(place / "store")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("whole ") == 4 and printed.count("unfinished ") == 2
    assert "6 artefacts, 0 damaged" in printed


def test_one_flipped_byte_is_found(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "store/two/abc/weights/data.bin").write_bytes(b"twp")
    assert verify.main([str(place / "results/demo")]) == 4
    printed = capsys.readouterr().out
    assert "damaged" in printed and "data.bin has another sha256" in printed
    assert "whole       " + str(place / "results/demo/one") in printed
    assert verify.main([str(place / "results/demo/one")]) == 0
    (place / "store/two/abc/manifest.json").write_text("{")
    assert verify.main([str(place / "store/two")]) == 4


def test_nothing_to_verify(tmp_path: Path) -> None:
    assert verify.main([str(tmp_path)]) == 3
