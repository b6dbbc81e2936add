"""Every kind of source gives the tars that the same data gives as LLaVA JSON."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llava_steps.core.errors import ConfigError, InputError
from llava_steps.data.samples.decode import decode
from llava_steps.data.sources import detect
from llava_steps.settings.dataset import TarShards
from llava_steps.shard_tars import run
from tests.helpers.data_fixtures import fake_context, jpeg, members, write_tar

TALKS = [(f"s{n}", f"What is {n}?", f"It is, 「{n}」.") for n in range(7)]


def shard(source: Path, entry: Path, **options: Any) -> dict[str, Any]:
    entry.mkdir()
    config = TarShards(source=str(source), **({"samples_per_shard": 3, "workers": 1} | options))
    return dict(run(fake_context(entry, source=source), config))


def tars(entry: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(entry.glob("*.tar"))}


def quarantine(entry: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (entry / "quarantine.jsonl").read_text().splitlines()]


def dialogue(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images 0.jpg ... and train.json: what the other kinds are compared with."""
    data = tmp_path / "data"
    data.mkdir()
    records = []
    for number, (name, question, answer) in enumerate(TALKS):
        (data / f"{number}.jpg").write_bytes(jpeg(number))
        records.append(
            {
                "id": name, "image": f"{number}.jpg", "kind": "digit",
                "conversations": dialogue(f"<image>\n{question}", answer),
            }
        )  # fmt: skip
    (data / "train.json").write_text(json.dumps(records), encoding="utf-8")
    shard(data / "train.json", tmp_path / "llava")
    return data


def write_table(folder: Path, kind: str) -> Path:
    (folder / "train.json").unlink()
    path = folder / f"texts.{kind}"
    rows = [
        {"id": name, "file_name": f"{n}.jpg", "question": question, "text": answer, "kind": "digit"}
        for n, (name, question, answer) in enumerate(TALKS)
    ]
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        return path
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == "tsv" else {}
        writer = csv.DictWriter(file, list(rows[0]), **form)
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("named", ["file", "folder"])
def test_a_folder_of_images_with_a_table(
    folder: Path, tmp_path: Path, kind: str, named: str
) -> None:
    path = write_table(folder, kind)
    assert detect(path) == "table"
    shard(path if named == "file" else folder, tmp_path / "out", workers=2)
    assert tars(tmp_path / "out") == tars(tmp_path / "llava")


def write_parquet(path: Path, start: int, stop: int, form: str = "conversations") -> None:
    rows: list[dict[str, Any]] = []
    for number in range(start, stop):
        name, question, answer = TALKS[number]
        row: dict[str, Any] = {
            "id": name, "image": {"bytes": jpeg(number), "path": None}, "kind": "digit",
        }  # fmt: skip
        if form == "conversations":
            row["conversations"] = dialogue(f"<image>\n{question}", answer)
        else:
            row |= {"q": question, "a": answer}
        if form == "several":
            row["image"] = [row["image"]]
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


@pytest.mark.parametrize("form", ["conversations", "single", "several"])
def test_parquet_with_embedded_images(folder: Path, tmp_path: Path, form: str) -> None:
    """Two files whose borders are not those of the shards, nor their row groups."""
    out = tmp_path / "parquet"
    out.mkdir()
    write_parquet(out / "train-00001.parquet", 5, 7, form)
    write_parquet(out / "train-00000.parquet", 0, 5, form)
    columns = {} if form == "conversations" else {"question": "q", "answer": "a"}
    for workers in (1, 2):
        shard(out, tmp_path / f"out{workers}", columns=columns, workers=workers)
        assert tars(tmp_path / f"out{workers}") == tars(tmp_path / "llava")


