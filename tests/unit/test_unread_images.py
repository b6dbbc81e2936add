"""A sample with an image that nothing reads, with video or sound, never becomes one of text."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llava_steps import evaluate, prepare_energon, shard_tars
from llava_steps.core.errors import InputError
from llava_steps.data.energon.reader import SampleReader
from llava_steps.data.samples.decode import decode
from llava_steps.data.samples.sample import SampleError, from_parts
from llava_steps.settings.dataset import EnergonDataset, TarShards
from tests.helpers.data_fixtures import fake_context, jpeg, make_energon, members, write_tar

TALK = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog."}]
META = b'{"question": "What?"}'
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"/>'
MP4 = b"\0\0\0\x18ftypisom" + bytes(40)
HEIC = b"\0\0\0\x18ftypheic" + bytes(40)


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(out, "PNG")
    return out.getvalue()


def shard(source: Path, entry: Path, **options: Any) -> dict[str, Any]:
    entry.mkdir()
    given = {"quarantine_limit": 1.0, "workers": 1, **options}
    config = TarShards(source=str(source), **given)
    return dict(shard_tars.run(fake_context(entry, source=source), config))


def reasons(entry: Path) -> list[str]:
    lines = (entry / "quarantine.jsonl").read_text().splitlines()
    return [json.loads(line)["reason"] for line in lines]


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"video": "v.mp4"}, "video is not supported: the field 'video' is set"),
    ({"videos": ["v.mp4"]}, "video"), ({"audio": {"path": "a.wav"}}, "audio is not supported"),
    ({"audio": "a.wav", "image": "a.jpg"}, "audio is not supported"),
    ({"img": "a.jpg"}, "image in the field 'img', which is not read: 'a.jpg'"),
    ({"image_path": "x/A.PNG"}, "image in the field 'image_path'"),
    ({"image": None, "images": ["a.jpg"]}, "image in the field 'images'"),
    ({"image": "", "url": "https://host/a.webp?width=3"}, "image in the field 'url'"),
    ({"image_url": {"url": "data:image/png;base64,AAAA"}}, "image in the field 'image_url'"),
    ({"files": [{"path": "b.heic"}]}, "image in the field 'files'"),
    ({"img": "coco/000123"}, "image in the field 'img'"),
    ({"Image": "000123"}, "image in the field 'Image'"),
    ({"image_base64": "/9j/4AAQSkZJRgABAQ"}, "image in the field 'image_base64'"),
    ({"picture": {"id": 7}}, "image in the field 'picture'"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "reason"), FIELDS)
@pytest.mark.parametrize("placeholder", ["", "<image>\n"])
def test_records(tmp_path: Path, fields: dict[str, Any], reason: str, placeholder: str) -> None:
    """B9, and images in fields of other names."""
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    talk = [{"from": "human", "value": f"{placeholder}What?"}, TALK[1]]
    good = {"id": "good", "conversations": TALK}
    rows = [good, {"id": "bad", "conversations": talk, **fields}]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    metrics = shard(tmp_path / "t.json", tmp_path / "out")
    assert metrics["samples_written"] == 1
    assert reasons(tmp_path / "out")[0].startswith(reason)
    with pytest.raises(InputError, match=r"record 1: (video|audio|image in the field)"):
        evaluate.read_questions(tmp_path / "t.json")


@pytest.mark.parametrize("mark", ["video", "audio"])
def test_placeholders_of_video_and_sound(tmp_path: Path, mark: str) -> None:
    talk = [{"from": "human", "value": f"<{mark}>\nWhat?"}, TALK[1]]
    rows = [{"id": "bad", "conversations": talk}, {"id": "good", "conversations": TALK}]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    shard(tmp_path / "t.json", tmp_path / "out")
    assert reasons(tmp_path / "out") == [f"{mark} is not supported: turn 0 contains <{mark}>"]


def test_fields_that_are_no_images_stay(tmp_path: Path) -> None:
    """Text alone is a sample; words may end like a file, and an image may have an address too."""
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    asked = [{"from": "human", "value": "<image>\nSee a.png"}, TALK[1]]
    rows = [
        {
            "id": "x.png",
            "conversations": TALK,
            "video": None,
            "audio": "",
            "source": "wiki.en",
            "image_id": 7,
            "photo": None,
            "pictures": [],
            "image_count": "none",
        },
        {"id": 2, "image": "a.jpg", "conversations": asked, "url": "http://host/a.jpg"},
        {"id": 3, "conversations": [{"from": "human", "value": "Open a.png"}, TALK[1]]},
    ]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    assert shard(tmp_path / "t.json", tmp_path / "out")["samples_written"] == 3


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables_name_the_column(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    row = {"picture": "a.jpg", "question": "What?", "answer": "A dog."}
    text = json.dumps(row) if kind == "jsonl" else ",".join(row) + "\n" + ",".join(row.values())
    (tmp_path / f"t.{kind}").write_text(text)
    with pytest.raises(InputError, match="1 x image in the field 'picture', which is not read"):
        shard(tmp_path / f"t.{kind}", tmp_path / "out")
    columns = {"image": "picture"}
    assert shard(tmp_path / f"t.{kind}", tmp_path / "yes", columns=columns)["samples_written"] == 1


@pytest.mark.parametrize("value", [{"bytes": png(), "path": None}, png(), [{"bytes": png()}]])
def test_parquet_names_the_column(tmp_path: Path, value: Any) -> None:
    rows = [
        {"picture": value, "question": "What?", "answer": "A dog."},
        {"picture": None, "question": "What?", "answer": "A dog."},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    metrics = shard(tmp_path / "t.parquet", tmp_path / "out")
    assert metrics["samples_written"] == 1
    assert reasons(tmp_path / "out")[0].startswith("image in the field 'picture', which is not")


def test_parquet_with_sound(tmp_path: Path) -> None:
    sound = {"bytes": b"RIFF....WAVE", "path": "a.wav"}
    row = {"image": {"bytes": png()}, "audio": sound, "question": "What?", "answer": "A dog."}
    pq.write_table(pa.Table.from_pylist([row, {**row, "audio": None}]), tmp_path / "t.parquet")
    assert shard(tmp_path / "t.parquet", tmp_path / "out")["samples_written"] == 1
    assert reasons(tmp_path / "out")[0].startswith("audio is not supported: the field 'audio'")


PARTS: list[tuple[str, bytes, str]] = [
    ("PNG", png(), ""), ("Jpeg", jpeg(0), ""), ("jpe", jpeg(0), ""), ("png", jpeg(0), ""),
    ("jpg", png(), ""), ("bmp", png(), ""), ("heic", jpeg(0), ""),
    ("heic", HEIC, "unreadable image: the file is HEIC"),
    ("svg", SVG, "unreadable image: the file is SVG"),
    ("jpg", b"", "unreadable image: the file is empty"), ("png", b"<html>", "unreadable image"),
    ("img", png(), "part 'img' is not read: it is an image (PNG)"),
    ("bin", HEIC, "part 'bin' is not read: it is an image (HEIC)"),
    ("data", SVG, "part 'data' is not read: it is an image (SVG)"),
    ("mp4", MP4, "part 'mp4' is not read: it is video or sound (MP4)"),
    ("wav", b"x", "part 'wav' is not read: it is video or sound (wav)"),
    ("npy", b"\x93NUMPY", "no image is recognised: part 'npy' is not read"),
    ("cls", b"7", "no image is recognised: part 'cls' is not read"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "data", "reason"), PARTS)
def test_tars_of_others_at_sharding(tmp_path: Path, part: str, data: bytes, reason: str) -> None:
    samples = {
        "good": {"jpg": jpeg(1), "txt": b"x", "json": META},
        "odd": {part: data, "txt": b"x", "json": META},
        "text": {"txt": b"x", "json": META},
    }
    write_tar(tmp_path / "x.tar", members(samples))
    metrics = shard(tmp_path / "x.tar", tmp_path / "out")
    assert metrics["samples_written"] == (2 if reason else 3)
    if reason:
        (said,) = reasons(tmp_path / "out")
        assert said.startswith(reason)


@pytest.mark.parametrize(("part", "data", "reason"), PARTS)
def test_tars_of_others_when_prepared_and_trained_on(
    tmp_path: Path, part: str, data: bytes, reason: str
) -> None:
    """energon knows parts by their exact names: another case, or another name, is not read."""
    sample = {part: data, "txt": b"x", "json": META}
    readable = part in ("jpg", "jpeg", "png", "webp")
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars/x.tar", members({"odd": sample}))
    config = EnergonDataset(tar_dir=str(tmp_path), split=[1, 0, 0], workers=1)
    (tmp_path / "out").mkdir()
    context = fake_context(tmp_path / "out", tar_dir=tmp_path / "tars")
    if readable and not reason:
        prepare_energon.run(context, config)
        assert SampleReader(tmp_path / "out", "train")[0].images == (data,)
        return
    with pytest.raises(InputError, match=r"odd: .*(image|video|part)"):
        prepare_energon.run(context, config)
    if not readable:
        with pytest.raises(SampleError, match="is not read"):
            from_parts("odd", sample)


def test_parts_beside_an_image_are_left_out_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sample = {"jpg": jpeg(0), "txt": b"x", "json": META, "cls": b"7"}
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars/x.tar", members({"a": sample, "b": sample}))
    with caplog.at_level(logging.WARNING):
        assert shard(tmp_path / "tars/x.tar", tmp_path / "out")["samples_written"] == 2
        assert "parts left out: cls (2)" in caplog.text
        (tmp_path / "ds").mkdir()
        config = EnergonDataset(tar_dir=str(tmp_path), split=[1, 0, 0], workers=1)
        context = fake_context(tmp_path / "ds", tar_dir=tmp_path / "tars")
        assert prepare_energon.run(context, config)["parts_left_out"] == {"cls": 2}
    assert "2 parts 'cls' are in the tars" in caplog.text


@pytest.mark.parametrize("name", ["1.5b.jpg", "a.tar.jpg", "b.seg.png", "README"])
def test_members_of_no_clear_sample_are_refused_by_name(tmp_path: Path, name: str) -> None:
    sample = {"jpg": jpeg(0), "txt": b"x", "json": META}
    write_tar(tmp_path / "x.tar", [*members({"a": sample}), (name, jpeg(0))])
    with pytest.raises(InputError, match=name):
        shard(tmp_path / "x.tar", tmp_path / "out")


def test_a_field_map_that_does_not_name_our_own_parts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    talk = [{"from": "human", "value": "<image>\n?"}, TALK[1]]
    (tmp_path / "t.json").write_text(json.dumps([{"image": "a.png", "conversations": talk}]))
    shard(tmp_path / "t.json", tmp_path / "tars")
    fields = {"image": "jpg", "context": "json[question]", "answers": "txt"}
    config = EnergonDataset(tar_dir=str(tmp_path), split=[1, 0, 0], workers=1, field_map=fields)
    (tmp_path / "ds").mkdir()
    with pytest.raises(InputError, match=r"'png' is an image .*field_map\.image does not name"):
        prepare_energon.run(fake_context(tmp_path / "ds", tar_dir=tmp_path / "tars"), config)


def test_training_refuses_what_energon_prepared_with_another_field_map(tmp_path: Path) -> None:
    def parts(number: int) -> dict[str, bytes]:
        return {"png" if number else "jpg": png(), "txt": b"x", "json": META}

    reader = SampleReader(make_energon(tmp_path / "ds", 2, 2, parts), "train")
    assert decode(reader[0].images[0]).size == (9, 9)
    with pytest.raises(SampleError, match="part 'png' is not read: it is an image"):
        reader[1]
