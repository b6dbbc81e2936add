"""`shard_tars`: the tar contract, determinism, conservation, hostile input."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_steps.core.errors import InputError
from llava_steps.data.samples.decode import check_image, decode
from llava_steps.data.samples.sample import SampleError
from llava_steps.data.shards import writer
from llava_steps.data.sources import Options, content_files, open_source
from llava_steps.settings.dataset import TarShards
from llava_steps.shard_tars import run
from tests.helpers.data_fixtures import fake_context, jpeg


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def make_source(folder: Path, count: int) -> list[dict[str, Any]]:
    """`count` good records, with one image, two images or none, and their files."""
    (folder / "images").mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for number in range(count):
        names = [f"images/{number}-{i}.jpg" for i in range((1, 2, 0)[number % 3])]
        for i, name in enumerate(names):
            (folder / name).write_bytes(jpeg(100 * number + i))
        record: dict[str, Any] = {
            "id": f"s{number}", "kind": "digit", "lang": "ja",
            "conversations": [
                human("<image>\n" * len(names) + f"何番 {number}?"), gpt(f"{number} です"),
                human("And then?"), gpt("Nothing."),
            ],
        }  # fmt: skip
        if names:
            record["image"] = names[0] if len(names) == 1 else names
        records.append(record)
    return records


def write(folder: Path, records: list[Any], name: str = "train.json", ascii: bool = False) -> Path:
    path = folder / name
    path.write_text(json.dumps(records, ensure_ascii=ascii), encoding="utf-8")
    return path


def shard(source: Path, entry: Path, **options: Any) -> dict[str, Any]:
    entry.mkdir(exist_ok=True)
    config = TarShards(source=str(source), **({"samples_per_shard": 4, "workers": 1} | options))
    return dict(run(fake_context(entry, source=source), config))


def read(entry: Path) -> dict[str, dict[str, bytes]]:
    """Parts by key, by Python's tarfile."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(entry.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, part = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None and member.mtime == 0 and member.uid == member.gid == 0
                found.setdefault(key, {})[part] = file.read()
    return found


def tree(entry: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(entry.iterdir())}


def test_the_contract_holds(tmp_path: Path) -> None:
    records = make_source(tmp_path, 10)
    source = write(tmp_path, records)
    metrics = shard(source, tmp_path / "out")
    found = read(tmp_path / "out")
    assert list(found) == [f"{n:09d}" for n in range(10)]
    for number, parts in enumerate(found.values()):
        record = records[number]
        images = record.get("image", [])
        names = images if isinstance(images, list) else [images]
        expected = {("jpg" if i == 0 else f"{i}.jpg") for i in range(len(names))}
        assert set(parts) == expected | {"txt", "json"}
        for i, name in enumerate(names):
            assert parts["jpg" if i == 0 else f"{i}.jpg"] == (tmp_path / name).read_bytes()
        assert parts["txt"].decode() == f"{number} です"
        meta = json.loads(parts["json"])
        turns = record["conversations"]
        assert meta == {
            "question": f"何番 {number}?",
            "id": f"s{number}",
            "images": len(names),
            "kind": "digit",
            "lang": "ja",
            "conversations": [
                {"role": {"human": "user", "gpt": "assistant"}[t["from"]], "content": t["value"]}
                for t in turns
            ],
        }
    assert [len(names) for names in shard_members(tmp_path / "out")] == [4, 4, 2]
    assert metrics["samples_in"] == metrics["samples_written"] == 10
    assert (tmp_path / "out" / "quarantine.jsonl").read_bytes() == b""
    rows = json.loads((tmp_path / "out" / "shards.json").read_bytes())["shards"]
    for row in rows:
        data = (tmp_path / "out" / row["name"]).read_bytes()
        assert row["size"] == len(data) and row["sha256"] == hashlib.sha256(data).hexdigest()
    assert [row["samples"] for row in rows] == [4, 4, 2]


def shard_members(entry: Path) -> list[set[str]]:
    """Keys of each tar."""
    return [
        {name.partition(".")[0] for name in tarfile.open(path).getnames()}
        for path in sorted(entry.glob("*.tar"))
    ]


