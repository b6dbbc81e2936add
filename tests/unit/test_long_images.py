"""Images that a resize would make huge are found in all samples before a training (B8)."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_steps import audit, prepare_energon, shard_tars
from llava_steps.core.errors import InputError
from llava_steps.data.energon.reader import SampleReader
from llava_steps.settings.dataset import Audit, EnergonDataset, TarShards
from tests.helpers.data_fixtures import fake_context, jpeg, make_hf_dir, write_tar

COUNT = 60
LONG = {11: (9000, 1, "PNG"), 37: (1, 9000, "JPEG"), 52: (9000, 1, "WEBP")}
WIDE = {5: (900, 30)}
"""Long, but used."""


def make(root: Path, numbers: range = range(COUNT)) -> Path:
    """A dataset with some long images, tars of 20 samples."""
    rows: list[dict[str, Any]] = []
    for number in numbers:
        data = jpeg(number, WIDE.get(number, (40, 36)))
        if number in LONG:
            width, height, form = LONG[number]
            out = io.BytesIO()
            Image.new("RGB", (width, height), "red").save(out, form)
            data = out.getvalue()
        (root / f"{number}.x").write_bytes(data)
        talk = [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "x"}]
        rows.append({"id": number, "image": f"{number}.x", "conversations": talk})
    (root / "t.json").write_text(json.dumps(rows))
    tars, out_dir = root / "tars", root / "dataset"
    tars.mkdir()
    out_dir.mkdir()
    sharded = TarShards(source=str(root / "t.json"), samples_per_shard=20, workers=1)
    shard_tars.run(fake_context(tars, source=root / "t.json"), sharded)
    config = EnergonDataset(tar_dir=str(tars), split=[2, 1, 0], workers=1)
    prepare_energon.run(fake_context(out_dir, tar_dir=tars), config)
    return out_dir


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_hf_dir(tmp_path_factory.mktemp("hf"), size=96)
    (path / "config.json").write_text("{}")
    return path


def check(dataset: Path, hf_dir: Path, out: Path, **settings: Any) -> dict[str, Any]:
    out.mkdir()
    context = fake_context(out, tokenizer_load_dir=hf_dir, data_path=dataset)
    config = Audit(**{"seq_length": 512, "samples": 1, "thumbnails": 0, **settings})
    return dict(audit.run(context, config))


@pytest.mark.parametrize("samples", [1, 0])
def test_every_long_image_is_named_however_few_samples_are_checked(
    tmp_path: Path, hf_dir: Path, samples: int
) -> None:
    dataset = make(tmp_path)
    listed = json.loads((dataset / "long_images.json").read_text())
    assert [(row["width"], row["height"]) for row in listed] == [
        (9000, 1), (900, 30), (1, 9000), (9000, 1)
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"part png: too many pixels after the resize"):
        check(dataset, hf_dir, tmp_path / "out", samples=samples)
    report = json.loads((tmp_path / "out/report.json").read_text())
    named = [row["sample"].rpartition("/")[2] for row in report["refused_samples"]]
    assert sorted(map(int, named)) == [11, 37]
    with pytest.raises(InputError, match=r"000002\.tar/000000052: part webp: too many pixels"):
        check(dataset, hf_dir, tmp_path / "val", split="val")


def test_ordinary_datasets_have_no_list(tmp_path: Path, hf_dir: Path) -> None:
    dataset = make(tmp_path, range(12, 35))
    assert not (dataset / "long_images.json").exists()
    assert SampleReader(dataset, "train").long_images() == []
    assert check(dataset, hf_dir, tmp_path / "out")["refused"] == 0


def test_a_header_behind_much_metadata_is_found(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x9286] = b"x" * 60_000
    out = io.BytesIO()
    Image.new("RGB", (900, 2)).save(out, "JPEG", exif=exif, icc_profile=bytes(120_000))
    parts = [("k.jpg", out.getvalue()), ("k.txt", b"x"), ("k.json", b'{"question": "?"}')]
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars/x.tar", parts)
    (tmp_path / "ds").mkdir()
    config = EnergonDataset(tar_dir=str(tmp_path), split=[1, 0, 0], workers=1)
    prepare_energon.run(fake_context(tmp_path / "ds", tar_dir=tmp_path / "tars"), config)
    (image,) = SampleReader(tmp_path / "ds", "train").long_images()
    assert (image.key, image.width, image.height) == ("k", 900, 2)


def test_a_damaged_list_is_an_input_error(tmp_path: Path) -> None:
    dataset = make(tmp_path, range(10, 14))
    (dataset / "long_images.json").write_text('[{"tar": 1}]')
    with pytest.raises(InputError, match=r"long_images\.json cannot be read"):
        SampleReader(dataset, "train").long_images()