def test_the_order_in_which_files_are_listed_leaves_no_trace(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p").mkdir()
    for number in range(7):
        write_parquet(tmp_path / f"p/{number}.parquet", number, number + 1)
    found = {kind: getattr(Path, kind) for kind in ("rglob", "iterdir")}
    for order in (1, -1):
        for kind, real in found.items():
            monkeypatch.setattr(
                Path, kind, lambda *a, real=real, order=order: iter(sorted(real(*a))[::order])
            )
        shard(tmp_path / "p", tmp_path / f"out{order}")
        assert tars(tmp_path / f"out{order}") == tars(tmp_path / "llava")


def test_refused_rows_of_parquet_are_found_again(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": jpeg(n), "path": "x"}, "text": f"a {n}", "when": n} for n in range(6)
    ]
    rows[4]["image"] = {"bytes": None, "path": "x.jpg"}
    (tmp_path / "p").mkdir()
    table = pa.Table.from_pylist(rows)
    table = table.append_column("day", pa.array([0] * 6, pa.date32()))
    pq.write_table(table.slice(0, 3), tmp_path / "p/a.parquet")
    pq.write_table(table.slice(3, 3), tmp_path / "p/b.parquet")
    with pytest.raises(InputError, match=r"tar_shards\.question"):
        shard(tmp_path / "p", tmp_path / "no")
    metrics = shard(tmp_path / "p", tmp_path / "out", question="Describe.", quarantine_limit=0.5)
    assert metrics["samples_in"] == 6 and metrics["samples_written"] == 5
    (row,) = quarantine(tmp_path / "out")
    assert (row["file"], row["place"], row["index"]) == ("b.parquet", 1, 4)
    assert row["reason"].startswith("no embedded image")


def test_webdataset_tars_of_others(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "tars"
    out.mkdir()
    samples = {
        f"key{n}": {
            "jpeg": jpeg(n),
            "json": json.dumps({"question": question, "id": name, "kind": "digit"}).encode(),
            "txt": answer.encode(),
            "cls": b"7",
        }
        for n, (name, question, answer) in enumerate(TALKS)
    }
    keys = list(samples)
    write_tar(out / "b.tar", members({k: samples[k] for k in keys[5:]}))
    write_tar(out / "a.tar", members({k: samples[k] for k in keys[:5]}))
    shard(out, tmp_path / "out", workers=2)
    assert tars(tmp_path / "out") == tars(tmp_path / "llava")


def test_our_own_tars_come_out_as_they_went_in(folder: Path, tmp_path: Path) -> None:
    shard(tmp_path / "llava", tmp_path / "out", source_format="webdataset")
    assert tars(tmp_path / "out") == tars(tmp_path / "llava")


def test_captions_are_asked_for_with_one_question(tmp_path: Path) -> None:
    """Tars of images and texts alone; one text is missing."""
    samples = {f"{n}": {"jpg": jpeg(n), "txt": f"a {n}".encode()} for n in range(4)}
    del samples["2"]["txt"]
    write_tar(tmp_path / "x.tar", members(samples))
    metrics = shard(
        tmp_path / "x.tar", tmp_path / "out", question="Describe.", quarantine_limit=0.5
    )
    assert metrics["quarantine_reasons"] == {"missing answer": 1}
    with tarfile.open(tmp_path / "out/000000.tar") as tar:
        file = tar.extractfile("000000000.json")
        assert file is not None
        assert json.load(file)["conversations"][0]["content"] == "<image>\nDescribe."


@pytest.mark.parametrize("damage", ["cut", "twice", "apart", "dotted", "garbage"])
def test_a_damaged_tar_is_refused_as_a_whole(tmp_path: Path, damage: str) -> None:
    parts = members({f"{n}": {"jpg": jpeg(n), "txt": b"x", "json": b"{}"} for n in range(3)})
    if damage == "twice":
        parts[1:1] = parts[:1]
    if damage == "apart":
        parts.append(parts.pop(0))
    if damage == "dotted":
        parts.append(("v1.5.jpg.bak", b""))
    path = write_tar(tmp_path / "x.tar", parts)
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:2000])
    if damage == "garbage":
        path.write_bytes(data[:1024] + b"\7" * 512 + data[1536:])
    with pytest.raises(InputError, match=r"x\.tar"):
        shard(path, tmp_path / "out", question="?")