@pytest.mark.parametrize("bad", [(), (1, 5, 6), (0, 1, 2, 3), tuple(range(4, 12))])
def test_bytes_do_not_depend_on_workers_and_equal_a_plain_tarfile(
    tmp_path: Path, bad: tuple[int, ...]
) -> None:
    """With and without refused samples; samples with the same id are all there."""
    records = make_source(tmp_path, 14)
    for number in bad:
        records[number]["conversations"] = [gpt("wrong way round")]
    for number in (3, 12, 13):
        records[number]["id"] = records[2]["id"]
    source = write(tmp_path, records)
    one = shard(source, tmp_path / "one", quarantine_limit=1.0)
    two = shard(source, tmp_path / "two", quarantine_limit=1.0, workers=3)
    assert one == two
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    good = [n for n in range(14) if n not in bad]
    assert [sorted(int(k) for k in keys) for keys in shard_members(tmp_path / "one")] == [
        good[i : i + 4] for i in range(0, len(good), 4)
    ]
    for path in (tmp_path / "one").glob("*.tar"):
        out = io.BytesIO()
        with (
            tarfile.open(path) as tar,
            tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as again,
        ):
            for member in tar:
                plain = tarfile.TarInfo(member.name)
                plain.size, plain.mode = member.size, 0o644
                again.addfile(plain, tar.extractfile(member))
        assert out.getvalue() == path.read_bytes()
    assert one["duplicate_ids"] == 1
    assert one["samples_in"] == 14 == one["samples_written"] + one["samples_quarantined"]


def test_jsonl_gives_the_same_tars(tmp_path: Path) -> None:
    records = make_source(tmp_path, 6)
    shard(write(tmp_path, records), tmp_path / "json")
    lines = "\ufeff" + "\n\n".join(json.dumps(record) for record in records)
    (tmp_path / "train.jsonl").write_text(lines, encoding="utf-8")
    shard(tmp_path / "train.jsonl", tmp_path / "jsonl")
    assert tree(tmp_path / "json") == tree(tmp_path / "jsonl")


def png(**options: Any) -> bytes:
    out = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    form = options.pop("form", "PNG")
    frames[0].save(out, form, **({"append_images": frames[1:]} if options else {}), **options)
    return out.getvalue()


ONE = [human("<image> a?"), gpt("b")]
BAD: list[tuple[Any, str]] = [
    ({"conversations": []}, "no conversation"),
    ({"conversations": "text"}, "no conversation"),
    ({"conversations": [human("a"), {"from": "system", "value": "b"}]}, "wrong role"),
    ({"conversations": [gpt("a"), human("b")]}, "wrong role"),
    ({"conversations": [human("a"), human("b")]}, "wrong role"),
    ({"conversations": [human("a"), gpt("b"), human("c")]}, "no last answer"),
    ({"conversations": [human("a"), gpt(" \n")]}, "empty answer"),
    ({"conversations": [human(" "), gpt("b")]}, "empty question"),
    ({"conversations": [human("a"), {"from": "gpt", "value": 3}]}, "not a text"),
    ({"conversations": [human("<image>"), gpt("b")]}, "wrong number of image placeholders"),
    ({"conversations": ONE, "image": ["a.jpg", "a.jpg"]}, "wrong number of image placeholders"),
    ({"conversations": [human("a"), gpt("<image>")], "image": "a.jpg"}, "image placeholder in an"),
    ({"conversations": [human("a"), gpt("\ud800")]}, "lone surrogate"),
    ({"conversations": [human("a"), gpt("b")], "note": "\udfff"}, "lone surrogate"),
    ({"conversations": [human("a"), gpt("b")], "note": float("nan")}, "not JSON"),
    ({"conversations": [human("a"), gpt("b")], "question": "x"}, "reserved field"),
    ({"conversations": [human("a"), gpt("b")], "id": True}, "unusable id"),
    ({"conversations": ONE, "image": "../secret.jpg"}, "image path outside the data"),
    ({"conversations": ONE, "image": "images/../../secret.jpg"}, "image path outside the data"),
    ({"conversations": ONE, "image": "/etc/passwd"}, "image path outside the data"),
    ({"conversations": ONE, "image": "a\0.jpg"}, "unusable image path"),
    ({"conversations": ONE, "image": 7}, "unusable image path"),
    ({"conversations": ONE, "image": "\udc80.jpg"}, "lone surrogate"),
    ({"conversations": ONE, "image": "nowhere.jpg"}, "unreadable file"),
    ({"conversations": ONE, "image": "images"}, "not a plain file"),
    ({"conversations": ONE, "image": "pipe"}, "not a plain file"),
    ({"conversations": ONE, "image": "empty.jpg"}, "unreadable image"),
    ({"conversations": ONE, "image": "text.jpg"}, "unreadable image"),
    ({"conversations": ONE, "image": "cut.jpg"}, "unreadable image"),
    ({"conversations": ONE, "image": "big.jpg"}, "too many pixels"),
    ({"conversations": ONE, "image": "heavy.jpg"}, "image file too large"),
    ({"conversations": ONE, "image": "bmp.jpg"}, "not a JPEG, PNG or WebP"),
    ({"conversations": ONE, "image": "moving.gif"}, "animated image"),
    (["a list"], "not an object"),
    (None, "not an object"),
]


