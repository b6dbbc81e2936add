"""Image paths that people write: what is wrong with them, and what to do, in one line."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from llava_steps import evaluate
from llava_steps.commands import chat
from llava_steps.core.errors import InputError
from llava_steps.settings.dataset import TarShards
from llava_steps.shard_tars import run
from tests.helpers.data_fixtures import fake_context, jpeg

BASE64 = base64.b64encode(jpeg(1, (400, 300)) * 3).decode()
RELATIVE = "paths are relative to the folder of the source file"
PATHS = {
    f"data:image/jpeg;base64,{BASE64}": ("image as a data: URI", "save it as a file"),
    BASE64: ("image in base64: /9j/", "save it as a file"),
    base64.b64encode(b"\x89PNG\r\n\x1a\n" * 99).decode(): ("image in base64", "as a file"),
    "https://host/a.jpg": ("image path is a URL: https://host/a.jpg", "download it"),
    "s3://bucket/a.jpg": ("image path is a URL: s3://bucket/a.jpg", "download it"),
    "file:///home/x/a.jpg": ("image path is a URL: file:///home/x/a.jpg", RELATIVE),
    "/home/x/a.jpg": ("image path outside the data: /home/x/a.jpg", RELATIVE),
    "~/a.jpg": ("image path outside the data: ~/a.jpg", RELATIVE),
    "../a.jpg": ("image path outside the data: ../a.jpg", RELATIVE),
    "images\\a.jpg": ("unreadable file: no such file (images\\a.jpg)", "write paths with /"),
    "b.jpg": ("unreadable file: no such file (b.jpg)", ""),
    "y" * 300: ("unreadable file: the name is too long (yyy", "...)"),
}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:12])
def test_the_reason_says_what_to_do_and_is_short(tmp_path: Path, path: str) -> None:
    """P5: the reason had 50 kB. P6: nothing said what paths are relative to."""
    talk = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "x"}]
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(jpeg(0))
    rows = [{"image": name, "conversations": talk} for name in (path, "images/a.jpg")]
    source = tmp_path / "t.json"
    source.write_text(json.dumps(rows))
    (tmp_path / "out").mkdir()
    config = TarShards(source=str(source), quarantine_limit=0.5, workers=1)
    run(fake_context(tmp_path / "out", source=source), config)
    (line,) = (tmp_path / "out/quarantine.jsonl").read_text().splitlines()
    begin, end = PATHS[path]
    reason = json.loads(line)["reason"]
    assert reason.startswith(begin) and end in reason and len(reason) < 350, reason
    with pytest.raises(InputError) as caught:
        evaluate.read_questions(source)
    assert reason in str(caught.value)


@pytest.mark.parametrize("path", ["https://host/a.jpg", f"data:image/png;base64,{BASE64}"])
def test_chat_does_not_fetch(path: str) -> None:
    with pytest.raises(InputError, match="images are files; download it first") as caught:
        chat.as_question([Path(path)], "?")
    assert len(str(caught.value)) < 150
