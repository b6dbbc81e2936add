"""The same input gives the same bytes, whatever the process, its folders, its clock or locale."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.test_image_formats import UNUSABLE

ROOT = Path(__file__).parents[2]
LOCALES = ("C", "de_DE.UTF-8")


def source(folder: Path) -> Path:
    """Samples that are refused, each for another reason."""
    folder.mkdir()
    good = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "x"}]
    rows = [json.dumps({"id": "good", "conversations": good}).encode()]
    asked = [{"from": "human", "value": "<image>\n?"}, good[1]]
    for number, (data, _) in enumerate(UNUSABLE.values()):
        (folder / f"{number}.png").write_bytes(data)
        row = {"id": number, "image": f"{number}.png", "conversations": asked}
        rows.append(json.dumps(row).encode())
    for name in ("nowhere.png", "x" * 300, "good.jsonl/x.png"):
        rows.append(json.dumps({"image": name, "conversations": asked}).encode())
    odd = {"conversations": good, "note": float("nan")}
    rows += [json.dumps(odd).encode(), b"\xff{}", b"{", b'{"a":' * 99_999, b"1" * 9999]
    path = folder / "good.jsonl"
    path.write_bytes(b"\n".join(rows))
    return path


def python(code: str, folder: Path, number: int) -> str:
    """What a new process prints, in surroundings of its own."""
    place = folder / f"tmp{number}"
    place.mkdir()
    settings = {
        "TMPDIR": str(place), "LC_ALL": LOCALES[number], "TZ": ("UTC", "Asia/Tokyo")[number],
        "PYTHONHASHSEED": str(number), "COLUMNS": ("80", "200")[number],
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "import locale\ntry: locale.setlocale(locale.LC_ALL, '')\n"
         "except locale.Error: pass\n" + code],
        cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT), **settings},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def test_what_is_refused_is_told_in_the_same_words_by_every_process(tmp_path: Path) -> None:
    """B4: reasons had the address of an object, and so the store had another value each time."""
    path = source(tmp_path / "data")
    code = f"""
import hashlib, pathlib, sys
from llava_steps.shard_tars import run
from llava_steps.settings.dataset import TarShards
from tests.helpers.data_fixtures import fake_context
out = pathlib.Path.cwd() / "out"; out.mkdir()
config = TarShards(source={str(path)!r}, quarantine_limit=1.0, workers=1)
run(fake_context(out, source=pathlib.Path({str(path)!r})), config)
for file in sorted(out.iterdir()):
    if file.is_file():
        print(file.name, hashlib.sha256(file.read_bytes()).hexdigest())
sys.stdout.write((out / "quarantine.jsonl").read_text())
"""
    first = python(code, tmp_path, 0)
    time.sleep(1.1)
    assert python(code, tmp_path, 1) == first
    assert first.count('"reason"') == len(UNUSABLE) + 8
    for word in ("0x", "BytesIO", str(tmp_path), "Errno", "Traceback"):
        assert word not in first


@pytest.mark.parametrize("name", ["noise", "cut png", "empty", "bomb"])
def test_chat_refuses_in_the_same_words(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.png").write_bytes(UNUSABLE[name][0])
    code = f"""
from pathlib import Path
from llava_steps.commands.chat import as_question
from llava_steps.core.errors import InputError
try:
    as_question([Path("{tmp_path}/x.png")], "?")
except InputError as error:
    print(error)
"""
    first = python(code, tmp_path, 0)
    assert first == python(code, tmp_path, 1)
    assert UNUSABLE[name][1] in first and "0x" not in first.replace(str(tmp_path), "")
