"""Datasets with JPEG, PNG and WebP parts, read by energon itself and by training."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from llava_steps import prepare_energon, shard_tars
from llava_steps.data.energon.reader import SampleReader
from llava_steps.settings.dataset import EnergonDataset, TarShards
from tests.helpers.data_fixtures import fake_context, make_hf_dir, train_loader

FORMS = ("JPEG", "PNG", "WEBP", "PNG")


def picture(number: int) -> bytes:
    out = io.BytesIO()
    Image.radial_gradient("L").rotate(40 * number).convert("RGB").save(out, FORMS[number])
    return out.getvalue()


def make(tmp_path: Path, numbers: list[int]) -> Path:
    """A dataset of one sample for each number, the last with the first image as its second."""
    for number in numbers:
        (tmp_path / f"{number}.x").write_bytes(picture(number))
    records: list[dict[str, Any]] = [
        {"id": n, "image": [f"{n}.x"], "conversations": [
            {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"It is {n}."},
        ]}
        for n in numbers
    ]  # fmt: skip
    records[-1]["image"].append(f"{numbers[0]}.x")
    records[-1]["conversations"][0]["value"] = "<image><image>What?"
    source = tmp_path / "t.json"
    source.write_text(json.dumps(records))
    tars, out = tmp_path / "tars", tmp_path / "dataset"
    tars.mkdir()
    out.mkdir()
    shard_tars.run(fake_context(tars, source=source), TarShards(source=str(source), workers=1))
    config = EnergonDataset(tar_dir=str(tars), split=[1, 0, 0], workers=1)
    prepare_energon.run(fake_context(out, tar_dir=tars), config)
    return out


@pytest.mark.parametrize(
    ("numbers", "image"), [([0], "jpg"), ([1, 3], "png"), ([0, 1, 2, 3], "jpg,png,webp")]
)
def test_energon_reads_the_parts_that_occur(tmp_path: Path, numbers: list[int], image: str) -> None:
    from megatron.energon import WorkerConfig, get_loader, get_train_dataset

    root = make(tmp_path, numbers)
    metadata = yaml.safe_load((root / ".nv-meta/dataset.yaml").read_text())
    assert metadata["field_map"]["image"] == image
    loader = get_loader(
        get_train_dataset(
            root,
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
            batch_size=None,
            shuffle_buffer_size=None,
            max_samples_per_sequence=None,
            repeat=False,
        )
    )
    read = {sample.answers: sample for sample in loader}
    assert set(read) == {f"It is {n}." for n in numbers}
    for number in numbers:
        with Image.open(io.BytesIO(picture(number))) as loaded:
            expected = np.asarray(loaded.convert("RGB"))
        pixels = read[f"It is {number}."].image.numpy()
        assert np.abs(255 * pixels.transpose(1, 2, 0) - expected).max() < 0.01


def test_training_reads_all_images_of_such_a_sample(tmp_path: Path) -> None:
    root = make(tmp_path, [0, 1, 2, 3])
    samples = [SampleReader(root, "train")[n] for n in range(4)]
    assert [s.images for s in samples[:3]] == [(picture(n),) for n in range(3)]
    assert samples[3].images == (picture(3), picture(0))
    hf_dir = make_hf_dir(tmp_path / "hf")
    (step,) = [next(iter(train_loader(root, hf_dir, global_batch_size=4)))]
    assert sorted(row.num_images for row in step) == [1, 1, 1, 2]
