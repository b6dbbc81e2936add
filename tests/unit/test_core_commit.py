"""Committed directories: whole or absent, and never believed when they differ from their marker."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from llava_steps.core import commit, fsio
from llava_steps.core.errors import InputError, IntegrityError


def make(root: Path, step: int) -> Path:
    temporary = root / f"{fsio.TEMPORARY}x"
    (temporary / "weights").mkdir(parents=True)
    (temporary / "weights/a.bin").write_bytes(bytes(range(200)))
    (temporary / "state.json").write_text(f'{{"step": {step}}}')
    final = root / commit.iteration_name(step)
    commit.commit_dir(temporary, final, {"step": step})
    return final


def test_latest_is_the_newest_committed(tmp_path: Path) -> None:
    for step in (5, 20, 100):
        make(tmp_path, step)
    (tmp_path / "iter_0000900").mkdir()
    (tmp_path / f"{fsio.TEMPORARY}iter_0001000").mkdir()
    assert commit.latest_commit(tmp_path).name == "iter_0000100"
    assert commit.read_commit(commit.latest_commit(tmp_path)) == {"step": 100}
    commit.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000020", "iter_0000100"]


def test_nothing_committed_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no committed checkpoint"):
        commit.latest_commit(tmp_path)


def test_a_commit_is_never_overwritten(tmp_path: Path) -> None:
    make(tmp_path, 1)
    with pytest.raises(IntegrityError, match="committed already"):
        make(tmp_path, 1)


@pytest.mark.parametrize("seed", range(60))
def test_any_damage_is_noticed(tmp_path: Path, seed: int) -> None:
    path = make(tmp_path, 7)
    chooser = random.Random(seed)
    victim = chooser.choice(sorted(p for p in path.rglob("*") if p.is_file()))
    data = bytearray(victim.read_bytes())
    kind = chooser.choice(["flip", "cut", "delete", "grow", "extra"])
    if kind == "flip":
        data[chooser.randrange(len(data))] ^= 1 << chooser.randrange(8)
        victim.write_bytes(data)
    elif kind == "cut":
        victim.write_bytes(data[: chooser.randrange(len(data))])
    elif kind == "grow":
        victim.write_bytes(data + b"\0")
    elif kind == "delete":
        victim.unlink()
    else:
        (path / "weights/b.bin").write_bytes(b"surplus")
    if kind in ("flip", "grow") and victim.name == commit.MARKER:
        try:
            commit.read_commit(path)
        except (IntegrityError, InputError):
            return
        # A marker that still says the same of every file did no harm.
        pytest.skip("the change left the marker's meaning as it was")
    with pytest.raises((IntegrityError, InputError)):
        commit.read_commit(path)