@pytest.mark.parametrize("workers", [1, 2])
def test_whatever_is_wrong_is_quarantined_with_its_reason(tmp_path: Path, workers: int) -> None:
    records: list[Any] = make_source(tmp_path, 6)
    (tmp_path.parent / "secret.jpg").write_bytes(jpeg(0))
    os.mkfifo(tmp_path / "pipe")
    for name, data in {
        "a.jpg": jpeg(1),
        "empty.jpg": b"",
        "text.jpg": b"no picture",
        "cut.jpg": jpeg(1)[:400],
        "big.jpg": jpeg(1, (400, 300)),
        "heavy.jpg": jpeg(1) + bytes(4 * 10_001),
        "bmp.jpg": png(form="BMP"),
        "moving.gif": png(form="GIF", save_all=True),
    }.items():
        (tmp_path / name).write_bytes(data)
    for number, (record, _) in enumerate(BAD):
        if isinstance(record, dict):
            record = {"id": f"bad{number}", **record}
        records.append(record)
    # Surrogates and NaN survive json.dumps only as escapes.
    source = tmp_path / "train.json"
    source.write_text(json.dumps(records))
    metrics = shard(
        source, tmp_path / "out", quarantine_limit=0.9, max_pixels=10_000, workers=workers
    )
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["index"] for row in rows] == list(range(6, 6 + len(BAD)))
    for row, (_, reason) in zip(rows, BAD, strict=True):
        assert row["reason"].startswith(reason), (row, reason)
        assert row["file"] == "train.json"
    assert list(read(tmp_path / "out")) == [f"{n:09d}" for n in range(6)]
    assert metrics["samples_in"] == 6 + len(BAD)
    assert metrics["samples_quarantined"] == len(BAD) == sum(metrics["quarantine_reasons"].values())