def test_what_is_wrong_with_a_row_of_a_table_is_told(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    lines = [
        b"image,question,answer", b"0.jpg,a?,b", b"0.jpg,a?", b"0.jpg,a?,b\xff", b"0.jpg,a?,",
        b'0.jpg,"a, ""b""\n?",c', b"../0.jpg,a?,b", b",no image?,b", b"1.jpg,a?,b",
    ]  # fmt: skip
    (tmp_path / "t.csv").write_bytes(b"\r\n".join(lines))
    metrics = shard(tmp_path / "t.csv", tmp_path / "out", quarantine_limit=0.9)
    assert metrics["samples_in"] == 8 and metrics["samples_written"] == 3
    assert [(r["index"], r["reason"].partition(":")[0]) for r in quarantine(tmp_path / "out")] == [
        (1, "wrong number of columns"), (2, "not UTF-8"), (3, "empty answer"),
        (5, "image path outside the data"), (7, "unreadable file"),
    ]  # fmt: skip


def picture(form: str, mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    frames = [Image.new("RGB", (40, 30), color).convert(mode) for color in ("red", "blue")]
    if options.get("save_all"):
        options["append_images"] = frames[1:]
    frames[0].save(out, form, **options)
    return out.getvalue()


def deep(form: str = "PNG", mode: str = "I;16") -> bytes:
    """Values up to 3,000, which 8 bits cannot hold."""
    out = io.BytesIO()
    Image.linear_gradient("L").convert("I").point(lambda v: v * 12).convert(mode).save(out, form)
    return out.getvalue()


def test_other_images_become_jpeg_if_asked_for_and_ordinary_ones_stay(tmp_path: Path) -> None:
    see_through = Image.new("RGBA", (40, 30), (255, 0, 0, 128))
    out = io.BytesIO()
    see_through.save(out, "TIFF")
    images = [
        jpeg(0), picture("PNG", "RGBA"), picture("WEBP"), picture("PNG", "P"), picture("BMP"),
        picture("GIF", save_all=True), picture("PNG")[:60], picture("PNG", "I;16"), deep(),
        deep("TIFF", "F"), picture("WEBP", save_all=True), picture("PNG", save_all=True),
        out.getvalue(),
    ]  # fmt: skip
    lines = ["image\tquestion\tanswer"]
    for number, data in enumerate(images):
        (tmp_path / f"{number}.any").write_bytes(data)
        lines.append(f"{number}.any\t?\tred")
    (tmp_path / "t.tsv").write_text("\n".join(lines))
    metrics = shard(tmp_path / "t.tsv", tmp_path / "no", quarantine_limit=0.9)
    assert metrics["quarantine_reasons"] == {
        "animated image": 3, "more than 8 bits": 2, "not a JPEG, PNG or WebP": 2,
        "unreadable image": 1,
    }  # fmt: skip
    assert "other_images to jpeg" in quarantine(tmp_path / "no")[0]["reason"]
    metrics = shard(
        tmp_path / "t.tsv", tmp_path / "yes", quarantine_limit=0.9, other_images="jpeg",
        samples_per_shard=13,
    )  # fmt: skip
    assert metrics["quarantine_reasons"] == {
        "animated image": 3, "more than 8 bits": 2, "unreadable image": 1
    }  # fmt: skip
    with tarfile.open(tmp_path / "yes/000000.tar") as tar:
        found = {m.name: tar.extractfile(m) for m in tar if not m.name.endswith(("txt", "json"))}
        parts = {name: file.read() for name, file in found.items() if file is not None}
    for number, kind in ((0, "jpg"), (1, "png"), (2, "webp"), (3, "png"), (7, "png")):
        assert parts[f"{number:09d}.{kind}"] == images[number]
    with Image.open(io.BytesIO(parts["000000004.jpg"])) as image:
        red, green, blue = image.getpixel((20, 15))  # type: ignore[misc]
        assert image.format == "JPEG" and red > 245 and green < 10 and blue < 10
    with Image.open(io.BytesIO(parts["000000012.png"])) as image:
        assert image.getpixel((20, 15)) == (255, 0, 0, 128)
    assert decode(parts["000000012.png"]).getpixel((20, 15)) == (255, 127, 127)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"a.csv": "x,y\n1,2\n"}, "no column of conversations"),
        ({"a.csv": "text,text\n1,2\n"}, "name the columns"),
        ({"a.csv": 'image,question,answer\na.jpg,"b" c,d\n'}, "line 2"),
        ({"a.csv": 'image,question,answer\na.jpg,"b\n' + "c,d\n" * 9}, "CSV at line 11"),
        ({"a.csv": "", "b.csv": ""}, "2 tables"),
        ({"a.csv": "text\n", "x.tar": ""}, "several kinds"),
        ({"a.bin": ""}, "no data of a known kind"),
        ({"a.parquet": "PAR1"}, "not a whole parquet"),
        ({"a.tar": ""}, "empty"),
    ],
)
def test_what_is_no_source_is_an_input_error(
    tmp_path: Path, files: dict[str, str], reason: str
) -> None:
    (tmp_path / "in").mkdir()
    for name, text in files.items():
        (tmp_path / "in" / name).write_text(text)
    with pytest.raises(InputError, match=reason):
        shard(tmp_path / "in", tmp_path / "out")


def test_wrong_columns_are_told(folder: Path, tmp_path: Path) -> None:
    path = write_table(folder, "csv")
    with pytest.raises(InputError, match=r"no column \['q'\]; there are .*question"):
        shard(path, tmp_path / "a", columns={"question": "q"})
    with pytest.raises(ConfigError, match="not fields"):
        shard(path, tmp_path / "b", columns={"picture": "file_name"})
