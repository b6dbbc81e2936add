"""Committed directories: whole or absent, and never believed when they differ from their marker."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from llava_steps.core import filesystem
from llava_steps.core.errors import InputError, IntegrityError
from llava_steps.store import commit

DAMAGES = int(os.environ.get("LLAVA_STEPS_DAMAGES", "500"))


def make(root: Path, step: int) -> Path:
    temporary = root / f"{filesystem.TEMPORARY}x"
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
    (tmp_path / f"{filesystem.TEMPORARY}iter_0001000").mkdir()
    assert commit.latest_commit(tmp_path).name == "iter_0000100"
    assert commit.read_commit(commit.latest_commit(tmp_path)) == {"step": 100}
    commit.prune(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000020", "iter_0000100"]


def test_nothing_committed_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no committed checkpoint"):
        commit.latest_commit(tmp_path)


def test_a_commit_is_never_overwritten(tmp_path: Path) -> None:
    make(tmp_path, 1)
    with pytest.raises(IntegrityError, match="already committed"):
        make(tmp_path, 1)


def damage(path: Path, chooser: random.Random) -> str:
    """Change one thing about the files below `path`; says what."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    victim, other = chooser.sample(files, 2)
    data = bytearray(victim.read_bytes())
    kind = chooser.choice(["flip", "cut", "delete", "grow", "extra", "swap", "copy", "zero"])
    if kind == "flip":
        data[chooser.randrange(len(data))] ^= 1 << chooser.randrange(8)
        victim.write_bytes(data)
    elif kind == "cut":
        victim.write_bytes(data[: chooser.randrange(len(data))])
    elif kind == "grow":
        victim.write_bytes(data + b"\0")
    elif kind == "delete":
        victim.unlink()
    elif kind == "extra":
        victim.with_name("b.bin").write_bytes(b"surplus")
    elif kind == "swap":
        victim.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif kind == "copy":
        victim.write_bytes(other.read_bytes())
    else:
        victim.write_bytes(bytes(len(data)))
    return f"{kind} {victim.name}"


def test_any_damage_is_noticed(tmp_path: Path) -> None:
    whole = make(tmp_path, 7)
    for number in range(3):  # files of equal size, whose exchange only a digest notices
        (whole / "weights" / f"{number}.distcp").write_bytes(random.Random(number).randbytes(999))
    shutil.copytree(whole, tmp_path / "again")
    (tmp_path / "again" / commit.MARKER).unlink()
    path = tmp_path / "iter_0000008"
    commit.commit_dir(tmp_path / "again", path, {"step": 8})
    chooser = random.Random(1)
    for number in range(DAMAGES):
        broken = tmp_path / "broken"
        shutil.copytree(path, broken)
        what = damage(broken, chooser)
        try:
            commit.read_commit(broken)
        except (IntegrityError, InputError):
            pass
        else:
            raise AssertionError(f"{number}: {what} was not noticed")
        shutil.rmtree(broken)
    commit.read_commit(path)
    print(f"{DAMAGES}/{DAMAGES} noticed")
