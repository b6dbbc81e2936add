"""docs/reference/data-formats.md: every example is read as the page says."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from llava_steps.data.sources import Options, open_source
from llava_steps.evaluate import read_questions

PAGE = (Path(__file__).parents[2] / "docs/reference/data-formats.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```\w+ (\S+)\n(.*?)^```", PAGE, flags=re.M | re.S))
EXPECTED = {
    "train.json": ("llava", [1, 2, 0]),
    "train.jsonl": ("llava", [1]),
    "captions.csv": ("table", [1, 1]),
    "vqa.tsv": ("table", [1]),
    "captions.jsonl": ("table", [1]),
    "heldout.json": ("llava", [1]),
}
"""Kind and images of each record."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", (32, 24), "grey").save(tmp_path / f"images/{name}.jpg")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_the_examples_are_these() -> None:
    assert set(FILES) == {*EXPECTED, "000000.json"}


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_is_read(place: Path, name: str) -> None:
    kind, images = EXPECTED[name]
    source = open_source(place / name, "auto", Options(question="Describe the image."))
    samples = [
        source.sample(record) for chunk in source.chunks(10) for record in source.read(chunk)
    ]
    assert source.name == kind and [len(s.images) for s in samples] == images
    assert all(s.turns[-1].role == "assistant" for s in samples)


def test_a_tar_of_the_page_is_read(place: Path) -> None:
    parts = {"000000.jpg": (place / "images/a.jpg").read_bytes(), "000000.txt": b"A cat.",
             "000000.json": FILES["000000.json"].encode()}  # fmt: skip
    (place / "tars").mkdir()
    with tarfile.open(place / "tars/000000.tar", "w") as tar:
        for name, data in parts.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = open_source(place / "tars")
    (sample,) = [
        source.sample(record) for chunk in source.chunks(10) for record in source.read(chunk)
    ]
    assert source.name == "webdataset" and sample.turns[-1].content == "A cat."


def test_questions_for_evaluation_have_their_group_and_answers(place: Path) -> None:
    (question,) = read_questions(place / "heldout.json")
    assert question.group == "animal/en" and question.references == ("cat", "a cat", "kitten")
