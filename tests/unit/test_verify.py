"""`verify` finds every artefact and every damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava_steps.commands import verify
from llava_steps.store import commit, store
from llava_steps.store.lease import Lease


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        entry = tmp_path / "store" / name / "abc"
        (entry / "weights").mkdir(parents=True)
        (entry / "weights/data.bin").write_bytes(name.encode())
        store.seal(entry, {"step": name})
        store.publish(entry, tmp_path / "results/demo" / name)
    (tmp_path / "store/three/def/.work/logs").mkdir(parents=True)
    # As a run of the workflow does while it lasts; the directory stays.
    (tmp_path / "results/demo/.work").mkdir()
    with Lease(tmp_path / "results/demo/.work"):
        pass
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


def test_a_damaged_manifest_and_a_file_that_was_added(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = place / "store/one/abc"
    (entry / "weights/more.bin").write_bytes(b"x")
    assert verify.main([str(entry)]) == 4
    assert "more.bin was not sealed" in capsys.readouterr().out
    manifest = json.loads((entry / "manifest.json").read_bytes())
    for change in ({"files": None}, {"files": [{}]}, {"files": []}, {"format": 7}):
        (entry / "manifest.json").write_text(json.dumps(manifest | change))
        assert verify.main([str(entry)]) == 4
    del manifest["files"]
    (entry / "manifest.json").write_text(json.dumps(manifest))
    assert verify.main([str(place / "results")]) == 4
    assert capsys.readouterr().out.count("damaged ") == 5


def test_checkpoints_of_unfinished_work_are_compared(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = place / "store/three/def"
    for step in (5, 10):
        (place / "tmp").mkdir()
        (place / "tmp/data.bin").write_bytes(b"12345678")
        commit.commit_dir(place / "tmp", entry / commit.iteration_name(step))
    (entry / commit.iteration_name(15)).mkdir()  # being written
    for shown in (place / "results/demo/three", entry):
        assert verify.main([str(shown)]) == 0
        assert "committed so far: iter_0000005, iter_0000010" in capsys.readouterr().out
    (entry / "iter_0000005/data.bin").write_bytes(b"12345679")
    assert verify.main([str(place / "results/demo/three")]) == 4
    assert "another sha256" in capsys.readouterr().out


def test_nothing_to_verify(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verify.main([str(place / "store"), str(tmp_path / "typo")]) == 3
    assert "typo holds no artefact" in capsys.readouterr().err
    monkeypatch.chdir(place / "store/one/abc/weights")
    assert verify.main([]) == 3
    monkeypatch.chdir(place)
    assert verify.main([]) == 0
    assert "3 artefacts, 0 damaged" in capsys.readouterr().out