def test_samples_that_share_an_id_are_kept_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in the published LLaVA mixes; even records that are equal in every byte."""
    records = make_source(tmp_path, 9)
    for number, other in ((3, 0), (6, 0), (7, 1)):
        records[number]["id"] = records[other]["id"]
    records.append(records[8])
    metrics = shard(write(tmp_path, records), tmp_path / "out")
    assert metrics["duplicate_ids"] == 3 and metrics["samples_quarantined"] == 0
    found = read(tmp_path / "out")
    assert [json.loads(parts["json"])["id"] for parts in found.values()] == [
        record["id"] for record in records
    ]
    assert list(found) == [f"{n:09d}" for n in range(10)]
    assert "3 ids occur more than once" in caplog.text


def test_broken_lines_of_jsonl_are_quarantined(tmp_path: Path) -> None:
    good = json.dumps({"id": "a", "conversations": [human("x"), gpt("y")]}).encode()
    deep = b"[" * 100_000
    lines = [good, b"{", b"\xff\xfe", b"12", deep, good.replace(b'"a"', b'"b"')]
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
    metrics = shard(tmp_path / "t.jsonl", tmp_path / "out", quarantine_limit=0.9)
    assert metrics["samples_written"] == 2
    assert metrics["quarantine_reasons"] == {"not JSON": 2, "not UTF-8": 1, "not an object": 1}


def test_too_many_refused_samples_fail_the_step_and_say_why(tmp_path: Path) -> None:
    records = make_source(tmp_path, 10)
    records[3]["conversations"] = []
    source = write(tmp_path, records)
    with pytest.raises(InputError, match=r"1 of 10 .*10\.00%.*1 x no conversation.*quarantine"):
        shard(source, tmp_path / "out")
    assert len((tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "out" / "shards.json").exists()
    assert shard(source, tmp_path / "out", quarantine_limit=0.1)["samples_written"] == 9


def test_the_ten_commonest_reasons_are_told(tmp_path: Path) -> None:
    kinds: list[Any] = [
        None, {}, {"id": ""}, {"conversations": [gpt("a")]}, {"conversations": [human("a")]},
        {"conversations": [human("a"), gpt("")]}, {"conversations": [human(""), gpt("b")]},
        {"conversations": [human("a"), gpt("\ud800")]}, {"conversations": ONE},
        {"conversations": ONE, "image": "/x"}, {"conversations": ONE, "image": "x"},
        {"conversations": [human("a"), gpt("<image>")], "image": "x"},
    ]  # fmt: skip
    records = [kind for number, kind in enumerate(kinds, 1) for _ in range(number)]
    with pytest.raises(InputError) as caught:
        shard(write(tmp_path, records[:-1], ascii=True), tmp_path / "out")
    told = str(caught.value).partition("): ")[2].partition(". Each")[0].split("; ")
    counts = [int(reason.partition(" x ")[0]) for reason in told]
    assert counts == [11, 11, *range(10, 2, -1)] and len(told) == 10


def test_bytes_do_not_depend_on_time_zone_hash_seed_or_umask(tmp_path: Path) -> None:
    source = write(tmp_path, make_source(tmp_path, 5))
    script = (
        "import os, sys; from pathlib import Path; os.umask(int(sys.argv[3], 8));"
        "from llava_steps.data import sources; from llava_steps.data.shards import writer;"
        "source = sources.open_source(Path(sys.argv[1]));"
        "writer.write_shards(writer.Settings(source, Path(sys.argv[2]), 2), 1, 0.0)"
    )
    for name, zone, umask in (("1", "Asia/Tokyo", "077"), ("2", "America/New_York", "000")):
        out = tmp_path / name
        out.mkdir()
        environment = {**os.environ, "TZ": zone, "PYTHONHASHSEED": name}
        command = [sys.executable, "-c", script, str(source), str(out), umask]
        subprocess.run(command, check=True, env=environment)
    assert tree(tmp_path / "1") == tree(tmp_path / "2")


@pytest.mark.parametrize("text", ["", "{}", "[", "[]", '{"id": 1}', "\xff"])
def test_unusable_files_are_input_errors(tmp_path: Path, text: str) -> None:
    source = tmp_path / "train.json"
    source.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"train\.json"):
        shard(source, tmp_path / "out")
    (tmp_path / "train.txt").write_text("[]")
    with pytest.raises(InputError, match="known kind"):
        shard(tmp_path / "train.txt", tmp_path / "out")


def test_leftovers_of_a_killed_attempt_do_no_harm(tmp_path: Path) -> None:
    source = write(tmp_path, make_source(tmp_path, 5))
    shard(source, tmp_path / "clean")
    out = tmp_path / "out"
    out.mkdir()
    for name in (
        "000000.tar",
        "000007.tar",
        ".tmp-part-000000000",
        ".tmp-000000.tar",
        "shards.json",
    ):
        (out / name).write_bytes(b"old")
    (out / ".work").mkdir()
    shard(source, out)
    (out / ".work").rmdir()
    assert tree(out) == tree(tmp_path / "clean")


def test_a_killed_worker_is_an_error_and_not_a_hang(tmp_path: Path) -> None:
    from llava_steps.core.errors import StepError
    from llava_steps.data import pool

    with pytest.raises(StepError, match="worker process was killed"):
        list(pool.ordered(os._exit, [0, 1, 2], 2))


@pytest.mark.parametrize("progressive", [False, True])
def test_the_quick_check_agrees_with_decoding(progressive: bool) -> None:
    """Cut at every 32nd of the file: what is accepted can be decoded, what is refused cannot."""
    data = jpeg(5, (320, 240), progressive=progressive)
    for part in range(33):
        cut = data[: len(data) * part // 32]
        verdicts = []
        for test in (lambda d: check_image(d, 10**9), decode):
            try:
                test(cut)
                verdicts.append(True)
            except SampleError:
                verdicts.append(False)
        assert verdicts[0] == verdicts[1] == (part == 32), part


def test_a_huge_png_is_refused_by_its_header(tmp_path: Path) -> None:
    out = io.BytesIO()
    Image.new("1", (13_400, 13_400)).save(out, "PNG")
    with pytest.raises(SampleError):
        check_image(out.getvalue(), 25_000_000)


def test_the_files_of_a_source_are_its_content(tmp_path: Path) -> None:
    records = make_source(tmp_path, 4)
    records.append({"id": "x", "image": "../secret.jpg"})
    source = write(tmp_path, records)
    root, files = content_files(source, "auto", Options())
    names = {path.relative_to(root).as_posix() for path in files}
    expected = {f"images/{p.name}" for p in (tmp_path / "images").iterdir()}
    assert names == expected | {"train.json"}


def test_memory_holds_one_sample_a_worker(tmp_path: Path) -> None:
    """A part is written sample by sample: reading ahead would show in the size of the task."""
    source = write(tmp_path, make_source(tmp_path, 3))
    settings = writer.Settings(open_source(source), tmp_path, 4)
    chunk = next(settings.source.chunks(4))
    part = writer.make_part(settings, chunk)
    assert [s.index for s in part.samples] == [0, 1, 2]
    assert part.path.stat().st_size % 10240 == 0
